# shellcheck shell=bash
# Sourced by child.sh and environment.sh: prints a text in the user's language, chosen as in configs/language/translate.py.

say() {  # the text in English, the text in Chinese
    local language="${LANGUAGE:-${LC_ALL:-${LC_MESSAGES:-${LANG:-}}}}" text="$1"
    case "${language,,}" in zh*) text="${2:-$1}" ;; esac
    # Users of the command line `sdxl-trainer` read its commands (configs/language/commands.py).
    if [ -n "${SDXL_TRAINER_COMMAND:-}" ]; then text="$(sed -E 's,bash launch/(\w+)\.sh,sdxl-trainer \1,g' <<< "$text")"; fi
    echo "$text"
}
