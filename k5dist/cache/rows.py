"""Rows of a Parquet file, read a row group at a time: of a long file little is in memory."""

from __future__ import annotations

import bisect
import collections
import io
import threading
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from k5dist import storage

GROUP_ROWS = 1024
_KEPT_GROUPS = 64


def rows_file(table: pa.Table) -> bytes:
    """A file of `table` as it is, in row groups of GROUP_ROWS."""
    data = io.BytesIO()
    pq.write_table(table, data, compression="zstd", row_group_size=GROUP_ROWS)
    return data.getvalue()


class Rows:
    """What stands in `columns` (or all) of a file of `rows_file`. Safe to be asked by several threads.

    Raises:
        FileNotFoundError: where there is no such file.
    """

    def __init__(self, uri: str, columns: Sequence[str] | None) -> None:
        self.uri, self.columns = uri, None if columns is None else ["key", *columns]
        self._lock = threading.Lock()
        self._file = pq.ParquetFile(storage.open_read(uri))
        meta = self._file.metadata
        self.num_rows = meta.num_rows
        self._at = self._file.schema_arrow.names.index("key")
        self._groups: collections.OrderedDict[int, pa.Table] = collections.OrderedDict()
        groups = range(meta.num_row_groups if self.num_rows else 0)  # an empty group has no statistics
        self._last = [self._statistics(group).max for group in groups]

    def _statistics(self, group: int) -> Any:
        return self._file.metadata.row_group(group).column(self._at).statistics

    def close(self) -> None:
        self._file.close(force=True)

    def row(self, number: int) -> dict[str, Any]:
        """Of the whole file's `number`-th row: the named columns and its key."""
        group, at = divmod(number, GROUP_ROWS)
        return self._group(group).slice(at, 1).to_pylist()[0]

    def find(self, key: str) -> dict[str, Any] | None:
        """The row of a key in a file sorted by `key`; None where there is none. Only one row group is read."""
        group = bisect.bisect_left(self._last, key)
        if group == len(self._last):
            return None
        table = self._group(group)
        at = bisect.bisect_left(table.column("key").to_pylist(), key)
        if at == table.num_rows or table.column("key")[at].as_py() != key:
            return None
        return table.slice(at, 1).to_pylist()[0]

    def _group(self, group: int) -> pa.Table:
        with self._lock:
            if group in self._groups:
                self._groups.move_to_end(group)
                return self._groups[group]
            table = self._file.read_row_group(group, columns=self.columns, use_threads=False)
            self._groups[group] = table
            if len(self._groups) > _KEPT_GROUPS:
                self._groups.popitem(last=False)
            return table
