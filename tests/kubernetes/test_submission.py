"""Submit → follow → finished, failed, stopped, by the official client over HTTP."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from k5dist.config import ConfigError
from tests.kubernetes.api_server import NAMESPACE, Cluster, Script, role
from tests.kubernetes.plans import DEV
from tests.kubernetes.schemas import needs_crds
from tests.kubernetes.scripts import NAME, fails, finishes, finishes_at_once, follow, runs_on

pytestmark = needs_crds


def test_a_job_is_submitted_followed_and_finishes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Cluster(finishes) as cluster:
        assert follow(cluster, tmp_path) == 0
        (made,) = cluster.created
    assert made["metadata"]["name"] == NAME
    shown = capsys.readouterr().out
    assert [line for line in shown.splitlines() if "train:" in line or line == "Done"] == [
        "train: 1/60", "train: 60/60", "Done",
    ]  # fmt: skip
    assert shown.index("status: Initializing") < shown.index("status: Running") < shown.index(f"RayJob {NAME} finished")
    assert list(cluster.pods) == [f"{NAME}-submitter"]


def test_a_log_that_breaks_off_goes_on_where_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Cluster(finishes) as cluster:
        cluster.breaks.add(f"{NAME}-submitter")
        assert follow(cluster, tmp_path) == 0
        assert not cluster.breaks
    shown = capsys.readouterr().out.splitlines()
    assert [line for line in shown if "train:" in line or line == "Done"] == ["train: 1/60", "train: 60/60", "Done"]


@pytest.mark.parametrize(
    ("script", "words"),
    [
        (fails("Job entrypoint command failed with exit code 1"), ["AppFailed", "exit code 1", "out of memory"]),
        (fails("", "DeadlineExceeded"), ["DeadlineExceeded"]),
    ],
)
def test_a_job_that_fails_says_why(
    script: Script, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Cluster(script) as cluster:
        assert follow(cluster, tmp_path) == 1
        assert list(cluster.pods) == [f"{NAME}-submitter"]
    shown = capsys.readouterr().out
    assert all(word in shown for word in [f"RayJob {NAME} failed", "the same command goes on", *words])


def test_queues_priorities_and_waiting_in_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def script(cluster: Cluster, job: dict[str, Any]) -> Iterator[None]:
        job["status"] = {"jobDeploymentStatus": "Suspended"}  # as Kueue leaves it until there is room
        yield
        yield
        yield from finishes(cluster, job)

    with Cluster(script) as cluster:
        assert follow(cluster, tmp_path, "kubernetes.queue=gpus", "kubernetes.queue_priority=high") == 0
        labels = cluster.created[0]["metadata"]["labels"]
    assert (labels["kueue.x-k8s.io/queue-name"], labels["kueue.x-k8s.io/priority-class"]) == ("gpus", "high")
    assert "waits in queue gpus" in capsys.readouterr().out


def test_a_server_that_stumbles_is_asked_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def script(cluster: Cluster, job: dict[str, Any]) -> Iterator[None]:
        for i, _ in enumerate(finishes(cluster, job)):
            cluster.failing = 2 if i in (0, 2) else cluster.failing
            yield

    with Cluster(script) as cluster:
        assert follow(cluster, tmp_path) == 0
    assert "503" in capsys.readouterr().out


def test_a_server_that_stays_away_leaves_the_job(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def script(cluster: Cluster, job: dict[str, Any]) -> Iterator[None]:
        cluster.failing = 1_000_000
        yield

    with Cluster(script) as cluster:
        assert follow(cluster, tmp_path) == 1
        assert NAME in cluster.rayjobs
    assert "may go on without this command" in capsys.readouterr().out


def test_a_run_that_is_on_its_way_is_not_begun_twice(tmp_path: Path) -> None:
    with Cluster(runs_on) as cluster:
        assert follow(cluster, tmp_path, "kubernetes.follow=false") == 0
        with pytest.raises(ConfigError, match="there already") as caught:
            follow(cluster, tmp_path)
        assert (caught.value.key, len(cluster.created)) == ("name", 1)
        assert NAME in cluster.rayjobs, "and the first goes on"


def test_one_that_has_ended_makes_way(tmp_path: Path) -> None:
    with Cluster(fails("exit code 1")) as cluster:
        assert follow(cluster, tmp_path) == 1
        cluster.script = finishes
        assert follow(cluster, tmp_path) == 0
        assert len(cluster.created) == 2


def test_a_suspended_one_is_made_and_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Cluster(finishes) as cluster:
        assert follow(cluster, tmp_path, "kubernetes.suspend=true") == 0
        assert cluster.rayjobs[NAME]["spec"]["suspend"] is True
        assert cluster.pods == {}
    assert "kubectl patch rayjob" in capsys.readouterr().out


def interrupt_when_it_runs(cluster: Cluster, job: dict[str, Any]) -> Iterator[None]:
    steps = runs_on(cluster, job)
    for _ in range(3):
        next(steps)
        yield
    threading.Timer(0, os.kill, (os.getpid(), signal.SIGINT)).start()
    yield from steps


@pytest.mark.parametrize("what", ["delete", "suspend", "leave"])
def test_ctrl_c(what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Cluster(interrupt_when_it_runs) as cluster:
        with pytest.raises(KeyboardInterrupt):
            follow(cluster, tmp_path, f"kubernetes.on_interrupt={what}")
        left, pods = dict(cluster.rayjobs), dict(cluster.pods)
    assert bool(left) == (what != "delete")
    assert bool(pods) == (what == "leave")
    assert f"RayJob {NAME}" in capsys.readouterr().out


def test_the_role_of_submitters_is_what_the_client_asks(tmp_path: Path) -> None:
    with Cluster(finishes) as cluster:
        follow(cluster, tmp_path, "kubernetes.queue=gpus")
        with pytest.raises(ConfigError):
            follow(cluster, tmp_path, "kubernetes.queue=none")
        cluster.script = interrupt_when_it_runs
        for what in ("suspend", "delete"):
            with pytest.raises(KeyboardInterrupt):
                follow(cluster, tmp_path, f"kubernetes.on_interrupt={what}")
        # People also list their jobs.
        assert role() - cluster.asked == {("rayjobs", "list")}


def launch(cluster: Cluster, folder: Path, *overrides: str) -> subprocess.Popen[str]:
    typed = [*DEV, f"name={NAME}", f"kubernetes.kubeconfig={cluster.kubeconfig(folder)}", *overrides]
    command = [sys.executable, "-m", "k5dist.launch", *typed]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_the_whole_command(tmp_path: Path) -> None:
    with Cluster(finishes_at_once) as cluster:
        output, error = launch(cluster, tmp_path).communicate(timeout=60)
    assert error == ""
    assert f"submitted RayJob {NAMESPACE}/{NAME}" in output
    assert "train: 60/60" in output
    assert output.rstrip().endswith(f"RayJob {NAME} finished")


def test_the_whole_command_is_interrupted(tmp_path: Path) -> None:
    processes: list[subprocess.Popen[str]] = []
    running = threading.Event()

    def script(cluster: Cluster, job: dict[str, Any]) -> Iterator[None]:
        for i, _ in enumerate(runs_on(cluster, job)):
            if i == 1:
                running.set()
            yield

    with Cluster(script) as cluster:
        processes.append(launch(cluster, tmp_path))
        assert running.wait(60)
        processes[0].send_signal(signal.SIGINT)
        output, _ = processes[0].communicate(timeout=60)
        assert (cluster.rayjobs, cluster.pods) == ({}, {})
    assert processes[0].returncode == 130
    assert "the workers save a checkpoint" in output


def test_the_whole_command_is_refused(tmp_path: Path) -> None:
    with Cluster(finishes) as cluster:
        process = launch(cluster, tmp_path, "kubernetes.queue=none")
        _, error = process.communicate(timeout=60)
    assert process.returncode == 2
    assert error.startswith("Configuration error\n  key   kubernetes.queue")


def test_a_job_that_someone_deletes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def script(cluster: Cluster, job: dict[str, Any]) -> Iterator[None]:
        yield from (step for step, _ in zip(runs_on(cluster, job), range(2), strict=False))
        del cluster.rayjobs[NAME]
        yield

    with Cluster(script) as cluster:
        assert follow(cluster, tmp_path) == 130
    assert "was deleted" in capsys.readouterr().out


def test_rights_that_are_lost_leave_the_job_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def script(cluster: Cluster, job: dict[str, Any]) -> Iterator[None]:
        yield from (step for step, _ in zip(runs_on(cluster, job), range(2), strict=False))
        cluster.rights.clear()
        yield

    with Cluster(script) as cluster:
        with pytest.raises(ConfigError, match="you may not"):
            follow(cluster, tmp_path)
        assert NAME in cluster.rayjobs
    assert "may go on without this command" in capsys.readouterr().out
