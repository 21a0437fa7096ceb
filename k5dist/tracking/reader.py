"""What a tracking store knows of runs that other processes keep; nothing is written, and no store is made."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from k5dist.tracking.run import TrackingUnreachable, check_tracking, make_client

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run


@dataclass(frozen=True)
class TrackedFacts:
    """A run as its store has it. `status` is MLflow's: RUNNING, FINISHED, FAILED, KILLED."""

    run_id: str
    name: str
    status: str
    run_uri: str  # its folder
    loss: float | None
    best_loss: float | None
    best_step: str | None
    error: str | None


@dataclass(frozen=True)
class LastStep:
    step: int
    loss: float
    time: float  # seconds since 1970, by the driver's clock


def read_runs(uri: str, experiment: str) -> dict[str, TrackedFacts]:
    """The runs of an experiment by their folders, of several with one folder the newest.

    Raises:
        TrackingUnreachable: where the store does not answer or is not there.
    """
    client = _client(uri)
    found = client.get_experiment_by_name(experiment)
    if found is None:
        return {}
    facts: dict[str, TrackedFacts] = {}
    token: str | None = None
    while True:
        page = client.search_runs([found.experiment_id], order_by=["attributes.start_time DESC"], page_token=token)
        for run in page:
            facts.setdefault(run.data.tags.get("run_uri", run.info.run_id), _facts(run))
        token = page.token
        if not token:
            return facts


def read_run(uri: str, run_id: str) -> tuple[TrackedFacts, LastStep | None]:
    """One run, and its newest training step. Raises TrackingUnreachable."""
    from mlflow.exceptions import MlflowException

    client = _client(uri)
    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        raise TrackingUnreachable(f"it has no run {run_id}") from error
    history = client.get_metric_history(run_id, "loss")
    last = max(history, key=lambda point: (point.timestamp, point.step), default=None)
    return _facts(run), None if last is None else LastStep(last.step, last.value, last.timestamp / 1000)


def _client(uri: str) -> MlflowClient:
    if uri.startswith("sqlite:") and not Path(uri.partition(":///")[2]).exists():
        raise TrackingUnreachable(f"there is no tracking store {uri}")
    check_tracking(uri)
    return make_client(uri)


def _facts(run: Run) -> TrackedFacts:
    metrics, tags = run.data.metrics, run.data.tags
    return TrackedFacts(
        run_id=run.info.run_id,
        name=run.info.run_name or run.info.run_id,
        status=run.info.status,
        run_uri=tags.get("run_uri", ""),
        loss=metrics.get("loss"),
        best_loss=metrics.get("validation/best_loss"),
        best_step=tags.get("best_step"),
        error=tags.get("error"),
    )
