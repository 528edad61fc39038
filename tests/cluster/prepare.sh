# shellcheck shell=bash
# Sourced by the trials here: the tiny model, a cached demo set and settings in $WORK, with the images put away.
# Run from the root of a checkout in an environment where it is installed:  bash tests/cluster/NAME.sh [work folder]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
WORK="${1:-$(mktemp -d)}"
export OMP_NUM_THREADS=1
rm -rf "$WORK/runs"  # of an earlier trial, which would be gone on with
if [ ! -f "$WORK/tiny.yaml" ]; then
    python -m sdxl_trainer.data.demo --out "$WORK/data"
    python -m sdxl_trainer.train.tiny --out "$WORK/model"
    sed -e "s#runs/demo/model .*#$WORK/model#" -e "s#\[runs/demo/data/metadata.json\] .*#[$WORK/data/metadata.json]#" \
        -e "s#dir: runs/demo/latents#dir: $WORK/latents#" -e "s#^  name: tiny#  name: tiny\n  dir: $WORK/runs#" \
        configs/tiny.yaml > "$WORK/tiny.yaml"
    NPROC=1 bash launch/cache.sh --cfg "$WORK/tiny.yaml"
fi
SETTINGS=(--cfg "$WORK/tiny.yaml" sample.prompts=[] data.num_workers=0 train.global_batch_size=4 train.micro_batch_size=2 log.every_steps=5)

expect() {  # wanted status, what, command...
    local wanted="$1" what="$2" status=0
    shift 2
    "$@" || status=$?
    if [ "$status" -ne "$wanted" ]; then echo "FAILED: $what ended with $status instead of $wanted"; exit 1; fi
    echo "ok: $what ended with $status"
}

compare_losses() {  # two run folders: the same loss at every step, to 1e-5
    python - "$1" "$2" <<'PY'
import json, sys
from pathlib import Path

def read(folder):
    lines = (json.loads(line) for line in (Path(folder) / "logs" / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines if "loss" in line}

first, second = read(sys.argv[1]), read(sys.argv[2])
apart = max(abs(first[step] - second[step]) for step in first)
assert first.keys() == second.keys() and apart < 1e-5, (len(first), len(second), apart)
print(f"ok: {len(first)} losses, at most {apart:.1e} apart")
PY
}
