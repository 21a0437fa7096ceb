"""What has a run before its driver has begun, or after it has gone: Slurm's queue, a Ray cluster's jobs.

Another scheduler has its place here: what it says of a job, and how one that waits is taken out of its queue.
Of a RayJob only the API server knows before its driver runs, which then makes itself known as any other.
"""

from __future__ import annotations

import shutil
import subprocess

from k5dist.cluster.record import DriverRecord
from k5dist.config import ConfigError

_SLURM_SECONDS = 60
_WAITING = {"PENDING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT", "SUSPENDED"}


def told(record: DriverRecord) -> tuple[str, str] | None:
    """What the scheduler says of the run's job, in a row for the user; None where there is none to ask."""
    try:
        if record.slurm_job_id:
            # With the reason that it waits for, a quota say.
            states = _slurm(["squeue", "--noheader", "--format=%T (%r)", f"--jobs={record.slurm_job_id}"]).splitlines()
            shown = ", ".join(state.strip().removesuffix(" (None)") for state in states)
            return ("Slurm", f"job {record.slurm_job_id}: {shown or 'not in the queue'}")
        if record.ray_job_id and record.ray_dashboard:
            from k5dist.cluster.jobs import job_status

            return ("Ray job", f"{record.ray_job_id}: {job_status(record.ray_dashboard, record.ray_job_id)}")
    except ConfigError as error:
        return ("scheduler", error.rule)
    return None


def cancel_waiting(record: DriverRecord) -> str | None:
    """Take what has not begun, or waits to go on, out of its queue; None where nothing waits.

    Raises:
        ConfigError: where the scheduler does not answer.
    """
    if record.slurm_job_id:
        if not _WAITING.intersection(_slurm_states(record.slurm_job_id)):
            return None
        _slurm(["scancel", record.slurm_job_id])
        return f"took job {record.slurm_job_id} out of Slurm's queue"
    if record.ray_job_id and record.ray_dashboard and record.state == "submitted":
        if record.sweep is not None:  # the job is that of its neighbours, too
            return f"run taken out of {record.sweep}; the others go on"
        from k5dist.cluster.jobs import stop_job

        return stop_job(record.ray_dashboard, record.ray_job_id)
    return None


def has_forgotten(record: DriverRecord) -> bool:
    """Whether nothing of a run that `cancel_waiting` found not waiting can begin any more."""
    return not (record.slurm_job_id and _slurm_states(record.slurm_job_id))


def _slurm_states(job: str) -> list[str]:
    return _slurm(["squeue", "--noheader", "--format=%T", f"--jobs={job}"]).split()


def _slurm(command: list[str]) -> str:
    """What a command of Slurm prints; nothing where Slurm has forgotten the job."""
    key, shown = "run", " ".join(command)
    if shutil.which(command[0]) is None:
        rule = f"its job is in a Slurm, and this machine has no {command[0]}"
        raise ConfigError(key, shown, rule, "ask from a login node")
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SLURM_SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        rule = f"Slurm's controller did not answer within {_SLURM_SECONDS} s"
        raise ConfigError(key, shown, rule, "see `scontrol ping`") from error
    if done.returncode and "Invalid job id" not in done.stderr:
        raise ConfigError(key, shown, done.stderr.strip(), "see `scontrol ping`")
    return done.stdout
