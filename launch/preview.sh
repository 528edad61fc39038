#!/usr/bin/env bash
# Preview the data as the model will see it, before or after caching:
#   bash launch/preview.sh --cfg x.yaml [--out preview] [--examine 0] [key.sub=value ...]
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
if [ -z "${VIRTUAL_ENV:-}" ] && [ -f "$ROOT/.venv/bin/activate" ]; then
    source "$ROOT/.venv/bin/activate"
fi
exec python -m sdxl_trainer.cache.preview "$@"
