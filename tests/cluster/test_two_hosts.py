"""A training gang across two hosts: two network name spaces of this machine, joined by a cable and by nothing else."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.cluster import job as jobs

HOME = Path(__file__).parent.parent.parent
COMMAND = (
    *("+flavour=t2v-tiny", "train.steps=6", "checkpoint.every=100", "validation.every=0", "data.held_out=0.0"),
    *("stages=[plan,precache,train]", "adapter=full"),
)
MISSING = [name for name in ("ip", "unshare", "nsenter") if shutil.which(name) is None]

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.slow,  # two Rays and two trainings
    pytest.mark.timeout(900),
    pytest.mark.skipif(bool(MISSING), reason=f"missing: {', '.join(MISSING)} (Debian: iproute2 util-linux)"),
    pytest.mark.skipif(os.getuid() != 0, reason="name spaces need root"),
]


def test_a_gang_trains_across_two_hosts_as_on_one(tmp_path: Path) -> None:
    """The losses of two workers of one machine, each host's workers on the interface that the other one reaches."""
    where = ("cluster=ray", "cluster.address=10.77.0.1:6379", "cluster.nodes=2", "cluster.workers_per_node=1")
    launch = [sys.executable, "-m", "k5dist.launch", *COMMAND, *where, "name=hosts", f"storage.root={tmp_path}"]
    environment = {**os.environ, "PYTHONPATH": str(HOME), "K5DIST_PROGRESS_SECONDS": "0"}
    with tempfile.TemporaryDirectory(prefix="k5-", dir="/tmp") as folder:  # Ray's sockets have bounded paths
        script = ["bash", HOME / "tests" / "cluster" / "network" / "two_hosts.sh", folder, sys.executable]
        done = subprocess.run(
            [*script, *launch], cwd=HOME, env=environment, capture_output=True, text=True, timeout=600, check=False
        )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-6000:]
    assert "node 10.77.0.1: GLOO_SOCKET_IFNAME=east, NCCL_SOCKET_IFNAME==east" in said
    assert "node 10.77.0.2: GLOO_SOCKET_IFNAME=west, NCCL_SOCKET_IFNAME==west" in said
    came = re.search(r"from the west: (\d+) bytes", done.stdout)
    assert came and int(came[1]) > 6 * 1_000_000, "each step's gradients"
    one = jobs.run(tmp_path, *COMMAND, "name=one", "cluster.workers_per_node=2")
    assert one.process.returncode == 0, one.output
    runs = [jobs.the_run(tmp_path, name) for name in ("hosts", "one")]
    hosts, one_machine = (jobs.losses(tmp_path, run.info.run_id) for run in runs)
    assert sorted(hosts) == list(range(1, 7))
    # To the last digit they differ: a worker that has a host for itself has more threads, which add in another order.
    assert hosts == pytest.approx(one_machine, rel=2e-6)
