#!/usr/bin/env bash
# Examine machine, settings and data:  bash launch/doctor.sh [--cfg x.yaml] [key.sub=value ...]
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
if [ -z "${VIRTUAL_ENV:-}" ] && [ -f "$ROOT/.venv/bin/activate" ]; then
    source "$ROOT/.venv/bin/activate"
fi
exec python -m sdxl_trainer.train.doctor "$@"
