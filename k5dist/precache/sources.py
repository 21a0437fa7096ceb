"""From the datasets' sources to rows: which clip, which part of it, which captions. Nothing is decoded here.

A source is a folder or a glob (local or object storage) of clips, or a manifest with columns `uri`, `caption` and
optionally `start` and `end` in seconds. What a source names is read only from below the source's own root: links and
absolute paths that lead out of it are rejected. Rows are kept as Arrow columns: a million of them is a usual manifest.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
from fsspec.utils import glob_translate

from k5dist import storage
from k5dist.config import ConfigError
from k5dist.datasets import IMAGE_SUFFIXES, VIDEO_SUFFIXES, DatasetConfig
from k5dist.precache.captions import MAX_SIDECAR_BYTES, SIDECARS, BadCaption, captions_of, is_text
from k5dist.precache.manifests import Entry, entries
from k5dist.precache.masks import mask_uri

CLIP_SUFFIXES = VIDEO_SUFFIXES + IMAGE_SUFFIXES
MAX_URI = 4096  # characters
OPEN_END = -1.0  # Arrow has no infinity of types for None: a clip's own end, from here to the index
_REMOTE = ("s3", "s3a", "gs", "gcs", "az", "abfs")  # stores that any manifest may name, with the user's own credentials
_ROW_SCHEMA = pa.schema(
    [
        ("dataset", pa.string()),
        ("uri", pa.string()),
        ("start", pa.float64()),
        ("end", pa.float64()),
        ("captions", pa.list_(pa.string())),
    ]
)
_REJECTED_SCHEMA = pa.schema([("dataset", pa.string()), ("uri", pa.string()), ("reason", pa.string())])
_ROWS_AT_ONCE = 16_384
_READERS = 32  # caption files at once: an object store answers many slowly rather than one fast


@dataclass(frozen=True)
class Row:
    """One clip, or a part of it: seconds are from its first frame; `end` None is its end."""

    uri: str
    captions: tuple[str, ...]
    start: float = 0.0
    end: float | None = None


@dataclass(frozen=True)
class Rejected:
    """A row that cannot be used, and why; it goes to the failure ledger."""

    uri: str
    reason: str


@dataclass(frozen=True)
class Listing:
    """The rows of all datasets, in their order, and what was rejected of them; as columns."""

    rows: pa.Table
    rejected: pa.Table

    @classmethod
    def of(cls, found: Iterable[tuple[str, Row | Rejected]]) -> Listing:
        """From (dataset, row) pairs, which are turned into columns a block at a time."""
        rows: list[pa.Table] = [_ROW_SCHEMA.empty_table()]
        rejected: list[pa.Table] = [_REJECTED_SCHEMA.empty_table()]
        pairs = iter(found)
        while block := list(islice(pairs, _ROWS_AT_ONCE)):
            good = [(name, row) for name, row in block if isinstance(row, Row)]
            bad = [(name, row.uri, row.reason) for name, row in block if isinstance(row, Rejected)]
            columns = [(n, r.uri, r.start, OPEN_END if r.end is None else r.end, r.captions) for n, r in good]
            rows += [_table(columns, _ROW_SCHEMA)] if columns else []
            rejected += [_table(bad, _REJECTED_SCHEMA)] if bad else []
        return cls(pa.concat_tables(rows), pa.concat_tables(rejected))


def _table(rows: list[tuple[Any, ...]], schema: pa.Schema) -> pa.Table:
    columns = zip(*rows, strict=True)
    return pa.table(
        [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)], schema=schema
    )


def read_datasets(datasets: Iterable[DatasetConfig]) -> Listing:
    """All rows of all datasets, in a stable order.

    Raises:
        ConfigError: when a dataset has no source, there is nothing at it, no clip in it, or none that can be used.
    """
    listings = [_read_dataset(dataset) for dataset in datasets]
    return Listing(
        pa.concat_tables([listing.rows for listing in listings]),
        pa.concat_tables([listing.rejected for listing in listings]),
    )


def _read_dataset(dataset: DatasetConfig) -> Listing:
    key, source = dataset.key("source"), dataset.source
    if source is None:
        fix = f"{key}=<folder, s3:// URI, glob or manifest of captioned clips>"
        raise ConfigError(key, None, "precache needs clips", fix)
    storage.check_readable(key, source if dataset.is_manifest else split_glob(source)[0])
    read = _manifest_rows if dataset.is_manifest else _folder_rows
    listing = Listing.of((dataset.name, row) for row in read(dataset, source))
    total = listing.rows.num_rows + listing.rejected.num_rows
    if not total:
        what = "rows" if dataset.is_manifest else f"videos or images ({' '.join(CLIP_SUFFIXES)})"
        raise ConfigError(key, source, f"the dataset is empty: no {what} found", "name a place with clips")
    if not listing.rows.num_rows:
        first = listing.rejected.slice(0, 1).to_pylist()[0]
        rule = f"none of its {total} clips can be used; the first: {first['uri']}: {first['reason']}"
        fix = "put a .txt with the caption beside each clip, or choose another caption_strategy"
        raise ConfigError(key, source, rule, fix)
    return listing


def split_glob(source: str) -> tuple[str, str | None]:
    """The folder that a source begins with, and the pattern below it; None for a folder without one."""
    parts = source.split("/")
    first = next((at for at, part in enumerate(parts) if re.search(r"[*?\[]", part)), None)
    if first is None or (storage.is_local(source) and os.path.isdir(storage.normalise(source))):
        return source, None
    return "/".join(parts[:first]) or ("/" if first else "."), "/".join(parts[first:])


def _folder_rows(dataset: DatasetConfig, source: str) -> Iterator[Row | Rejected]:
    root, pattern = split_glob(source)
    files = storage.find(root)
    wanted = re.compile(glob_translate(pattern)) if pattern else None
    clips = (name for name in sorted(files) if PurePosixPath(name).suffix.lower() in CLIP_SUFFIXES)
    clips = (name for name in clips if wanted is None or wanted.match(name))
    if dataset.mask_suffix is not None:  # a mask is no clip of its own
        masks = dataset.mask_suffix.lower()
        clips = (name for name in clips if not name.lower().endswith(masks))
    leaves = leaves_folder(root)
    names = {storage.join(root, name) for name in files} if dataset.mask_suffix is not None else set()
    is_there = names.__contains__

    def row(name: str) -> Row | Rejected:
        uri = storage.join(root, name)

        def read(suffix: str) -> bytes:
            beside = PurePosixPath(name).with_suffix(suffix).as_posix()
            if beside not in files:
                raise FileNotFoundError(beside)
            return _read_sidecar(storage.join(root, beside), leaves)

        reason = leaves(uri) or _bad_mask(dataset, uri, leaves, is_there)
        return Rejected(uri, reason) if reason else _captioned(dataset, uri, None, read)

    yield from _mapped(row, clips, threads=dataset.captions_from in SIDECARS)


def _mapped(make: Callable[[Any], Row | Rejected], items: Iterator[Any], *, threads: bool) -> Iterator[Row | Rejected]:
    """`make` of each item, in order; on threads where it waits for storage."""
    if not threads:
        yield from map(make, items)
        return
    with ThreadPoolExecutor(_READERS) as pool:
        while block := list(islice(items, _ROWS_AT_ONCE)):
            yield from pool.map(make, block)


def _captioned(
    dataset: DatasetConfig, uri: str, entry: dict[str, Any] | None, read: Callable[[str], bytes]
) -> Row | Rejected:
    try:
        return Row(uri, captions_of(dataset, uri, entry, read))
    except BadCaption as error:
        return Rejected(uri, str(error))


def _read_sidecar(uri: str, leaves: Callable[[str], str | None]) -> bytes:
    reason = leaves(uri)
    if reason:
        raise BadCaption(f"its caption file: {reason}")
    return storage.read_bytes(uri, 0, MAX_SIDECAR_BYTES + 1)


def _manifest_rows(dataset: DatasetConfig, source: str) -> Iterator[Row | Rejected]:
    folder = source.rsplit("/", 1)[0] if "/" in source else "."
    leaves = leaves_folder(folder)

    def row(numbered: tuple[int, Entry]) -> Row | Rejected:
        number, entry = numbered
        return _manifest_row(dataset, f"{source}:{number}", entry, folder, leaves)

    numbered = enumerate(entries(dataset.key("source"), source), start=1)
    yield from _mapped(row, numbered, threads=dataset.captions_from in SIDECARS)


def _manifest_row(
    dataset: DatasetConfig, place: str, entry: Entry, folder: str, leaves: Callable[[str], str | None]
) -> Row | Rejected:
    reason = f"the row {entry}" if isinstance(entry, str) else _bad_uri(entry.get("uri"))
    if isinstance(entry, str) or reason:
        return Rejected(place, reason or "")
    uri: str = entry["uri"]
    whole, reason = _resolved(uri, folder)
    reason = reason or leaves(whole) or _bad_mask(dataset, whole, leaves)
    if reason:
        return Rejected(uri, reason)

    def read(suffix: str) -> bytes:
        head, name = whole.rsplit("/", 1)
        return _read_sidecar(f"{head}/{PurePosixPath(name).with_suffix(suffix)}", leaves)

    found = _captioned(dataset, whole, entry, read)
    if isinstance(found, Rejected):
        return Rejected(uri, found.reason)
    times = _times(entry.get("start"), entry.get("end"))
    if times is None:
        return Rejected(uri, "start and end must be seconds, 0 ≤ start < end")
    return Row(whole, found.captions, *times)


def _bad_mask(
    dataset: DatasetConfig,
    uri: str,
    leaves: Callable[[str], str | None],
    is_there: Callable[[str], bool] = lambda _: True,
) -> str | None:
    """Why a clip's mask must not be read, or is known not to be there; a manifest's are found missing by probing."""
    if dataset.mask_suffix is None:
        return None
    mask = mask_uri(uri, dataset.mask_suffix)
    reason = leaves(mask) if is_there(mask) else "there is no such file"
    return f"its mask {mask.rsplit('/', 1)[-1]}: {reason}" if reason else None


def _bad_uri(uri: object) -> str | None:
    if not isinstance(uri, str) or not uri:
        return "the row has no uri"
    if len(uri) > MAX_URI or not is_text(uri):
        return f"its uri is not UTF-8 text of at most {MAX_URI:,} characters"
    return None


def _resolved(uri: str, folder: str) -> tuple[str, str | None]:
    """A manifest's URI as a whole one, and why it must not be used (None: it may)."""
    if ".." in uri.replace("\\", "/").split("/"):
        return uri, "a uri must not lead out of the manifest's folder with .."
    if "::" in uri:
        return uri, "a uri names one place, not a chain of them"
    scheme, separator, _ = uri.partition("://")
    if not separator:
        return (uri if uri.startswith("/") else f"{folder.rstrip('/')}/{uri}"), None
    own = folder.partition("://")[0] if "://" in folder else "file"
    if scheme in _REMOTE or scheme == own:
        return uri, None
    return uri, f"a manifest at {own}:// may not name {scheme}:// (but {', '.join(_REMOTE)})"


def _times(start: object, end: object) -> tuple[float, float | None] | None:
    """Seconds of a row's cells; None where they are no seconds."""
    try:
        begin = 0.0 if start in (None, "") else float(start)  # type: ignore[arg-type]
        until = None if end in (None, "") else float(end)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return None
    good = 0 <= begin < math.inf and (until is None or begin < until < math.inf)
    return (begin, until) if good else None


def leaves_folder(root: str) -> Callable[[str], str | None]:
    """A function that says why a URI is not below the local folder `root`; None where it is, or is not local at all.

    Links are followed: what counts is where the bytes lie.
    """
    if not storage.is_local(root):
        # A local path in a manifest from elsewhere would read this machine's own files.
        return lambda uri: None if not storage.is_local(uri) else "a local path in a manifest that is not local"
    if root.startswith(storage.PACKAGE_SCHEME):
        return lambda uri: None  # the project's own data, whose manifest names other packages' files
    real_root = os.path.realpath(storage.normalise(root))
    prefix = real_root.rstrip("/") + "/"
    folders: dict[str, str] = {}

    def leaves(uri: str) -> str | None:
        if not storage.is_local(uri):
            return None
        folder, _, name = storage.normalise(uri).rpartition("/") if uri.startswith("file://") else uri.rpartition("/")
        try:
            real = folders.get(folder)
            if real is None:
                real = folders[folder] = os.path.realpath(storage.normalise(folder or "/"), strict=True)
            path = f"{real}/{name}"
            if os.path.islink(path):
                path = os.path.realpath(path, strict=True)
        except FileNotFoundError:
            return "there is no such file"
        except OSError as error:
            return f"it cannot be reached ({error.strerror})"
        return None if path.startswith(prefix) else "it lies outside the source's folder"

    return leaves
