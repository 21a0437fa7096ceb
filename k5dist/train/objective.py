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
from k5dist.config import PATCH, ModelConfig, Route, TrainConfig
from k5dist.model.forward import Text, predict
from k5dist.model.tread import Routing

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
    features_ThwD: Tensor | None = None  # CREPA's, bf16

    @property
    def token_shape(self) -> tuple[int, int, int]:
        frames, height, width = self.mean_THWC.shape[:3]
        return frames, height // PATCH, width // PATCH

    @property
    def tokens(self) -> int:
        return math.prod(self.token_shape)


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
    routes: tuple[Route, ...] = ()  # TREAD's, in training alone
    crepa_weight: float = 0.0  # of the alignment with a clip's features, in training alone

    def sigma(self, uniform: float) -> float:
        """σ at a quantile: inverse normal CDF, sigmoid, shift."""
        normal = statistics.NormalDist(self.train.timestep_mean, self.train.timestep_std)
        sigma = 1 / (1 + math.exp(-normal.inv_cdf(min(max(uniform, 1e-9), 1 - 1e-9))))
        return self.shift * sigma / (1 + (self.shift - 1) * sigma)

    def drops_caption(self, key: str, epoch: int) -> bool:
        return unit_interval(self.train.seed, epoch, key, "caption") < self.train.caption_dropout

    def training_loss(self, transformer: nn.Module, clip: Clip, text: Text, epoch: int) -> Tensor:
        """Mean squared error of one clip, with CREPA's alignment where it is on, fp32, scalar."""
        where = (self.train.seed, epoch, clip.key)
        sigma = self.sigma(unit_interval(*where, "sigma"))
        routing = Routing(self.routes, seed_of(*where, "tread"), self.first_frame) if self.routes else None
        return self._loss(transformer, clip, text, sigma, where, draw=self.draw, routing=routing, align=True)

    @torch.no_grad()
    def validation_loss(self, transformer: nn.Module, clip: Clip, text: Text, level: int, levels: int) -> Tensor:
        """The same at the fixed timestep `level` of `levels` strata, with fixed noise and the posterior's mean."""
        where = (self.train.seed, "validation", level, clip.key)
        return self._loss(transformer, clip, text, self.sigma((level + 0.5) / levels), where, draw=False)

    def _loss(
        self, transformer: nn.Module, clip: Clip, text: Text, sigma: float, where: tuple[object, ...], *, draw: bool,
        routing: Routing | None = None, align: bool = False,
    ) -> Tensor:  # fmt: skip
        clean = self._latents(clip.mean_THWC, clip.logvar_THWC, (*where, "posterior") if draw else None)
        noise = self._noise(clean.shape, (*where, "noise"))
        noisy = (1 - sigma) * clean + sigma * noise
        if self.first_frame:
            assert clip.first_mean_1HWC is not None and clip.first_logvar_1HWC is not None
            first = (*where, "first") if draw else None
            noisy[:1] = self._latents(clip.first_mean_1HWC, clip.first_logvar_1HWC, first)
        # Filled, not copied: a copy from the host's ordinary memory would wait for all that the device has to do.
        timestep = torch.full((1,), TRAIN_TIMESTEPS * sigma, device=self.device, dtype=torch.float32)
        features = None
        if self.crepa_weight and align:
            assert clip.features_ThwD is not None, "training with CREPA reads features"
            features = clip.features_ThwD.to(self.device, non_blocking=True)
        velocity, alignment = predict(
            transformer, self.model, noisy[None].to(self.dtype), self.first_frame, timestep, text, routing, features
        )
        error = velocity[0].float() - (noise - clean)
        loss = error[1 if self.first_frame else 0 :].square().mean()
        return loss if alignment is None else loss - self.crepa_weight * alignment

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
