"""What a run notes of its samples for its workers, in its folder: their order and where they lie in the cache.

    order.json                    strata (k5dist/cache/order.py), written last: what it does not name is not there
    places/<digest>/*.parquet     FILE_ROWS rows a file: a sample's key, the place of its tensors, its captions with
                                  theirs, and CREPA's features'; sorted by stratum and key
    texts.parquet                 the places of the prompts that are no sample's

A worker opens it at once, however many samples there are: it reads the row groups that its clips fall into.
"""

from __future__ import annotations

import bisect
import collections
import dataclasses
import hashlib
import json
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from k5dist import storage
from k5dist.cache import layout
from k5dist.cache.order import Stratum, split_held_out
from k5dist.cache.rows import Rows, rows_file
from k5dist.cache.shards import ShardStore

VERSION = 1
ORDER, FOLDER, TEXTS = "order.json", "places", "texts.parquet"
FILE_ROWS = 1 << 18  # 256 row groups: the footer of a file is a few hundred KiB
_KEPT_FILES = 16
_PLACE = ["shard", "offset", "length", "tensors"]
_ALIKE = ["held_out", "frames", "height", "width", "dataset", "repeats", "probability"]


@dataclass(frozen=True)
class Stores:
    """Where a run's tensors are."""

    samples: ShardStore
    captions: ShardStore
    features: ShardStore | None = None

    @classmethod
    def of(cls, cache_uri: str, encoding: layout.TextEncoding, features_id: str) -> Stores:
        features = layout.features(cache_uri, features_id) if features_id else None
        return cls(layout.samples(cache_uri), layout.captions(cache_uri, encoding), features)

    @property
    def generations(self) -> list[str]:
        """Others whenever records were taken out: what was noted before may be wrong."""
        return [store.generation for store in (self.samples, self.captions, self.features) if store is not None]


@dataclass(frozen=True)
class Order:
    """`order.json`."""

    strata: tuple[Stratum, ...]
    rows: int
    missing: int  # of the run's samples, those that the cache has not; then there are no strata
    featureless: int  # samples without CREPA's features, where the run wants any
    feature_dim: int  # of the features; 0 without
    generations: tuple[str, ...]
    folder: str

    @classmethod
    def read(cls, run_uri: str) -> Order | None:
        """None where the run has none of this version yet."""
        uri = storage.join(run_uri, ORDER)
        if not storage.exists(uri):
            return None
        body = json.loads(storage.read_text(uri))
        if body.pop("version", None) != VERSION:
            return None
        strata = (Stratum(**stratum | {"bucket": tuple(stratum["bucket"])}) for stratum in body.pop("strata"))
        return cls(strata=tuple(strata), generations=tuple(body.pop("generations")), **body)


def forget_places(run_uri: str) -> None:
    """Before a run's samples change: what was noted of the old ones must not pass for the new ones'."""
    storage.remove(storage.join(run_uri, ORDER))


def note_places(run_uri: str, selected: pa.Table, held_out: float, stores: Stores, prompts: Iterable[str]) -> None:
    """Write down where a run's samples (`layout.SELECTION_SCHEMA`) and the captions of all of them lie.

    A sample that the cache has lost is counted; a caption or features that it has lost have no place.
    """
    generations = stores.generations  # asked before the index: what goes meanwhile is noticed
    table = _found(selected, stores.samples, ["frames", "height", "width"])
    missing = table.column("frames").null_count
    table = table.filter(pc.is_valid(table.column("frames")))
    index = stores.captions.index(_PLACE)
    table = table.set_column(table.column_names.index("captions"), "captions", _captions(table, index))
    featureless = feature_dim = 0
    if stores.features is not None:
        features = _found(table.select(["key"]), stores.features, [])
        table = table.append_column("features", _place_struct(features))
        featureless = features.column("shard").null_count
        feature_dim = _width(features)
    table = table.append_column("held_out", _held_out(table, held_out))
    table = table.sort_by([(name, "ascending") for name in (*_ALIKE, "key")])
    strata = [] if missing else _strata(table)
    folder = _write_files(run_uri, table.drop_columns(_ALIKE))
    wanted = pc.field("key").isin([layout.caption_key(text) for text in prompts])
    storage.publish_bytes(storage.join(run_uri, TEXTS), rows_file(index.filter(wanted).sort_by("key")))
    before = Order.read(run_uri)
    body = {"version": VERSION, "rows": selected.num_rows, "missing": missing, "featureless": featureless}
    body |= {"feature_dim": feature_dim, "generations": generations, "folder": folder}
    body["strata"] = [dataclasses.asdict(stratum) for stratum in strata]
    storage.publish_bytes(storage.join(run_uri, ORDER), json.dumps(body, indent=1).encode())
    if before is not None and before.folder != folder:
        storage.remove(storage.join(run_uri, FOLDER, before.folder))


def _found(table: pa.Table, store: ShardStore, columns: Sequence[str]) -> pa.Table:
    """`table` with the place of its keys in `store` and more of its columns; null where it is not there."""
    index = store.index([*_PLACE, *columns])
    rows = pc.index_in(table.column("key"), value_set=index.column("key").combine_chunks())
    found = index.select([*_PLACE, *columns]).take(rows)
    return pa.table([*table.columns, *found.columns], [*table.column_names, *found.column_names])


def _place_struct(table: pa.Table) -> pa.StructArray:
    columns = [table.column(name).combine_chunks() for name in _PLACE]
    arrays = [column.chunk(0) if isinstance(column, pa.ChunkedArray) else column for column in columns]
    return pa.StructArray.from_arrays(arrays, _PLACE, mask=pc.is_null(arrays[0]))


def _captions(table: pa.Table, index: pa.Table) -> pa.Array:
    """Lists of a text and its place."""
    lists = pa.concat_arrays(table.column("captions").chunks) if table.num_rows else pa.array([], pa.list_(pa.string()))
    texts = lists.flatten()
    distinct = texts.dictionary_encode()
    keys = pa.array([layout.caption_key(text) for text in distinct.dictionary.to_pylist()], pa.string())
    rows = pc.index_in(keys.take(distinct.indices), value_set=index.column("key").combine_chunks())
    places = _place_struct(index.select(_PLACE).take(rows))
    entries = pa.StructArray.from_arrays([texts, places], ["text", "place"])
    offsets = np.concatenate([[0], np.cumsum(pc.list_value_length(lists).to_numpy())]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), entries)


def _width(features: pa.Table) -> int:
    tensors = features.column("tensors").drop_null()
    return tensors[0].as_py()[0]["shape"][-1] if len(tensors) else 0


def _held_out(table: pa.Table, share: float) -> pa.Array:
    names = ("dataset", "frames", "height", "width")
    strata = list(zip(*(table.column(name).to_pylist() for name in names), strict=True))
    strata = [(dataset, tuple(shape)) for dataset, *shape in strata]
    _, rows = split_held_out(table.column("key").to_pylist(), share, strata)
    held_out = np.zeros(table.num_rows, dtype=bool)
    held_out[rows] = True
    return pa.array(held_out)


def _strata(table: pa.Table) -> list[Stratum]:
    """Of a table that is sorted by what a stratum has in common."""
    groups = table.group_by(_ALIKE).aggregate([("key", "count")]).sort_by([(name, "ascending") for name in _ALIKE])
    strata, first = [], 0
    for row in groups.to_pylist():
        bucket = (row["frames"], row["height"], row["width"])
        count, facts = row["key_count"], {name: row[name] for name in ("dataset", "repeats", "probability", "held_out")}
        strata.append(Stratum(bucket=bucket, first=first, count=count, **facts))
        first += count
    assert first == table.num_rows
    return strata


def _write_files(run_uri: str, table: pa.Table) -> str:
    """The folder's name: a digest, so that a worker never meets other rows than those whose order it knows."""
    parts = [table.slice(at, FILE_ROWS) for at in range(0, table.num_rows, FILE_ROWS)]
    digest = hashlib.sha256(str(table.schema).encode())
    for part in parts:
        for batch in part.to_batches(max_chunksize=1 << 14):
            digest.update(batch.serialize())
    name = digest.hexdigest()[:16]
    for number, part in enumerate(parts):
        uri = storage.join(run_uri, FOLDER, name, f"{number:06d}.parquet")
        if not storage.exists(uri):
            storage.publish_bytes(uri, rows_file(part))
    return name


class Places:
    """Rows of a run's samples by number. Safe to be asked by several threads."""

    def __init__(self, run_uri: str, order: Order) -> None:
        self.uri, self.strata = storage.join(run_uri, FOLDER, order.folder), order.strata
        self._firsts = [stratum.first for stratum in order.strata]
        self._files: collections.OrderedDict[int, Rows] = collections.OrderedDict()
        self._lock = threading.Lock()

    def stratum(self, row: int) -> Stratum:
        return self.strata[bisect.bisect_right(self._firsts, row) - 1]

    def row(self, number: int) -> dict[str, Any]:
        """`key`, the place, `captions` and, with CREPA, `features` of a sample.

        Raises:
            FileNotFoundError: where another precache replaced the files.
        """
        file, at = divmod(number, FILE_ROWS)
        with self._lock:
            rows = self._files.get(file)
            if rows is None:
                rows = self._files[file] = Rows(storage.join(self.uri, f"{file:06d}.parquet"), None)
            self._files.move_to_end(file)
            if len(self._files) > _KEPT_FILES:
                self._files.popitem(last=False)
        return rows.row(at)
