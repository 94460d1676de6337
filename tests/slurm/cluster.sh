#!/usr/bin/env bash
# A Slurm of two nodes on this machine: cluster.sh start|stop FOLDER. Installs nothing; needs slurm-wlm and munge (Debian), and root.
# After a start, SLURM_CONF=FOLDER/slurm.conf makes sbatch and its kin talk to it.
set -euo pipefail
folder=$(realpath -m "$2")

stop() {
    for pid in "$folder"/slurmd-*.pid "$folder/slurmctld.pid" "$folder/munge.pid"; do
        [ ! -f "$pid" ] || kill "$(cat "$pid")" 2>/dev/null || true
    done
}

start() {
    for program in munged slurmctld slurmd sbatch; do
        command -v $program >/dev/null || { echo "no $program here: install slurm-wlm and munge" >&2; exit 3; }
    done
    mkdir -p "$folder/state" "$folder/spool"
    (umask 077; head -c 1024 /dev/urandom >"$folder/munge.key")
    munged --force --key-file="$folder/munge.key" --socket="$folder/munge.socket" --pid-file="$folder/munge.pid" \
        --log-file="$folder/munge.log" --seed-file="$folder/munge.seed"
    read -r controller one two < <(python3 - <<'P'
import socket
sockets = [socket.socket() for _ in range(3)]
for s in sockets:
    s.bind(("", 0))
print(*(s.getsockname()[1] for s in sockets))
P
)
    # cred_expire: how long a requeued job waits before it starts again
    cat >"$folder/slurm.conf" <<C
ClusterName=test
SlurmctldHost=$(hostname)(127.0.0.1)
SlurmctldPort=$controller
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
AuthType=auth/munge
AuthInfo=socket=$folder/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool/%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd-%n.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
MpiDefault=none
KillWait=20
NodeName=n1 NodeHostname=$(hostname) NodeAddr=127.0.0.1 Port=$one CPUs=8
NodeName=n2 NodeHostname=$(hostname) NodeAddr=127.0.0.1 Port=$two CPUs=8
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
C
    export SLURM_CONF=$folder/slurm.conf
    slurmctld -c
    slurmd -N n1
    slurmd -N n2
    for _ in $(seq 60); do
        [ "$(sinfo --noheader --format=%t | sort -u)" != idle ] || exit 0
        sleep 0.5
    done
    echo "the nodes do not come up: see $folder/*.log" >&2
    exit 1
}

"$1"
