#!/usr/bin/env bash
# Train with DeepSpeed's launcher:  bash launch/deepspeed.sh --cfg x.yaml [key.sub=value ...]
#   HOSTFILE       lines of `host slots=8`; without it this machine alone. Needs pdsh, and ssh without a password.
#   NPROC, NNODES  ranks per node, and number of the hostfile's nodes (default: all)
#   PROGRAM=doctor measures the communication between the ranks instead
#   LAUNCHER_ARGS  further arguments for the launcher, such as "--master_port=29501 --ssh_port=2222"
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/child.sh"

forward_signal() {  # The launcher for one machine does not forward signals, but the process that it starts does.
    if [ -n "${HOSTFILE:-}" ]; then kill "-$1" "$2" 2>/dev/null || true; else pkill "-$1" -P "$2" || true; fi
}

where=(--hostfile="${HOSTFILE:-/dev/null}")
if [ -n "${HOSTFILE:-}" ]; then
    [ -r "$HOSTFILE" ] || fail "HOSTFILE=$HOSTFILE cannot be read" "无法读取 HOSTFILE=$HOSTFILE"
    command -v pdsh >/dev/null || fail "a hostfile needs pdsh: install your system's pdsh" "使用 hostfile 需要 pdsh：请安装系统的 pdsh"
    if [ -n "${NNODES:-}" ]; then where+=(--num_nodes="$NNODES"); fi
    if [ -n "${NPROC:-}" ]; then where+=(--num_gpus="$NPROC"); fi
else
    where+=(--num_gpus="${NPROC:-$(choose_num_ranks)}")
fi
read -ra more <<< "${LAUNCHER_ARGS:-}"
if [ "${PROGRAM:-train}" = doctor ]; then
    program=(--module sdxl_trainer.launch.probe --report)
else
    program=("$ROOT/train/main.py" "$@")
    answer_first "$ROOT/train/main.py" "--cfg configs/tiny.yaml" "$@"
fi
run_child deepspeed "${where[@]}" ${more[@]+"${more[@]}"} "${program[@]}"
