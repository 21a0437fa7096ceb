"""Stopping a run wherever its driver is: it saves a checkpoint and ends, and the same command goes on from there."""

from __future__ import annotations

import dataclasses

from k5dist.cluster.record import DriverRecord, ask_to_stop, beat_seconds, write_record
from k5dist.config import ConfigError
from k5dist.runs.facts import RunFacts
from k5dist.runs.schedulers import cancel_waiting, has_forgotten


def stop(run: RunFacts) -> str:
    """What was done, in a line for the user.

    Raises:
        ConfigError: where nothing is there to be stopped, or what has it does not answer.
    """
    record = run.record
    if record is None:
        raise ConfigError("run", run.name, "no driver has made itself known in its folder", "stop it where it runs")
    if run.state == "running":
        return _stop_running(run, record)
    # What was stopped, failed or lost may be queued again by its scheduler.
    said = None if run.state == "finished" else cancel_waiting(record)
    if said is None and record.state == "submitted" and has_forgotten(record):
        said = "its scheduler knows it no more: nothing of it waits"
    if said is None:
        fix = f"nothing is left to stop; `python -m k5dist.runs status {run.name}` says more"
        raise ConfigError("run", run.name, f"it does not run: {run.state}", fix)
    write_record(run.uri, dataclasses.replace(record, state="stopped"))
    return said


def _stop_running(run: RunFacts, record: DriverRecord) -> str:
    """A request in the run's folder, wherever the driver is: asked twice, it still stops once, and saves."""
    ask_to_stop(run.uri)
    where = f"process {record.pid}" if record.is_here else f"the driver on {record.host}"
    looks = f"it looks every {beat_seconds(run.uri):.0f} s"
    return f"asked {where} to stop ({looks}): it saves a checkpoint and ends; the same command goes on from there"
