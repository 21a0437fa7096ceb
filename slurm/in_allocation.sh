# Inside a Slurm allocation: Ray on every node by srun, then the same driver as anywhere, on the first node.
# Sourced by train.sbatch and precache.sbatch; `python -m k5dist.launch cluster=slurm` puts it whole into its script.
# The job's overrides are the positional parameters. Settings, all optional:
#   K5DIST_PYTHON            the Python that has k5dist (default: python)
#   K5DIST_CONTAINER         an image, by K5DIST_CONTAINER_KIND: pyxis (default) or apptainer
#   K5DIST_CONTAINER_MOUNTS  what it sees of the host, source:target, by commas
#   K5DIST_HEAD_ADDRESS      the first node's address, where its own idea of it is not the one others reach
#   K5DIST_SWEEP             a file with a line of overrides for each task of a job array (task 0: the first line)

python=${K5DIST_PYTHON:-python}
srun_options=() prefix=()
if [[ -n ${K5DIST_CONTAINER:-} ]]; then
  case ${K5DIST_CONTAINER_KIND:-pyxis} in
    pyxis)
      # Each step is a container of its own, with a /tmp of its own unless it is mounted; Ray's processes and the driver
      # meet by sockets below it.
      srun_options=("--container-image=$K5DIST_CONTAINER" "--container-workdir=$PWD")
      srun_options+=("--container-mounts=/tmp:/tmp,$PWD:$PWD${K5DIST_CONTAINER_MOUNTS:+,$K5DIST_CONTAINER_MOUNTS}") ;;
    apptainer)
      prefix=(apptainer exec --nv --bind "$PWD:$PWD${K5DIST_CONTAINER_MOUNTS:+,$K5DIST_CONTAINER_MOUNTS}")
      prefix+=(--pwd "$PWD" "$K5DIST_CONTAINER") ;;
    *) echo "K5DIST_CONTAINER_KIND=$K5DIST_CONTAINER_KIND: it is pyxis or apptainer" >&2; exit 2 ;;
  esac
fi
if [[ -n ${K5DIST_SWEEP:-} ]]; then
  declare -a sweep="($(sed -n "$((SLURM_ARRAY_TASK_ID + 1))p" "$K5DIST_SWEEP"))"
  set -- "$@" "${sweep[@]}"
fi

((${SLURM_RESTART_COUNT:-0} > 0)) && set -- "$@" resume=auto # queued again: resume=never was meant for the first time

driver='' asked_to_stop=''
stop_driver() { # never to srun, which would kill what has not saved yet
  asked_to_stop=1
  [[ -n $driver ]] || return 0
  echo "k5dist: asked to stop: the workers save a checkpoint"
  if ((!${#srun_options[@]})); then
    kill -USR1 "$driver" || true # apptainer passes it on
    return 0
  fi
  local id name
  while read -r id name; do # all processes of the step get it: the driver is alone in its own
    if [[ $name == k5dist-driver ]]; then scancel --signal=USR1 "$id" || true; fi
  done < <(squeue --noheader --steps --jobs="$SLURM_JOB_ID" --format='%i %j')
}
trap stop_driver USR1 TERM

on_first=(srun --overlap --nodes=1 --ntasks=1 -w "$SLURMD_NODENAME" "${srun_options[@]}")
head=${K5DIST_HEAD_ADDRESS:-$("${on_first[@]}" "${prefix[@]}" "$python" -c \
  'import ray.util; print(ray.util.get_node_ip_address())' | tail -n 1)}
port=$((20000 + SLURM_JOB_ID % 10000)) # jobs that share a node have clusters of their own
export RAY_ADDRESS="$head:$port" K5DIST_WAIT_NODES="$SLURM_JOB_NUM_NODES"
# Ray's ports ask for this token: made here, known to this job's steps alone.
RAY_AUTH_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN
export K5DIST_RAY_HEAD="$SLURMD_NODENAME" K5DIST_RAY_PORT="$port"

# shellcheck disable=SC2016  # expanded on each node
ray_node='
options=(--block --disable-usage-stats "--num-cpus=$SLURM_CPUS_ON_NODE" "--num-gpus=${SLURM_GPUS_ON_NODE:-0}")
options+=("--temp-dir=/tmp/k5-$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}-$SLURM_NODEID")
options+=(--min-worker-port=0 --max-worker-port=0 --dashboard-agent-listen-port=0 --dashboard-agent-grpc-port=0)
if [[ $SLURMD_NODENAME == "$K5DIST_RAY_HEAD" ]]; then
  exec "$@" -m ray.scripts.scripts start --head "--port=$K5DIST_RAY_PORT" --include-dashboard=false "${options[@]}"
fi
exec "$@" -m ray.scripts.scripts start "--address=$RAY_ADDRESS" "${options[@]}"'
srun --overlap --job-name=k5dist-ray --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" \
  --ntasks-per-node=1 "${srun_options[@]}" bash -c "$ray_node" ray "${prefix[@]}" "$python" \
  >"/tmp/k5-ray-$SLURM_JOB_ID.log" 2>&1 &
ray=$!

for ((i = 0; i < 240; i++)); do # until the head listens
  (exec 3<>"/dev/tcp/$head/$port") 2>/dev/null && break
  kill -0 "$ray" 2>/dev/null || break
  [[ -z $asked_to_stop ]] || break
  sleep 1
done

command=("${prefix[@]}" "$python" -m k5dist.launch "$@" cluster.kind=ray "cluster.address=$RAY_ADDRESS")
if ((${#srun_options[@]})); then # pyxis enters a container by srun alone
  command=("${on_first[@]}" --job-name=k5dist-driver "${command[@]}")
fi
status=130
if [[ -z $asked_to_stop ]]; then
  "${command[@]}" &
  driver=$!
  if [[ -n $asked_to_stop ]]; then stop_driver; fi # asked in between
  while :; do # a signal interrupts `wait`; the driver goes on
    wait "$driver" && status=0 || status=$?
    kill -0 "$driver" 2>/dev/null || break
  done
fi
trap - USR1 TERM

if ((status != 0 && status != 130)); then
  echo "k5dist: the last lines of Ray on all nodes:" >&2
  tail -n 5 "/tmp/k5-ray-$SLURM_JOB_ID.log" >&2 || true
fi
kill -TERM "$ray" 2>/dev/null || true # srun ends Ray on all nodes
for ((i = 0; i < 30; i++)); do kill -0 "$ray" 2>/dev/null && sleep 0.5; done
kill -KILL "$ray" 2>/dev/null || true
rm -rf "/tmp/k5-ray-$SLURM_JOB_ID.log" "/tmp/k5-$SLURM_JOB_ID-"*
if [[ -n $asked_to_stop && $status -ne 0 ]]; then
  echo "k5dist: queued again; it goes on from the newest checkpoint"
  scontrol requeue "$SLURM_JOB_ID"
  sleep 60 # Slurm ends the script
fi
exit "$status"
