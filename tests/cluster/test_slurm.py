"""A real Slurm of two emulated nodes on this machine: both scripts, and a run that is stopped, queued again and goes on.

Slurm lets a requeued job wait for two minutes: `-m slow` asks for this test.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster import job as jobs

HOME = Path(__file__).parent.parent.parent
COMMAND = (
    *("+flavour=t2v-tiny", "train.steps=80", "checkpoint.every=1000", "validation.prompts=[]"),
    "stages=[plan,precache,train]",
)
MISSING = [name for name in ("slurmctld", "slurmd", "sbatch", "munged", "unshare") if shutil.which(name) is None]

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(bool(MISSING), reason=f"missing: {', '.join(MISSING)} (Debian: slurmctld slurmd munge)"),
    pytest.mark.skipif(os.getuid() != 0, reason="slurmd and name spaces need root"),
]


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """Sockets of munge lie below it, and their paths are bounded."""
    with tempfile.TemporaryDirectory(prefix="k5-", dir="/tmp") as folder:
        yield Path(folder)


def test_stopped_queued_again_and_finished_with_the_losses_of_an_undisturbed_run(short_folder: Path) -> None:
    scripts = HOME / "tests" / "cluster" / "slurm"
    command = ["bash", scripts / "two_nodes.sh", short_folder / "slurm", "bash", scripts / "preempt.sh", short_folder]
    environment = {**os.environ, "PYTHONPATH": str(HOME)}
    done = subprocess.run(
        [*command, sys.executable, *COMMAND], cwd=HOME, env=environment, capture_output=True, text=True, check=False
    )
    said = {path.stem: path.read_text() for path in short_folder.glob("*.out")}
    everything = "\n".join([done.stdout, done.stderr, *said.values()])
    assert done.returncode == 0, everything
    assert "k5dist: asked to stop" in said["preempted"], everything
    assert "resumed from the checkpoint of step" in said["preempted"], everything
    assert "clips: all 14 are in the cache" in said["precache"], everything
    root = short_folder / "root"
    preempted, whole = (jobs.the_run(root, name) for name in ("preempted", "whole"))
    assert preempted.info.status == whole.info.status == "FINISHED", everything
    found = jobs.losses(root, whole.info.run_id)
    assert sorted(found) == list(range(1, 81))
    assert jobs.losses(root, preempted.info.run_id) == found
    jobs.wait_until_nothing_runs(str(root))
