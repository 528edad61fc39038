#!/usr/bin/env bash
# Train:  bash launch/train.sh --cfg x.yaml [key.sub=value ...]
# Runs on one machine, or on each of several; launch/torchrun.sh lists the environment variables.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/torchrun.sh"
answer_first "$ROOT/train/main.py" "--cfg configs/tiny.yaml" "$@"
run_ranks "$ROOT/train/main.py" "$@"
