"""What is around the training: `python -m k5dist.benchmark launch --out FILE`.

The real command on the tiny flavour, on this machine: from the command to the first step with a warm cache, from a
killed worker to the next step, and the driver's own CPU time while the workers train. Nothing of it depends on the
model.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from k5dist.console import say, show_table

GOALS = {"first_step_seconds": 45.0, "restart_seconds": 20.0, "driver_cpu_share": 0.02}
NAME = "launch-benchmark"
# Nothing that takes time of its own between the steps; a checkpoint now and then to restart from.
OVERRIDES = (
    *("+flavour=t2v-tiny", f"name={NAME}", "train.steps=1000000", "data.held_out=0.0", "validation.every=0"),
    *("validation.prompts=[]", "checkpoint.every=20", "stages=[plan,precache,train]"),
)


class Command:
    """A launch whose lines are kept with the moment at which they came."""

    def __init__(self, root: Path, *overrides: str) -> None:
        self.began = time.monotonic()
        command = [sys.executable, "-m", "k5dist.launch", *overrides, f"storage.root={root}"]
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", "K5DIST_PROGRESS_SECONDS": "0"}
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
        )
        self.lines: list[tuple[float, str]] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append((time.monotonic(), line.rstrip("\n")))

    def moment(self, wanted: Callable[[str], bool], *, after: float = 0.0, seconds: float = 600) -> float:
        """When the first line after `after` came that is `wanted`; ends the benchmark where it does not come."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            over = self.process.poll() is not None
            for at, line in list(self.lines):
                if at > after and wanted(line):
                    return at
            if over:
                break
            time.sleep(0.01)
        raise SystemExit("the line never came:\n" + "\n".join(line for _, line in self.lines[-40:]))

    def steps(self, begin: float, end: float) -> int:
        return sum(begin < at <= end and is_step(line) for at, line in list(self.lines))

    def end(self) -> float:
        """Stop it as Ctrl-C does; seconds until it has ended."""
        began = time.monotonic()
        self.process.send_signal(signal.SIGINT)
        self.process.wait(timeout=120)
        return time.monotonic() - began


def is_step(line: str) -> bool:
    return line.startswith("train: ") and "loss" in line


def workers(run: Path) -> list[psutil.Process]:
    """The training's processes: they are given the run's plan, and are not torchrun."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        command = process.info["cmdline"] or []
        if f"{run}/plan.json" in command and "torch.distributed.run" not in command:
            found.append(process)
    return found


def cpu_seconds(pid: int) -> float:
    """Of a process and all below it, those that have ended included: what of a wait was work, whoever else worked."""
    total = 0.0
    for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
        with contextlib.suppress(psutil.Error):
            times = process.cpu_times()
            total += times.user + times.system + times.children_user + times.children_system
    return total


def measure(root: Path, seconds: float) -> dict[str, Any]:
    warm = Command(root, *OVERRIDES, "stages=[plan,precache]", "name=warm")
    say("making the cache")
    if warm.process.wait(timeout=900):
        raise SystemExit("\n".join(line for _, line in warm.lines))
    say("timing: command → first step")
    command = Command(root, *OVERRIDES)
    try:
        return _measured(command, root / "runs" / NAME, seconds)
    finally:
        if command.process.poll() is None:
            command.process.kill()


def _measured(command: Command, run: Path, seconds: float) -> dict[str, Any]:
    planned = command.moment(lambda line: line.startswith("Plan of "))
    cached = command.moment(lambda line: line == "Precache")
    stepped = command.moment(is_step)
    spent = cpu_seconds(command.process.pid)
    say(f"timing: the driver's CPU over {seconds:.0f} s of training")
    driver = psutil.Process(command.process.pid)
    command.moment(lambda line: line.startswith("train: 25/"))  # past the first checkpoint
    begin, before = time.monotonic(), driver.cpu_times()
    time.sleep(seconds)
    after, end = driver.cpu_times(), time.monotonic()
    used = after.user + after.system - before.user - before.system
    say("timing: a worker is killed → next step")
    killed = time.monotonic()
    workers(run)[-1].kill()
    noticed = command.moment(lambda line: line.startswith("the gang stopped"), after=killed)
    trained = command.moment(is_step, after=noticed)
    steps = command.steps(begin, end)
    return {
        "first_step_seconds": stepped - command.began,
        "first_step_cpu_seconds": spent,
        "until_plan_seconds": planned - command.began,
        "until_cache_seconds": cached - command.began,
        "restart_seconds": trained - killed,
        "restart_noticed_seconds": noticed - killed,
        "driver_cpu_share": used / (end - begin),
        "driver_cpu_ms_a_step": 1e3 * used / max(1, steps),
        "steps_a_second": steps / (end - begin),
        "stop_seconds": command.end(),
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m k5dist.benchmark launch", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON file")
    parser.add_argument("--seconds", type=float, default=60.0, help="of training, for the driver's CPU time")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="k5dist-launch-") as folder:
        load = os.getloadavg()
        figures = measure(Path(folder), arguments.seconds)
    # Load above the number of cores: others were at work here, and the times are longer than the command's own.
    machine = {"cores": os.cpu_count(), "load_before": load, "load_after": os.getloadavg()}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps({"figures": figures, "goals": GOALS, "machine": machine}, indent=1) + "\n")
    show_table("launch", rows(figures, machine))
    say(f"figures: {arguments.out}")


def rows(figures: dict[str, Any], machine: dict[str, Any]) -> list[tuple[str, str]]:
    until = f"plan after {figures['until_plan_seconds']:.1f}, cache after {figures['until_cache_seconds']:.1f}"
    noticed = f"noticed after {figures['restart_noticed_seconds']:.1f}"
    spent = f"{figures['first_step_cpu_seconds']:.1f} s of CPU time over all processes"
    cpu = f"{figures['driver_cpu_ms_a_step']:.1f} ms a step at {figures['steps_a_second']:.1f} steps a second"
    loads = f"{machine['load_before'][0]:.1f} before, {machine['load_after'][0]:.1f} after, {machine['cores']} cores"
    return [
        ("first step", f"{figures['first_step_seconds']:.1f} s ({until}); goal {GOALS['first_step_seconds']:.0f} s"),
        ("", spent),
        ("gang restart", f"{figures['restart_seconds']:.1f} s ({noticed}); goal {GOALS['restart_seconds']:.0f} s"),
        ("driver's CPU", f"{figures['driver_cpu_share']:.1%} of a core ({cpu}); goal {GOALS['driver_cpu_share']:.0%}"),
        ("stop", f"{figures['stop_seconds']:.1f} s from Ctrl-C to the end, with a checkpoint"),
        ("load", loads),
    ]


if __name__ == "__main__":
    main()
