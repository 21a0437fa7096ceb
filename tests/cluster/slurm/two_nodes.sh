#!/usr/bin/env bash
# A Slurm of two emulated nodes (n1, n2; 4 CPUs each) on this machine, for the length of one command:
#   two_nodes.sh FOLDER COMMAND…        FOLDER: a short path, made here; keeps configuration, spools and logs
# Needs root and Debian's slurmctld slurmd slurm-client munge. Everything runs in name spaces of its own: nothing
# listens outside of its loopback, and the kernel ends all of it with the command.
set -euo pipefail
if [[ ${K5DIST_INSIDE:-} != 1 ]]; then
  K5DIST_INSIDE=1 exec unshare --net --pid --fork --mount-proc --kill-child bash "$0" "$@"
fi
folder=$1
shift
ip link set lo up
ip addr add 127.0.0.2/8 dev lo # without it Slurm cannot resolve the host's name
host=$(hostname -s)
mkdir -p "$folder"/{state,log,spool/n1,spool/n2,munge}
chmod 700 "$folder/munge"
dd if=/dev/urandom of="$folder/munge/key" bs=128 count=1 status=none
chmod 400 "$folder/munge/key"
cat >"$folder/slurm.conf" <<CONF
ClusterName=emulated
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=17000
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/munge/socket
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool/%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd-%n.pid
SlurmctldLogFile=$folder/log/slurmctld.log
SlurmdLogFile=$folder/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
EnforcePartLimits=ALL
SlurmdParameters=config_overrides
ReturnToService=2
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SlurmdTimeout=10
KillWait=5
NodeName=n1 NodeHostname=$host NodeAddr=127.0.0.1 Port=17001 CPUs=4 RealMemory=4000
NodeName=n2 NodeHostname=$host NodeAddr=127.0.0.1 Port=17002 CPUs=4 RealMemory=4000
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=60 State=UP
CONF
export GLOO_SOCKET_IFNAME=lo # the only interface here
export SLURM_CONF=$folder/slurm.conf
munged --force --key-file="$folder/munge/key" --socket="$folder/munge/socket" --pid-file="$folder/munge/pid" \
  --log-file="$folder/munge/log" --seed-file="$folder/munge/seed"
slurmctld -f "$SLURM_CONF"
slurmd -f "$SLURM_CONF" -N n1
slurmd -f "$SLURM_CONF" -N n2
for ((i = 0; i < 100; i++)); do
  [[ $(sinfo --noheader --Node --format=%T | sort -u) == idle ]] && break
  sleep 0.1
done
"$@"
