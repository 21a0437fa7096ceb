"""A sweep of two runs here, of which one fails: the other is not touched by that, and the cache is made once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from mlflow import MlflowClient

from tests.cluster import job as jobs

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]
COMMAND = (
    *("-m", "+flavour=t2v-tiny", "train.steps=3", "validation.every=0", "data.held_out=0.0", "name=lr"),
    *("stages=[plan,precache,train]", "optimizer.lr=1e30,1e-3"),
)


def test_children_of_one_parent_that_fail_and_finish_each_for_itself(tmp_path: Path) -> None:
    job = jobs.start(tmp_path, *COMMAND)
    assert job.wait(800) == 1, job.output
    assert "14 seen, 14 encoded" in job.output and "14 seen, 0 encoded, 14 cached before" in job.output
    assert "run 2 of 2 of lr-sweep: optimizer.lr=0.001" in job.output

    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.get_experiment_by_name("k5dist")
    assert experiment is not None
    found = client.search_runs([experiment.experiment_id])
    (parent,) = [run for run in found if "k5dist.sweep" in run.data.tags]
    children = [run for run in found if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert {run.data.params["optimizer.lr"]: run.info.status for run in children} == {
        "1e+30": "FAILED",
        "0.001": "FINISHED",
    }
    assert (parent.info.status, parent.data.params) == ("FAILED", {"optimizer.lr": "1e+30, 0.001"})
    table = Path(client.download_artifacts(parent.info.run_id, "sweep.json", str(tmp_path))).read_text()
    assert [row["state"] for row in json.loads(table)] == ["failed", "finished"]
    jobs.wait_until_nothing_runs(str(tmp_path))
