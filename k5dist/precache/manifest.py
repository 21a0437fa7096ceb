"""From `data.source` to rows: which clip, which part of it, which caption. Nothing is decoded here.

A source is a folder (local or object storage) of videos with a text file of the same name beside each, or a manifest
(.jsonl, .csv, .parquet) with columns `uri`, `caption` and optionally `start` and `end` in seconds. Relative URIs of a
manifest are relative to its folder, and never lead out of it.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from k5dist import storage
from k5dist.config import ConfigError

VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi")
MANIFEST_SUFFIXES = (".jsonl", ".csv", ".parquet")


@dataclass(frozen=True)
class Row:
    """One wanted sample: seconds are from the clip's first frame; `end` None is the clip's end."""

    uri: str
    caption: str
    start: float = 0.0
    end: float | None = None


@dataclass(frozen=True)
class Rejected:
    """A row that cannot be used, and why; it goes to the failure ledger."""

    uri: str
    reason: str


def read_source(source: str) -> tuple[list[Row], list[Rejected]]:
    """All rows of a source, in a stable order.

    Raises:
        ConfigError: when there is nothing at the source, no clip in it, or not one caption.
    """
    storage.check_readable("data.source", source)
    is_manifest = source.lower().endswith(MANIFEST_SUFFIXES)
    found = list(_manifest_rows(source) if is_manifest else _folder_rows(source))
    rows = [row for row in found if isinstance(row, Row)]
    rejected = [row for row in found if isinstance(row, Rejected)]
    if not found:
        what = "rows" if is_manifest else f"videos ({' '.join(VIDEO_SUFFIXES)})"
        raise ConfigError("data.source", source, f"the dataset is empty: no {what} found", "name a place with clips")
    if not rows:
        rule = f"none of its {len(found)} clips can be used; the first: {rejected[0].uri}: {rejected[0].reason}"
        fix = "put a .txt with the caption beside each clip, or name a manifest with uri and caption"
        raise ConfigError("data.source", source, rule, fix)
    return rows, rejected


def _folder_rows(source: str) -> Iterator[Row | Rejected]:
    names = set(storage.find(source))
    for name in sorted(names):
        path = PurePosixPath(name)
        if path.suffix.lower() not in VIDEO_SUFFIXES:
            continue
        uri, text = storage.join(source, name), path.with_suffix(".txt").as_posix()
        if text not in names:
            yield Rejected(uri, f"no caption: there is no {PurePosixPath(text).name} beside it")
            continue
        try:
            caption = storage.read_bytes(storage.join(source, text)).decode("utf-8-sig").strip()
        except UnicodeDecodeError:
            yield Rejected(uri, "its caption file is not UTF-8 text")
            continue
        yield Row(uri, caption) if caption else Rejected(uri, "its caption file is empty")


def _manifest_rows(source: str) -> Iterator[Row | Rejected]:
    folder = source.rsplit("/", 1)[0] if "/" in source else "."
    for number, entry in enumerate(_entries(source), start=1):
        place = f"{source}:{number}"
        uri, caption = entry.get("uri"), entry.get("caption")
        if not isinstance(uri, str) or not uri:
            yield Rejected(place, "the row has no uri")
        elif not isinstance(caption, str) or not caption.strip():
            yield Rejected(uri, "the row has no caption")
        elif ".." in PurePosixPath(uri).parts:
            yield Rejected(uri, "a uri must not lead out of the manifest's folder with ..")
        else:
            whole = uri if "://" in uri or uri.startswith("/") else storage.join(folder, uri)
            try:
                start, end = float(entry.get("start") or 0), entry.get("end")
                yield Row(whole, caption.strip(), start, None if end in (None, "") else float(end))
            except (TypeError, ValueError):
                yield Rejected(uri, "start and end must be seconds")


def _entries(source: str) -> Iterator[dict[str, Any]]:
    if source.lower().endswith(".parquet"):
        import pyarrow.parquet as pq

        with storage.open_read(source) as file:
            yield from pq.read_table(file).to_pylist()
        return
    try:
        text = storage.read_bytes(source).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ConfigError("data.source", source, "a manifest must be UTF-8 text", "save it as UTF-8") from None
    if source.lower().endswith(".csv"):
        yield from csv.DictReader(io.StringIO(text))
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            place, rule = f"{source}:{number}", f"is not JSON ({error.msg})"
            raise ConfigError("data.source", place, rule, "one object a line") from None
        if not isinstance(entry, dict):
            raise ConfigError("data.source", f"{source}:{number}", "is no JSON object", "one object a line")
        yield entry
