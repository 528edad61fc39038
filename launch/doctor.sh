#!/usr/bin/env bash
# Examine machine, settings and data:  bash launch/doctor.sh [--cfg x.yaml] [key.sub=value ...]
# On each of several nodes, with the environment variables that launch/torchrun.sh lists, it measures their communication.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/torchrun.sh"
if [ "${NNODES:-1}" != 1 ] || [ -n "${RDZV_ENDPOINT:-}" ]; then
    [ "$#" = 0 ] || fail \
        "across nodes the doctor measures communication only; examine settings on one node, without NNODES" \
        "跨节点时 doctor 只测量通信；请在一个节点上不设置 NNODES 检查配置"
    run_ranks -m sdxl_trainer.launch.probe --report
else
    exec python -m sdxl_trainer.train.doctor "$@"
fi
