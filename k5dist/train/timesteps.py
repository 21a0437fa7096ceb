"""Which noise levels are trained, and how much each counts. σ = 0 is the clip, σ = 1 is noise.

A distribution is given by its quantile function, so that draws can be spread evenly over quantiles (strata).
"""

from __future__ import annotations

import math
import statistics

import numpy as np
from scipy.special import betaincinv

from k5dist.cache.keys import seed_of, unit_interval
from k5dist.config import TrainConfig

EDGE = 1e-9  # quantiles keep away from 0 and 1, where a normal is infinite
GOLDEN = (math.sqrt(5) - 1) / 2  # multiples of it, modulo 1, leave the most even gaps whatever their number


def sigma_at(train: TrainConfig, uniform: float) -> float:
    """σ at a quantile, ascending, before the shift (SD3, arXiv 2403.03206, section 3.1).

    logit_normal: sigmoid(N(mean, std)); uniform; mode: f(u) = 1 − u − s (cos²(πu/2) − 1 + u) at u = 1 − quantile;
    beta: Beta(a, b), as for flow matching in arXiv 2410.24164.
    """
    u = min(max(uniform, EDGE), 1 - EDGE)
    match train.timestep_sampling:
        case "uniform":
            return u
        case "mode":
            v = 1 - u
            return min(
                max(1 - v - train.timestep_mode_scale * (math.cos(math.pi / 2 * v) ** 2 - 1 + v), EDGE), 1 - EDGE
            )
        case "beta":
            return min(max(float(betaincinv(*train.timestep_beta, u)), EDGE), 1 - EDGE)
    normal = statistics.NormalDist(train.timestep_mean, train.timestep_std)
    return 1 / (1 + math.exp(-normal.inv_cdf(u)))


def shifted(sigma: float, shift: float) -> float:
    """σ' = kσ / (1 + (k − 1) σ)."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def stratum(seed: int, epoch: int, batch: int, position: int, size: int) -> float:
    """The quantile of the clip at `position` of a batch of `size` real clips.

    Each of `size` equal strata is drawn from once a batch: which clip gets which is shuffled, and all stand at one
    place in theirs, which moves by the golden ratio from batch to batch (the low-discrepancy times of arXiv
    2107.00630, with a sequence in place of a draw). So a batch is even over quantiles, the batches of an epoch are
    together, and each clip's own quantile is uniform. The same on any number of workers.
    """
    order = np.random.Generator(np.random.Philox(seed_of(seed, epoch, batch, "strata"))).permutation(size)
    place = (unit_interval(seed, epoch, "strata") + batch * GOLDEN) % 1
    return (int(order[position % size]) + place) / size


def loss_weight(train: TrainConfig, sigma: float) -> float:
    """What the loss at a level counts (none: 1).

    min_snr: Min-SNR-γ (Hang et al., arXiv 2303.09556) counts errors of the clip by min(SNR, γ), SNR = ((1 − σ) / σ)².
    A velocity's error is the clip's over σ, as x0 = x_t − σ v, so here it is σ² min(SNR, γ) = min((1 − σ)², γ σ²).
    cosmap: 2 / (π (1 − 2σ + 2σ²)) (SD3, section 3.1).
    """
    match train.loss_weighting:
        case "min_snr":
            return min((1 - sigma) ** 2, train.min_snr_gamma * sigma**2)
        case "cosmap":
            return 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2))
    return 1.0
