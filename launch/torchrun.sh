# Sourced by train.sh and cache.sh: starts the ranks with torchrun and passes the program's own exit status on.
# The working directory is left alone, because the user's paths are relative to it.
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

run_ranks() {  # program and its arguments
    if [ -z "${VIRTUAL_ENV:-}" ] && [ -f "$ROOT/.venv/bin/activate" ]; then
        source "$ROOT/.venv/bin/activate"
    fi
    local ranks="${NPROC:-$(count_gpus)}"
    # One thread per CPU rank and library keeps ranks from fighting for cores; an explicit setting wins.
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
    SDXL_TRAINER_STATUS_FILE="$(mktemp)"
    export SDXL_TRAINER_STATUS_FILE
    echo "+ torchrun --standalone --nproc_per_node=$ranks $*" >&2
    # In the background, because bash would not pass a signal on to a foreground child. It starts such children with
    # Ctrl-C ignored, and only another program can turn that back.
    python -c 'import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execvp(sys.argv[1], sys.argv[1:])' \
        torchrun --standalone --nproc_per_node="$ranks" "$@" &
    local child=$! status=0 signal=0
    trap 'signal=15; kill -TERM "$child" 2>/dev/null' TERM
    trap 'signal=2; kill -INT "$child" 2>/dev/null' INT
    wait "$child" || status=$?
    while kill -0 "$child" 2>/dev/null; do  # a signal ends `wait`, not the child
        status=0; wait "$child" || status=$?
    done
    # torchrun answers 1 whatever happened; rank 0 wrote down what did, unless it was stopped before it began.
    local recorded; recorded="$(cat "$SDXL_TRAINER_STATUS_FILE")"; rm -f "$SDXL_TRAINER_STATUS_FILE"
    if [ -z "$recorded" ] && [ "$signal" -ne 0 ]; then recorded=$((128 + signal)); fi
    if [ "$status" -ne 0 ] && [ -n "$recorded" ] && [ "$recorded" -ne 0 ]; then status="$recorded"; fi
    return "$status"
}

count_gpus() {
    local gpus=0
    if command -v nvidia-smi >/dev/null 2>&1; then gpus="$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)"; fi
    echo "$(( gpus > 0 ? gpus : 1 ))"
}
