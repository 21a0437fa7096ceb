"""Whether a cache still holds what was written into it, sample by sample; and taking out what nobody wants any more."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from k5dist import storage
from k5dist.cache import layout
from k5dist.cache.shards import Place, ShardStore, places
from k5dist.shapes import Bucket

ROWS_AT_ONCE = 10_000
READERS = 16  # requests at once: an object store answers many slowly rather than one fast
_EXPONENT = 0x7F80  # of a bf16: all ones is an infinity or no number


@dataclass(frozen=True)
class Bad:
    """A record that cannot be trained on, and why. `name` is what a person knows it by: its source or its caption."""

    key: str
    name: str
    reason: str


def stores(cache_uri: str) -> list[ShardStore]:
    """The samples, every encoding's captions and every vision encoder's features."""
    folder = storage.join(cache_uri, "captions")
    captions = [ShardStore(storage.join(folder, name), layout.CAPTION_COLUMNS) for name in storage.list_folder(folder)]
    return [layout.samples(cache_uri), *captions, *feature_stores(cache_uri)]


def feature_stores(cache_uri: str) -> list[ShardStore]:
    return [layout.features(cache_uri, name) for name in storage.list_folder(storage.join(cache_uri, "features"))]


def verify(
    store: ShardStore, advance: Callable[[], None] = lambda: None, *, samples: ShardStore | None = None
) -> Iterator[Bad]:
    """Read every record of the index again and hold it against its checksum, its shape and what a number may be.

    Features are as long as their samples' latents: for theirs, `samples` says how long those are.
    """
    table = store.index()
    facts = table.drop_columns(["shard", "offset", "length", "tensors"])
    if samples is not None:
        facts = _with_shapes(facts, samples)
    called = "uri" if "uri" in store.columns else "caption"
    with ThreadPoolExecutor(READERS) as pool:
        for batch in table_batches(table.num_rows):
            rows = facts.slice(*batch).to_pylist()
            faults = pool.map(lambda place, row: _fault(store, place, row), places(table.slice(*batch)), rows)
            for row, reason in zip(rows, faults, strict=True):
                advance()
                if reason:
                    yield Bad(row["key"], str(row[called])[:200], reason)


def _with_shapes(facts: pa.Table, samples: ShardStore) -> pa.Table:
    """With the frames and sides of each record's sample; null where there is no such sample any more."""
    names = ["frames", "height", "width"]
    index = samples.index(["key", *names])
    rows = pc.index_in(facts.column("key"), value_set=index.column("key").combine_chunks())
    found = index.select(names).take(rows)
    return pa.table([*facts.columns, *found.columns], [*facts.column_names, *names])


def table_batches(rows: int) -> Iterator[tuple[int, int]]:
    """(start, count) of slices that are turned into Python objects one after another."""
    return ((start, min(ROWS_AT_ONCE, rows - start)) for start in range(0, rows, ROWS_AT_ONCE))


def _fault(store: ShardStore, place: Place, row: Mapping[str, Any]) -> str | None:
    try:
        data = storage.read_bytes(store.shard_uri(place.shard), place.offset, place.offset + place.length)
    except FileNotFoundError:
        return f"its shard {place.shard} is missing"
    if len(data) != place.length:
        return f"its shard {place.shard} ends within it: {len(data)} of {place.length} bytes"
    if zlib.crc32(data) != row["crc32"]:
        return f"its bytes in shard {place.shard} have changed since they were written"
    faults = (
        _tensor_fault(name, shape, np.frombuffer(data, np.uint16, length // 2, offset), row)
        for name, shape, offset, length in place.tensors
    )
    return next(filter(None, faults), None)


def _tensor_fault(name: str, shape: tuple[int, ...], bits: np.ndarray, row: Mapping[str, Any]) -> str | None:
    if bits.size != np.prod(shape, dtype=np.int64):
        return f"{name} holds {bits.size} numbers, its shape is {list(shape)}"
    if ((bits & _EXPONENT) == _EXPONENT).any():
        return f"{name} holds infinities or no numbers"
    if name in ("mean", "logvar"):
        # Every frame must have reached the latents: temporal tiles that lose a clip's tail are an old fault of others.
        bucket = Bucket(row["frames"], row["height"], row["width"])
        if tuple(shape[:3]) != bucket.latent_shape:
            return f"{name} is {list(shape[:3])}, a clip of {bucket} has latents of {list(bucket.latent_shape)}"
    if name == "features" and row.get("frames") is not None:
        latents = Bucket(row["frames"], row["height"], row["width"]).latent_shape[0]
        if shape[0] != latents:
            return f"features of {shape[0]} frames, its latents have {latents}"
    return None


def wanted_keys(root: str, features_id: str | None = None) -> set[str]:
    """The samples that some run below `root` was begun with; only of runs with CREPA's `features_id` where one is given
    (a run whose plan does not say counts as one)."""
    runs = storage.join(root, "runs")
    wanted: set[str] = set()
    for run in storage.list_folder(runs):
        uri = storage.join(runs, run, layout.SELECTION)
        if storage.exists(uri) and (
            features_id is None or _features_of(storage.join(runs, run)) in (features_id, None)
        ):
            wanted.update(layout.read_selection(uri))
    return wanted


def _features_of(run_uri: str) -> str | None:
    uri = storage.join(run_uri, "plan.json")
    return json.loads(storage.read_text(uri)).get("features_id") if storage.exists(uri) else None


def prune(store: ShardStore, wanted: Collection[str]) -> int:
    """Remove every record whose key is not `wanted`; how many there were."""
    keys = store.index(["key"]).column("key").to_pylist()
    return store.remove(set(keys) - set(wanted))
