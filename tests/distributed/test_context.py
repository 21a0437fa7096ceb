"""Context parallelism: workers that share a clip's tokens train as one worker does."""

from pathlib import Path

import pytest

from k5dist import export, storage
from k5dist.plan import RunPlan
from tests.distributed.gangs import Result, assert_close, make_run, train

pytestmark = pytest.mark.timeout(300)

FP32 = 2e-5  # 2e-6 in losses and 3e-6 in norms were measured
STEPS = ("train.steps=3", "adapter=full", "stages=[train,validate]")
ODD = ("data.resolution=[48,80]",)  # 75 tokens: one worker's run is a token short
NABLA = ("model.attention_type=nabla", "model.attention_P=0.6", "model.attention_wT=3", "model.attention_wW=1")
NABLA += ("model.attention_wH=1", "model.attention_add_sta=true", "data.resolution=[128,128]")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("context")


@pytest.fixture(scope="module")
def dense(root: Path, tiny_t2v: Path) -> list[tuple[RunPlan, Result]]:
    """The same training on one worker, on two that share clips, on two pairs, on two pairs that are copies."""
    degrees = [(1, ()), (2, ("parallel.context=2",)), (4, ("parallel.context=2",))]
    degrees.append((4, ("parallel.context=2", "parallel.replicate=2")))
    plans = [
        make_run(root, tiny_t2v, f"dense-{i}", *STEPS, *ODD, *degree, workers=workers)
        for i, (workers, degree) in enumerate(degrees)
    ]
    return list(zip(plans, [*train(*plans[:2]), *train(plans[2]), *train(plans[3])], strict=True))


def check_same(ours: Result, theirs: Result) -> None:
    assert sorted(theirs.losses) == [1, 2, 3]
    assert_close(ours.losses, theirs.losses, FP32)
    assert_close(ours.norms, theirs.norms, FP32)


def test_two_workers_share_clips(dense: list[tuple[RunPlan, Result]]) -> None:
    (alone, one), (plan, two) = dense[:2]
    assert plan.buckets[0].tokens % 2 == 1
    assert (plan.world.shard, plan.world.context, plan.accumulation) == (1, 2, alone.accumulation)
    check_same(two, one)


def test_together_with_shards_and_replicas(dense: list[tuple[RunPlan, Result]]) -> None:
    worlds = [(plan.world.replicate, plan.world.shard, plan.world.context) for plan, _ in dense[2:]]
    assert worlds == [(1, 2, 2), (2, 1, 2)]
    for _, result in dense[2:]:
        check_same(result, dense[0][1])


def test_a_video_is_left_once_and_the_export_is_the_trained_model(dense: list[tuple[RunPlan, Result]]) -> None:
    plan, result = dense[1]
    assert len(result.events("videos")) == len(result.events("started")) == 1
    assert storage.list_folder(storage.join(plan.run_uri, "validation/step-00000003")) == ["00.safetensors"]
    report = export.export_run(plan)
    assert report.error <= report.tolerance < report.difference_to_base


def test_nabla_keeps_a_map_for_each_head(root: Path, tiny_nabla: Path) -> None:
    one, two = train(
        make_run(root / "nabla", tiny_nabla, "one", "train.steps=3", *NABLA),
        make_run(root / "nabla", tiny_nabla, "two", "train.steps=3", "parallel.context=2", *NABLA, workers=2),
    )
    check_same(two, one)
