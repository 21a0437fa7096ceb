"""A run as a job of a real Ray cluster with a dashboard: submitted, followed, let go of, stopped; and refused."""

from __future__ import annotations

import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from k5dist.cluster.record import read_record
from k5dist.train.checkpoint import committed_steps
from tests.cluster import faults
from tests.cluster import job as jobs
from tests.cluster.test_runs import ENDLESS, runs

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]
SECRET = "hunter2hunter2"
NAMED = {"K5_TEST_MARK": "passed on", "AWS_SECRET_ACCESS_KEY": SECRET, "K5DIST_UNNAMED": SECRET}


@pytest.fixture(scope="module")
def dashboard() -> Iterator[str]:
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", str(Path(sys.executable).parent), prepend=":")  # jobs say `python`
        patch.setenv("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
        # A port of its own: by default the agent that starts jobs listens where another Ray's may do so already.
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            port = taken.getsockname()[1]
        head = {"num_cpus": 4, "include_dashboard": True, "dashboard_agent_listen_port": port}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        try:
            assert cluster.head_node is not None
            yield f"http://{cluster.head_node.webui_url}"
        finally:
            cluster.shutdown()


def submit(root: Path, dashboard: str, *overrides: str) -> jobs.Job:
    where = ("cluster=ray", "cluster.submit=true", f"cluster.address={dashboard}")
    return jobs.start(root, *ENDLESS, *where, *overrides, env=NAMED)


def the_job(dashboard: str) -> Any:
    from ray.job_submission import JobSubmissionClient

    return max(JobSubmissionClient(dashboard).list_jobs(), key=lambda job: job.start_time or 0)


def test_submitted_followed_let_go_of_and_stopped(dashboard: str, tmp_path: Path) -> None:
    job = submit(tmp_path, dashboard, "cluster.pass_env=[K5_TEST_MARK]")
    job.wait_for(jobs.trained_to(2), 300)
    info = the_job(dashboard)
    assert SECRET not in str(info), "nothing of the environment goes along by itself"
    assert info.runtime_env["env_vars"]["K5_TEST_MARK"] == "passed on"
    again = submit(tmp_path, dashboard)
    assert again.wait() == 2, again.output
    assert "this run has a driver" in again.output
    job.signal(signal.SIGINT)
    assert job.wait() == 130, job.output
    assert "the job goes on" in job.output and "runs stop fox" in job.output
    assert f"Ray job {info.submission_id}" in runs(tmp_path, "list")
    assert the_job(dashboard).status == "RUNNING"

    # Ray's own way to stop a job, which would leave three seconds to a driver.
    from ray.job_submission import JobSubmissionClient

    JobSubmissionClient(dashboard).stop_job(info.submission_id)
    run = tmp_path / "runs" / "fox"
    faults.wait_until(_Endless(), lambda: _state(run) != "running", "its end", seconds=60)  # type: ignore[arg-type]
    assert _state(run) == "stopped"
    fingerprint = jobs.the_run(tmp_path, "fox").data.tags["run_fingerprint"]
    assert committed_steps(str(run / "checkpoints"), fingerprint)
    jobs.wait_until_nothing_runs(str(run))


class _Endless:
    """In place of a job whose end would be an error."""

    output = ""

    class process:  # noqa: N801
        @staticmethod
        def poll() -> None: ...


def _state(run: Path) -> str:
    record = read_record(str(run))
    return "" if record is None else record.state


def test_no_cluster_no_gpus_and_no_such_variable_are_one_message_each(dashboard: str, tmp_path: Path) -> None:
    nobody = submit(tmp_path, "http://127.0.0.1:1")
    unset = submit(tmp_path, dashboard, "cluster.pass_env=[K5_TEST_UNSET]")
    assert (nobody.wait(), unset.wait()) == (2, 2), f"{nobody.output}\n{unset.output}"
    assert "no Ray dashboard answers there" in nobody.output and "Traceback" not in nobody.output
    assert "this variable is not set here" in unset.output
    assert not (tmp_path / "runs" / "fox" / "driver.json").exists()
    gpus = submit(tmp_path, dashboard, "cluster.gpus_per_node=2", "cluster.wait_seconds=2", "name=gpus")
    assert gpus.wait() == 1, gpus.output
    assert "could not give 1 node(s) with {'CPU': 1, 'GPU': 2} each within 2 s" in gpus.output
    assert "Traceback" not in gpus.output
    assert "failed" in runs(tmp_path, "list")
    assert f"{the_job(dashboard).submission_id}: failed: " in runs(tmp_path, "status", "gpus")
