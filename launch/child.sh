# shellcheck shell=bash
# Sourced by the launch scripts: starts a launcher, passes signals on, and answers with the program's own exit status.
# The working directory is left alone, because the user's paths are relative to it.
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
if [ -z "${VIRTUAL_ENV:-}" ] && [ -f "$ROOT/.venv/bin/activate" ]; then
    source "$ROOT/.venv/bin/activate"
fi
# One thread per CPU rank and library keeps ranks from fighting for cores; an explicit setting wins.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

fail() {  # reason
    echo "$*" >&2
    exit 2
}

run_child() {  # command and its arguments
    command -v "$1" >/dev/null || fail "$1 is not installed here: activate the environment, or run bash launch/quickstart.sh"
    SDXL_TRAINER_STATUS_FILE="$(mktemp)"
    export SDXL_TRAINER_STATUS_FILE
    echo "+ $*" >&2
    # In the background, because bash would not pass a signal on to a foreground child.
    python -m sdxl_trainer.launch.launcher "$@" &
    local child=$! status=0 signal=0
    trap 'signal=15; pass_on TERM "$child"' TERM
    trap 'signal=2; pass_on INT "$child"' INT
    trap 'signal=1; pass_on HUP "$child"' HUP  # does nothing under nohup
    wait "$child" || status=$?
    while kill -0 "$child" 2>/dev/null; do  # a signal ends `wait`, not the child
        status=0; wait "$child" || status=$?
    done
    # Launchers answer 1 whatever happened; the first rank of this node wrote down what did, unless it was stopped
    # before it began.
    local recorded; recorded="$(cat "$SDXL_TRAINER_STATUS_FILE")"; rm -f "$SDXL_TRAINER_STATUS_FILE"
    # Which of two signals a rank heard first, the terminal's or its launcher's, is chance.
    if [ "$signal" -ne 0 ] && { [ -z "$recorded" ] || [ "$recorded" -gt 128 ]; }; then recorded=$((128 + signal)); fi
    if [ "$status" -ne 0 ] && [ -n "$recorded" ] && [ "$recorded" -ne 0 ]; then status="$recorded"; fi
    return "$status"
}

pass_on() {  # signal, process
    kill "-$1" "$2" 2>/dev/null || true
}

count_gpus() {
    local gpus=0
    if command -v nvidia-smi >/dev/null 2>&1; then gpus="$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)"; fi
    echo "$(( gpus > 0 ? gpus : 1 ))"
}
