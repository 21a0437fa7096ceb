"""Faults from outside, as the world makes them: a proxy before the store, signals to processes, a node that goes."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq

from k5dist.precache.video import encode_mp4
from tests.cluster.job import Job

MARK = "K5DIST_TEST_MARK"  # in the environment of every process that a test may kill


class FaultyProxy:
    """HTTP before a store. A fixed `share` of requests, by their hash, goes wrong; with `away` all of them do."""

    def __init__(self, target: str) -> None:
        self.target = target.removeprefix("http://")
        self.share = 0.0
        self.away = False
        self.silent = 0  # so many of the next requests are never answered
        self.closing = threading.Event()
        self.seen: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.sent: Counter[str] = Counter()  # bytes of bodies by method and path
        self._lock = threading.Lock()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_one_request(self) -> None:
                with contextlib.suppress(ConnectionError):
                    return super().handle_one_request()
                self.close_connection = True

            def log_message(self, format: str, *args: object) -> None: ...

            def do_GET(self) -> None:
                proxy.answer(self)

            do_PUT = do_POST = do_HEAD = do_DELETE = do_GET

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()

    def _fault(self, request: str) -> str | None:
        """The same request goes wrong at the same times in every run, and never for ever."""
        with self._lock:
            self.seen[request] += 1
            digest = hashlib.sha256(f"{request} {self.seen[request]}".encode()).digest()
            if self.away:
                return "503"
            if self.silent:
                self.silent -= 1
                self.faults["silent"] += 1
                return "silent"
            if digest[0] >= 256 * self.share:
                return None
            kind = ("500", "503", "closed", "cut", "slow")[digest[1] % 5]
            self.faults[kind] += 1
            return kind

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        body = handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
        fault = self._fault(f"{handler.command} {handler.path}")
        if fault == "silent":
            self.closing.wait()
        if fault in ("closed", "silent"):
            handler.close_connection = True
            return
        if fault in ("500", "503"):
            code = {"500": "InternalError", "503": "SlowDown"}[fault]
            text = f"<Error><Code>{code}</Code><Message>injected</Message></Error>".encode()
            _send(handler, int(fault), [("Content-Type", "application/xml")], text, len(text))
            return
        if fault == "slow":
            time.sleep(1.0)
        connection = http.client.HTTPConnection(self.target, timeout=60)
        try:
            connection.request(handler.command, handler.path, body, dict(handler.headers.items()))
            response = connection.getresponse()
            data = response.read()
        finally:
            connection.close()
        with self._lock:
            self.sent[f"{handler.command} {handler.path}"] += len(data)
        headers = [(k, v) for k, v in response.getheaders() if k.lower() not in _HOP]
        length = int(response.getheader("Content-Length") or 0) if handler.command == "HEAD" else len(data)
        if fault == "cut" and data:
            data, handler.close_connection = data[: len(data) // 2], True
        _send(handler, response.status, headers, data, length)


_HOP = {"connection", "transfer-encoding", "content-length", "keep-alive"}


def _send(
    handler: BaseHTTPRequestHandler, status: int, headers: list[tuple[str, str]], data: bytes, length: int
) -> None:
    handler.send_response_only(status)
    for name, value in headers:
        handler.send_header(name, value)
    handler.send_header("Content-Length", str(length))
    handler.end_headers()
    if handler.command != "HEAD":
        handler.wfile.write(data)


def make_clips(folder: Path, count: int) -> None:
    """`count` small clips with captions of many lengths: several batches of text with padding."""
    folder.mkdir(parents=True)
    for number in range(count):
        frames = np.random.default_rng(number).integers(0, 255, (40, 64, 96, 3), np.uint8)
        encode_mp4(frames, folder / f"{number:02}.mp4", frame_rate=24)
        (folder / f"{number:02}.txt").write_text(f"clip {number} of grey noise" + ", and more of it" * (number % 7))


def cache_files(root: Path) -> dict[str, str]:
    """Every file below cache/<fingerprint>/ with its digest; of the ledger what it says without its counts."""
    (cache,) = (root / "cache").iterdir()
    found = {
        path.relative_to(cache).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(cache.rglob("*"))
        if path.is_file() and path.name != "failures.parquet"
    }
    return found | {"failures.parquet": str(failures(root))}


def failures(root: Path) -> list[tuple[str, str, str]]:
    (ledger,) = (root / "cache").glob("*/failures.parquet")
    return sorted((row["uri"], row["stage"], row["reason"]) for row in pq.read_table(ledger).to_pylist())


def shards(root: Path) -> int:
    """How many shards of samples are committed."""
    return len(list(root.glob("cache/*/index/*.parquet")))


def wait_until(job: Job, true: Callable[[], object], what: str, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert job.process.poll() is None, f"the job ended before {what}:\n{job.output}"
        assert time.monotonic() < deadline, f"{what}: never\n{job.output}"
        time.sleep(0.02)


def workers(mark: str, title: str) -> list[psutil.Process]:
    """Ray's worker processes of that `mark` that run something named `title` at this moment."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = " ".join(process.info["cmdline"] or [])
        with contextlib.suppress(psutil.Error):
            if line.startswith("ray::") and title in line and process.environ().get(MARK) == mark:
                found.append(process)
    return found


def send(processes: list[psutil.Process], number: int) -> int:
    sent = 0
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)
            sent += 1
    return sent


def kill(processes: list[psutil.Process]) -> int:
    return send(processes, signal.SIGKILL)


def make_slow_clip(path: Path) -> None:
    """A clip that takes long enough to decode for its worker to be found at it."""
    frames = np.random.default_rng(0).integers(0, 255, (40, 720, 1280, 3), np.uint8)
    encode_mp4(frames, path, frame_rate=24)


def kill_who_opens(job: Job, path: Path, mark: str, title: str, most: int) -> int:
    """SIGKILL to every worker that runs `title` and has `path` open, until it ends or `most` are dead; how many."""
    killed: set[int] = set()
    while job.process.poll() is None and len(killed) < most:
        for process in workers(mark, title):
            if process.pid not in killed and _opened(process, path):
                killed.update([process.pid] if kill([process]) else [])
        time.sleep(0.05)
    return len(killed)


def _opened(process: psutil.Process, path: Path) -> bool:
    with contextlib.suppress(psutil.Error, OSError):
        return any(file.path == str(path) for file in process.open_files())
    return False
