"""CREPA on several workers: one alignment, however the clip's tokens and the head's weights are shared."""

import dataclasses
from pathlib import Path

import pytest

from k5dist import export, storage
from k5dist.cache import layout
from k5dist.config import ConfigError
from k5dist.train.feed import refuse_featureless
from tests.distributed.gangs import Gang, assert_close, make_run, select, train
from tests.distributed.test_context import NABLA, STEPS
from tests.distributed.test_tread import check_same

pytestmark = pytest.mark.timeout(300)

ON = ("crepa.enabled=true", "crepa.weight=0.3")
ODD = ("data.resolution=[48,80]", "parallel.context=2")  # 75 tokens in frames of 15: a run ends within a frame


def test_workers_that_share_clips_or_shards_align_as_one(tmp_path: Path, tiny_t2v: Path) -> None:
    one, two, plain = (
        make_run(tmp_path, tiny_t2v, name, *STEPS[:1], "data.resolution=[48,80]", *more, workers=workers)
        for name, more, workers in (("one", ON, 1), ("two", (*ON, *ODD), 2), ("plain", (), 1))
    )
    results = train(one, two, plain)
    check_same(results[1], results[0])
    alone, shared = (result.metric("crepa_alignment") for result in results[:2])
    assert sorted(alone) == [1, 2, 3]
    for step, alignment in alone.items():
        assert shared[step] == pytest.approx(alignment, abs=1e-5)
    difference = results[2].losses[1] - results[0].losses[1]
    assert abs(difference) > 1e-3, "it is aligned"
    assert difference == pytest.approx(0.3 * alone[1], abs=1e-5), "what is told is what the loss holds"
    assert all("crepa_alignment" not in event["metrics"] for event in results[2].events("step"))
    report = export.export_run(one)
    assert report.error <= report.tolerance < report.difference_to_base, "without the head"
    (shards,) = train(make_run(tmp_path, tiny_t2v, "shards", *STEPS[:1], ODD[0], *ON, workers=2))
    check_same(shards, results[0])
    assert_close(shards.metric("crepa_alignment"), alone, 1e-4)


def test_tokens_in_nablas_order_meet_their_own_features(tmp_path: Path, tiny_nabla: Path) -> None:
    settings = ("train.steps=3", "adapter=full", *NABLA, *ON)
    one, two = train(
        make_run(tmp_path, tiny_nabla, "one", *settings),
        make_run(tmp_path, tiny_nabla, "two", *settings, "parallel.context=2", workers=2),
    )
    check_same(two, one)


def test_a_cache_without_features_is_refused(tmp_path: Path, tiny_t2v: Path) -> None:
    plan = make_run(tmp_path, tiny_t2v, "none", "train.steps=1", *ON)
    storage.remove(layout.features(plan.cache_uri, plan.features_id).uri)
    select(plan, layout.read_selected(storage.join(plan.run_uri, layout.SELECTION)))
    before = dataclasses.replace(plan, config=dataclasses.replace(plan.config, stages=("train",)))
    with pytest.raises(ConfigError, match="have no features"):  # by the launcher, before anything starts
        refuse_featureless(before)
    refuse_featureless(dataclasses.replace(plan, config=dataclasses.replace(plan.config, stages=("precache", "train"))))
    result = Gang(plan).result()
    (error,) = result.events("config_error")
    assert result.status != 0
    assert error["key"] == "crepa.enabled"
    assert "precache" in error["fix"]
