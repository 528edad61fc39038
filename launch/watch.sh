#!/usr/bin/env bash
# Show runs in your browser while they go on:  bash launch/watch.sh [RUNS] [--host 127.0.0.1] [--port 8765]
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
if [ -z "${VIRTUAL_ENV:-}" ] && [ -f "$ROOT/.venv/bin/activate" ]; then
    source "$ROOT/.venv/bin/activate"
fi
exec python -m sdxl_trainer.train.watch "$@"
