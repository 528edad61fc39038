# Sourced by train.sh and cache.sh: starts the ranks with torchrun and passes the program's own exit status on.
# The working directory is left alone, because the user's paths are relative to it.
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

run_ranks() {
    if [ -z "${VIRTUAL_ENV:-}" ] && [ -f "$ROOT/.venv/bin/activate" ]; then
        source "$ROOT/.venv/bin/activate"
    fi
    local ranks="${NPROC:-$(count_gpus)}"
    # One thread per CPU rank and library keeps ranks from fighting for cores; an explicit setting wins.
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
    SDXL_TRAINER_STATUS_FILE="$(mktemp)"
    export SDXL_TRAINER_STATUS_FILE
    echo "+ torchrun --standalone --nproc_per_node=$ranks $*" >&2
    local status=0
    torchrun --standalone --nproc_per_node="$ranks" "$@" || status=$?
    # torchrun answers 1 whatever happened; rank 0 wrote down what did.
    local recorded; recorded="$(cat "$SDXL_TRAINER_STATUS_FILE")"; rm -f "$SDXL_TRAINER_STATUS_FILE"
    if [ "$status" -ne 0 ] && [ -n "$recorded" ] && [ "$recorded" -ne 0 ]; then status="$recorded"; fi
    return "$status"
}

count_gpus() {
    local gpus=0
    if command -v nvidia-smi >/dev/null 2>&1; then gpus="$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)"; fi
    echo "$(( gpus > 0 ? gpus : 1 ))"
}
