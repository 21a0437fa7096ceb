"""A cache held against its own checksums: every kind of damage is named, and only it; repair and prune remove rows."""

from __future__ import annotations

import shutil
import uuid
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from k5dist import storage
from k5dist.cache import layout
from k5dist.cache.shards import Record, ShardStore, places
from k5dist.cache.verify import Bad, prune, stores, verify, wanted_keys

LATENT = (3, 4, 6, 16)  # of 9 × 32 × 48


def record(key: str, tensor: np.ndarray | None = None) -> Record:
    rng = np.random.default_rng(sum(map(ord, key)))
    finite = rng.integers(0, 0x4000, LATENT).astype(np.uint16)
    columns = {"frames": 9, "height": 32, "width": 48, "caption": "a", "caption_key": "a"}
    columns |= {"uri": f"/clips/{key}.mp4", "start": 0.0, "end": None, "first_frame": False}
    columns = {name: value for name, value in columns.items() if name in layout.SAMPLE_COLUMNS}
    return Record(key, {"mean": finite if tensor is None else tensor, "logvar": finite}, columns)


@pytest.fixture(params=["local", "memory"])
def cache(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    root = str(tmp_path) if request.param == "local" else f"memory://{uuid.uuid4().hex}"
    uri = storage.join(root, "cache", "f")
    store = layout.samples(uri)
    store.write([record("a"), record("b"), record("c")])
    store.write([record("d")])
    encoding = layout.TextEncoding("{}", 0, 8)
    text = Record("t", {"qwen": np.zeros((2, 8), np.uint16)}, {"caption": "a", "text_length": 2})
    layout.captions(uri, encoding).write([text])
    return uri


def faults(cache: str) -> dict[str, str]:
    return {bad.key: bad.reason for store in stores(cache) for bad in verify(store)}


def damage(store: ShardStore, key: str, change: bytes, at: int) -> None:
    table = store.index()
    place = places(table)[table.column("key").to_pylist().index(key)]
    data = bytearray(storage.read_bytes(store.shard_uri(place.shard)))
    data[place.offset + at : place.offset + at + len(change)] = change
    storage.publish_bytes(store.shard_uri(place.shard), bytes(data))


def test_a_whole_cache_has_no_faults(cache: str) -> None:
    seen = []
    assert [bad for store in stores(cache) for bad in verify(store, lambda: seen.append(1))] == []
    assert len(seen) == 5, "every sample and every caption is read"


def test_one_flipped_bit_is_one_bad_sample(cache: str) -> None:
    store = layout.samples(cache)
    table = store.index()
    place = places(table)[1]
    byte = storage.read_bytes(store.shard_uri(place.shard), place.offset + 99, place.offset + 100)[0]
    damage(store, "b", bytes([byte ^ 1]), 99)
    assert list(verify(store)) == [Bad("b", "/clips/b.mp4", faults(cache)["b"])]
    assert "have changed" in faults(cache)["b"]


def test_missing_and_torn_shards_name_their_samples(cache: str) -> None:
    store = layout.samples(cache)
    shards = dict(zip(*(store.index().column(name).to_pylist() for name in ("key", "shard")), strict=True))
    data = storage.read_bytes(store.shard_uri(shards["a"]))
    storage.publish_bytes(store.shard_uri(shards["a"]), data[: len(data) - 10])
    storage.remove(store.shard_uri(shards["d"]))
    found = faults(cache)
    assert found.keys() == {"c", "d"}
    assert "ends within it" in found["c"]
    assert "missing" in found["d"]


def test_numbers_and_shapes_are_looked_at(cache: str) -> None:
    store = layout.samples(cache)
    infinite = np.zeros(LATENT, np.uint16)
    infinite[1, 2, 3, 4] = 0x7F80
    short = np.zeros((2, *LATENT[1:]), np.uint16)
    store.write([record("e", infinite), record("f", short)])
    found = faults(cache)
    assert found.keys() == {"e", "f"}
    assert "infinities" in found["e"]
    assert "[2, 4, 6], a clip of 9×32×48 has latents of [3, 4, 6]" in found["f"]


def test_removed_rows_are_gone_and_all_others_stay(cache: str) -> None:
    store = layout.samples(cache)
    before = {
        key: store.read(place)
        for key, place in zip(store.index().column("key").to_pylist(), places(store.index()), strict=True)
    }
    assert store.remove({"b", "d", "nobody"}) == 2
    assert store.keys() == {"a", "c"}
    for key, place in zip(["a", "c"], places(store.index()), strict=True):
        assert all((store.read(place)[name] == tensor).all() for name, tensor in before[key].items())
    assert len(storage.list_folder(storage.join(cache, "shards"))) == 1, "a shard without records goes"
    assert store.remove({"c"}) == 1
    store.write([record("b"), record("c")])
    assert faults(cache) == {}
    assert store.keys() == {"a", "b", "c"}


def test_prune_keeps_what_a_run_was_begun_with(cache: str) -> None:
    root = cache.rsplit("/cache/", 1)[0]
    layout.write_selection(storage.join(root, "runs", "one", layout.SELECTION), layout.selection(["a"]))
    layout.write_selection(storage.join(root, "runs", "two", layout.SELECTION), layout.selection(["c", "elsewhere"]))
    storage.publish_bytes(storage.join(root, "runs", "three", "plan.json"), b"{}")
    assert wanted_keys(root) == {"a", "c", "elsewhere"}
    assert prune(layout.samples(cache), wanted_keys(root)) == 2
    assert layout.samples(cache).keys() == {"a", "c"}


def add_features(cache: str, encoder: str, *keys: str, frames: int = 3) -> ShardStore:
    store = layout.features(cache, encoder)
    tensor = np.full((frames, 2, 3, 8), 0x3F80, np.uint16)
    store.write([Record(key, {"features": tensor}, {"uri": f"/clips/{key}.mp4"}) for key in keys])
    return store


def test_features_are_held_against_their_checksums_and_their_samples_length(cache: str) -> None:
    store, samples = add_features(cache, "dino", "a", "b", "gone"), layout.samples(cache)
    assert list(verify(store, samples=samples)) == []
    damage(store, "a", b"\x80\x7f", 10)
    add_features(cache, "dino", "c", frames=2)
    found = {bad.name: bad.reason for bad in verify(store, samples=samples)}
    assert found.keys() == {"/clips/a.mp4", "/clips/c.mp4"}
    assert "have changed" in found["/clips/a.mp4"]
    assert found["/clips/c.mp4"] == "features of 2 frames, its latents have 3"


def test_prune_keeps_the_features_of_runs_with_their_encoder(cache: str) -> None:
    root = cache.rsplit("/cache/", 1)[0]
    stores_ = {name: add_features(cache, name, "a", "b", "c") for name in ("dino", "other")}
    for run, key, features_id in (("one", "a", "dino"), ("two", "b", ""), ("old", "c", None)):
        uri = storage.join(root, "runs", run)
        layout.write_selection(storage.join(uri, layout.SELECTION), layout.selection([key]))
        if features_id is not None:
            storage.publish_bytes(storage.join(uri, "plan.json"), f'{{"features_id": "{features_id}"}}'.encode())
    for name, store in stores_.items():
        prune(store, wanted_keys(root, name))
    assert stores_["dino"].keys() == {"a", "c"}, "nobody knows what the oldest run wants"
    assert stores_["other"].keys() == {"c"}
    assert wanted_keys(root) == {"a", "b", "c"}


def test_two_encodings_of_one_clip_live_side_by_side(tmp_path: Path) -> None:
    """Two jobs whose GPUs round differently must not write two contents under one name."""
    other = record("a", np.full(LATENT, 7, np.uint16))
    stores_ = [layout.samples(str(tmp_path / name)) for name in ("both", "one", "two")]
    both, one, two = stores_
    assert one.write([record("a")]) == both.write([record("a")])
    assert two.write([other]) == both.write([other])
    assert len(storage.list_folder(storage.join(both.uri, "shards"))) == 2
    assert both.index().num_rows == 1
    assert list(verify(both)) == []
    part = storage.join(both.uri, "index", storage.list_folder(storage.join(both.uri, "index"))[0])
    assert pq.read_table(part).column("crc32").type == "uint32"
    shutil.rmtree(both.uri)
