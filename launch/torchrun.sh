# shellcheck shell=bash
# Sourced by train.sh, cache.sh and sample.sh: starts this node's ranks with torchrun. Environment variables:
#   NPROC             ranks on this node (default: one per GPU, or 1 without GPUs)
#   NNODES            nodes of the job (default 1); more than one need either NODE_RANK or RDZV_ENDPOINT
#   NODE_RANK         number of this node, from 0, with MASTER_ADDR (node 0) and MASTER_PORT (default 29500)
#   RDZV_ENDPOINT     host:port of a rendezvous that numbers the nodes, with RDZV_ID if several jobs share it
#   MAX_RESTARTS      restarts of all ranks after one has failed (default 0)
source "$(dirname "${BASH_SOURCE[0]}")/child.sh"

run_ranks() {  # program and its arguments
    local nodes="${NNODES:-1}" where=()
    if [ "$nodes" = 1 ] && [ -z "${RDZV_ENDPOINT:-}" ]; then
        where=(--standalone)
    elif [ -n "${RDZV_ENDPOINT:-}" ]; then
        where=(--nnodes="$nodes" --rdzv_backend=c10d --rdzv_endpoint="$RDZV_ENDPOINT" --rdzv_id="${RDZV_ID:-sdxl-trainer}")
    else
        [ -n "${MASTER_ADDR:-}" ] || fail \
            "NNODES=$nodes needs MASTER_ADDR, the host name of node 0, or RDZV_ENDPOINT" \
            "NNODES=$nodes 需要 MASTER_ADDR（节点 0 的主机名）或 RDZV_ENDPOINT"
        [ -n "${NODE_RANK:-}" ] || fail \
            "NNODES=$nodes needs NODE_RANK, from 0 to $((nodes - 1)), or RDZV_ENDPOINT" \
            "NNODES=$nodes 需要 NODE_RANK（0 至 $((nodes - 1))）或 RDZV_ENDPOINT"
        where=(--nnodes="$nodes" --node_rank="$NODE_RANK" --master_addr="$MASTER_ADDR" --master_port="${MASTER_PORT:-29500}")
    fi
    # Under nohup a closed terminal must not stop the job, but torchrun would end it on SIGHUP.
    if [ -n "$(trap -p HUP)" ]; then export TORCHELASTIC_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGQUIT; fi
    run_child torchrun "${where[@]}" --nproc_per_node="${NPROC:-$(choose_num_ranks)}" --max_restarts="${MAX_RESTARTS:-0}" "$@"
}
