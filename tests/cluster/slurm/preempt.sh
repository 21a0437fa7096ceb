#!/usr/bin/env bash
# Within two_nodes.sh: preempt.sh ROOT PYTHON OVERRIDES… A run is stopped by a signal, queued again by its own script and
# goes on; while it waits, both scripts are typed by hand for an undisturbed run. Ends when the queue is empty.
set -euo pipefail
root=$1 python=$2
shift 2
overrides=("$@" "storage.root=$root/root" cluster.nodes=2 cluster.workers_per_node=1)
home=$PWD
export K5DIST_PROGRESS_SECONDS=0 K5DIST_PYTHON=$python K5DIST_HOME=$home
until_true() { # seconds, command…
  local deadline=$((SECONDS + $1))
  shift
  until "$@"; do
    ((SECONDS < deadline)) || { echo "never came: $*" >&2; exit 1; }
    sleep 0.1
  done
}
said() { grep -qsE "$1" "$root/preempted.out"; }
quiet() { [[ -z $(squeue --noheader) ]]; }

"$python" -m k5dist.launch "${overrides[@]}" name=preempted cluster=slurm "slurm.output=$root/preempted.out" |
  tee "$root/submit.out"
job=$(sed -n 's/^submitted preempted: job //p' "$root/submit.out")
until_true 300 said '^train: ([5-9]|[1-9][0-9])/'
scancel --signal=USR1 --batch "$job"
until_true 120 said '^k5dist: queued again'
# Slurm would let it wait for two minutes; at once, its nodes would still refuse the job they have just ended.
scontrol update "JobId=$job" StartTime=now+5seconds
precache=$(sbatch --parsable --output="$root/precache.out" slurm/precache.sbatch "${overrides[@]}" name=whole)
sbatch --nodes=2 --dependency="afterok:$precache" --output="$root/whole.out" slurm/train.sbatch \
  "${overrides[@]}" name=whole 'stages=[plan,train]'
until_true 600 quiet
