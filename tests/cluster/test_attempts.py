"""Rows whose worker dies under them: an end is set to them, in tasks and in actors, and to no other row."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ray
import ray.data

from k5dist.precache.attempts import MAX_DEATHS, Attempts

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]
ROWS, POISON = 12, "5"


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "RAY_ENABLE_UV_RUN_RUNTIME_ENV"):
            patch.setenv(name, "0")
        ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
        yield
        ray.shutdown()


def work(row: dict[str, Any], *, attempts: Attempts, deaths: Path) -> dict[str, Any]:
    reason = attempts.begin("work", row)
    if reason is None and row["key"] == POISON:
        with deaths.open("a") as file:
            file.write("x")
        os.kill(os.getpid(), signal.SIGKILL)
    if reason is None:
        attempts.end("work", row)
    return {"key": row["key"], "reason": reason or ""}


class Worker:
    def __init__(self, attempts: Attempts, deaths: Path) -> None:
        self.attempts, self.deaths = attempts, deaths

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        return work(row, attempts=self.attempts, deaths=self.deaths)


@pytest.mark.parametrize("kind", ["task", "actor"])
def test_who_kills_its_worker_three_times_is_given_up_alone(tmp_path: Path, kind: str) -> None:
    deaths, attempts = tmp_path / "deaths", Attempts()
    rows = ray.data.from_items([{"key": str(number)} for number in range(ROWS)], override_num_blocks=3)
    if kind == "task":
        done = rows.map(partial(work, attempts=attempts, deaths=deaths))
    else:
        done = rows.map(
            Worker,  # type: ignore[arg-type]
            fn_constructor_args=(attempts, deaths),
            compute=ray.data.ActorPoolStrategy(size=1, max_tasks_in_flight_per_actor=2),
        )
    reasons = {row["key"]: row["reason"] for row in done.take_all()}
    assert len(reasons) == ROWS
    assert {key for key, reason in reasons.items() if reason} == {POISON}
    assert reasons[POISON].startswith(f"its worker died {MAX_DEATHS} times")
    assert len(deaths.read_text()) == MAX_DEATHS
