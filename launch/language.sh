# shellcheck shell=bash
# Sourced by child.sh and environment.sh: prints a text in the user's language, chosen as in configs/language/translate.py.

say() {  # the text in English, the text in Chinese
    local language="${LANGUAGE:-${LC_ALL:-${LC_MESSAGES:-${LANG:-}}}}"
    case "${language,,}" in zh*) echo "${2:-$1}" ;; *) echo "$1" ;; esac
}
