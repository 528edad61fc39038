#!/usr/bin/env bash
# DeepSpeed's launcher on CPU ranks: --num_gpus on one machine, and a hostfile over an sshd on loopback, where two names
# of this machine stand for two nodes. Needs root, sshd and pdsh.
source "$(dirname "${BASH_SOURCE[0]}")/prepare.sh"
export DS_ACCELERATOR=cpu

NPROC=2 expect 0 "10 steps by deepspeed --num_gpus=2" bash launch/deepspeed.sh "${SETTINGS[@]}" run.name=local train.max_steps=10

stop_in_steps() {
    bash launch/deepspeed.sh "${SETTINGS[@]}" run.name=stopped train.max_steps=4000 > "$WORK/stopped.log" 2>&1 & local job=$!
    until grep -q "step 5/" "$WORK/stopped.log"; do sleep 0.2; done
    kill -TERM $job
    wait $job
}
NPROC=2 expect 143 "a run that SIGTERM stops" stop_in_steps
test -d "$WORK"/runs/stopped/checkpoints/step-*

SSH="$WORK/ssh"
mkdir -p "$SSH" /run/sshd
[ -f "$SSH/key" ] || ssh-keygen -q -t ed25519 -N '' -f "$SSH/key"
[ -f "$SSH/host" ] || ssh-keygen -q -t ed25519 -N '' -f "$SSH/host"
cp "$SSH/key.pub" "$SSH/authorized"; chmod 700 "$SSH"
/usr/sbin/sshd -p 2222 -h "$SSH/host" -o AuthorizedKeysFile="$SSH/authorized" -o StrictModes=no -o PidFile="$SSH/pid" \
    -o ListenAddress=127.0.0.1 -o ListenAddress=127.0.0.2 -o PermitUserEnvironment=yes
trap 'kill "$(cat "$SSH/pid")"' EXIT
cat > "$SSH/config" <<TEXT
Host node0 node1
  Port 2222
  IdentityFile $SSH/key
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
Host node0
  HostName 127.0.0.1
Host node1
  HostName 127.0.0.2
TEXT
mkdir -p "$WORK/bin"
printf '#!/bin/sh\nexec /usr/bin/ssh -F %s/config "$@"\n' "$SSH" > "$WORK/bin/ssh"; chmod +x "$WORK/bin/ssh"
printf 'node0 slots=1\nnode1 slots=1\n' > "$WORK/hostfile"
export PATH="$WORK/bin:$PATH" HOSTFILE="$WORK/hostfile" LAUNCHER_ARGS="--master_addr=127.0.0.1 --master_port=29512"
expect 0 "10 steps over a hostfile" bash launch/deepspeed.sh "${SETTINGS[@]}" run.name=hosts train.max_steps=10
compare_losses "$WORK/runs/local" "$WORK/runs/hosts"
expect 2 "a mistake, over a hostfile" bash launch/deepspeed.sh "${SETTINGS[@]}" run.name=hosts train.max_step=10
