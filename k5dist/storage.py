"""The one seam to storage: local paths, `s3://` (any fsspec scheme) and `package://` data behind the same few verbs.

Everything that is published appears whole or not at all: local files are written aside and renamed, object stores
replace an object in one put. Published names are never written twice with other contents, so readers need no locks.
A store that stumbles is asked again (k5dist/retry.py); one that stays away raises StorageUnavailable.
Credentials, endpoint and region come from the usual environment or profile (AWS_*); nothing here reads or logs them.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any, cast

import fsspec

from k5dist.retry import StorageUnavailable, one_line, patiently
from k5dist.schema import ConfigError

READ_SECONDS = 60  # of silence until a request to an object store is given up, and made again
PACKAGE_SCHEME = "package://"
READ_AHEAD = 2 * 2**20  # bytes of an open remote file; the libraries' own are up to 50 MiB a seek
# Stores other than Amazon's answer a range request with the whole object's checksum, or none: botocore's newer default
# would refuse every such read. What a user sets stays.
os.environ.setdefault("AWS_RESPONSE_CHECKSUM_VALIDATION", "when_required")
os.environ.setdefault("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
_ASIDE = ".k5dist-tmp-"  # begins the names of files that are not whole yet


def is_local(uri: str) -> bool:
    return "://" not in uri or uri.startswith(("file://", PACKAGE_SCHEME))


def normalise(uri: str) -> str:
    """`uri` without a trailing slash; a local path absolute, without `file://`, `~` expanded."""
    if uri.startswith(PACKAGE_SCHEME):
        return _package_path(uri)
    if is_local(uri):
        return str(Path(uri.removeprefix("file://")).expanduser().absolute())
    return uri.rstrip("/")


def stable_name(uri: str) -> str:
    """`uri` as fingerprints know it: the same on every machine for what is not a local path."""
    return uri if uri.startswith(PACKAGE_SCHEME) else normalise(uri)


def join(uri: str, *parts: str) -> str:
    return "/".join([uri.rstrip("/"), *(part.strip("/") for part in parts)])


def filesystem(uri: str) -> tuple[Any, str]:
    """The fsspec filesystem of `uri` and the path in it. Listings are never cached: other processes write too."""
    if is_local(uri):
        return fsspec.filesystem("file", auto_mkdir=True), normalise(uri)
    scheme = uri.split("://", 1)[0]
    options: dict[str, Any] = {"use_listings_cache": False}
    if scheme in ("s3", "s3a"):
        # A few quick retries of one request of the many that make an upload or a listing; `patiently` has the patience.
        retries = {"mode": "standard", "max_attempts": 4}
        options["config_kwargs"] = {"retries": retries, "connect_timeout": 10, "read_timeout": READ_SECONDS}
    fs = fsspec.filesystem(scheme, **options)
    if scheme in ("s3", "s3a"):
        fs.retries = 1  # s3fs would multiply botocore's retries with its own
    return fs, fs._strip_protocol(uri)


def exists(uri: str) -> bool:
    fs, path = filesystem(uri)
    return patiently(uri, lambda: fs.exists(path))


def size(uri: str) -> int:
    """Bytes of the file at `uri`."""
    fs, path = filesystem(uri)
    return int(patiently(uri, lambda: fs.size(path), appears=not is_local(uri)))


def read_bytes(uri: str, start: int | None = None, end: int | None = None) -> bytes:
    """The file's bytes, or those of [start, end) by one range request."""
    fs, path = filesystem(uri)
    return patiently(uri, lambda: fs.cat_file(path, start=start, end=end), appears=not is_local(uri))


def read_ranges(uri: str, ranges: list[tuple[int, int]]) -> list[bytes]:
    """The bytes of several [start, end) of one file, asked for at once."""
    fs, path = filesystem(uri)
    starts, ends = [start for start, _ in ranges], [end for _, end in ranges]
    return patiently(uri, lambda: fs.cat_ranges([path] * len(ranges), starts, ends, on_error="raise"))


def read_text(uri: str) -> str:
    return read_bytes(uri).decode()


def open_read(uri: str) -> IO[bytes]:
    """The file, opened; the reads of a remote one are repeated like every other verb, and ask for READ_AHEAD at a time:
    who needs a part of a long film transfers little more."""
    fs, path = filesystem(uri)
    if is_local(uri):
        return fs.open(path, "rb")
    opened = partial(fs.open, path, "rb", block_size=READ_AHEAD, cache_type="readahead")
    return cast(IO[bytes], _PatientFile(uri, patiently(uri, opened, appears=True)))


class _PatientFile(io.RawIOBase):
    """A remote file whose reads are repeated. Leaving its `with` raises StorageUnavailable when a read was given up:
    a decoder between storage and caller may have taken that for the end of the file."""

    def __init__(self, uri: str, file: Any) -> None:
        self._uri, self._file = uri, file
        self._lost: StorageUnavailable | None = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def read(self, size: int | None = -1) -> bytes:
        at = self._file.tell()

        def read() -> bytes:
            self._file.seek(at)
            return self._file.read(-1 if size is None else size)

        try:
            return patiently(self._uri, read)
        except StorageUnavailable as error:
            self._lost = error
            raise

    def readall(self) -> bytes:
        return self.read()

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()

    def __exit__(self, *exception: object) -> None:
        self.close()
        if self._lost is not None:
            raise self._lost


def list_folder(uri: str) -> list[str]:
    """Names of the files and folders directly below `uri`, sorted; none where the folder does not exist."""
    fs, path = filesystem(uri)
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        entries = patiently(uri, lambda: fs.ls(path, detail=False))
        names = (entry.rstrip("/").rsplit("/", 1)[-1] for entry in entries)
        return sorted(name for name in names if name and not name.startswith(_ASIDE))
    return []


def find(uri: str) -> dict[str, dict[str, Any]]:
    """Every file below `uri`: its path relative to `uri` → fsspec's facts (size, mtime or ETag)."""
    fs, path = filesystem(uri)
    prefix = path.rstrip("/") + "/"
    found = patiently(uri, lambda: fs.find(path, detail=True)).items()
    return {name.removeprefix(prefix): info for name, info in found if _ASIDE not in name}


def sizes(uri: str) -> dict[str, int]:
    """Bytes of every file below `uri`, by its path relative to `uri`."""
    return {name: int(info["size"]) for name, info in find(uri).items()}


@contextlib.contextmanager
def _written_aside(target: Path) -> Iterator[Path]:
    """A name beside `target` that becomes `target` when the `with` ends well, and is gone when it does not."""
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f"{_ASIDE}{uuid.uuid4().hex}")
    try:
        yield aside
        aside.replace(target)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def publish_bytes(uri: str, data: bytes) -> None:
    """Make `data` visible at `uri`, whole or not at all."""
    fs, path = filesystem(uri)
    if not is_local(uri):
        patiently(uri, lambda: fs.pipe_file(path, data))
        return
    with _written_aside(Path(path)) as aside, aside.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def publish_file(local: Path, uri: str) -> None:
    """Make a finished local file visible at `uri`, whole or not at all."""
    fs, path = filesystem(uri)
    if not is_local(uri):
        patiently(uri, lambda: fs.put_file(str(local), path))
        return
    with _written_aside(Path(path)) as aside:
        shutil.copyfile(local, aside)


def publish_folder(local: Path, uri: str, last: str) -> None:
    """Make a local folder visible at `uri`; the file `last` goes last, so that its presence means completeness."""
    files = sorted(p for p in local.rglob("*") if p.is_file())
    for file in sorted(files, key=lambda p: p.relative_to(local).as_posix() == last):
        publish_file(file, join(uri, file.relative_to(local).as_posix()))


def fetch_folder(uri: str, local: Path) -> Path:
    """A local copy of the files below `uri`; `uri` itself where it is local already."""
    if is_local(uri):
        return Path(normalise(uri))
    fs, path = filesystem(uri)
    for name, info in find(uri).items():
        target = local / name
        if target.exists() and target.stat().st_size == int(info["size"]):
            continue
        with _written_aside(target) as aside:
            patiently(join(uri, name), partial(fs.get_file, join(path, name), str(aside)), appears=True)
    return local


def remove(uri: str) -> None:
    """Delete a file, or a folder with all that is in it; nothing happens where there is nothing."""
    fs, path = filesystem(uri)
    with contextlib.suppress(FileNotFoundError):
        patiently(uri, lambda: fs.rm(path, recursive=True))


@contextlib.contextmanager
def scratch_folder(prefix: str) -> Iterator[Path]:
    """A local folder for the length of a `with`; the one place where a run on object storage writes locally."""
    folder = Path(tempfile.mkdtemp(prefix=f"k5dist-{prefix}-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def check_writable(key: str, uri: str) -> None:
    """Write and delete a probe below `uri`.

    Raises:
        ConfigError: naming `key`, when the folder or bucket cannot be reached or written.
    """
    probe = join(uri, f".probe-{uuid.uuid4().hex}")
    try:
        if is_local(uri):
            publish_bytes(probe, b"k5dist")
            Path(normalise(probe)).unlink()
            return
        # A bucket that does not answer must say so in seconds, not after the patient retries of a long run.
        fs, path = _impatient(probe)
        fs.pipe_file(path, b"k5dist")
        fs.rm_file(path)
    except Exception as error:
        raise ConfigError(key, uri, f"must be writable ({one_line(error)})", _storage_fix(uri)) from error


def check_readable(key: str, uri: str) -> None:
    """Raises ConfigError, naming `key`, when there is nothing at `uri` or its bucket cannot be reached."""
    try:
        fs, path = filesystem(uri) if is_local(uri) else _impatient(uri)
        found = fs.exists(path)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(key, uri, f"must be readable ({one_line(error)})", _storage_fix(uri)) from error
    if not found:
        raise ConfigError(key, uri, "there is nothing at this place", f"check the path, or set {key}=")


def _impatient(uri: str) -> tuple[Any, str]:
    scheme = uri.split("://", 1)[0]
    if scheme not in ("s3", "s3a"):
        return filesystem(uri)
    config = {"retries": {"mode": "standard", "max_attempts": 2}, "connect_timeout": 3, "read_timeout": 10}
    fs = fsspec.filesystem(scheme, use_listings_cache=False, config_kwargs=config, skip_instance_cache=True)
    fs.retries = 1  # s3fs retries on its own as well
    return fs, fs._strip_protocol(uri)


def _storage_fix(uri: str) -> str:
    if is_local(uri):
        return "choose a folder you may write to, or mend its permissions"
    return "check the bucket's name, AWS_ENDPOINT_URL, the region and the credentials (environment or profile)"


def _package_path(uri: str) -> str:
    """Where an installed package keeps a data file, found without importing the package."""
    package, _, rest = uri.removeprefix(PACKAGE_SCHEME).partition("/")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        fix = "pip install -e '.[quickstart]' in the clone (for the embedded footage)"
        raise ConfigError("data.source", uri, f"needs the package {package}, which is not installed", fix)
    return str(Path(next(iter(spec.submodule_search_locations))) / rest)
