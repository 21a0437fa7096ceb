"""The stages `verify` and `prune` as a user runs them: damage is named and mended, what no run wants goes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from k5dist.cache import layout
from k5dist.cache.shards import ShardStore, places
from k5dist.plan import RunPlan
from k5dist.precache.video import encode_mp4
from tests.cluster import job as jobs

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]


def damage(store: ShardStore, key: str) -> Path:
    """Flip one bit in the middle of a record; returns its shard."""
    table = store.index()
    place = places(table)[table.column("key").to_pylist().index(key)]
    shard = Path(store.shard_uri(place.shard))
    data = bytearray(shard.read_bytes())
    data[place.offset + place.length // 2] ^= 1
    shard.write_bytes(data)
    return shard


def tensors(store: ShardStore) -> dict[str, list[bytes]]:
    table = store.index()
    keys = table.column("key").to_pylist()
    return {
        key: [tensor.float().numpy().tobytes() for tensor in store.read(place).values()]
        for key, place in zip(keys, places(table), strict=True)
    }


def test_damage_is_named_mended_and_what_nobody_wants_goes(tmp_path: Path) -> None:
    clips, root = tmp_path / "clips", tmp_path / "root"
    clips.mkdir()
    for name in ("a", "b", "c"):
        frames = np.random.default_rng(ord(name)).integers(0, 255, (40, 64, 96, 3), np.uint8)
        encode_mp4(frames, clips / f"{name}.mp4", frame_rate=24)
        (clips / f"{name}.txt").write_text(f"clip {name}\n")
    command = ["+flavour=t2v-tiny", f"data.source={clips}", "crepa.enabled=true", "name=clips"]
    job = jobs.run(root, *command, "stages=[precache]", "resume=never")
    assert job.process.returncode == 0, job.output
    plan = RunPlan.from_json((root / "runs" / "clips" / "plan.json").read_text())
    samples, features = layout.samples(plan.cache_uri), layout.features(plan.cache_uri, plan.features_id)
    whole, seen = tensors(samples), tensors(features)
    assert len(whole) == len(seen) == 3
    index = samples.index()
    names = dict(zip(index.column("key").to_pylist(), index.column("uri").to_pylist(), strict=True))
    other, bad = index.column("key").to_pylist()[:2]
    damage(samples, bad)
    damage(features, other)

    job = jobs.run(root, *command, "stages=[verify]", "resume=never")
    assert job.process.returncode == 1, job.output
    assert all(f"{names[key]}: its bytes in shard" in job.output for key in (bad, other))
    assert "2 records of the cache are damaged" in job.output
    assert (root / "runs" / "clips" / layout.SELECTION).exists(), "who only looks removes no run"

    job = jobs.run(root, *command, "stages=[verify]", "precache.repair=true")
    assert job.process.returncode == 0, job.output
    assert "3 seen, 1 encoded, 2 cached before" in job.output
    assert (tensors(samples), tensors(features)) == (whole, seen)

    shutil.copytree(root / "runs" / "clips", root / "runs" / "other")
    shutil.rmtree(root / "runs" / "clips")
    layout.write_selection(str(root / "runs" / "other" / layout.SELECTION), layout.selection([bad]))
    job = jobs.run(root, *command, "name=third", "stages=[verify,prune]")
    assert job.process.returncode == 0, job.output
    assert "every record is what was written" in job.output
    assert (tensors(samples), tensors(features)) == ({bad: whole[bad]}, {bad: seen[bad]})
    assert json.loads((root / "runs" / "third" / "plan.json").read_text())["name"] == "third"
