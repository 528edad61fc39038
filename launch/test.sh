#!/usr/bin/env bash
# All checks: lint, format, types, tests.  bash launch/test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh
prepare_environment "[test]"

ruff check .
ruff format --check .
pyright
# Two workers: much of the time ranks wait for each other. A file stays on one worker, for what its tests share.
python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder "$@"
