#!/usr/bin/env bash
# Fill the latent cache on this machine:  bash launch/cache.sh --cfg x.yaml [key.sub=value ...]
# NPROC sets the number of ranks (default: one per GPU, or 1 without GPUs).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/torchrun.sh"
run_ranks "$ROOT/cache/main.py" "$@"
