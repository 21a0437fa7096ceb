"""What is known of runs: from their folders, and from the tracking store where it answers."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from k5dist import storage
from k5dist.cluster.record import DriverRecord, read_record
from k5dist.config import ConfigError, nearest
from k5dist.tracking.reader import LastStep, TrackedFacts, read_run
from k5dist.tracking.run import TrackingUnreachable, default_tracking_uri

_READERS = 16  # folders of object storage that are read at once
_OF_MLFLOW = {"FINISHED": "finished", "FAILED": "failed", "KILLED": "stopped", "RUNNING": "lost"}


@dataclass(frozen=True)
class Place:
    """Where runs are looked for: the same keys as a launch's."""

    root: str
    tracking_uri: str
    experiment: str
    tracking_typed: bool = False  # then a run's plan does not say better: its store may have another address from here

    @classmethod
    def of(cls, root: str, tracking_uri: str | None, experiment: str) -> Place:
        root = storage.normalise(root)
        return cls(root, tracking_uri or default_tracking_uri(root), experiment, tracking_uri is not None)

    @property
    def runs_uri(self) -> str:
        return storage.join(self.root, "runs")


@dataclass(frozen=True)
class RunFacts:
    name: str
    uri: str
    record: DriverRecord | None  # None: of a run that was only planned, or by an older release
    tracked: TrackedFacts | None = None

    @property
    def state(self) -> str:
        """planned, submitted, running, lost (it was running and its driver is gone), finished, stopped or failed."""
        if self.record is None:
            return _OF_MLFLOW.get(self.tracked.status, "planned") if self.tracked else "planned"
        return "lost" if self.record.is_lost(self.uri) else self.record.state

    @property
    def loss(self) -> float | None:
        if self.record is not None and self.record.loss is not None:
            return self.record.loss
        return self.tracked.loss if self.tracked else None

    @property
    def progress(self) -> str:
        record = self.record
        if record is None or not record.stage:
            return ""
        return f"{record.stage} {record.done}/{record.total}" if record.total else record.stage

    @property
    def eta(self) -> float | None:
        """Seconds until the present stage ends, at its pace of late; None where there is none."""
        record = self.record
        if record is None or self.state != "running" or record.pace is None or record.done >= record.total:
            return None
        return max(0.0, record.pace * (record.total - record.done) - (time.time() - record.moved))

    @property
    def age(self) -> float | None:
        """Seconds since it last moved."""
        return None if self.record is None else max(0.0, time.time() - (self.record.moved or self.record.began))


def list_runs(place: Place, tracked: dict[str, TrackedFacts]) -> list[RunFacts]:
    """All below the root, the one that moved last at the end."""
    names = storage.list_folder(place.runs_uri)

    def read(name: str) -> RunFacts:
        uri = storage.join(place.runs_uri, name)
        return RunFacts(name, uri, read_record(uri), tracked.get(uri))

    with ThreadPoolExecutor(_READERS) as pool:
        found = list(pool.map(read, names))
    return sorted(found, key=lambda run: (run.record.moved if run.record else 0.0, run.name))


def find_run(place: Place, text: str) -> RunFacts:
    """The run of that name, of the only name that begins so, or of that folder.

    Raises:
        ConfigError: where none or several are meant, with the nearest names.
    """
    if "/" in text:
        uri = storage.normalise(text)
        if not any(storage.exists(storage.join(uri, name)) for name in ("plan.json", "driver.json")):
            raise ConfigError("run", text, "this folder holds no run", "python -m k5dist.runs list")
        return RunFacts(uri.rsplit("/", 1)[-1], uri, read_record(uri))
    names = storage.list_folder(place.runs_uri)
    if text not in names:
        begin = [name for name in names if name.startswith(text)]
        if len(begin) > 1:
            rule = f"{len(begin)} runs begin so below {place.runs_uri}"
            raise ConfigError("run", text, rule, f"one of {', '.join(begin[:5])}{', …' * (len(begin) > 5)}")
        if not begin:
            raise _unknown(place, text, names)
        text = begin[0]
    uri = storage.join(place.runs_uri, text)
    return RunFacts(text, uri, read_record(uri))


def _unknown(place: Place, text: str, names: list[str]) -> ConfigError:
    if not names:
        fix = "storage.root=<where the run was started with>"
        return ConfigError("run", text, f"there are no runs below {place.runs_uri}", fix)
    near = nearest(text, names) or names[-3:]
    return ConfigError("run", text, f"no such run below {place.runs_uri}", f"did you mean {', '.join(near)}?")


@dataclass(frozen=True)
class Details:
    """Of one run, more."""

    run: RunFacts
    plan: dict[str, Any]
    last: LastStep | None
    tracking_uri: str
    tracking_error: str | None


def details(place: Place, run: RunFacts) -> Details:
    """With the tracking store that was typed, or else its plan's; where that does not answer, without, and with the
    reason."""
    plan = _json(storage.join(run.uri, "plan.json"))
    tracking_uri = None if place.tracking_typed else plan.get("tracking_uri")
    tracking_uri = tracking_uri or place.tracking_uri
    run_id = _json(storage.join(run.uri, "tracking.json")).get("run_id")
    if run_id is None:
        return Details(run, plan, None, tracking_uri, None)
    try:
        tracked, last = read_run(tracking_uri, run_id)
    except TrackingUnreachable as error:
        return Details(run, plan, None, tracking_uri, str(error))
    return Details(RunFacts(run.name, run.uri, run.record, tracked), plan, last, tracking_uri, None)


def _json(uri: str) -> dict[str, Any]:
    return json.loads(storage.read_text(uri)) if storage.exists(uri) else {}
