#!/usr/bin/env bash
# Generate the images of a prompt file:  bash launch/sample.sh --model PATH --prompts FILE --out DIR [key.sub=value ...]
# NPROC sets the number of ranks that share the prompts (default: one per GPU, or 1 without GPUs).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/torchrun.sh"
answer_first "$ROOT/train/sample_main.py" "--model PATH --prompts FILE --out DIR" "$@"
run_ranks "$ROOT/train/sample_main.py" "$@"
