"""The whole main job on object storage: a real S3 server on loopback, and nothing on the local disk but scratch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from mlflow import MlflowClient

from k5dist import storage
from k5dist.cache.keys import content_digest
from k5dist.precache.video import decode_clip, probe
from tests.cluster import job as jobs
from tests.cluster.faults import FaultyProxy
from tests.cluster.job import SHORT
from tests.cluster.s3 import BUCKET, SECRET, client, server
from tests.numbered import write

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of a client of a fresh S3 server with one empty bucket."""
    with server(tmp_path_factory.mktemp("s3")) as environment:
        yield environment


def objects(environment: dict[str, str]) -> dict[str, int]:
    pages = client(environment).get_paginator("list_objects_v2").paginate(Bucket=BUCKET)
    return {entry["Key"]: entry["Size"] for page in pages for entry in page.get("Contents", [])}


def test_the_main_job_lives_in_a_bucket(s3: dict[str, str], tmp_path: Path) -> None:
    home, work, scratch = tmp_path / "home", tmp_path / "work", tmp_path / "scratch"
    for folder in (home, work, scratch):
        folder.mkdir()
    environment = {**s3, "HOME": str(home), "TMPDIR": str(scratch)}
    tracking = f"tracking.uri=sqlite:///{scratch}/mlflow.db"
    job = jobs.run(f"s3://{BUCKET}/root", *SHORT, "name=whole", tracking, env=environment, cwd=work)
    assert job.process.returncode == 0, job.output

    found = objects(s3)
    run = "root/runs/whole"
    assert f"{run}/plan.json" in found
    assert f"{run}/checkpoints/step-00000012/COMMITTED" in found
    assert f"{run}/export/pytorch_lora_weights.safetensors" in found
    assert f"{run}/validation/step-00000012/00.mp4" in found
    assert any(key.startswith("root/cache/") and key.endswith(".safetensors") for key in found)
    assert any(key.startswith("root/cache/") and "/index/" in key for key in found)
    artifacts = {key.split("/artifacts/")[1] for key in found if key.startswith("root/mlartifacts/")}
    assert {"config.yaml", "plan.json", "videos/step-00000012/00.mp4", "logs/train.log"} <= artifacts

    assert [p for p in work.rglob("*") if p.is_file()] == []
    kept = {p.relative_to(home).as_posix() for p in home.rglob("*") if p.is_file()}
    own = {name for name in kept if not name.startswith((".cache/k5dist/pretrained/", ".ray/", ".config/"))}
    assert own == set(), "but for copies of encoders and what Ray keeps of itself"
    left = [p.name for p in scratch.iterdir() if p.name.startswith("k5dist-")]
    assert left == [], "scratch is cleaned up"

    for place in (job.output, *_texts(s3, run)):
        assert SECRET not in place
    status = MlflowClient(f"sqlite:///{scratch}/mlflow.db").search_runs(["1"])[0].info.status
    assert status == "FINISHED"


def _texts(environment: dict[str, str], run: str) -> list[str]:
    s3 = client(environment)
    return [
        s3.get_object(Bucket=BUCKET, Key=f"{run}/{n}")["Body"].read().decode() for n in ("plan.json", "config.yaml")
    ]


def test_of_a_long_film_only_the_part_that_is_needed_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Probe, content digest and five frames near the end of a file of 40 MB, by range requests."""
    fsspec.filesystem("s3", skip_instance_cache=True).clear_instance_cache()
    with server(tmp_path) as environment:
        proxy = FaultyProxy(environment["AWS_ENDPOINT_URL"])
        for name, value in (environment | {"AWS_ENDPOINT_URL": proxy.url}).items():
            monkeypatch.setenv(name, value)
        path = tmp_path / BUCKET / "film.mp4"
        picture = np.random.default_rng(0).integers(0, 255, (256, 256, 3), np.uint8)
        frames = [np.roll(picture, 8 * at, 0) for at in range(480)]
        write(str(path), frames, codec="mpeg4", gop=12, options={"qmin": "1", "qmax": "2", "b:v": "40M"})
        size = path.stat().st_size
        assert size > 30e6
        wanted: dict[str, Any] = {
            "start": 18.0,
            "end": None,
            "num_frames": 5,
            "frame_rate": 24,
            "height": 64,
            "width": 64,
        }
        try:
            with storage.open_read(f"s3://{BUCKET}/film.mp4") as file:
                assert probe(file).num_frames == 480  # type: ignore[arg-type]
            probed = sum(proxy.sent.values())
            with storage.open_read(f"s3://{BUCKET}/film.mp4") as file:
                remote = decode_clip(file, **wanted)  # type: ignore[arg-type]
            decoded = sum(proxy.sent.values()) - probed
            content_digest(f"s3://{BUCKET}/film.mp4")
            digested = sum(proxy.sent.values()) - probed - decoded
        finally:
            proxy.close()
            fsspec.filesystem("s3", skip_instance_cache=True).clear_instance_cache()
        assert np.array_equal(remote, decode_clip(str(path), **wanted))
        assert max(probed, decoded) < 4 * storage.READ_AHEAD + 2e6, (probed, decoded, size)
        assert digested < 6e6, digested


def test_a_server_that_falls_silent_is_asked_again(s3: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Reads, listings and writes: a request that nobody answers is given up and made again."""
    for name, value in s3.items():
        monkeypatch.setenv(name, value)
    proxy = FaultyProxy(s3["AWS_ENDPOINT_URL"])
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    monkeypatch.setattr(storage, "READ_SECONDS", 0.5)
    fsspec.filesystem("s3").clear_instance_cache()
    uri = f"s3://{BUCKET}/silent/file"
    try:
        proxy.silent = 1
        storage.publish_bytes(uri, b"content")
        proxy.silent = 2
        assert storage.read_bytes(uri) == b"content"
        proxy.silent = 1
        assert [name.rsplit("/", 1)[-1] for name in storage.list_folder(f"s3://{BUCKET}/silent")] == ["file"]
        assert (proxy.silent, proxy.faults["silent"]) == (0, 4)
    finally:
        proxy.close()
        fsspec.filesystem("s3").clear_instance_cache()
