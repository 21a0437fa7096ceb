#!/usr/bin/env bash
# The tour in one command: makes .venv, installs the project, and runs the whole main job on a laptop's CPU: real
# footage, real model classes with random weights. Run it again and it finds everything done. Arguments go to the job:
#   ./launch/quickstart.sh train.steps=100
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/setup.sh

setup_project quickstart
started=$SECONDS
.venv/bin/python -m k5dist.launch +flavour=t2v-tiny "$@" ||
  fail "The job did not finish (its message is above). The same command goes on from where it stopped."
echo
echo "The whole job took $((SECONDS - started)) s. Next:"
echo "  your own clips   .venv/bin/python -m k5dist.launch +flavour=t2v-tiny data.source=<folder with clip.mp4 and clip.txt>"
echo "  the real model   .venv/bin/python -m k5dist.launch +flavour=t2v-lite-sft-5s data.source=<folder>     (GPU)"
echo "  only the plan    .venv/bin/python -m k5dist.launch +flavour=t2v-pro-sft-10s-hd cluster.nodes=4 cluster.gpus_per_node=8 'stages=[plan]'"
