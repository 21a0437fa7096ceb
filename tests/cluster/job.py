"""The real command in a process of its own, as a user starts it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from mlflow import MlflowClient
from mlflow.entities import Run

# Twelve steps, each kind of event at least twice, and little of what costs time.
SHORT = (
    "+flavour=t2v-tiny",
    "train.steps=12",
    "checkpoint.every=4",
    "validation.every=6",
    "validation.sampling_steps=2",
    "validation.prompts=[A cartoon rabbit wakes up in a green meadow]",
    "validation.compare=[base]",
)


@dataclass
class Job:
    """A running launch; its output is collected line by line."""

    process: subprocess.Popen[str]
    lines: list[str] = field(default_factory=list)
    _reader: threading.Thread | None = None

    def wait_for(self, seen: Callable[[str], bool], seconds: float = 120, after: int = 0) -> str:
        """The first line that `seen` likes, from line `after` on; fails when the job ends or the time is over before
        it comes."""
        deadline, at = time.monotonic() + seconds, after
        while time.monotonic() < deadline:
            while at < len(self.lines):
                if seen(self.lines[at]):
                    return self.lines[at]
                at += 1
            if self.process.poll() is not None and at == len(self.lines):
                break
            time.sleep(0.02)
        raise AssertionError("the line never came:\n" + self.output)

    def wait(self, seconds: float = 240) -> int:
        try:
            status = self.process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it still runs after {seconds} s:\n" + self.output) from None
        assert self._reader is not None
        self._reader.join(timeout=10)
        return status

    def signal(self, number: int) -> None:
        os.kill(self.process.pid, number)

    @property
    def output(self) -> str:
        return "\n".join(self.lines)


def start(root: Path | str, *overrides: str, env: dict[str, str] | None = None, cwd: Path | None = None) -> Job:
    command = [sys.executable, "-m", "k5dist.launch", *overrides, f"storage.root={root}"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=cwd,
        env={**os.environ, "PYTHONUNBUFFERED": "1", "K5DIST_PROGRESS_SECONDS": "0", **(env or {})},
        start_new_session=True,
    )
    job = Job(process)

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            job.lines.append(line.rstrip("\n"))

    job._reader = threading.Thread(target=read, daemon=True)
    job._reader.start()
    return job


def run(root: Path | str, *overrides: str, env: dict[str, str] | None = None, cwd: Path | None = None) -> Job:
    job = start(root, *overrides, env=env, cwd=cwd)
    job.wait()
    return job


def wait_for_file(job: Job, path: Path, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert job.process.poll() is None, "the job ended first:\n" + job.output
        assert time.monotonic() < deadline, f"{path} never came:\n" + job.output
        time.sleep(0.02)


def trained_to(step: int) -> Callable[[str], bool]:
    """Likes the progress line of a step, or of a later one."""

    def seen(line: str) -> bool:
        name, _, rest = line.partition(": ")
        return name == "train" and rest.split("/")[0].isdigit() and int(rest.split("/")[0]) >= step

    return seen


def the_run(root: Path, name: str | None = None) -> Run:
    """The newest MLflow run below an embedded store (of that run name)."""
    client = MlflowClient(f"sqlite:///{root}/mlflow.db")
    experiment = client.get_experiment_by_name("k5dist")
    assert experiment is not None
    wanted = f"attributes.run_name = '{name}'" if name else ""
    return client.search_runs([experiment.experiment_id], wanted, order_by=["attributes.start_time DESC"])[0]


def losses(root: Path, run_id: str) -> dict[int, float]:
    """The training loss of every step; a step that was logged twice (before and after a crash) must agree."""
    found: dict[int, float] = {}
    for metric in MlflowClient(f"sqlite:///{root}/mlflow.db").get_metric_history(run_id, "loss"):
        assert found.setdefault(metric.step, metric.value) == metric.value, (
            f"step {metric.step} was logged twice, differently"
        )
    return found


def left_running(plan_folder: str) -> list[str]:
    """Command lines of processes that still work on a run: torchrun, its workers, or anything given its plan."""
    return [" ".join(process.info["cmdline"]) for process in _working_on(plan_folder)]


def _working_on(plan_folder: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        command = " ".join(process.info["cmdline"] or [])
        if plan_folder in command and "k5dist" in command and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process)
    return found


def wait_until_nothing_runs(plan_folder: str, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not left_running(plan_folder):
            return
        time.sleep(0.2)
    raise AssertionError("still running: " + "\n".join(left_running(plan_folder)))


def kill_all(job: Job, plan_folder: str) -> None:
    """SIGKILL to the driver and its workers at once, as when a machine loses power."""
    job.signal(signal.SIGKILL)
    for process in _working_on(plan_folder):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    job.wait()
