"""Scheduled sampling: the rollout and its target against a plain reference; schedules, costs and rules."""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path

import pytest
import torch

from k5dist.cache.keys import unit_interval
from k5dist.cache.order import Batch
from k5dist.compose import compose, to_run_config
from k5dist.config import ConfigError, RolloutConfig
from k5dist.plan import ClusterFacts, estimates, make_plan
from k5dist.train.rollout import Rollout, rollout_draw, rollout_sigmas
from tests.unit.models import SCALE, our_model
from tests.unit.test_objective import keyed_noise, model_inputs, objective, random_clip


def config(*overrides: str) -> RolloutConfig:
    return to_run_config(compose(["+flavour=t2v-tiny", *overrides])).rollout


@pytest.mark.parametrize("task", ["t2v", "i2v"])
@pytest.mark.parametrize("depth", [1, 3])
def test_a_rollout_is_what_a_plain_loop_gives(request: pytest.FixtureRequest, task: str, depth: int) -> None:
    folder: Path = request.getfixturevalue(f"tiny_{task}")
    free = 1 if task == "i2v" else 0
    goal, clip, transformer = objective(folder, first_frame=bool(free)), random_clip(), our_model(folder)
    rollout = Rollout(depth, chance=1.0, sampling_steps=10, min_sigma=1e-3)
    seen = model_inputs(transformer, lambda: goal.training_loss(transformer, clip, clip.text, 2, rollout=rollout))

    where = (goal.train.seed, 2, clip.key)
    sigma, clean = goal.sigma(unit_interval(*where, "sigma")), clip.mean_THWC * SCALE
    noise = keyed_noise(*where, "noise", shape=tuple(clean.shape))
    quantile = sigma / (goal.shift - (goal.shift - 1) * sigma)
    plain = torch.linspace(min(1.0, quantile + depth / 10), quantile, depth + 1, dtype=torch.float64)
    sigmas = (goal.shift * plain / (1 + (goal.shift - 1) * plain)).tolist()
    state = (1 - sigmas[0]) * clean + sigmas[0] * noise
    if free:
        assert clip.first_mean_1HWC is not None
        state[:1] = clip.first_mean_1HWC * SCALE
    mask = torch.zeros(1, *clean.shape[:3], 1)
    mask[:, :free] = 1
    transformer.eval()
    for now, following in itertools.pairwise(sigmas):
        given = torch.cat([state[None], torch.zeros(1, *clean.shape), mask], dim=-1)
        time = torch.tensor([1000 * now], dtype=torch.float32)
        with torch.no_grad():
            velocity = transformer(given, clip.text.qwen_1LD, clip.text.clip_1D, time, (1.0, 3.16, 3.16), None)[0]
        state = torch.cat([state[:free], state[free:] + (following - now) * velocity[free:]])
    torch.testing.assert_close(seen["latents"][0, ..., :16], state, rtol=0, atol=2e-5)
    assert seen["timestep"].item() == pytest.approx(1000 * sigma)
    error = seen["velocity"][0] - (state - clean) / sigma
    torch.testing.assert_close(seen["loss"], error[free:].square().mean(), rtol=1e-4, atol=0)
    assert transformer.training is False
    plain_loss = model_inputs(transformer, lambda: goal.training_loss(transformer, clip, clip.text, 2))["loss"]
    assert abs(float(seen["loss"] - plain_loss)) > 1e-3


def test_a_model_without_error_is_given_the_target_of_flow_matching(tiny_t2v: Path) -> None:
    """Where the velocity is exactly ε − x0, a rollout arrives at x_σ and asks for ε − x0."""
    goal, clip = objective(tiny_t2v), random_clip()
    noise = keyed_noise(goal.train.seed, 0, clip.key, "noise", shape=tuple(clip.mean_THWC.shape))

    class Exact(torch.nn.Module):
        def forward(self, *_: object) -> torch.Tensor:
            return (noise - clip.mean_THWC * SCALE)[None]

    rollout = Rollout(4, chance=1.0, sampling_steps=20, min_sigma=1e-3)
    assert float(goal.training_loss(Exact(), clip, clip.text, 0, rollout=rollout)) == pytest.approx(0, abs=1e-8)


def test_a_clip_that_is_not_chosen_is_trained_as_ever_with_the_same_forwards(tiny_t2v: Path) -> None:
    goal, clip, transformer = objective(tiny_t2v), random_clip(), our_model(tiny_t2v).train()
    calls: list[tuple[bool, bool]] = []
    hook = transformer.register_forward_hook(lambda *_: calls.append((transformer.training, torch.is_grad_enabled())))
    draw = rollout_draw(goal.train.seed, 0, clip.key)
    losses = []
    for chance in (draw, math.nextafter(draw, 1)):
        calls.clear()
        rollout = Rollout(3, chance=chance, sampling_steps=50, min_sigma=1e-3)
        losses.append(float(goal.training_loss(transformer, clip, clip.text, 0, rollout=rollout).detach()))
        assert calls == [(False, False)] * 3 + [(True, True)], "without gradient and dropout, then one to train on"
    calls.clear()
    clear = Rollout(3, chance=1.0, sampling_steps=50, min_sigma=0.999)
    losses.append(float(goal.training_loss(transformer, clip, clip.text, 0, rollout=clear).detach()))
    assert len(calls) == 4
    hook.remove()
    plain = float(goal.training_loss(transformer, clip, clip.text, 0).detach())
    assert losses[0] == losses[2] == plain != losses[1]


def test_the_way_down_is_that_of_a_sampling(tiny_t2v: Path) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    scheduler.set_timesteps(sigmas=[1 - i / 50 for i in range(50)])
    sigmas = scheduler.sigmas
    assert isinstance(sigmas, torch.Tensor)
    sampled = sigmas.tolist()
    for depth in (1, 4):
        ours = rollout_sigmas(sampled[20], depth, sampling_steps=50, shift=5.0)
        assert ours == pytest.approx(sampled[20 - depth : 21], rel=1e-5)
    near_noise = rollout_sigmas(sampled[1], 4, sampling_steps=50, shift=5.0)
    assert near_noise[0] == 1.0
    assert near_noise[-1] == sampled[1]
    assert sorted(near_noise, reverse=True) == near_noise and len(set(near_noise)) == 5


def test_probability_and_depth_grow_over_the_ramp() -> None:
    rollout = config("rollout.probability=0.8", "rollout.max_steps=4", "rollout.start_step=10", "rollout.ramp_steps=20")
    assert [rollout.chance(step) for step in (1, 10, 15, 30, 31)] == pytest.approx([0, 0, 0.2, 0.8, 0.8])
    depths = {step: {rollout.depth(step, i / 100) for i in range(100)} for step in (11, 20, 30, 1000)}
    assert depths == {11: {1}, 20: {1, 2}, 30: {1, 2, 3, 4}, 1000: {1, 2, 3, 4}}
    at_once = dataclasses.replace(rollout, ramp_steps=0)
    assert [at_once.chance(step) for step in (10, 11)] == [0, 0.8]
    several = [Rollout.of_step(rollout, 0, step).depth for step in range(30, 230)]
    assert set(several) == {1, 2, 3, 4}
    assert several == [Rollout.of_step(rollout, 0, step).depth for step in range(30, 230)]


@pytest.mark.parametrize(("accumulation", "workers"), [(4, 1), (2, 2), (1, 8), (8, 3)])
def test_the_forwards_of_a_step_are_counted_as_they_are_dealt(accumulation: int, workers: int) -> None:
    rollout = config("rollout.probability=0.3", "rollout.max_steps=3")
    clips, total, trials = accumulation * workers, 0, 4000
    for trial in range(trials):
        draws = [rollout_draw(trial, 0, str(i)) for i in range(clips)]
        batch = Batch(tuple(range(clips)), (1.0,) * clips, (0,) * clips).sorted_by(draws)
        least = [min(draws[row] for row in batch.rows[i : i + workers]) for i in range(0, clips, workers)]
        assert least == [draws[row] for row in batch.rows][::workers]
        total += sum(draw < 0.3 for draw in least) * Rollout.of_step(rollout, trial, 5000).depth
    assert total / trials == pytest.approx(rollout.forwards(accumulation, workers), rel=0.06)


def test_the_plan_counts_the_forwards() -> None:
    def costs(*overrides: str) -> tuple[float, float, str]:
        settings = to_run_config(compose(["+flavour=t2v-lite-sft-5s", "train.batch_size=8", *overrides]))
        plan = make_plan(settings, ClusterFacts(8, "NVIDIA H200"), "weights")
        found = estimates(plan)
        return found.step_flops, found.rollout_flops, plan.run_fingerprint

    none, nothing, plain = costs()
    some, rolled, changed = costs("rollout.probability=1", "rollout.max_steps=3")
    assert nothing == 0
    assert some - none == pytest.approx(rolled)
    assert 2 / 3 < rolled / none < 1, "two forwards on average beside a step that costs two to three"
    assert changed != plain
    assert costs("rollout.max_steps=3")[2] == plain, "what is off changes nothing"


@pytest.mark.parametrize(
    ("override", "key", "rule"),
    [
        ("rollout.probability=1.5", "rollout.probability", "0 ≤ p ≤ 1"),
        ("rollout.max_steps=0", "rollout.max_steps", "greater than 0"),
        ("rollout.max_steps=60", "rollout.max_steps", "of the 50 steps"),
        ("rollout.ramp_steps=-1", "rollout.ramp_steps", "≥ 0"),
        ("rollout.start_step=-1", "rollout.start_step", "≥ 0"),
        ("rollout.start_step=60", "rollout.start_step", "the training has 60"),
        ("rollout.min_sigma=0", "rollout.min_sigma", "0 < σ < 1"),
    ],
)
def test_what_cannot_be_is_refused(override: str, key: str, rule: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config("rollout.probability=0.5", override)
    assert caught.value.key == key
    assert rule in caught.value.rule
    config("rollout.probability=0.5", override, caught.value.fix)
