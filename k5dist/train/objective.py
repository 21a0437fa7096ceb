"""The flow-matching objective, keyed: every draw is a function of (seed, epoch, sample), never of rank or history.

x_t = (1 − σ) x0 + σ ε, target ε − x0, timestep 1000 σ; σ = sigmoid(N(m, s)), then σ' = kσ / (1 + (k − 1) σ) (Kandinsky
5.0 report; SD3's logit-normal sampling). For image-to-video the clean first frame stands in x_t and the loss covers the
frames after it.

Shape suffixes: T H W latent frames and sides, C 16 latent channels.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from k5dist.cache.keys import seed_of, unit_interval
from k5dist.config import ModelConfig, TrainConfig
from k5dist.model.forward import Text, predict_velocity

TRAIN_TIMESTEPS = 1000.0


@dataclass(frozen=True)
class Clip:
    """One cached sample: the posterior of its latents (unscaled, bf16) and, for i2v, of its first frame alone."""

    key: str
    mean_THWC: Tensor
    logvar_THWC: Tensor
    first_mean_1HWC: Tensor | None
    first_logvar_1HWC: Tensor | None
    text: Text

    @property
    def tokens(self) -> int:
        return math.prod(self.mean_THWC.shape[:3]) // 4


@dataclass(frozen=True)
class Objective:
    """What training needs to know beside model and clip. `draw` picks the posterior's sample or its mean."""

    model: ModelConfig
    train: TrainConfig
    first_frame: bool
    shift: float
    scaling_factor: float
    draw: bool
    device: torch.device
    dtype: torch.dtype

    def sigma(self, uniform: float) -> float:
        """σ at a quantile: inverse normal CDF, sigmoid, shift."""
        normal = statistics.NormalDist(self.train.timestep_mean, self.train.timestep_std)
        sigma = 1 / (1 + math.exp(-normal.inv_cdf(min(max(uniform, 1e-9), 1 - 1e-9))))
        return self.shift * sigma / (1 + (self.shift - 1) * sigma)

    def drops_caption(self, key: str, epoch: int) -> bool:
        return unit_interval(self.train.seed, epoch, key, "caption") < self.train.caption_dropout

    def drops_first_frame(self, key: str, epoch: int) -> bool:
        """Whether an image-to-video run sees the clip as text-to-video: mask 0, frame 0 noisy, loss over all frames."""
        return unit_interval(self.train.seed, epoch, key, "first frame") < self.train.first_frame_dropout

    def training_loss(self, transformer: nn.Module, clip: Clip, text: Text, epoch: int) -> Tensor:
        """Mean squared error of one clip, fp32, scalar."""
        where = (self.train.seed, epoch, clip.key)
        sigma = self.sigma(unit_interval(*where, "sigma"))
        first_frame = self.first_frame and not self.drops_first_frame(clip.key, epoch)
        return self._loss(transformer, clip, text, sigma, where, draw=self.draw, first_frame=first_frame)

    @torch.no_grad()
    def validation_loss(self, transformer: nn.Module, clip: Clip, text: Text, level: int, levels: int) -> Tensor:
        """The same at the fixed timestep `level` of `levels` strata, with fixed noise and the posterior's mean."""
        where = (self.train.seed, "validation", level, clip.key)
        sigma = self.sigma((level + 0.5) / levels)
        return self._loss(transformer, clip, text, sigma, where, draw=False, first_frame=self.first_frame)

    def _loss(
        self,
        transformer: nn.Module,
        clip: Clip,
        text: Text,
        sigma: float,
        where: tuple[object, ...],
        *,
        draw: bool,
        first_frame: bool,
    ) -> Tensor:
        clean = self._latents(clip.mean_THWC, clip.logvar_THWC, (*where, "posterior") if draw else None)
        noise = self._noise(clean.shape, (*where, "noise"))
        noisy = (1 - sigma) * clean + sigma * noise
        if first_frame:
            assert clip.first_mean_1HWC is not None and clip.first_logvar_1HWC is not None
            first = (*where, "first") if draw else None
            noisy[:1] = self._latents(clip.first_mean_1HWC, clip.first_logvar_1HWC, first)
        # Filled, not copied: a copy from the host's ordinary memory would wait for all that the device has to do.
        timestep = torch.full((1,), TRAIN_TIMESTEPS * sigma, device=self.device, dtype=torch.float32)
        velocity = predict_velocity(transformer, self.model, noisy[None].to(self.dtype), first_frame, timestep, text)[0]
        error = velocity.float() - (noise - clean)
        return error[1 if first_frame else 0 :].square().mean()

    def _latents(self, mean: Tensor, logvar: Tensor, where: tuple[object, ...] | None) -> Tensor:
        """Scaled latents, fp32: a keyed draw of the posterior, or its mean where `where` is None."""
        mean = mean.to(self.device, non_blocking=True).float()
        if where is not None:
            deviation = (0.5 * logvar.to(self.device, non_blocking=True).float().clamp(-30, 20)).exp()
            mean = mean + deviation * self._noise(mean.shape, where)
        return mean * self.scaling_factor

    def _noise(self, shape: torch.Size, where: tuple[object, ...]) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(seed_of(*where))
        return torch.randn(shape, generator=generator, device=self.device, dtype=torch.float32)
