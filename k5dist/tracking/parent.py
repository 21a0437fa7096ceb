"""The MLflow run that holds a sweep's runs together. It is made once: the same sweep again finds it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from k5dist.tracking.run import TrackedRun, make_client

_TAG = "k5dist.sweep"


def open_parent(
    *, uri: str, experiment: str, name: str, artifact_root: str, sweep: str, swept: Mapping[str, str]
) -> str:
    """The id of the run of the sweep `sweep` (a fingerprint); `swept` are the keys and the values that they take."""
    client = make_client(uri)
    run_id = None
    if found := client.get_experiment_by_name(experiment):
        runs = client.search_runs([found.experiment_id], f"tags.`{_TAG}` = '{sweep}'", max_results=1)
        run_id = runs[0].info.run_id if runs else None
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


def close_parent(uri: str, run_id: str, status: str, table: list[dict[str, Any]]) -> None:
    """`status` is MLflow's; what is left to others to run (a job array) has no one to close it."""
    client = make_client(uri)
    client.log_text(run_id, json.dumps(table, indent=1), "sweep.json")
    client.set_terminated(run_id, status)
