#!/usr/bin/env bash
# Train a grid of settings and compare them:
#   bash launch/ablate.sh --cfg x.yaml --vary optim.lr=1e-5,2e-5 [--seeds 3] [key.sub=value ...]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/child.sh"
[ "$#" -gt 0 ] || answer_first "" "--cfg configs/tiny.yaml --vary optim.lr=1e-5,2e-5"
exec python -m sdxl_trainer.train.ablation "$@"
