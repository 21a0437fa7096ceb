"""`python -m k5dist.runs` on a run that runs: seen, read, stopped from here and from elsewhere, and lost."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from k5dist.cluster.record import read_record, write_record
from k5dist.train.checkpoint import committed_steps
from tests.cluster import faults
from tests.cluster import job as jobs

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]
ENDLESS = (
    *("+flavour=t2v-tiny", "train.steps=100000", "validation.every=0", "checkpoint.every=1000000", "name=fox"),
    *("stages=[plan,precache,train]", "data.held_out=0.0"),
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def job(root: Path) -> Iterator[jobs.Job]:
    job = jobs.start(root, *ENDLESS)
    yield job
    if job.process.poll() is None:
        job.signal(signal.SIGKILL)
    jobs.wait_until_nothing_runs(str(root / "runs" / "fox"))


def runs(root: Path, *arguments: str, before: tuple[str, ...] = ()) -> str:
    command = [*before, sys.executable, "-m", "k5dist.runs", *arguments, f"storage.root={root}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _knows_much(root: Path) -> bool:
    record = read_record(str(root / "runs" / "fox"))
    return record is not None and bool(record.pace and record.ray and record.nodes)


def _is_driver(root: Path, job: jobs.Job) -> bool:
    record = read_record(str(root / "runs" / "fox"))
    return record is not None and record.state == "running" and record.pid == job.process.pid


def test_seen_read_and_stopped(job: jobs.Job, root: Path) -> None:
    job.wait_for(jobs.trained_to(3), 300)
    faults.wait_until(job, lambda: _knows_much(root), "progress and nodes in its record")
    status = runs(root, "status", "fo")
    assert "running" in status and "RUNNING" in status, status
    assert "s each, about" in status and "1 nodes alive, no GPUs" in status and ": CPU " in status, status
    (line,) = [line for line in runs(root, "list").splitlines() if line.startswith("fox")]
    assert "train" in line and "/100000" in line and f"process {job.process.pid}" in line
    followed = subprocess.Popen(
        [sys.executable, "-m", "k5dist.runs", "logs", "fox", "--follow", f"storage.root={root}"],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert f"asked process {job.process.pid} to stop" in runs(root, "stop", "fox")
    assert job.wait() == 130, job.output
    said, _ = followed.communicate(timeout=30)
    assert "train: 3/100000" in said and "stopping: the workers finish their step" in said, said
    assert '"started"' in runs(root, "logs", "fox", "--rank", "0")
    assert '"started"' not in runs(root, "logs", "fox", "--rank", "1")
    assert "stopped" in runs(root, "status", "fox")
    (root / "mlflow.db").rename(root / "away.db")
    status = runs(root, "status", "fox")
    (root / "away.db").rename(root / "mlflow.db")
    assert "from the run's folder" in status and "loss" in status, status


@pytest.mark.skipif(os.getuid() != 0 or shutil.which("unshare") is None, reason="another host's name needs root")
def test_stopped_from_another_machine_and_then_lost(job: jobs.Job, root: Path) -> None:
    """The other machine has another name and the run's folder, and that is all."""
    job.wait_for(jobs.trained_to(1), 300)
    elsewhere = ("unshare", "--uts", "sh", "-c", 'hostname elsewhere; exec "$@"', "sh")
    assert "to stop (it looks every 2 s)" in runs(root, "stop", "fox", before=elsewhere)
    assert job.wait() == 130, job.output
    (plan,) = root.glob("runs/fox/plan.json")
    fingerprint = jobs.the_run(root, "fox").data.tags["run_fingerprint"]
    assert committed_steps(str(plan.parent / "checkpoints"), fingerprint)
    assert not (root / "runs" / "fox" / "stop-requested").exists()

    again = jobs.start(root, *ENDLESS)
    faults.wait_until(again, lambda: _is_driver(root, again), "its record")
    again.signal(signal.SIGKILL)
    again.wait()
    record = read_record(str(root / "runs" / "fox"))
    assert record is not None and record.state == "running", "nobody was there to write anything else"
    write_record(str(root / "runs" / "fox"), dataclasses.replace(record, beat=record.beat - 60))  # a minute goes by
    assert "lost: its driver is gone" in runs(root, "status", "fox")
