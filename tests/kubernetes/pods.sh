#!/usr/bin/env bash
# A RayJob's head and worker as two raylets on this machine, and what KubeRay's submitter and Kubernetes' preStop hooks do:
#   pods.sh FOLDER ENTRYPOINT PROGRESS
# The job runs until a line of its log has PROGRESS; then both pods are asked to end, as when a RayJob is suspended. Ray's
# parameters come as K5DIST_TEST_HEAD and K5DIST_TEST_WORKER. Everything runs in name spaces of its own.
set -euo pipefail
if [[ ${K5DIST_INSIDE:-} != 1 ]]; then
  K5DIST_INSIDE=1 exec unshare --net --pid --fork --mount-proc --kill-child bash "$0" "$@"
fi
folder=$1 entrypoint=$2 progress=$3
ip link set lo up
ip addr add 127.0.0.2/8 dev lo
export GLOO_SOCKET_IFNAME=lo RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
RAY_AUTH_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')
export RAY_AUTH_TOKEN
ports=(--min-worker-port=0 --max-worker-port=0)
# shellcheck disable=SC2086  # parameters are words
env $K5DIST_TEST_HEAD_ENV ray start --head --block --port=6379 --temp-dir="$folder/h" "${ports[@]}" \
  $K5DIST_TEST_HEAD >"$folder/head.log" 2>&1 &
address=http://127.0.0.1:8265
health="import urllib.request as u; u.urlopen('$address/api/gcs_healthz', timeout=5)"
until python -c "$health" >/dev/null 2>&1; do sleep 0.2; done
# shellcheck disable=SC2086
ray start --block --address=127.0.0.1:6379 --temp-dir="$folder/w" "${ports[@]}" --dashboard-agent-listen-port=0 \
  --dashboard-agent-grpc-port=0 $K5DIST_TEST_WORKER >"$folder/worker.log" 2>&1 &

# What KubeRay 1.5 renders for its submitter's shell.
bash -c "ray job submit --address $address --submission-id the-job --no-wait -- $entrypoint ; ray job logs --address \
$address --follow the-job" >"$folder/job.log" 2>&1 &
log=$!
until grep -q "$progress" "$folder/job.log"; do
  kill -0 "$log" 2>/dev/null || { cat "$folder/job.log" "$folder"/{head,worker}.log; exit 1; }
  sleep 0.1
done
python -m k5dist.cluster.drain worker 90 &
worker=$!
python -m k5dist.cluster.drain head 90 && echo "head: $?"
wait "$worker" && echo "worker: $?"
ray job status --address "$address" the-job
pgrep --full --count k5dist.train.worker || true
wait "$log" || true
