"""Logs in a run's folder: written by its driver, read from anywhere, also while they grow.

A log is a row of files, `<name>-0000.log` and on. A local one is one file that grows. An object cannot grow, so on
object storage the last one is replaced as a whole until it holds a mebibyte; then the next begins.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

from k5dist import storage

_CHUNK = 2**20  # bytes of an object


class LogFile:
    """`write` never waits for storage; `flush`, on one other thread, carries the lines over."""

    def __init__(self, folder: str, name: str) -> None:
        self._folder, self._name = folder, name
        self._lock = threading.Lock()
        self._fresh: list[str] = []
        self._number, self._chunk = 0, b""

    def write(self, line: str) -> None:
        with self._lock:
            self._fresh.append(line + "\n")

    def flush(self) -> None:
        """Raises what storage raises; the lines are kept then, for the next time."""
        with self._lock:
            data, self._fresh = "".join(self._fresh).encode(errors="replace"), []
        if not data:
            return
        try:
            self._append(data)
        except BaseException:
            with self._lock:
                self._fresh.insert(0, data.decode())
            raise

    def _append(self, data: bytes) -> None:
        uri = storage.join(self._folder, f"{self._name}-{self._number:04d}.log")
        if storage.is_local(uri):
            path = Path(storage.normalise(uri))
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("ab") as file:
                file.write(data)
            return
        storage.publish_bytes(uri, self._chunk + data)
        self._chunk += data
        if len(self._chunk) >= _CHUNK:
            self._number, self._chunk = self._number + 1, b""


class LogReader:
    """The whole lines of a log that were not read before; `read` again for those that came since."""

    def __init__(self, folder: str, name: str) -> None:
        self._folder, self._prefix = folder, f"{name}-"
        self._number, self._offset, self._rest = 0, 0, b""

    def read(self) -> Iterator[str]:
        names = {name for name in storage.list_folder(self._folder) if name.startswith(self._prefix)}
        while (name := f"{self._prefix}{self._number:04d}.log") in names:
            uri = storage.join(self._folder, name)
            size = storage.size(uri)
            if size > self._offset:
                *lines, self._rest = (self._rest + storage.read_bytes(uri, self._offset, size)).split(b"\n")
                self._offset = size
                yield from (line.decode(errors="replace") for line in lines)
            if f"{self._prefix}{self._number + 1:04d}.log" not in names:
                return
            self._number, self._offset = self._number + 1, 0
