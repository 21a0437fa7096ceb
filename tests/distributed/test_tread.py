"""TREAD on several workers: the tokens that skip blocks are the same ones, whoever holds them."""

from pathlib import Path

import pytest

from tests.distributed.gangs import Result, assert_close, make_run, train
from tests.distributed.test_context import FP32, NABLA

pytestmark = pytest.mark.timeout(300)

# 75 tokens, of which 40 and 53 stay: runs of tokens and of kept tokens are a token short on one of two workers.
ODD = ("data.resolution=[48,80]", "adapter=full", "train.activation_checkpointing=attention")
ROUTES = "tread.routes=[{selection_ratio:0.47,start_layer_idx:0,end_layer_idx:1},"
ROUTES += "{selection_ratio:0.3,start_layer_idx:-2,end_layer_idx:-2}]"
STEPS = ("train.steps=3", ROUTES)


def check_same(ours: Result, theirs: Result) -> None:
    assert sorted(theirs.losses) == [1, 2, 3]
    assert_close(ours.losses, theirs.losses, FP32)
    assert_close(ours.norms, theirs.norms, FP32, [1])
    assert_close(ours.norms, theirs.norms, 2e-4)  # AdamW magnifies what rounding left of the smallest gradients


def test_workers_that_share_clips_route_as_one(tmp_path: Path, tiny_t2v: Path) -> None:
    root = tmp_path
    one, two, plain = train(
        make_run(root, tiny_t2v, "one", *STEPS, *ODD),
        make_run(root, tiny_t2v, "two", *STEPS, *ODD, "parallel.context=2", workers=2),
        make_run(root, tiny_t2v, "plain", "train.steps=3", *ODD),
    )
    check_same(two, one)
    assert abs(one.losses[1] - plain.losses[1]) > 1e-4 * plain.losses[1], "it is routed"
    (four,) = train(make_run(root, tiny_t2v, "four", *STEPS, *ODD, "parallel.context=2", workers=4))
    check_same(four, one)


def test_blocks_of_nabla_are_routed_whole(tmp_path: Path, tiny_nabla: Path) -> None:
    one, two = train(
        make_run(tmp_path, tiny_nabla, "one", *STEPS, *NABLA),
        make_run(tmp_path, tiny_nabla, "two", *STEPS, "parallel.context=2", *NABLA, workers=2),
    )
    check_same(two, one)
