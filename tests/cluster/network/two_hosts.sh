#!/usr/bin/env bash
# Two hosts on this machine, for the length of one command: two network name spaces that reach each other by one cable
# (a veth pair: east 10.77.0.1, west 10.77.0.2), each with a node of one Ray cluster (10.77.0.1:6379).
#   two_hosts.sh FOLDER PYTHON COMMAND…        FOLDER: a short path for Ray's sockets and logs; COMMAND runs in the east
# Needs root and iproute2. The kernel ends all of it with the command; the bytes that came from the west are told last.
set -euo pipefail
if [[ ${K5DIST_INSIDE:-} != 1 ]]; then
  K5DIST_INSIDE=1 exec unshare --net --pid --fork --mount-proc --kill-child bash "$0" "$@"
fi
folder=$1 python=$2
shift 2
mkdir -p "$folder/east" "$folder/west"
ip link set lo up
unshare --net sleep infinity &
west=$!
here=$(readlink /proc/self/ns/net) there=$(readlink /proc/self/ns/net)
until [[ -n $there && $there != "$here" ]]; do # it has its own only after a moment
  sleep 0.05
  there=$(readlink "/proc/$west/ns/net" || true)
done
in_west() { nsenter --net="/proc/$west/ns/net" "$@"; }
ip link add east type veth peer name west netns "$west"
ip addr add 10.77.0.1/24 dev east
ip link set east up
in_west ip link set lo up
in_west ip addr add 10.77.0.2/24 dev west
in_west ip link set west up
common=(--disable-usage-stats --min-worker-port=0 --max-worker-port=0)
"$python" -c 'import secrets; print(secrets.token_hex(32))' >"$folder/token"
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$folder/token" # Ray's default where it listens beyond loopback
export RAY_ENABLE_UV_RUN_RUNTIME_ENV=0 RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO=0
ray=("$python" -m ray.scripts.scripts start "${common[@]}" --object-store-memory=200000000)
"${ray[@]}" --head --include-dashboard=false --node-ip-address=10.77.0.1 --port=6379 --num-cpus=3 \
  --temp-dir="$folder/east" >"$folder/east.log" 2>&1
in_west "${ray[@]}" --address=10.77.0.1:6379 --node-ip-address=10.77.0.2 --num-cpus=1 --temp-dir="$folder/west" \
  >"$folder/west.log" 2>&1 || { cat "$folder/west.log" >&2; exit 1; }
status=0
"$@" || status=$?
received=$(ip -j -s link show east | "$python" -c 'import json, sys; print(json.load(sys.stdin)[0]["stats64"]["rx"]["bytes"])')
echo "from the west: $received bytes"
exit "$status"
