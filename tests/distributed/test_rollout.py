"""Scheduled sampling on gangs: clips chosen unevenly over the workers, and still no worker waits for another."""

from __future__ import annotations

from pathlib import Path

import pytest

from k5dist.train.feed import Dataset, Feed
from k5dist.train.rollout import Rollout
from k5dist.train.worker import plan_encoding
from tests.distributed.gangs import assert_close, make_run, train

pytestmark = pytest.mark.timeout(300)

FP32 = 5e-5
ROLLOUT = ("rollout.probability=0.5", "rollout.max_steps=3", "rollout.ramp_steps=4", "rollout.sampling_steps=10")
ROLLOUT += ("rollout.start_step=1", "optimizer.lr=3e-3")


def test_two_workers_roll_out_as_one(tmp_path: Path, tiny_t2v: Path) -> None:
    one = make_run(tmp_path, tiny_t2v, "one", *ROLLOUT)
    two = make_run(tmp_path, tiny_t2v, "two", *ROLLOUT, workers=2)
    off = make_run(tmp_path, tiny_t2v, "off", "optimizer.lr=3e-3")
    alone, both, without = train(one, two, off)
    assert_close(both.losses, alone.losses, FP32)
    assert_close(both.norms, alone.norms, FP32)
    assert alone.losses[1] == pytest.approx(without.losses[1], rel=FP32), "rollouts begin after step 1"
    assert alone.losses[6] != pytest.approx(without.losses[6], rel=1e-3)
    # In some step one worker alone has a clip to roll out, and in some none has.
    dataset = Dataset.open(two, plan_encoding(two))
    feeds = [
        Feed(dataset, seed=0, batch_size=4, rank=rank, size=2, epoch=0, batch=0, rolls_out=True) for rank in range(2)
    ]
    uneven = 0
    for number, steps in zip(range(1, 7), zip(*feeds, strict=False), strict=False):
        chance = Rollout.of_step(two.config.rollout, 0, number).chance
        chosen = [[draw < chance for draw in _own(feed, step)] for feed, step in zip(feeds, steps, strict=True)]
        assert steps[0].draws == steps[1].draws, "both know of every clip"
        for i, draw in enumerate(steps[0].draws):
            real = [flags[i] and step.clips[i][1] > 0 for flags, step in zip(chosen, steps, strict=True)]
            assert (draw < chance) == any(real)
            uneven += any(real) and not all(real)
    for feed in feeds:
        feed.close()
    assert uneven


def _own(feed: Feed, step: object) -> list[float]:
    from k5dist.train.rollout import rollout_draw

    return [rollout_draw(feed.seed, step.epoch, clip.key) for clip, _ in step.clips]  # type: ignore[attr-defined]
