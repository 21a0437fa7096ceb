"""Manifests (.jsonl, .csv, .parquet) as a stream of rows. A row that cannot be read is an error of its own."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from typing import IO, Any, cast

from k5dist import storage
from k5dist.config import ConfigError

COLUMNS = ("uri", "caption", "start", "end")
MAX_LINE_BYTES = 8 * 2**20  # of a row: what is longer is no row of a manifest, and must not fill the memory
_ROWS_AT_ONCE = 8192

Entry = dict[str, Any] | str  # a row's cells by column, or why it cannot be read


def entries(key: str, source: str) -> Iterator[Entry]:
    """The manifest's rows, in order and a few at a time.

    Raises:
        ConfigError: naming `key`, where the file as a whole is not what its suffix says.
    """
    with storage.open_read(source) as file:
        if source.lower().endswith(".parquet"):
            yield from _parquet(key, source, file)
        elif source.lower().endswith(".csv"):
            yield from _csv(file)
        else:
            yield from _jsonl(file)


def _parquet(key: str, source: str, file: IO[bytes]) -> Iterator[Entry]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(file)
        names = [name for name in table.schema_arrow.names if name in COLUMNS]
        for batch in table.iter_batches(_ROWS_AT_ONCE, columns=names):
            # Column by column: whole rows as Python objects cost several times as much.
            columns = [_values(column) for column in batch.columns]
            yield from (dict(zip(names, cells, strict=True)) for cells in zip(*columns, strict=True))
    except (pa.ArrowException, OSError) as error:
        rule = f"is not a Parquet file that can be read ({str(error).splitlines()[0]})"
        raise ConfigError(key, source, rule, "write it again") from error


def _values(column: Any) -> list[Any]:
    try:
        return column.to_pylist()
    except UnicodeDecodeError:  # a string column may hold any bytes
        return [_value(cell) for cell in column]


def _value(cell: Any) -> Any:
    try:
        return cell.as_py()
    except UnicodeDecodeError:
        return b""


def _csv(file: IO[bytes]) -> Iterator[Entry]:
    csv.field_size_limit(MAX_LINE_BYTES)  # the library's own limit would end the file at the first long caption
    # Bytes that are no UTF-8 become lone surrogates, which make a row's text invalid and no other row's.
    rows = csv.reader(
        io.TextIOWrapper(cast(io.BufferedReader, file), "utf-8-sig", errors="surrogateescape", newline="")
    )
    header: list[str] | None = None
    while True:
        try:
            cells = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            yield f"is no row of a CSV file ({error})"
            continue
        if header is None:
            header = [name.strip() for name in cells]
        elif cells:
            yield dict(zip(header, cells, strict=False))


def _jsonl(file: IO[bytes]) -> Iterator[Entry]:
    first = True
    while line := file.readline(MAX_LINE_BYTES):
        if len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
            while (rest := file.readline(MAX_LINE_BYTES)) and not rest.endswith(b"\n"):
                pass
            yield f"is longer than {MAX_LINE_BYTES >> 20} MiB"
            continue
        line = line.removeprefix(b"\xef\xbb\xbf") if first else line
        first = False
        if line.strip():
            yield _object(line)


def _object(line: bytes) -> Entry:
    try:
        entry = json.loads(line.decode())
    except UnicodeDecodeError:
        return "is not UTF-8 text"
    except (ValueError, RecursionError) as error:
        return f"is not JSON ({getattr(error, 'msg', error)})"
    return entry if isinstance(entry, dict) else "is no JSON object"
