"""Precache under faults: after any of them, and the same command again where the driver died, the cache is the one of
an undisturbed run, byte for byte."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from k5dist.retry import SECONDS_VARIABLE
from tests.cluster import faults
from tests.cluster import job as jobs
from tests.cluster.s3 import BUCKET, server

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]
CLIPS = 30
COMMAND = (
    *("+flavour=t2v-tiny", "stages=[plan,precache]", "name=clips"),
    # Four clips a shard; decoding apart from the VAE's actor, as it is on a machine with GPUs.
    *("precache.shard_size_mib=0.12", "precache.text_batch_size=4", "precache.decode_workers=1"),
)


@dataclass
class Place:
    """A bucket behind the proxy, and the folder in which its objects lie."""

    proxy: faults.FaultyProxy
    folder: Path
    environment: dict[str, str]

    def root(self, name: str) -> Path:
        return self.folder / name

    def start(self, name: str, *overrides: str, **env: str) -> jobs.Job:
        scratch = self.folder.parent.parent / f"tracking-{name}"
        scratch.mkdir(exist_ok=True)
        tracking = f"tracking.uri=sqlite:///{scratch}/mlflow.db"
        source = f"data.source=s3://{BUCKET}/clips"
        environment = {**self.environment, faults.MARK: name, **env}
        return jobs.start(f"s3://{BUCKET}/{name}", *COMMAND, source, tracking, *overrides, env=environment)

    def run(self, name: str, *overrides: str, **env: str) -> jobs.Job:
        job = self.start(name, *overrides, **env)
        job.wait()
        assert job.process.returncode == 0, job.output
        return job


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("faults")
    with server(folder / "s3") as environment:
        proxy = faults.FaultyProxy(environment["AWS_ENDPOINT_URL"])
        faults.make_clips(folder / "s3" / BUCKET / "clips", CLIPS)
        yield Place(proxy, folder / "s3" / BUCKET, environment | {"AWS_ENDPOINT_URL": proxy.url})
        proxy.close()


@pytest.fixture(scope="module")
def undisturbed(place: Place) -> dict[str, str]:
    """The files of the cache that the others are compared with."""
    job = place.run("undisturbed")
    assert f"{CLIPS} seen, {CLIPS} encoded, 0 cached before" in job.output
    assert faults.shards(place.root("undisturbed")) == 8
    files = faults.cache_files(place.root("undisturbed"))
    assert not any("orders/" in name for name in files), "orders go when they are done"
    return files


def test_stumbling_storage_is_asked_again(place: Place, undisturbed: dict[str, str]) -> None:
    place.proxy.share = 0.12
    try:
        place.run("stumbling")
    finally:
        place.proxy.share = 0.0
    assert set(place.proxy.faults) == {"500", "503", "closed", "cut", "slow"}, place.proxy.faults
    assert faults.cache_files(place.root("stumbling")) == undisturbed


def test_storage_that_stays_away_and_a_killed_driver(place: Place, undisturbed: dict[str, str]) -> None:
    """Storage goes: the job fails with one line and blames no clip. The driver dies: the next one goes on."""
    root = place.root("away")
    job = place.start("away", **{SECONDS_VARIABLE: "2"})
    faults.wait_until(job, lambda: faults.shards(root) >= 1, "the first shard")
    place.proxy.away = True
    status = job.wait()
    place.proxy.away = False
    assert status == 1, job.output
    said = [line for line in job.lines if line.startswith("storage did not answer for")]
    assert len(said) == 1 and SECONDS_VARIABLE in said[0], job.output
    assert "Traceback" not in job.output
    assert not list(root.glob("cache/*/failures.parquet")) or faults.failures(root) == []

    before = faults.shards(root)
    assert 1 <= before < 8
    job = place.start("away")
    faults.wait_until(job, lambda: faults.shards(root) > before, "another shard")
    jobs.kill_all(job, "no such plan")
    left = faults.shards(root)
    assert left < 8, "killed in the middle"

    again = place.run("away")
    assert f"{4 * left} cached before" in again.output, again.output
    assert faults.cache_files(root) == undisturbed


def test_killed_workers_are_replaced(place: Place, undisturbed: dict[str, str]) -> None:
    """SIGKILL to the text encoders' actor, to a decoding task and to the VAE's actor, each at its work."""
    job = place.start("workers")
    for title in ("TextStage)).submit", "Map(decode_row)", "VaeStage)).submit"):
        faults.wait_until(job, lambda title=title: faults.kill(faults.workers("workers", title)), title)
    assert job.wait() == 0, job.output
    assert faults.cache_files(place.root("workers")) == undisturbed


def test_a_lost_node_is_done_without(
    place: Place, undisturbed: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL to a raylet of a cluster of two nodes, in the middle of the work."""
    from ray.cluster_utils import Cluster

    for name, value in (place.environment | {"RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    quick = {f"health_check_{name}_ms": 1000 for name in ("initial_delay", "period", "timeout")}
    quick["health_check_failure_threshold"] = 3
    head = {"num_cpus": 4, "include_dashboard": False, "_system_config": quick}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        second = cluster.add_node(num_cpus=2)
        many = ("precache.decode_workers=2", "precache.vae_workers=2")  # clips overtake one another
        job = place.start("nodes", "cluster=ray", f"cluster.address={cluster.address}", *many)
        faults.wait_until(job, lambda: faults.shards(place.root("nodes")) >= 1, "the first shard")
        cluster.remove_node(second, allow_graceful=False)
        assert job.wait() == 0, job.output
    finally:
        cluster.shutdown()
    assert faults.cache_files(place.root("nodes")) == undisturbed


def test_two_jobs_at_once_write_the_same_shards(place: Place, undisturbed: dict[str, str]) -> None:
    """The second comes when the first is at its work, and would cut larger groups: it keeps the first one's."""
    root = place.root("both")
    first = place.start("both")
    faults.wait_until(first, lambda: list(root.glob("cache/*/orders/*")), "an order")
    faults.wait_until(first, lambda: faults.workers("both", "VaeStage)).submit"), "the VAE at work")
    held = faults.workers("both", "VaeStage))")
    faults.send(held, signal.SIGSTOP)  # it has not finished before the second begins
    second = place.start("both", "name=other", "precache.shard_size_mib=0.2", **{faults.MARK: "second"})
    faults.wait_until(second, lambda: any(line.startswith("clips: ") for line in second.lines), "the second's clips")
    faults.send(held, signal.SIGCONT)
    assert (first.wait(), second.wait()) == (0, 0), f"{first.output}\n{second.output}"
    assert "nothing to encode" not in "".join(line for line in second.lines if line.startswith("clips: "))
    assert faults.cache_files(root) == undisturbed


def test_a_clip_that_kills_its_worker_ends_in_the_ledger(tmp_path: Path) -> None:
    """Whoever decodes it is killed from outside, as a kernel short of memory would do it."""
    clips, root = tmp_path / "clips", tmp_path / "root"
    faults.make_clips(clips, 6)
    poison = clips / "03.mp4"
    faults.make_slow_clip(poison)
    mark = str(tmp_path)
    limit = "precache.max_failure_ratio=0.2"
    job = jobs.start(root, *COMMAND, f"data.source={clips}", limit, env={faults.MARK: mark})
    deaths = faults.kill_who_opens(job, poison, mark, "decode_row", most=6)
    assert job.wait() == 0, job.output
    assert deaths == 3
    ((uri, stage, reason),) = faults.failures(root)
    assert (uri, stage) == (str(poison), "decode")
    assert "its worker died 3 times" in reason
    assert "6 seen, 5 encoded" in job.output
