"""A precache's workers find their place on clusters of few cores, where each waits for another's work."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from k5dist import storage
from k5dist.benchmark.precache import make_checkpoint, make_clips, plan_for
from k5dist.precache import pipeline

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(180)]


@pytest.fixture
def one_core(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    ray.init("local", num_cpus=1, object_store_memory=128 * 2**20, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def test_on_one_core_two_encoders_a_decoder_and_a_writer_work(one_core: None, tmp_path: Path) -> None:
    shape = (5, 64, 64)
    manifest = make_clips(tmp_path / "clips", 3, shape)
    plan = plan_for(tmp_path, manifest, shape, ["cluster.gpus_per_node=0", "precache.vae_workers=2"])
    make_checkpoint(Path(storage.normalise(plan.config.pretrained)), plan.config, full=False)
    assert pipeline.precache(plan, pipeline.check_source(plan)).total("encoded") == 3
