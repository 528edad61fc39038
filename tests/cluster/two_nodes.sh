#!/usr/bin/env bash
# Two torchrun agents in two network namespaces, joined by one cable, which is cut in the middle of the second run.
# Needs root and iproute2. First a whole run of 20 steps on two nodes, then one that is cut off at about step 10 and
# must end on both nodes by itself with a status that is not 0, and the same command again, which must go on.
source "$(dirname "${BASH_SOURCE[0]}")/prepare.sh"

ip netns add node0; ip netns add node1
tidy() {
    for node in node0 node1; do
        ip netns pids $node | xargs -r kill -9 || true
        ip netns del $node
    done
}
trap tidy EXIT
ip link add cable0 netns node0 type veth peer name cable1 netns node1
for node in 0 1; do
    ip -n node$node addr add "10.77.0.$((node + 1))/24" dev cable$node
    ip -n node$node link set cable$node up
    ip -n node$node link set lo up
done

on_node() {  # number, words of the run
    local node="$1"
    shift
    ip netns exec "node$node" env NNODES=2 NODE_RANK="$node" NPROC=1 MASTER_ADDR=10.77.0.1 MASTER_PORT=29511 \
        GLOO_SOCKET_IFNAME="cable$node" TP_SOCKET_IFNAME="cable$node" \
        bash launch/train.sh "${SETTINGS[@]}" "$@" > "$WORK/node$node.log" 2>&1
}

on_both() {  # words of the run; answers with the worse status
    local first=0 second=0
    on_node 1 "$@" & local other=$!
    on_node 0 "$@" || first=$?
    wait $other || second=$?
    echo "  node 0 ended with $first, node 1 with $second"
    return $((first > second ? first : second))
}

cut_at_step_10() {
    until grep -q "step 10/" "$WORK/node0.log" 2>/dev/null; do sleep 0.2; done
    ip -n node0 link set cable0 down
    echo "  the cable is cut"
}

expect 0 "20 steps on two nodes" on_both run.name=whole train.max_steps=20
rm -f "$WORK/node0.log"
cut_at_step_10 & cutter=$!
seconds="$SECONDS"
expect 1 "a run whose cable is cut" on_both run.name=cut train.max_steps=400 checkpoint.every_steps=5 engine.timeout_minutes=1
echo "  $((SECONDS - seconds)) s, start and steps included"
wait $cutter
ip -n node0 link set cable0 up
expect 0 "the same command again" on_both run.name=cut train.max_steps=20 checkpoint.every_steps=5
compare_losses "$WORK/runs/whole" "$WORK/runs/cut"
