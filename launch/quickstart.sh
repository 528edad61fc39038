#!/usr/bin/env bash
# Quick start on a bare machine: install, and fine-tune a tiny SDXL on images of new shapes (demo.sh).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh
prepare_environment "[watch]"
exec bash launch/demo.sh "$@"
