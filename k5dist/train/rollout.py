"""Scheduled sampling: the model's own few-step rollout as the input of a training step.

A sampler is fed its own outputs, training is not, so the sampler's small errors add up (exposure bias: Bengio et al.,
"Scheduled Sampling for Sequence Prediction", 2015; for flow matching ReflexFlow, arXiv 2512.04904). A clip that is
rolled out starts a few steps of a sampling above its σ, at the exact x_σ' = (1 − σ') x0 + σ' ε, and takes Euler steps
without gradient down to σ:

    x̂ ← x̂ + (σ_{i+1} − σ_i) v(x̂, σ_i)

The velocity that leads from where it arrives to the clean clip is the target:

    (x̂ − x0) / σ

Without an error of the model x̂ = x_σ and the target is ε − x0, as ever.

Shape suffixes: T H W latent frames and sides, C 16 latent channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from k5dist.cache.keys import unit_interval
from k5dist.config import RolloutConfig

Velocity = Callable[[Tensor, float], Tensor]


def rollout_draw(seed: int, epoch: int, key: str) -> float:
    """A clip is rolled out where this lies below the step's chance."""
    return unit_interval(seed, epoch, key, "rollout")


@dataclass(frozen=True)
class Rollout:
    """What all rollouts of one optimiser step have in common, and whether the clip at hand is among them."""

    depth: int
    chance: float
    sampling_steps: int
    min_sigma: float
    chosen: bool = False

    @classmethod
    def of_step(cls, config: RolloutConfig, seed: int, step: int) -> Rollout:
        """A function of seed and step alone, so that all workers agree on the number of forwards without a word."""
        depth = config.depth(step, unit_interval(seed, step, "rollout depth"))
        return cls(depth, config.chance(step), config.sampling_steps, config.min_sigma)

    def sigmas(self, sigma: float, shift: float) -> list[float]:
        return rollout_sigmas(sigma, self.depth, sampling_steps=self.sampling_steps, shift=shift)


def rollout_sigmas(sigma: float, depth: int, *, sampling_steps: int, shift: float) -> list[float]:
    """Noise levels from the start of a rollout of `depth` steps down to `sigma`, depth + 1 of them.

    Steps are as long as those of a sampling of `sampling_steps`: even before the shift σ = k u / (1 + (k − 1) u). Near
    pure noise, where fewer are left, the way is cut into shorter ones.
    """
    end = sigma / (shift - (shift - 1) * sigma)
    start = min(1.0, end + depth / sampling_steps)
    levels = [start + (end - start) * i / depth for i in range(depth)]
    return [shift * level / (1 + (shift - 1) * level) for level in levels] + [sigma]


@torch.no_grad()
def roll_out(
    transformer: nn.Module, velocity: Velocity, start_THWC: Tensor, sigmas: Sequence[float], *, first: int
) -> Tensor:
    """Euler steps from `start_THWC` at sigmas[0] to sigmas[-1]: frames from `first` on, without dropout.

    `velocity(x_THWC, σ)` is the model's, fp32.
    """
    training = transformer.training
    transformer.eval()
    reached = start_THWC.clone()
    for sigma, following in pairwise(sigmas):
        reached[first:] += (following - sigma) * velocity(reached, sigma)[first:]
    transformer.train(training)
    return reached
