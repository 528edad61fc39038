#!/usr/bin/env bash
# Measure generated images against the validation set:
#   bash launch/quality.sh --model RUN_FOLDER --features PATH [key.sub=value ...]
# NPROC sets the number of ranks that share the work (default: one per GPU, or 1 without GPUs).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/torchrun.sh"
answer_first "$ROOT/train/quality/__main__.py" "--model RUN_FOLDER --features PATH" "$@"
run_ranks "$ROOT/train/quality/__main__.py" "$@"
