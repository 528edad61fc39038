#!/usr/bin/env bash
# Debian's Slurm on this machine alone: a job whose time limit ends in the middle saves, goes back into the queue by itself
# and is done by its second start. Needs root, slurm-wlm and munge.
source "$(dirname "${BASH_SOURCE[0]}")/prepare.sh"

ETC="$WORK/slurm"; mkdir -p "$ETC/state" "$ETC/spool" /run/munge
[ -f /etc/munge/munge.key ] || mungekey --create
chown -R munge /etc/munge /run/munge /var/log/munge /var/lib/munge
pgrep -x munged > /dev/null || su -s /bin/sh munge -c /usr/sbin/munged
cat > "$ETC/slurm.conf" <<TEXT
ClusterName=trial
SlurmctldHost=$(hostname -s)
SlurmUser=root
StateSaveLocation=$ETC/state
SlurmdSpoolDir=$ETC/spool
SlurmctldPidFile=$ETC/slurmctld.pid
SlurmdPidFile=$ETC/slurmd.pid
SlurmctldLogFile=$ETC/slurmctld.log
SlurmdLogFile=$ETC/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MinJobAge=3600
KillWait=30
RequeueExit=
NodeName=$(hostname -s) CPUs=$(nproc) State=UNKNOWN
PartitionName=trial Nodes=ALL Default=YES MaxTime=INFINITE State=UP
TEXT
sed -i '/^RequeueExit=$/d' "$ETC/slurm.conf"
export SLURM_CONF="$ETC/slurm.conf"
slurmctld; slurmd
trap 'scancel --me 2>/dev/null; kill "$(cat "$ETC/slurmd.pid")" "$(cat "$ETC/slurmctld.pid")"' EXIT
until sinfo -h -o %t | grep -q idle; do sleep 1; done

state() { scontrol show job "$1" | grep -o 'JobState=[A-Z]*' | cut -d= -f2; }
wait_for() {  # job, state
    for _ in $(seq 600); do
        [ "$(state "$1")" = "$2" ] && return 0
        sleep 1
    done
    echo "FAILED: job $1 is $(state "$1"), not $2"; tail -n 40 "$WORK/slurm-$1.out"; exit 1
}

submit() { sbatch --parsable --cpus-per-task="$(nproc)" --output="$WORK/slurm-%j.out" "$@"; }
export NPROC=2
job="$(submit launch/slurm.sbatch "${SETTINGS[@]}" run.name=slurm train.max_steps=10)"
wait_for "$job" COMPLETED
echo "ok: 10 steps under Slurm"

# One minute of limit, and a warning as soon as Slurm can give it: the first start is stopped somewhere in the steps.
long="$(submit --time=1 --signal=B:USR1@20 launch/slurm.sbatch "${SETTINGS[@]}" run.name=limit train.max_steps=600)"
until grep -q "requeueing" "$WORK/slurm-$long.out" 2>/dev/null; do sleep 1; done
echo "ok: the time limit's warning saved and queued again: $(scontrol show job "$long" | grep -o 'Restarts=[0-9]*')"
until grep -q "resuming from" "$WORK/slurm-$long.out"; do sleep 1; done
echo "ok: the second start resumes"
scancel "$long"
wait_for "$long" CANCELLED
echo "ok: scancel ends it for good"
