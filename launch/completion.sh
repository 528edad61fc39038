# shellcheck shell=bash disable=SC2034
# Completion of the command line `sdxl-trainer` in bash, and in zsh by its bashcompinit. `sdxl-trainer completion` prints
# this file, and behind it the words of each command.
if [ -n "${ZSH_VERSION:-}" ]; then autoload -U +X compinit bashcompinit && compinit -u && bashcompinit; fi
declare -A SDXL_TRAINER_WORDS

_sdxl_trainer() {
    local word="${COMP_WORDS[COMP_CWORD]}" command=commands
    if [ "$COMP_CWORD" -gt 1 ]; then command="${COMP_WORDS[1]}"; fi
    # shellcheck disable=SC2207
    COMPREPLY=($(compgen -W "${SDXL_TRAINER_WORDS[$command]:-}" -- "$word" || true))
    # The value of a setting follows its name without a space.
    case "${COMPREPLY[*]}" in *=) compopt -o nospace 2>/dev/null || true ;; esac
}
complete -o default -F _sdxl_trainer sdxl-trainer
