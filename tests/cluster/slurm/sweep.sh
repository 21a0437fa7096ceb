#!/usr/bin/env bash
# Within two_nodes.sh: sweep.sh ROOT PYTHON OVERRIDES… A sweep of two runs becomes a job array behind a job that makes the
# cache; the second run is taken out of the queue before it begins. Ends when the queue is empty.
set -euo pipefail
root=$1 python=$2
shift 2
export K5DIST_PROGRESS_SECONDS=0
runs() { "$python" -m k5dist.runs "$@" "storage.root=$root/root"; }
"$python" -m k5dist.launch -m "$@" name=lr cluster=slurm cluster.workers_per_node=1 "storage.root=$root/root" \
  "slurm.output=$root/%x-%a.out" | grep ^submitted
waiting=$(runs list | sed -n 's/^\(lr-[0-9a-f]\{10\}\) .*Slurm job [0-9]*_1;.*/\1/p')
echo "second: $waiting"
runs status "$waiting" | sed -n 's/^Slurm  */queue: /p'
runs stop "$waiting"
for ((i = 0; i < 600; i++)); do
  [[ -z $(squeue --noheader) ]] && break
  sleep 1
done
runs list
