"""How a driver makes itself known: `driver.json` and `logs/` in the run's folder, kept by a thread of the driver.

Whoever can read the run's folder can tell where its driver is, how far it got and what it said; whoever can write there
can ask it to stop. No address of the driver is needed, nothing listens, and no secret is in it (docs/adr/0029).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import psutil

from k5dist import storage
from k5dist.cluster.logs import LogFile
from k5dist.config import ConfigError
from k5dist.console import listening
from k5dist.tracking.redact import redact_text

RAYJOB, RAYJOB_NAMESPACE = "K5DIST_RAYJOB", "K5DIST_RAYJOB_NAMESPACE"  # set in the pod where a RayJob's driver runs
FILE, STOP_FILE, LOGS = "driver.json", "stop-requested", "logs"
SCHEMA_VERSION = 1
BEAT_LOCAL, BEAT_REMOTE = 2.0, 10.0  # seconds between looks at what changed; object storage is asked less often
SILENT_BEATS, SILENT_SECONDS = 6, 30.0  # so long without a word, whichever is more, and a driver counts as lost
_LOAD_SECONDS = 10.0  # between samples of the nodes
_PACE_POINTS = 50  # of progress, over which the pace is measured
_CLOSE_SECONDS = 20.0
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DriverRecord:
    """The whole of `driver.json`. Times are seconds since 1970, by the driver's clock."""

    state: str  # submitted, running, or how it ended: finished, stopped, failed
    began: float
    beat: float  # when this was written
    host: str = ""
    pid: int = 0
    pid_started: float = 0.0  # a number is used again; with its start it names one process
    stage: str = ""
    done: int = 0  # of what the stage counts: clips, captions, steps
    total: int = 0
    pace: float | None = None  # seconds each, of late
    moved: float = 0.0  # when `done` last changed
    loss: float | None = None
    logs: str = ""  # this attempt's folder below logs/
    sweep: str | None = None
    # Where it was submitted; what has not begun yet is found by these.
    slurm_job_id: str | None = None
    ray_job_id: str | None = None
    ray_dashboard: str | None = None
    kubernetes_job: str | None = None  # the RayJob's name
    kubernetes_namespace: str | None = None
    ray: dict[str, float] | None = None  # nodes alive, GPUs, free GPUs
    nodes: tuple[dict[str, Any], ...] = ()  # load by node: k5dist.cluster.load

    def to_json(self) -> bytes:
        return json.dumps({"schema_version": SCHEMA_VERSION, **dataclasses.asdict(self)}, indent=1).encode()

    @classmethod
    def from_json(cls, text: str) -> DriverRecord:
        """Keys that this release does not know are left out: a newer driver's record can be read."""
        body = json.loads(text)
        known = {field.name for field in dataclasses.fields(cls)}
        body = {name: value for name, value in body.items() if name in known}
        return cls(**{**body, "nodes": tuple(body.get("nodes", ()))})

    @property
    def is_here(self) -> bool:
        """Whether its process is of this machine and still there."""
        if self.host != socket.gethostname() or not self.pid:
            return False
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(self.pid)
            same = abs(process.create_time() - self.pid_started) < 2
            return same and process.status() != psutil.STATUS_ZOMBIE
        return False

    def is_lost(self, run_uri: str) -> bool:
        """Whether it says that it runs, and has been silent for too long. That its process cannot be seen says nothing
        by itself: a container may have this machine's name and numbers of its own."""
        silent = max(SILENT_SECONDS, SILENT_BEATS * beat_seconds(run_uri))
        return self.state == "running" and not self.is_here and time.time() - self.beat > silent


def beat_seconds(run_uri: str) -> float:
    return BEAT_LOCAL if storage.is_local(run_uri) else BEAT_REMOTE


def read_record(run_uri: str) -> DriverRecord | None:
    """None where no driver has ever made itself known."""
    uri = storage.join(run_uri, FILE)
    with contextlib.suppress(FileNotFoundError):
        if storage.exists(uri):
            return DriverRecord.from_json(storage.read_text(uri))
    return None


def write_record(run_uri: str, record: DriverRecord) -> None:
    storage.publish_bytes(storage.join(run_uri, FILE), record.to_json())


def refuse_second(run_uri: str, *, everywhere: bool = False) -> None:
    """Two drivers of one run would write over each other. Of another machine's only `everywhere` asks: a driver that
    was killed there may be what this one replaces.

    Raises:
        ConfigError: where one runs.
    """
    record = read_record(run_uri)
    if record is None or record.state not in ("running", "submitted"):
        return
    runs = record.is_here and record.pid != os.getpid()
    if runs or (everywhere and not record.is_lost(run_uri)):
        where = f"process {record.pid} of {record.host}" if record.pid else f"{record.state} elsewhere"
        name = run_uri.rsplit("/", 1)[-1]
        fix = f"look: python -m k5dist.runs status {name}; end it: python -m k5dist.runs stop {name}; or name=<another>"
        raise ConfigError("name", name, f"this run has a driver: {where}", fix)


def ask_to_stop(run_uri: str) -> None:
    """Its driver finds this at its next beat, wherever it runs."""
    storage.publish_bytes(storage.join(run_uri, STOP_FILE), b"")


def submitted(**where: Any) -> DriverRecord:
    """For a run that waits for its turn elsewhere; its driver replaces it."""
    return DriverRecord(state="submitted", began=time.time(), beat=time.time(), **where)


class Recorder:
    """Keeps `driver.json` and the logs of one run as long as its `with` lasts. Storage that stumbles delays them and
    nothing else."""

    def __init__(self, run_uri: str, sweep: str | None = None) -> None:
        self.run_uri = run_uri
        self.asked_to_stop = False  # by the file: this run alone is meant
        self.load: Callable[[], list[dict[str, Any]]] | None = None  # samples the gang's nodes
        now, before = time.time(), read_record(run_uri)
        self._waits = _job_that_waits(before)
        self._record = DriverRecord(
            state="running",
            began=now,
            beat=now,
            host=socket.gethostname(),
            pid=os.getpid(),
            pid_started=psutil.Process().create_time(),
            moved=now,
            logs=time.strftime("%Y%m%d-%H%M%S", time.gmtime(now)) + f"-{os.getpid()}",
            sweep=sweep or (before.sweep if before else None),
            **_submitted_as(before),
        )
        folder = storage.join(run_uri, LOGS, self._record.logs)
        self._driver_log, self._ranks_log = (LogFile(folder, name) for name in ("driver", "ranks"))
        self._points: deque[tuple[float, int]] = deque(maxlen=_PACE_POINTS)
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._written: DriverRecord | None = None
        self._warned = False
        self._keeper = threading.Thread(target=self._keep, name="k5dist-record", daemon=True)
        self._sampler = threading.Thread(target=self._sample, name="k5dist-load", daemon=True)
        self._exits = contextlib.ExitStack()

    def __enter__(self) -> Recorder:
        storage.remove(storage.join(self.run_uri, STOP_FILE))  # it was meant for the driver before
        write_record(self.run_uri, self._record)
        self._exits.enter_context(listening(self))
        self._keeper.start()
        self._sampler.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: object) -> None:
        self._exits.close()
        if error is not None and not isinstance(error, KeyboardInterrupt):
            self._driver_log.write(f"{kind.__name__ if kind else ''}: {redact_text(str(error))}")
        state = {True: "finished", False: "failed"}[error is None]
        if error is None and self._waits is not None:
            # This was a job before the run's own, its precache on other nodes: the run still waits for its turn.
            self._set(state="submitted", slurm_job_id=self._waits, host="", pid=0, nodes=(), ray=None)
        else:
            self._set(state="stopped" if isinstance(error, KeyboardInterrupt) else state, nodes=(), ray=None)
        self._ended.set()
        self._keeper.join(_CLOSE_SECONDS)

    def line(self, text: str) -> None:
        self._driver_log.write(redact_text(text))

    def progress(self, name: str, done: int, total: int) -> None:
        now = time.time()
        if name != self._record.stage or (self._points and done < self._points[-1][1]):
            self._points.clear()
        self._points.append((now, done))
        (first_at, first), last = self._points[0], self._points[-1][1]
        pace = (now - first_at) / (last - first) if last > first else None
        self._set(stage=name, done=done, total=total, pace=pace, moved=now)

    def stage(self, name: str) -> None:
        self._points.clear()
        self._set(stage=name, done=0, total=0, pace=None, moved=time.time())

    def rank_line(self, line: str, event: dict[str, Any] | None) -> None:
        """What a worker wrote: of its steps the newest loss is kept, all else a person reads in the log."""
        kind = event["kind"] if event is not None else None
        if event is not None and kind == "step":
            self._set(loss=event["metrics"]["loss"])
        elif event is not None and kind == "failed":
            self._ranks_log.write(redact_text(f"[rank {event['rank']}] {event['traceback']}"))
        elif kind != "resumed":  # which repeats the history
            self._ranks_log.write(redact_text(line))

    @contextlib.contextmanager
    def watching(self, load: Callable[[], list[dict[str, Any]]]) -> Iterator[None]:
        """`load` tells about the gang's nodes as long as the `with` lasts; it may fail, and may take its time."""
        self.load = load
        try:
            yield
        finally:
            self.load = None

    def _set(self, **changes: Any) -> None:
        with self._lock:
            self._record = dataclasses.replace(self._record, **changes)

    def _keep(self) -> None:
        while not self._ended.wait(beat_seconds(self.run_uri)):
            self._beat()
        self._beat()

    def _sample(self) -> None:
        """On a thread of its own: nodes that are busy or gone answer late."""
        while not self._ended.wait(_LOAD_SECONDS):
            load = self.load
            with contextlib.suppress(Exception):  # a node that goes is the gang's affair
                self._set(nodes=tuple(load()) if load else ())
            with contextlib.suppress(Exception):
                self._set(ray=_cluster())

    def _beat(self) -> None:
        try:
            # Before the record: whoever reads there that the run has ended finds all that was said.
            self._driver_log.flush()
            self._ranks_log.flush()
            with self._lock:
                record = dataclasses.replace(self._record, beat=time.time())
            old = self._written
            quiet = old is not None and dataclasses.replace(record, beat=old.beat) == old
            if not quiet or (old and record.beat - old.beat >= 2 * beat_seconds(self.run_uri)):
                write_record(self.run_uri, record)
                self._written = record
            if not self.asked_to_stop and storage.exists(storage.join(self.run_uri, STOP_FILE)):
                self.asked_to_stop = True
                storage.remove(storage.join(self.run_uri, STOP_FILE))
                if callable(signal.getsignal(signal.SIGUSR1)):
                    os.kill(os.getpid(), signal.SIGUSR1)  # what Ctrl-C is
        except Exception as error:
            if not self._warned:
                log.warning("%s cannot be kept: %s", FILE, redact_text(str(error)))
            self._warned = True


def _submitted_as(before: DriverRecord | None) -> dict[str, Any]:
    """Under which names the scheduler knows this process; what the submitter wrote holds, where it is of this job."""
    names = ("slurm_job_id", "ray_job_id", "ray_dashboard", "kubernetes_job", "kubernetes_namespace")
    known: dict[str, Any] = dict.fromkeys(names)
    if before is not None and before.state == "submitted":
        known = {name: getattr(before, name) for name in names}
    of_job = {"slurm_job_id": "SLURM_JOB_ID", "kubernetes_job": RAYJOB, "kubernetes_namespace": RAYJOB_NAMESPACE}
    known |= {name: os.environ[variable] for name, variable in of_job.items() if os.environ.get(variable)}
    return known


def _job_that_waits(before: DriverRecord | None) -> str | None:
    """The Slurm job that was submitted for the run, where this process is of another one."""
    of_task = [os.environ.get(name, "") for name in ("SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID")]
    own = {os.environ.get("SLURM_JOB_ID"), "_".join(of_task)}
    if None in own or before is None or before.state != "submitted" or before.slurm_job_id in own:
        return None
    return before.slurm_job_id


def _cluster() -> dict[str, float] | None:
    """Nodes and GPUs of the Ray cluster that this driver is on; None outside of one."""
    import ray

    if not ray.is_initialized():
        return None
    total, free = ray.cluster_resources(), ray.available_resources()
    alive = sum(bool(node["Alive"]) for node in ray.nodes())
    return {"nodes": alive, "gpus": total.get("GPU", 0.0), "gpus_free": free.get("GPU", 0.0)}
