"""A real Slurm of two emulated nodes on this machine: both scripts, and a run that is stopped and goes on.

Each job has a Ray of its own: those of whole runs take minutes, and `-m slow` asks for them.
"""

from __future__ import annotations

import os
import re
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
    *("+flavour=t2v-tiny", "train.steps=30", "checkpoint.every=1000", "validation.prompts=[]"),
    "stages=[plan,precache,train]",
)
MISSING = [name for name in ("slurmctld", "slurmd", "sbatch", "munged", "unshare") if shutil.which(name) is None]

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(bool(MISSING), reason=f"missing: {', '.join(MISSING)} (Debian: slurmctld slurmd munge)"),
    pytest.mark.skipif(os.getuid() != 0, reason="slurmd and name spaces need root"),
]


REFUSED = """
from k5dist.cluster import slurm
from k5dist.config import ConfigError
for options in (["--partition=nowhere"], ["--nodes=3"], ["--nodes=1", "--time=99:00:00"], ["--gpus-per-node=1"]):
    script = "\\n".join(["#!/bin/bash", *(f"#SBATCH {option}" for option in options), "true"]) + "\\n"
    good = slurm.SlurmJob("good", "#!/bin/bash\\n#SBATCH --begin=now+1hour\\ntrue\\n", after_previous=False)
    try:
        slurm.submit([good, slurm.SlurmJob("bad", script, after_previous=True)])
    except ConfigError as error:
        print(options[-1], error.key, error.rule, sep="|", flush=True)
"""


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """Sockets of munge lie below it, and their paths are bounded."""
    with tempfile.TemporaryDirectory(prefix="k5-", dir="/tmp") as folder:
        yield Path(folder)


def test_what_slurm_refuses_is_one_message_and_leaves_nothing_queued(short_folder: Path) -> None:
    """A queue that does not exist, more nodes and more time than there are, GPUs of a cluster without."""
    (short_folder / "refused.py").write_text(REFUSED)
    script = f"{sys.executable} {short_folder}/refused.py && echo queued: $(squeue --noheader --format=%j)"
    command = ["bash", HOME / "tests" / "cluster" / "slurm" / "two_nodes.sh", short_folder / "slurm", "bash", "-c"]
    environment = {**os.environ, "PYTHONPATH": str(HOME)}
    done = subprocess.run([*command, script], cwd=HOME, env=environment, capture_output=True, text=True, check=False)
    *refused, queued = [line.split("|") for line in done.stdout.splitlines()]
    assert [line[:2] for line in refused] == [
        ["--partition=nowhere", "slurm.partition"],
        ["--nodes=3", "cluster.nodes"],
        ["--time=99:00:00", "slurm.time"],
        ["--gpus-per-node=1", "cluster.gpus_per_node"],
    ], done.stdout + done.stderr
    assert queued == ["queued:"], done.stdout


# In the place of pyxis: its options go, and the command is a step of the real Slurm all the same.
SRUN = """#!/bin/bash
kept=()
for word in "$@"; do [[ $word == --container-* ]] || kept+=("$word"); done
exec {srun} "${{kept[@]}}"
"""


@pytest.mark.slow
@pytest.mark.parametrize("as_step", [False, True])
def test_stopped_queued_again_and_finished_with_the_losses_of_an_undisturbed_run(
    as_step: bool, short_folder: Path
) -> None:
    """With `as_step` the driver is a step of its own, as it is in a container of pyxis's."""
    scripts = HOME / "tests" / "cluster" / "slurm"
    command = ["bash", scripts / "two_nodes.sh", short_folder / "slurm", "bash", scripts / "preempt.sh", short_folder]
    environment = {**os.environ, "PYTHONPATH": str(HOME)}
    if as_step:
        (short_folder / "srun").write_text(SRUN.format(srun=shutil.which("srun")))
        (short_folder / "srun").chmod(0o755)
        environment["PATH"] = f"{short_folder}:{environment['PATH']}"
    container = ["slurm.container=k5.sqsh"] if as_step else []
    done = subprocess.run(
        [*command, sys.executable, *COMMAND, *container],
        cwd=HOME,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
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
    assert sorted(found) == list(range(1, 31))
    assert jobs.losses(root, preempted.info.run_id) == found
    jobs.wait_until_nothing_runs(str(root))


@pytest.mark.slow  # two allocations one after the other, each with a Ray of its own: minutes
def test_a_sweep_is_a_job_array_and_what_waits_is_taken_out_of_the_queue(short_folder: Path) -> None:
    scripts = HOME / "tests" / "cluster" / "slurm"
    command = ["bash", scripts / "two_nodes.sh", short_folder / "slurm", "bash", scripts / "sweep.sh", short_folder]
    overrides = ["+flavour=t2v-tiny", "train.steps=4", "validation.every=0", "data.held_out=0.0", *COMMAND[-1:]]
    done = subprocess.run(
        [*command, sys.executable, *overrides, "optimizer.lr=1e-3,3e-3"],
        cwd=HOME,
        env={**os.environ, "PYTHONPATH": str(HOME)},
        capture_output=True,
        text=True,
        check=False,
    )
    said = {path.stem: path.read_text() for path in short_folder.glob("*.out")}
    everything = "\n".join([done.stdout, done.stderr, *said.values()])
    assert done.returncode == 0, everything
    assert "submitted lr-sweep: job 2 after 1" in done.stdout, everything
    assert "queue: job 2_1: PENDING" in done.stdout and "took job 2_1 out of Slurm's queue" in done.stdout, everything
    second = next(line for line in done.stdout.splitlines() if line.startswith("second: ")).split()[1]
    states = dict(re.findall(r"^(lr-[0-9a-f]{10}) +(\w+)", done.stdout, re.MULTILINE))
    assert states.pop(second) == "stopped" and list(states.values()) == ["finished"], everything
    assert set(said) == {"lr-sweep-precache-4294967294", "lr-sweep-0"}, everything
    assert "14 seen, 14 encoded" in said["lr-sweep-precache-4294967294"], everything
    assert "14 seen, 0 encoded, 14 cached before" in said["lr-sweep-0"], everything
    (first,) = states
    run = jobs.the_run(short_folder / "root", first)
    assert run.info.status == "FINISHED"
    assert jobs.the_run(short_folder / "root", "lr-sweep").info.run_id == run.data.tags["mlflow.parentRunId"]
