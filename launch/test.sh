#!/usr/bin/env bash
# Lint, format, types and tests:  bash launch/test.sh [--long] [pytest arguments]
#   --long  also run the tests marked `long`; run it before you send a change to the engine, checkpoints or cache formats
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh
prepare_environment "[test]"

selected=(-m "not long")
if [ "${1:-}" = --long ]; then
    shift
    selected=()
fi
ruff check .
ruff format --check .
pyright
# Three workers for two cores, because ranks often wait for each other. A file stays on one worker, which shares fixtures between its tests.
# -rs lists every skipped test with its reason.
python -m pytest -rs --numprocesses 3 --dist loadfile --no-loadscope-reorder ${selected[@]+"${selected[@]}"} "$@"
