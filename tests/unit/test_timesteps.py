"""Noise levels and what they count: against the published formulas, and even over quantiles where asked."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch

from k5dist.cache.keys import unit_interval
from k5dist.cache.order import EpochOrder, Stratum
from k5dist.compose import compose, to_run_config
from k5dist.config import TrainConfig
from k5dist.train.objective import Clip, Objective
from k5dist.train.timesteps import loss_weight, sigma_at, stratum
from tests.unit.models import CPU, SCALE, model_config, our_model, random, random_text

LEVELS = np.linspace(0.005, 0.995, 100)


def train_config(**changes: Any) -> TrainConfig:
    return dataclasses.replace(to_run_config(compose(["+flavour=t2v-tiny"])).train, **changes)


def drawn(train: TrainConfig, count: int = 200_000) -> np.ndarray:
    """σ of evenly spaced quantiles."""
    return np.array([sigma_at(train, (i + 0.5) / count) for i in range(count)])


# Distributions


def test_uniform_and_logit_normal() -> None:
    assert [sigma_at(train_config(timestep_sampling="uniform"), u) for u in LEVELS] == pytest.approx(list(LEVELS))
    train = train_config(timestep_mean=0.3, timestep_std=1.2)
    expected = scipy.stats.norm.ppf(LEVELS, 0.3, 1.2)
    assert [sigma_at(train, u) for u in LEVELS] == pytest.approx(list(1 / (1 + np.exp(-expected))))


@pytest.mark.parametrize(("a", "b"), [(1.0, 1.5), (2.0, 5.0), (0.5, 0.5)])
def test_beta_has_its_distribution(a: float, b: float) -> None:
    train = train_config(timestep_sampling="beta", timestep_beta=(a, b))
    sigmas = np.array([sigma_at(train, u) for u in LEVELS])
    assert scipy.stats.beta.cdf(sigmas, a, b) == pytest.approx(LEVELS, abs=1e-6)


@pytest.mark.parametrize("scale", [-1.0, 0.0, 1.29, 2 / (math.pi - 2)])
def test_mode_is_sd3s(scale: float) -> None:
    """f(u) with u uniform, drawn by numpy: the same distribution. Its density at 1/2 grows with the scale."""
    train = train_config(timestep_sampling="mode", timestep_mode_scale=scale)
    sigmas = drawn(train, 4000)
    u = (np.arange(4000) + 0.5) / 4000
    expected = np.sort(1 - u - scale * (np.cos(np.pi / 2 * u) ** 2 - 1 + u))
    assert sigmas == pytest.approx(expected, abs=1e-9)
    near = np.mean(np.abs(sigmas - 0.5) < 0.05)
    assert near > 0.15 if scale > 1 else near <= 0.101


@pytest.mark.parametrize("sampling", ["logit_normal", "uniform", "mode", "beta"])
def test_levels_ascend_within_0_and_1(sampling: str) -> None:
    train = train_config(timestep_sampling=sampling)
    sigmas = [sigma_at(train, u) for u in (0.0, *LEVELS, 1.0)]
    assert sigmas == sorted(sigmas)
    assert 0 < sigmas[0] < sigmas[-1] < 1


# Strata


def test_a_batch_has_one_clip_in_each_stratum_and_steps_are_even_together() -> None:
    batches = [[stratum(0, 3, batch, at, 8) for at in range(8)] for batch in range(50)]
    for batch in batches:
        assert sorted(int(u * 8) for u in batch) == list(range(8))
        assert all(0 <= u < 1 for u in batch)
    gaps = np.diff(np.sort(np.array(batches).ravel()))
    assert gaps.max() < 3 / 400, "of 400 in all; draws leave gaps of 6 and more"
    assert np.diff(np.sort(np.random.default_rng(0).random(400))).max() > 3 / 400
    assert len({tuple(np.argsort(batch)) for batch in batches}) > 40, "shuffled anew"


def test_each_position_is_uniform_by_itself() -> None:
    for position in (0, 3, 7):
        found = [stratum(1, epoch, batch, position, 8) for epoch in range(40) for batch in range(25)]
        assert scipy.stats.kstest(found, "uniform").pvalue > 0.01


def test_strata_are_the_same_on_every_number_of_workers_and_leave_fillings_out() -> None:
    """As a step asks for them: position i of worker r is i · workers + r, fillings stand last."""
    clips = Stratum((17, 64, 96), "main", 1, None, held_out=False, first=0, count=5)
    (batch,) = EpochOrder([clips], seed=0, epoch=0, batch_size=8).batches()
    assert batch.num_real == 5 and batch.weights == (1.0,) * 5 + (0.0,) * 3
    by_world = []
    for size in (1, 2, 4):
        found = {}
        for rank in range(size):
            for i, (row, _, weight) in enumerate(batch.of_worker(rank, size)):
                if weight:
                    found[row] = stratum(7, 0, 0, i * size + rank, batch.num_real)
        by_world.append(found)
    assert by_world[0] == by_world[1] == by_world[2]
    assert sorted(int(5 * u) for u in by_world[0].values()) == [0, 1, 2, 3, 4]


# Shift, weights, loss


def objective(folder: Path, train: TrainConfig, reference: int | None = None) -> Objective:
    return Objective(
        model=model_config(folder),
        train=train,
        first_frame=False,
        **{"shift": 10.0, "scaling_factor": SCALE, "draw": False, "device": CPU, "dtype": torch.float32},
        reference_tokens=reference,
    )


def random_clip() -> Clip:
    mean = random(5, 8, 12, 16) / SCALE
    return Clip("clip", mean, torch.full_like(mean, -3.0), None, None, random_text(6))


def test_the_shift_by_resolution_is_sd3s(tiny_t2v: Path) -> None:
    """arXiv 2403.03206, equation 23, on top of the checkpoint's own: two shifts in a row multiply."""
    goal = objective(tiny_t2v, train_config(timestep_sampling="uniform"), reference=1000)
    assert goal.sigma(0.4, 1000) == objective(tiny_t2v, goal.train).sigma(0.4, 77)
    ratio = math.sqrt(250 / 1000)
    t = 10 * 0.4 / (1 + 9 * 0.4)
    assert goal.sigma(0.4, 250) == pytest.approx(ratio * t / (1 + (ratio - 1) * t))
    assert goal.sigma(0.4, 1) < goal.sigma(0.4, 1000) < goal.sigma(0.4, 4000)


def test_min_snr_weighs_the_clips_error_by_the_clamped_ratio() -> None:
    """From the definition: a velocity that is off by e makes a clip x0 = x_t − σ v that is off by σ e."""
    train = train_config(loss_weighting="min_snr", min_snr_gamma=5.0)
    for sigma in (0.01, 0.2, 0.309, 0.5, 0.9):
        clean, noise, error = 0.7, -1.3, 0.11
        noisy, velocity = (1 - sigma) * clean + sigma * noise, noise - clean + error
        off = (noisy - sigma * velocity - clean) ** 2
        expected = min(((1 - sigma) / sigma) ** 2, 5.0) * off
        assert loss_weight(train, sigma) * error**2 == pytest.approx(expected)


def test_cosmap_is_sd3s() -> None:
    train = train_config(loss_weighting="cosmap")
    assert [loss_weight(train, s) for s in (0.0, 0.5, 1.0)] == pytest.approx([2 / math.pi, 4 / math.pi, 2 / math.pi])
    # The density of σ = 1 − 1 / (tan(πu/2) + 1), cosine's schedule mapped to flow matching, u uniform.
    u = (np.arange(100_000) + 0.5) / 100_000
    density, edges = np.histogram(1 - 1 / (np.tan(np.pi / 2 * u) + 1), bins=20, range=(0, 1), density=True)
    middles = (edges[1:] + edges[:-1]) / 2
    assert density == pytest.approx([loss_weight(train, s) for s in middles], rel=5e-3)
    assert loss_weight(train_config(), 0.3) == 1.0


@pytest.mark.parametrize("loss", ["mse", "huber"])
@pytest.mark.parametrize("weighting", ["none", "min_snr", "cosmap"])
def test_the_training_loss_is_weighted_and_the_validation_loss_is_not(
    tiny_t2v: Path, loss: str, weighting: str
) -> None:
    train = train_config(loss=loss, loss_weighting=weighting, huber_c=0.3)
    goal, plain = objective(tiny_t2v, train), objective(tiny_t2v, train_config())
    transformer, clip = our_model(tiny_t2v), random_clip()
    with torch.no_grad():
        sigma = goal.sigma(0.37, clip.tokens)
        error, _ = goal._error(
            transformer, clip, clip.text, sigma, (train.seed, 2, clip.key), draw=False, first_frame=False
        )
        error = error.double()
        found = goal.training_loss(transformer, clip, clip.text, 2, 0.37)
        expected = (2 * 0.3 * ((error**2 + 0.09).sqrt() - 0.3) if loss == "huber" else error**2).mean()
        torch.testing.assert_close(found.double(), expected * loss_weight(train, sigma), rtol=1e-5, atol=0)
        both = [g.validation_loss(transformer, clip, clip.text, 1, 4) for g in (goal, plain)]
    assert torch.equal(*both)


def test_pseudo_huber_is_the_square_of_small_errors_and_grows_linearly(tiny_t2v: Path) -> None:
    of_error = objective(tiny_t2v, train_config(loss="huber", huber_c=0.1))._of_error
    small = torch.tensor([1e-3, -2e-3], dtype=torch.float64)
    torch.testing.assert_close(of_error(small), small.square(), rtol=1e-3, atol=0)
    large = torch.tensor([50.0, 100.0], dtype=torch.float64)
    torch.testing.assert_close(of_error(large), 0.2 * large, rtol=1e-2, atol=0)


def test_quantiles_are_the_clips_own_unless_stratified(tiny_t2v: Path) -> None:
    clip = random_clip()
    plain, even = (objective(tiny_t2v, train_config(timestep_stratified=on)) for on in (False, True))
    assert plain.quantile(clip, 2, 5, 1, 4) == unit_interval(plain.train.seed, 2, clip.key, "sigma")
    assert even.quantile(clip, 2, 5, 1, 4) == stratum(even.train.seed, 2, 5, 1, 4)
