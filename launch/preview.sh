#!/usr/bin/env bash
# Preview the data as the model will see it, before or after caching:
#   bash launch/preview.sh --cfg x.yaml [--out preview] [--examine 0] [key.sub=value ...]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/child.sh"
[ "$#" -gt 0 ] || answer_first "" "--cfg configs/tiny.yaml"
exec python -m sdxl_trainer.cache.preview "$@"
