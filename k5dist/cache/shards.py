"""A folder of safetensors shards with a Parquet index: `shards/<name>.safetensors` and `index/<name>.parquet`.

A shard exists for readers when its index part does, and that is published after it, so a half-written shard is never
seen. A shard's name is the digest of the keys and checksums in it: a task that runs twice publishes the same file
twice, and two jobs whose bits differ publish two. All tensors are bfloat16 (as uint16 bit patterns where numpy carries
them). A record's tensors are contiguous in its shard, so reading it is one range request; its CRC-32 stands in the
index.
"""

from __future__ import annotations

import hashlib
import io
import json
import uuid
import zlib
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from k5dist import storage

if TYPE_CHECKING:
    import torch

INDEX_VERSION = 2
_READERS = 16
_TENSOR = pa.struct(
    [("name", pa.string()), ("shape", pa.list_(pa.int32())), ("offset", pa.int64()), ("length", pa.int64())]
)
_PLACE = [
    ("key", pa.string()),
    ("shard", pa.string()),
    ("offset", pa.int64()),
    ("length", pa.int64()),
    ("crc32", pa.uint32()),
    ("tensors", pa.list_(_TENSOR)),
]


def read_parquet(uri: str, columns: Sequence[str] | None = None) -> pa.Table:
    """A small Parquet file by one request, which storage repeats when it must; Arrow's own readers give up."""
    return pq.read_table(pa.BufferReader(storage.read_bytes(uri)), columns=None if columns is None else list(columns))


@dataclass(frozen=True)
class Record:
    """One row to be written: its key, its tensors (uint16 arrays of bf16 bits) and its index columns."""

    key: str
    tensors: Mapping[str, np.ndarray]
    columns: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Place:
    """Where a record's bytes lie; `tensors` holds (name, shape, offset from the record's start, length)."""

    shard: str
    offset: int
    length: int
    tensors: tuple[tuple[str, tuple[int, ...], int, int], ...]


class ShardStore:
    """Shards and index below one URI, with `columns` (pyarrow types) in every index row besides the place."""

    def __init__(self, uri: str, columns: Mapping[str, pa.DataType]) -> None:
        self.uri = uri
        self.columns = dict(columns)
        fields = [*_PLACE, *self.columns.items()]
        self.schema = pa.schema(fields, metadata={"k5dist.index_version": str(INDEX_VERSION)})

    def write(self, records: Sequence[Record]) -> str:
        """Publish one shard and then its index part; returns the shard's name."""
        if not records:
            raise ValueError("a shard holds at least one record")
        if len({record.key for record in records}) < len(records):
            raise ValueError("a key stands twice in one shard")
        records = sorted(records, key=lambda record: record.key)
        sums = [_crc32(record) for record in records]
        facts = [f"{record.key}{crc32:08x}" for record, crc32 in zip(records, sums, strict=True)]
        name = hashlib.sha256("".join(facts).encode()).hexdigest()[:24]
        if storage.exists(self._part_uri(name)):
            return name  # by a task that was run twice or another job: whoever reads it is not disturbed
        data, rows = _serialise(name, records)
        for row, crc32 in zip(rows, sums, strict=True):
            row["crc32"] = crc32
        storage.publish_bytes(self.shard_uri(name), data)
        self._publish_part(name, pa.Table.from_pylist(rows, schema=self.schema))
        return name

    def _publish_part(self, name: str, table: pa.Table) -> None:
        part = io.BytesIO()
        pq.write_table(table, part, compression="zstd")
        storage.publish_bytes(self._part_uri(name), part.getvalue())

    def _part_uri(self, name: str) -> str:
        return storage.join(self.uri, "index", f"{name}.parquet")

    def shard_uri(self, shard: str) -> str:
        return storage.join(self.uri, "shards", f"{shard}.safetensors")

    def remove(self, keys: Collection[str]) -> int:
        """Take records out of the index, and shards that no record is left in from storage; the number of rows.

        An index part is replaced by one with another name before it goes, so a reader sees every other row all along.
        What a reader took from the index before may be gone when it asks for it: not for a cache in use.
        """
        removed = 0
        if keys:  # before anything goes
            storage.publish_bytes(storage.join(self.uri, "removed"), uuid.uuid4().hex.encode())
        for part in self._parts():
            table = read_parquet(storage.join(self.uri, "index", part))
            stays = [key not in keys for key in table.column("key").to_pylist()]
            if all(stays):
                continue
            left = table.filter(pa.array(stays))
            removed += table.num_rows - left.num_rows
            shards = set(table.column("shard").to_pylist()) - set(left.column("shard").to_pylist())
            if left.num_rows:
                rest = hashlib.sha256("".join(left.column("key").to_pylist()).encode()).hexdigest()[:8]
                self._publish_part(f"{part.split('.')[0].split('-')[0]}-{rest}", left)
            storage.remove(storage.join(self.uri, "index", part))
            for shard in shards:
                storage.remove(self.shard_uri(shard))
        return removed

    @property
    def generation(self) -> str:
        """Another one whenever records were taken out: what was noted of places before may be wrong."""
        uri = storage.join(self.uri, "removed")
        return storage.read_text(uri) if storage.exists(uri) else ""

    def _parts(self) -> list[str]:
        return [name for name in storage.list_folder(storage.join(self.uri, "index")) if name.endswith(".parquet")]

    def index(self, columns: Sequence[str] | None = None) -> pa.Table:
        """All committed rows (of the named columns), one a key, sorted by key; empty where nothing is written."""
        folder = storage.join(self.uri, "index")
        names = self._parts()
        wanted = None if columns is None else sorted({"key", *columns})
        schema = self.schema if wanted is None else pa.schema([self.schema.field(name) for name in wanted])
        if not names:
            return schema.empty_table()
        with ThreadPoolExecutor(_READERS) as pool:
            parts = list(pool.map(lambda name: read_parquet(storage.join(folder, name), wanted), names))
        table = pa.concat_tables(parts, promote_options="default").combine_chunks()
        del parts  # of a million rows each copy is hundreds of MiB
        # Two jobs on one cache may have encoded the same clip into different shards: one row a key is kept, the first.
        order = pc.sort_indices(table.column("key"))  # stable
        keys = table.column("key").take(order).combine_chunks()
        order = order.filter(pa.concat_arrays([pa.array([True]), pc.not_equal(keys[1:], keys[:-1])]))
        if len(order) < table.num_rows or not np.array_equal(order, np.arange(len(order))):
            table = table.take(order)
        return table.cast(schema)

    def keys(self) -> set[str]:
        return set(self.index(["key"]).column("key").to_pylist())

    def read(self, place: Place) -> dict[str, torch.Tensor]:
        """A record's tensors, bfloat16 on CPU, by one range request."""
        import torch

        uri = self.shard_uri(place.shard)
        data = storage.read_bytes(uri, place.offset, place.offset + place.length)
        if len(data) != place.length:
            raise OSError(f"{uri}: {place.length} bytes at {place.offset} wanted, {len(data)} read")
        buffer = torch.frombuffer(bytearray(data), dtype=torch.bfloat16)
        return {
            name: buffer[offset // 2 : (offset + length) // 2].reshape(shape)
            for name, shape, offset, length in place.tensors
        }


def _crc32(record: Record) -> int:
    """Of the record's bytes as they lie in its shard."""
    value = 0
    for array in record.tensors.values():
        value = zlib.crc32(np.ascontiguousarray(array).data, value)
    return value


def _serialise(shard: str, records: Sequence[Record]) -> tuple[bytes, list[dict[str, Any]]]:
    """The shard's bytes in the safetensors format, and the index rows of its records.

    Written out here because the order of tensors matters (a record's must be neighbours) and the library sorts its own
    way; the format is eight bytes of header length, a JSON header padded to eight bytes, and the tensors' bytes.
    """
    header: dict[str, Any] = {"__metadata__": {"k5dist.index_version": str(INDEX_VERSION)}}
    chunks: list[bytes] = []
    rows: list[dict[str, Any]] = []
    end = 0
    for record in records:
        start, parts = end, []
        for name, array in record.tensors.items():
            assert array.dtype == np.uint16, "cached tensors are bf16 bit patterns"
            offsets = [end, end + array.nbytes]
            header[f"{record.key}/{name}"] = {"dtype": "BF16", "shape": list(array.shape), "data_offsets": offsets}
            parts.append({"name": name, "shape": list(array.shape), "offset": end - start, "length": array.nbytes})
            chunks.append(array.tobytes())
            end += array.nbytes
        rows.append({"key": record.key, "shard": shard, "offset": start, "length": end - start, "tensors": parts})
        rows[-1] |= record.columns
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    for row in rows:
        row["offset"] += 8 + len(text)
    return b"".join([len(text).to_bytes(8, "little"), text, *chunks]), rows


def places(table: pa.Table) -> list[Place]:
    """The `Place` of every row of an index."""
    return [place(row) for row in table.select(["shard", "offset", "length", "tensors"]).to_pylist()]


def place(row: Mapping[str, Any]) -> Place:
    tensors = tuple((t["name"], tuple(t["shape"]), t["offset"], t["length"]) for t in row["tensors"])
    return Place(row["shard"], row["offset"], row["length"], tensors)
