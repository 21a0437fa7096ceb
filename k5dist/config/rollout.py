"""Scheduled sampling: how often, how far and from when on the model trains on its own outputs."""

from __future__ import annotations

import dataclasses
import math

from k5dist.schema import ConfigError, positive


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    probability: float
    max_steps: int
    start_step: int
    ramp_steps: int
    sampling_steps: int
    min_sigma: float

    def __post_init__(self) -> None:
        if not 0 <= self.probability <= 1:
            rule = "a probability, 0 ≤ p ≤ 1 (0: no rollouts)"
            raise ConfigError("rollout.probability", self.probability, rule, "rollout.probability=0.25")
        positive("rollout.max_steps", self.max_steps)
        positive("rollout.sampling_steps", self.sampling_steps)
        if self.max_steps > self.sampling_steps:
            rule = f"a rollout takes some of the {self.sampling_steps} steps of a sampling"
            raise ConfigError("rollout.max_steps", self.max_steps, rule, f"rollout.max_steps={self.sampling_steps}")
        for name in ("start_step", "ramp_steps"):
            if getattr(self, name) < 0:
                raise ConfigError(f"rollout.{name}", getattr(self, name), "steps ≥ 0", f"rollout.{name}=0")
        if not 0 < self.min_sigma < 1:
            rule = "a noise level, 0 < σ < 1: the correction is the drift over σ, and must stay finite"
            raise ConfigError("rollout.min_sigma", self.min_sigma, rule, "rollout.min_sigma=0.05")

    @property
    def enabled(self) -> bool:
        return self.probability > 0

    def ramp(self, step: int) -> float:
        """How far probability and depth have grown at optimiser step `step` (from 1 on): 0 to 1."""
        after = step - self.start_step
        return min(1.0, max(0.0, after / self.ramp_steps)) if self.ramp_steps else float(after > 0)

    def chance(self, step: int) -> float:
        """The probability that a clip is rolled out at a step."""
        return self.probability * self.ramp(step)

    def depth(self, step: int, uniform: float) -> int:
        """Steps of a rollout, 1 to max_steps × ramp, all alike; `uniform` lies in [0, 1)."""
        return 1 + int(uniform * max(1, math.ceil(self.max_steps * self.ramp(step))))

    def forwards(self, accumulation: int, workers: int) -> float:
        """Forwards more that every worker runs in a step, on average, once the ramp is over.

        A step's clips are dealt with those that are rolled out first, and a micro-batch in which one worker has such a
        clip takes all of them through the rollout: n of n·m clips in ⌈n / workers⌉ micro-batches.
        """
        clips, p = accumulation * workers, self.probability
        chosen = [math.comb(clips, n) * p**n * (1 - p) ** (clips - n) for n in range(clips + 1)]
        rounds = sum(share * math.ceil(n / workers) for n, share in enumerate(chosen))
        return rounds * (1 + self.max_steps) / 2
