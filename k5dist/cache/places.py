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
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
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
_BATCH_ROWS = 1 << 14
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
    samples = stores.samples.index([*_PLACE, "frames", "height", "width"])
    table = _found(selected, samples, ["frames", "height", "width"])
    missing = table.column("row").null_count
    table = table.filter(pc.is_valid(table.column("row")))
    pa.default_memory_pool().release_unused()  # Arrow keeps what reading took, several times the table
    featureless, feature_dim, features = 0, 0, None
    if stores.features is not None:
        features = stores.features.index(_PLACE)
        rows = pc.index_in(table.column("key"), value_set=features.column("key").combine_chunks())
        featureless, feature_dim = rows.null_count, _width(features.take(rows.drop_null()[:1]))
        table = table.append_column("features", rows)
    table = table.append_column("held_out", _held_out(table, held_out))
    table = table.sort_by([(name, "ascending") for name in (*_ALIKE, "key")])
    strata = [] if missing else _strata(table)
    captions = stores.captions.index(_PLACE)
    pa.default_memory_pool().release_unused()
    folder = _write_files(run_uri, table.drop_columns(_ALIKE), partial(_noted, samples, captions, features))
    wanted = pc.field("key").isin([layout.caption_key(text) for text in prompts])
    storage.publish_bytes(storage.join(run_uri, TEXTS), rows_file(captions.filter(wanted).sort_by("key")))
    before = Order.read(run_uri)
    body = {"version": VERSION, "rows": selected.num_rows, "missing": missing, "featureless": featureless}
    body |= {"feature_dim": feature_dim, "generations": generations, "folder": folder}
    body["strata"] = [dataclasses.asdict(stratum) for stratum in strata]
    storage.publish_bytes(storage.join(run_uri, ORDER), json.dumps(body, indent=1).encode())
    if before is not None and before.folder != folder:
        storage.remove(storage.join(run_uri, FOLDER, before.folder))


def _found(table: pa.Table, index: pa.Table, columns: Sequence[str]) -> pa.Table:
    """`table` with the `row` of its keys in `index` and some of its columns; null where it is not there."""
    rows = pc.index_in(table.column("key"), value_set=index.column("key").combine_chunks())
    found = index.select(list(columns)).take(rows)
    return pa.table([*table.columns, rows, *found.columns], [*table.column_names, "row", *found.column_names])


def _noted(samples: pa.Table, captions: pa.Table, features: pa.Table | None, part: pa.Table) -> pa.Table:
    """Rows of a run with the places that `row` and `features` name by number, and those of their captions: what a file
    holds. A million rows' places at once would take gigabytes."""
    place = samples.select(_PLACE).take(part.column("row"))
    columns = {"key": part.column("key"), "captions": _captions(part, captions)}
    columns |= {name: place.column(name) for name in _PLACE}
    if features is not None:
        columns["features"] = _place_struct(features.select(_PLACE).take(part.column("features")))
    return pa.table(columns)


def _place_struct(table: pa.Table) -> pa.StructArray:
    columns = [table.column(name).combine_chunks() for name in _PLACE]
    arrays = [column.chunk(0) if isinstance(column, pa.ChunkedArray) else column for column in columns]
    return pa.StructArray.from_arrays(arrays, _PLACE, mask=pc.is_null(arrays[0]))


def _captions(table: pa.Table, index: pa.Table) -> pa.Array:
    """Lists of a text and its place."""
    lists = pa.concat_arrays(table.column("captions").chunks) if table.num_rows else pa.array([], pa.list_(pa.string()))
    texts = lists.flatten()
    distinct = texts.dictionary_encode()
    batches = (distinct.dictionary[at : at + _BATCH_ROWS] for at in range(0, len(distinct.dictionary), _BATCH_ROWS))
    known = [pa.array([layout.caption_key(text) for text in batch.to_pylist()], pa.string()) for batch in batches]
    keys = pa.concat_arrays(known) if known else pa.array([], pa.string())
    rows = pc.index_in(keys.take(distinct.indices), value_set=index.column("key").combine_chunks())
    places = _place_struct(index.select(_PLACE).take(rows))
    entries = pa.StructArray.from_arrays([texts, places], ["text", "place"])
    offsets = np.concatenate([[0], np.cumsum(pc.list_value_length(lists).to_numpy())]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), entries)


def _width(features: pa.Table) -> int:
    """Of the features of the first row, if there is any."""
    return features.column("tensors")[0].as_py()[0]["shape"][-1] if features.num_rows else 0


def _held_out(table: pa.Table, share: float) -> pa.Array:
    names = ("dataset", "frames", "height", "width")
    alike: dict[Any, Any] = {}  # one object a stratum, not one a row
    strata: list[Any] = []
    for batch in table.select(list(names)).to_batches(max_chunksize=_BATCH_ROWS):
        for dataset, *shape in zip(*(batch.column(name).to_pylist() for name in names), strict=True):
            stratum = (dataset, tuple(shape))
            strata.append(alike.setdefault(stratum, stratum))
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


def _write_files(run_uri: str, table: pa.Table, noted: Callable[[pa.Table], pa.Table]) -> str:
    """FILE_ROWS at a time of what `noted` makes of `table`'s rows.

    Returns the folder's name: a digest, so that a worker never meets other rows than those whose order it knows.
    """
    digest, schema = hashlib.sha256(), b""
    with storage.scratch_folder("places") as scratch:  # the name is known when the last file is
        for number, at in enumerate(range(0, table.num_rows, FILE_ROWS)):
            part = noted(table.slice(at, FILE_ROWS).combine_chunks())
            if not schema:
                schema = str(part.schema).encode()
                digest.update(schema)
            for batch in part.to_batches(max_chunksize=_BATCH_ROWS):
                digest.update(batch.serialize())
            (scratch / f"{number:06d}.parquet").write_bytes(rows_file(part))
            pa.default_memory_pool().release_unused()
        name = digest.hexdigest()[:16]
        for file in sorted(scratch.iterdir()):
            uri = storage.join(run_uri, FOLDER, name, file.name)
            if not storage.exists(uri):
                storage.publish_bytes(uri, file.read_bytes())
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
