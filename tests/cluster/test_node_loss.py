"""A raylet of the training's cluster is killed: the gang goes on from the newest checkpoint on the node that takes its
place, and its losses are those of an undisturbed run of as many workers on one machine."""

from __future__ import annotations

from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

from tests.cluster import job as jobs

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]
COMMAND = (
    *("+flavour=t2v-tiny", "train.steps=16", "checkpoint.every=4", "validation.every=0", "data.held_out=0.0"),
    "stages=[plan,precache,train]",
)
SOON = {f"health_check_{name}_ms": 1000 for name in ("initial_delay", "period", "timeout")}


# Six or twelve starts of a worker, each seconds of importing torch, on the two cores that CI has: minutes.
@pytest.mark.slow
@pytest.mark.parametrize("nodes", [2, pytest.param(4, marks=pytest.mark.timeout(2400))])
def test_a_lost_node_is_replaced_and_the_losses_are_the_same(
    nodes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = jobs.start(tmp_path, *COMMAND, "name=whole", f"cluster.workers_per_node={nodes}")
    assert undisturbed.wait(900) == 0, undisturbed.output

    monkeypatch.setenv("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    monkeypatch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    head = {"num_cpus": 3, "include_dashboard": False}
    cluster = Cluster(
        initialize_head=True, head_node_args={**head, "_system_config": {**SOON, "health_check_failure_threshold": 3}}
    )
    try:
        others = [cluster.add_node(num_cpus=1) for _ in range(nodes - 1)]
        where = ("cluster=ray", f"cluster.address={cluster.address}", f"cluster.nodes={nodes}")
        job = jobs.start(tmp_path, *COMMAND, "name=lost", *where, "cluster.workers_per_node=1")
        job.wait_for(jobs.trained_to(6), 900)
        cluster.remove_node(others[-1], allow_graceful=False)
        cluster.add_node(num_cpus=1)
        assert job.wait(900) == 0, job.output
    finally:
        cluster.shutdown()
    # Either the node is missed first, or a worker elsewhere that lost its peer is heard of first.
    assert "restart 1 from the newest checkpoint" in job.output, job.output
    assert "resumed from the checkpoint of step" in job.output
    lost, whole = (jobs.the_run(tmp_path, name) for name in ("lost", "whole"))
    assert lost.info.status == "FINISHED"
    losses = jobs.losses(tmp_path, lost.info.run_id)
    assert sorted(losses) == list(range(1, 17))
    assert losses == jobs.losses(tmp_path, whole.info.run_id)
    jobs.wait_until_nothing_runs(str(tmp_path / "runs"))
