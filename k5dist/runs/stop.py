"""Stopping a run wherever its driver is: it saves a checkpoint and ends, and the same command goes on from there."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Callable

from k5dist.cluster.record import DriverRecord, ask_to_stop, beat_seconds
from k5dist.config import ConfigError
from k5dist.runs.facts import RunFacts

_SLURM_SECONDS = 60


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
    waiting = _WAITING.get(run.state)
    said = waiting(record) if waiting else None
    if said is None:
        fix = f"nothing is left to stop; `python -m k5dist.runs status {run.name}` says more"
        raise ConfigError("run", run.name, f"it does not run: {run.state}", fix)
    return said


def _stop_running(run: RunFacts, record: DriverRecord) -> str:
    """A signal where the driver is a process of this machine, of this run alone; else a request in the run's folder."""
    goes_on = "it saves a checkpoint and ends; the same command goes on from there"
    if record.is_here and record.sweep is None:
        try:
            os.kill(record.pid, signal.SIGUSR1)
        except PermissionError as error:
            rule = f"its driver, process {record.pid} of this machine, belongs to another user"
            raise ConfigError("run", run.name, rule, "ask that user") from error
        return f"asked process {record.pid} to stop: {goes_on}"
    ask_to_stop(run.uri)
    return f"asked the driver on {record.host} to stop (it looks every {beat_seconds(run.uri):.0f} s): {goes_on}"


def _cancel_waiting(record: DriverRecord) -> str | None:
    """Take what has not begun, or waits to go on, out of its queue; None where nothing waits."""
    if record.slurm_job_id:
        return _cancel_slurm(record.slurm_job_id)
    if record.ray_job_id and record.ray_dashboard and record.state == "submitted":
        from k5dist.cluster.jobs import stop_job

        return stop_job(record.ray_dashboard, record.ray_job_id)
    # A RayJob of Kubernetes (record.kubernetes_job) that waits for its turn would be deleted or suspended here.
    return None


_WAITING: dict[str, Callable[[DriverRecord], str | None]] = {
    "submitted": _cancel_waiting,
    "stopped": _cancel_waiting,  # Slurm may have queued it again
    "lost": _cancel_waiting,
    "failed": _cancel_waiting,
}


def _cancel_slurm(job: str) -> str | None:
    if shutil.which("scancel") is None:
        rule, fix = f"it is job {job} of a Slurm, and this machine has no scancel", "stop it from a login node"
        raise ConfigError("run", job, rule, fix)
    waits = _run(["squeue", "--noheader", "--format=%T", f"--jobs={job}"]).split()
    if not set(waits) & {"PENDING", "REQUEUED", "REQUEUE_HOLD", "SUSPENDED"}:
        return None
    _run(["scancel", job])
    return f"took job {job} out of Slurm's queue"


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SLURM_SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        rule = f"Slurm's controller did not answer within {_SLURM_SECONDS} s"
        raise ConfigError("run", " ".join(command), rule, "see `scontrol ping`") from error
    if done.returncode and "Invalid job id" not in done.stderr:
        raise ConfigError("run", " ".join(command), done.stderr.strip(), "see `scontrol ping`")
    return done.stdout
