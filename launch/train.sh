#!/usr/bin/env bash
# Train:  bash launch/train.sh --cfg x.yaml [key.sub=value ...]
# On one machine, or started on each of many; launch/torchrun.sh says by what in the environment.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/torchrun.sh"
run_ranks "$ROOT/train/main.py" "$@"
