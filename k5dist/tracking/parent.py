"""The MLflow run that holds a sweep's runs together. It is made once: the same sweep again finds it.

Where the submitting machine reaches the tracking server it makes the parent. Where only the runs do (Kubernetes), each
is told the sweep's identity in the parent's place, and the first of them makes it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from k5dist.tracking.run import TrackedRun, make_client

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

_TAG = "k5dist.sweep"
_NAMED = "sweep:"  # in `tracking.parent`: what follows is <identity>:<name>, and no id of MLflow's
SETTLE_SECONDS = 2.0  # two that were made at one moment see each other by then


def open_parent(
    *, uri: str, experiment: str, name: str, artifact_root: str, sweep: str, swept: Mapping[str, str]
) -> str:
    """The id of the run of the sweep `sweep` (a fingerprint); `swept` are the keys and the values that they take."""
    client = make_client(uri)
    found = _runs_of(client, experiment, sweep)
    run_id = found[0].info.run_id if found else None
    run = TrackedRun(
        uri=uri,
        experiment=experiment,
        run_name=name,
        artifact_root=artifact_root,
        run_id=run_id,
        tags={_TAG: sweep},
    )
    with run:
        known = client.get_run(run.run_id).data.params
        for key, values in swept.items():
            if key not in known:
                client.log_param(run.run_id, key, values)
    client.update_run(run.run_id, status="RUNNING")
    return run.run_id


def named_parent(sweep: str, name: str) -> str:
    """What `tracking.parent` says where the runs make their parent themselves."""
    return f"{_NAMED}{sweep}:{name}"


def join_parent(*, uri: str, experiment: str, artifact_root: str, parent: str) -> str:
    """The id of the run that `parent` (a value of `tracking.parent`) stands for; what is named is made where it is not
    there. Of several that were made at one moment the oldest stays, and all who ask after it get that one."""
    if not parent.startswith(_NAMED):
        return parent
    sweep, _, name = parent.removeprefix(_NAMED).partition(":")
    client = make_client(uri)
    mine = None
    if not _runs_of(client, experiment, sweep):
        mine = open_parent(
            uri=uri, experiment=experiment, name=name, artifact_root=artifact_root, sweep=sweep, swept={}
        )
        client.set_terminated(mine, "FINISHED")  # nobody outlives the others to do it later
    found = _runs_of(client, experiment, sweep)
    if time.time() - found[-1].info.start_time / 1000 < SETTLE_SECONDS:
        time.sleep(SETTLE_SECONDS)
        found = _runs_of(client, experiment, sweep)
    first = found[0].info.run_id
    if mine not in (None, first):
        client.delete_run(mine)
    return first


def _runs_of(client: MlflowClient, experiment: str, sweep: str) -> list[Run]:
    """The parents of this sweep, the oldest first."""
    known = client.get_experiment_by_name(experiment)
    if known is None:
        return []
    runs = client.search_runs([known.experiment_id], f"tags.`{_TAG}` = '{sweep}'")
    return sorted(runs, key=lambda run: (run.info.start_time, run.info.run_id))


def close_parent(uri: str, run_id: str, status: str, table: list[dict[str, Any]]) -> None:
    """`status` is MLflow's; what is left to others to run (a job array) has no one to close it."""
    client = make_client(uri)
    client.log_text(run_id, json.dumps(table, indent=1), "sweep.json")
    client.set_terminated(run_id, status)
