"""What is under way in a precache is bounded by bytes, on a real Ray whose object store holds a third of the clips."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from k5dist import storage
from k5dist.benchmark.precache import make_checkpoint, make_clips, plan_for
from k5dist.plan import RunPlan
from k5dist.pools import block_bytes, settle_flow
from k5dist.precache import pipeline, stages
from k5dist.precache.stages import Rows, VaeStage

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

STORE, CORES, CLIPS, SHAPE = 256 * 2**20, 8, 21, (17, 768, 1024)


class SlowVae(VaeStage):
    """Takes longer than decoding does, and of the pictures a corner: the tiny VAE would need a minute for the whole."""

    def __call__(self, row: Rows) -> Rows:
        time.sleep(0.5)
        row["pixels"] = row["pixels"][:, :64, :64].copy()
        return super().__call__(row)


class StoreWatch:
    """The most that the object store of a session's only node held, by the node's own account."""

    def __init__(self) -> None:
        self.used = self.spilled = self.fallback = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> StoreWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        from ray._private.internal_api import node_stats

        (node,) = ray.nodes()
        while not self._over.wait(0.02):
            address, port = node["NodeManagerAddress"], node["NodeManagerPort"]
            stats: Any = node_stats(address, port, include_memory_info=False).store_stats
            self.used = max(self.used, stats.object_store_bytes_used)
            self.spilled = max(self.spilled, stats.spilled_bytes_total)
            self.fallback = max(self.fallback, stats.object_store_bytes_fallback)


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunPlan]:
    monkeypatch.setenv("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    manifest = make_clips(tmp_path / "clips", CLIPS, SHAPE)
    plan = plan_for(tmp_path, manifest, SHAPE, ["cluster.gpus_per_node=0", "precache.shard_size_mib=16"])
    make_checkpoint(Path(storage.normalise(plan.config.pretrained)), plan.config, full=False)
    ray.init("local", num_cpus=CORES, object_store_memory=STORE, include_dashboard=False, log_to_driver=False)
    yield plan
    ray.shutdown()


def test_what_is_under_way_stays_below_the_plans_bound(plan: RunPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "VaeStage", SlowVae)
    block, rows = block_bytes(plan.buckets), plan.rows_per_shard(plan.sample_bytes)
    flow = settle_flow(STORE, block, rows * plan.sample_bytes, 1)
    assert CORES * block > STORE and CLIPS * block > 3 * STORE, "nothing else keeps it below"
    with StoreWatch() as store:
        summary = pipeline.precache(plan, pipeline.check_source(plan))
    assert summary.total("encoded") == CLIPS
    assert (store.spilled, store.fallback) == (0, 0)
    assert 2 * block <= store.used <= flow.bound_bytes < STORE
