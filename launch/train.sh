#!/usr/bin/env bash
# Train on this machine:  bash launch/train.sh --cfg x.yaml [key.sub=value ...]
# NPROC sets the number of ranks (default: one per GPU, or 1 without GPUs).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/torchrun.sh"
run_ranks "$ROOT/train/main.py" "$@"
