"""`cluster.overlap` on a real Ray cluster: the second run's cache is made while the first trains, with equal losses.

The trainings are far too long: the tests stop them once they have seen what they wait for.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

from tests.cluster import job as jobs
from tests.cluster.test_runs import runs

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]
SWEEP = (
    *("-m", "+flavour=t2v-tiny", "checkpoint.every=10000", "validation.every=0", "data.held_out=0.0", "name=fox"),
    *("cluster=ray", "cluster.workers_per_node=2", "stages=[plan,precache,train]"),
)
CORES = 6


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
        patch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": CORES, "include_dashboard": False})
        try:
            yield str(cluster.address)
        finally:
            cluster.shutdown()


def wait_until_free(address: str, seconds: float = 60) -> None:
    ray.init(address=address, log_to_driver=False)
    try:
        deadline = time.monotonic() + seconds
        while ray.available_resources().get("CPU") != CORES:
            assert time.monotonic() < deadline, f"still held: {ray.available_resources()}"
            time.sleep(0.1)
    finally:
        ray.shutdown()


@pytest.mark.slow  # three drivers one after another, five trainings
@pytest.mark.timeout(1800)
def test_the_next_cache_is_made_beside_the_training_and_the_losses_are_the_same(address: str, tmp_path: Path) -> None:
    swept = (*SWEEP, f"cluster.address={address}", "data.crop=center,none")
    long = (*swept, "cluster.overlap=true", "train.steps=100000")
    interrupted = jobs.start(tmp_path / "overlap", *long)
    interrupted.wait_for(lambda line: line.startswith("meanwhile, on "), 300)
    interrupted.signal(signal.SIGINT)
    assert interrupted.wait(300) == 130, interrupted.output
    wait_until_free(address)

    job = jobs.start(tmp_path / "overlap", *long)
    done = job.wait_for(lambda line: line.startswith("meanwhile, done: precache of "), 300)
    second = done.split(":")[1].removeprefix(" precache of ")
    first = next(path.name for path in (tmp_path / "overlap" / "runs").iterdir() if path.name != second)
    job.wait_for(jobs.trained_to(1), 300, after=len(job.lines))
    job.wait_for(jobs.trained_to(4), 300)
    assert "run 2 of 2" not in job.output, "the first still trains"
    runs(tmp_path / "overlap", "stop", first)
    job.wait_for(lambda line: line.startswith("run 2 of 2"), 300)
    at = len(job.lines)
    job.wait_for(jobs.trained_to(4), 300, after=at)
    assert any("14 seen, 0 encoded, 14 cached before" in line for line in job.lines[at:]), job.output
    job.signal(signal.SIGINT)
    assert job.wait(300) == 130, job.output
    wait_until_free(address)
    jobs.wait_until_nothing_runs(str(tmp_path))

    plain = jobs.start(tmp_path / "plain", *swept, "train.steps=4")
    assert plain.wait(600) == 0, plain.output
    for crop in ("center", "none"):
        losses = [losses_of(tmp_path / root, crop) for root in ("plain", "overlap")]
        assert list(losses[0]) == [1, 2, 3, 4]
        assert {step: losses[1][step] for step in losses[0]} == losses[0]


def losses_of(root: Path, crop: str) -> dict[int, float]:
    """Of the sweep's run with that value."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{root}/mlflow.db")
    experiment = client.get_experiment_by_name("k5dist")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id], f"params.`data.crop` = '{crop}'")
    return jobs.losses(root, run.info.run_id)


@pytest.mark.slow  # two drivers, each with a training
def test_what_fails_ahead_fails_at_its_own_turn(address: str, tmp_path: Path) -> None:
    """At 6 frames a second every clip is too short."""
    where = (f"cluster.address={address}", "cluster.overlap=true", "train.steps=100000")
    job = jobs.start(tmp_path, *SWEEP, *where, "data.frame_rate=12,6")
    told = job.wait_for(lambda line: line.startswith("meanwhile, the precache of "), 300)
    assert "clips failed, more than precache.max_failure_ratio" in told
    job.wait_for(jobs.trained_to(1), 300, after=len(job.lines))
    second = told.split()[4]
    first = next(path.name for path in (tmp_path / "runs").iterdir() if path.name != second)
    runs(tmp_path, "stop", first)
    assert job.wait(300) == 1, job.output
    assert "PrecacheError: " in job.output and f"{second}  data.frame_rate=6: failed" in job.output, job.output
    assert f"{first}  data.frame_rate=12: stopped" in job.output, job.output
    wait_until_free(address)


def test_a_training_that_leaves_nothing_is_refused(address: str, tmp_path: Path) -> None:
    where = (f"cluster.address={address}", "cluster.overlap=true", "data.crop=center,none")
    job = jobs.start(tmp_path, *SWEEP, *where, "cluster.workers_per_node=4", "train.steps=4")
    assert job.wait() == 2, job.output
    assert "beside the training (0 GPUs, 5 cores) the Ray cluster has 0 GPUs and 1 cores" in job.output
    assert not list((tmp_path / "runs").glob("*/plan.json")), "nothing is begun"
