"""The scripts that `cluster=slurm` submits, and what it says when Slurm refuses. A real Slurm: tests/cluster."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from k5dist.cluster import slurm
from k5dist.compose import compose, to_run_config
from k5dist.config import ConfigError
from k5dist.plan import ClusterFacts, make_plan

TINY = ["+flavour=t2v-tiny", "cluster=slurm", "cluster.nodes=2", "name=a"]


def jobs(*overrides: str, gpus: int = 0) -> list[slurm.SlurmJob]:
    typed = [*TINY, *overrides]
    return slurm.jobs(make_plan(to_run_config(compose(typed)), ClusterFacts(gpus), "generated:test"), typed)


def directives(job: slurm.SlurmJob) -> set[str]:
    return {line.removeprefix("#SBATCH ") for line in job.script.splitlines() if line.startswith("#SBATCH ")}


def test_a_script_asks_for_what_the_plan_says() -> None:
    asked = ["slurm.partition=long", "slurm.account=us", "slurm.qos=high", "slurm.options=[--exclusive]"]
    (job,) = jobs(*asked, "cluster.gpus_per_node=8", "train.batch_size=16", gpus=8)
    assert {"--partition=long", "--account=us", "--qos=high", "--exclusive", "--nodes=2"} <= directives(job)
    assert {"--gpus-per-node=8", "--signal=B:USR1@180", "--requeue", "--ntasks-per-node=1"} <= directives(job)
    subprocess.run(["bash", "-n"], input=job.script, text=True, check=True)


def arguments_of(job: slurm.SlurmJob) -> list[str]:
    """The overrides as bash reads them out of the script."""
    head = job.script.partition("# Inside a Slurm allocation")[0]
    done = subprocess.run(
        ["bash"], input=head + "\nprintf '%s\\n' \"$@\"\n", capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()


def test_overrides_pass_the_shell_unchanged() -> None:
    typed = """validation.prompts=["it's $HOME `a` !", "two  spaces"]"""
    (job,) = jobs(typed)
    assert arguments_of(job) == [*TINY, typed, "train.batch_size=4"]


def test_other_gpus_make_the_cache_in_a_job_before() -> None:
    before, behind = jobs(
        "slurm.precache_partition=cheap", "slurm.precache_nodes=1", "slurm.precache_gpus_per_node=2", "resume=never",
        "cluster.gpus_per_node=8", "train.batch_size=null", gpus=8,
    )  # fmt: skip
    assert {"--partition=cheap", "--nodes=1", "--gpus-per-node=2"} <= directives(before)
    assert {"--nodes=2", "--gpus-per-node=8"} <= directives(behind)
    assert (before.after_previous, behind.after_previous) == (False, True)
    ours, theirs = arguments_of(before), arguments_of(behind)
    assert "stages=[plan,precache]" in ours and "stages=[plan,train,validate,export]" in theirs
    # One run: the batch of the training's 16 workers for both, and what the first has left is not removed.
    assert ours[-1] == theirs[-1] == "train.batch_size=16"
    assert "resume=auto" in theirs and "resume=auto" not in ours


def test_a_container_runs_ray_and_the_driver() -> None:
    (job,) = jobs("slurm.container=k5.sqsh", "slurm.container_kind=apptainer", "slurm.container_mounts=['/data:/data']")
    lines = job.script.splitlines()
    assert "export K5DIST_CONTAINER=k5.sqsh" in lines and "export K5DIST_CONTAINER_KIND=apptainer" in lines
    assert "export K5DIST_CONTAINER_MOUNTS=/data:/data" in lines
    assert not any(line.startswith("export K5DIST_PYTHON=") for line in lines), "the image has a Python of its own"


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("slurm.time=tomorrow", "slurm.time"),
        ("slurm.options=[-x]", "slurm.options"),
        ("slurm.container_kind=docker", "slurm.container_kind"),
        ("slurm.precache_nodes=0", "slurm.precache_nodes"),
        ("slurm.signal_seconds=0", "slurm.signal_seconds"),
        ("slurm.precache_gpus_per_node=-1", "slurm.precache_gpus_per_node"),
    ],
)
def test_what_slurm_could_not_take_is_refused_before(override: str, key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        to_run_config(compose([*TINY, override]))
    assert caught.value.key == key


def test_a_machine_without_slurm_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="no sbatch"):
        slurm.submit(jobs())


def test_a_printed_script_runs_when_it_is_submitted() -> None:
    (job,) = jobs("cluster.dry_run=true")
    assert not any("dry_run" in argument for argument in arguments_of(job))


@pytest.mark.parametrize("kind", ["local", "ray"])
def test_what_is_not_submitted_has_no_dry_run(kind: str) -> None:
    with pytest.raises(ConfigError, match=r"stages=\[plan\]"):
        to_run_config(compose(["+flavour=t2v-tiny", f"cluster={kind}", "cluster.dry_run=true"]))
