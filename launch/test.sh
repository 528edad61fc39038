#!/usr/bin/env bash
# All checks: lint, format, types, tests.  bash launch/test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh
prepare_environment "[test]"

ruff check .
ruff format --check .
# pyright cannot follow an editable install with package_dir, so it gets the packages as links.
mkdir -p build/types/sdxl_trainer
for folder in configs launch data cache train; do ln -sfn "../../../$folder" "build/types/sdxl_trainer/$folder"; done
pyright
# Two workers: much of the time ranks wait for each other. A file stays on one worker, for what its tests share.
python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder "$@"
