"""Runs as jobs of a Ray cluster, by its Jobs API: submitted, followed and stopped from anywhere that reaches its
dashboard.

A job is the configuration as it was resolved and checked here, as files, and one command on the head node that reads
them. Nothing of this machine's environment goes along but the variables that `cluster.pass_env` names.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from k5dist import storage
from k5dist.cluster.record import FILE, read_record, refuse_second, submitted, write_record
from k5dist.config import ConfigError, RunConfig
from k5dist.console import say
from k5dist.plan import RunPlan
from k5dist.retry import one_line
from k5dist.tracking.redact import redact_uris

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

DEFAULT_DASHBOARD = "http://127.0.0.1:8265"
_ANSWER_SECONDS, _AGENT_SECONDS = 10, 30
# `ray job stop` kills what has not ended three seconds after SIGTERM; a checkpoint takes longer.
_STOP_SECONDS = {"RAY_JOB_STOP_WAIT_TIME_S": "900"}
EXIT_FAILED, EXIT_INTERRUPTED = 1, 130


@dataclasses.dataclass(frozen=True)
class Job:
    """A submitted job, and the folders of its runs."""

    dashboard: str
    job_id: str
    run_uris: tuple[str, ...]


def dashboard_of(address: str | None) -> str:
    """`cluster.address`, or what Ray's own commands would take."""
    return address or os.environ.get("RAY_API_SERVER_ADDRESS") or DEFAULT_DASHBOARD


def connect(dashboard: str) -> JobSubmissionClient:
    """Raises ConfigError where no Ray dashboard answers there."""
    fix = "cluster.address=http://<head>:8265, of a cluster that was started with its dashboard"
    try:
        # Ray's own client waits without a limit.
        with contextlib.suppress(urllib.error.HTTPError):  # it answers; it may want a token
            urllib.request.urlopen(f"{dashboard.rstrip('/')}/api/version", timeout=_ANSWER_SECONDS).close()
        from ray.job_submission import JobSubmissionClient

        return JobSubmissionClient(dashboard)
    except Exception as error:
        rule = f"no Ray dashboard answers there ({one_line(error)})"
        raise ConfigError("cluster.address", dashboard, rule, fix) from error


def configuration(plan: RunPlan) -> dict[str, Any]:
    """What the job runs: this plan's configuration, on the cluster that it finds itself in."""
    config = plan.config
    there = dataclasses.replace(config.cluster, submit=False, address=None, pass_env=())
    place = dataclasses.replace(config.storage, root=storage.normalise(config.storage.root))
    return dataclasses.replace(config, name=plan.name, cluster=there, storage=place).to_mapping()


def environment(config: RunConfig) -> dict[str, str]:
    """Raises ConfigError for a variable that is to be passed and is not set."""
    for name in config.cluster.pass_env:
        if name not in os.environ:
            raise ConfigError("cluster.pass_env", name, "this variable is not set here", f"export {name}=…")
    return {name: os.environ[name] for name in config.cluster.pass_env} | _STOP_SECONDS


def _hand_over(client: JobSubmissionClient, **job: Any) -> None:
    """A cluster that has just begun has a dashboard, and for some seconds no agent that starts jobs."""
    until = time.monotonic() + _AGENT_SECONDS
    while True:
        try:
            client.submit_job(**job)
            return
        except RuntimeError as error:
            if "No available agent" not in str(error) or time.monotonic() > until:
                raise
        time.sleep(1)


def submit(plans: Sequence[RunPlan], sweep: str | None = None) -> Job:
    """One job that takes these runs one after another.

    Raises:
        ConfigError: where the cluster does not take it; nothing is left behind then.
    """
    dashboard = dashboard_of(plans[0].config.cluster.address)
    for plan in plans:
        refuse_second(plan.run_uri, everywhere=True)
    client = connect(dashboard)
    variables = environment(plans[0].config)
    job = Job(dashboard, f"k5dist-{plans[0].name}-{uuid.uuid4().hex[:6]}", tuple(plan.run_uri for plan in plans))
    before = [read_record(uri) for uri in job.run_uris]
    for uri in job.run_uris:
        write_record(uri, submitted(ray_job_id=job.job_id, ray_dashboard=redact_uris(dashboard), sweep=sweep))
    try:
        with tempfile.TemporaryDirectory(prefix="k5dist-job-") as folder:
            names = [f"run-{at:03d}.json" for at in range(len(plans))]
            for name, plan in zip(names, plans, strict=True):
                (Path(folder) / name).write_text(json.dumps(configuration(plan), indent=1))
            _hand_over(
                client,
                # exec: signals reach it and not a shell.
                entrypoint=f"exec python -m k5dist.launch --resolved {' '.join(names)}",
                submission_id=job.job_id,
                runtime_env={"working_dir": folder, "env_vars": variables},
                metadata={"k5dist": plans[0].name},
            )
    except Exception as error:
        for uri, record in zip(job.run_uris, before, strict=True):
            write_record(uri, record) if record is not None else storage.remove(storage.join(uri, FILE))
        rule = f"the cluster did not take the job ({one_line(error)})"
        raise ConfigError("cluster.address", dashboard, rule, "see the dashboard's own log on the head node") from error
    say(f"submitted {job.job_id} to {dashboard}")
    return job


def follow(job: Job) -> int:
    """Show what the job says until it ends; an exit status. Ctrl-C lets go of it, and it goes on."""
    client = connect(job.dashboard)
    try:
        asyncio.run(_show(client, job.job_id))
        status, info = client.get_job_status(job.job_id), client.get_job_info(job.job_id)
    except KeyboardInterrupt:
        say(f"the job goes on. {_how_to(job)}")
        return EXIT_INTERRUPTED
    except Exception as error:
        say(f"the job's output does not come any more ({one_line(error)}). {_how_to(job)}")
        return EXIT_FAILED
    if status.value == "SUCCEEDED":
        return 0
    if any(record.state == "stopped" for uri in job.run_uris if (record := read_record(uri)) is not None):
        say("stopped; the same command goes on from the newest checkpoint")
        return EXIT_INTERRUPTED
    _mark_unbegun(job)
    sys.stderr.write(f"job {job.job_id}: {status.value}: {info.message}\n")
    return EXIT_FAILED


def _how_to(job: Job) -> str:
    name = job.run_uris[0].rsplit("/", 1)[-1]
    root = job.run_uris[0].rsplit("/runs/", 1)[0]
    command = "python -m k5dist.runs"
    return (
        f"Follow: {command} logs {name} --follow storage.root={root}   Stop: {command} stop {name} storage.root={root}"
    )


async def _show(client: JobSubmissionClient, job_id: str) -> None:
    async for lines in client.tail_job_logs(job_id):
        sys.stdout.write(lines)
        sys.stdout.flush()


def _mark_unbegun(job: Job) -> None:
    """A job that ended before its driver began has no driver to say so."""
    for uri in job.run_uris:
        record = read_record(uri)
        if record is not None and record.state == "submitted" and record.ray_job_id == job.job_id:
            write_record(uri, dataclasses.replace(record, state="failed"))


def stop_job(dashboard: str, job_id: str) -> str | None:
    """None where the job has ended or is unknown."""
    client = connect(dashboard)
    if not any(job.submission_id == job_id and not job.status.is_terminal() for job in client.list_jobs()):
        return None
    client.stop_job(job_id)
    return f"took job {job_id} off the Ray cluster at {dashboard}"


def job_status(dashboard: str, job_id: str) -> str:
    """What the cluster says of it; that it does not answer, where that is so."""
    try:
        info = connect(dashboard).get_job_info(job_id)
    except ConfigError as error:
        return error.rule
    except RuntimeError as error:  # Ray's client raises it for a job that the cluster does not know
        return one_line(error)
    return info.status.value.lower() + (f": {info.message}" if info.status.is_terminal() and info.message else "")
