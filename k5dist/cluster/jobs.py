"""Runs as jobs of a Ray cluster, by its Jobs API: submitted, followed and stopped from anywhere that reaches its
dashboard."""

from __future__ import annotations

from typing import TYPE_CHECKING

from k5dist.config import ConfigError
from k5dist.retry import one_line

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient


def connect(dashboard: str) -> JobSubmissionClient:
    """Raises ConfigError where no Ray dashboard answers there."""
    from ray.job_submission import JobSubmissionClient

    try:
        return JobSubmissionClient(dashboard)
    except Exception as error:
        rule = f"no Ray dashboard answers there ({one_line(error)})"
        fix = "cluster.address=http://<head>:8265, on a cluster started with its dashboard"
        raise ConfigError("cluster.address", dashboard, rule, fix) from error


def stop_job(dashboard: str, job_id: str) -> str | None:
    """None where the job has ended or is unknown."""
    client = connect(dashboard)
    if not any(job.submission_id == job_id and not job.status.is_terminal() for job in client.list_jobs()):
        return None
    client.stop_job(job_id)
    return f"took job {job_id} off the Ray cluster at {dashboard}"
