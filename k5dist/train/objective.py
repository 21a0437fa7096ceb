"""The flow-matching objective, keyed: every draw is a function of (seed, epoch, sample), never of rank or history.

x_t = (1 − σ) x0 + σ ε, target ε − x0, timestep 1000 σ (Kandinsky 5.0 report). How σ is drawn and what it counts stands
in `k5dist.train.timesteps`. For image-to-video the clean first frame stands in x_t and the loss covers the frames after
it.

Shape suffixes: T H W latent frames and sides, C 16 latent channels.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from k5dist.cache.keys import seed_of, unit_interval
from k5dist.config import PATCH, ModelConfig, Route, TrainConfig
from k5dist.model.forward import Text, predict
from k5dist.model.tread import Routing
from k5dist.train.rollout import Rollout, roll_out, rollout_draw
from k5dist.train.timesteps import loss_weight, shifted, sigma_at, stratum

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
    mask_THW1: Tensor | None = None  # 0…1 where the loss counts; None: everywhere alike
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
    reference_tokens: int | None = None  # of a clip at which `shift` holds; None: it holds for all
    routes: tuple[Route, ...] = ()  # TREAD's, in training alone
    crepa_weight: float = 0.0  # of the alignment with a clip's features, in training alone

    def sigma(self, uniform: float, tokens: int | None = None) -> float:
        """σ at a quantile, for a clip of `tokens`."""
        return shifted(sigma_at(self.train, uniform), self.shift_of(tokens))

    def shift_of(self, tokens: int | None) -> float:
        """The shift for a clip of `tokens`.

        By resolution: k = shift · √(tokens / reference), SD3's shift by √(pixels / pixels), which keeps a picture's
        signal-to-noise ratio when neighbours that say the same are averaged to the reference's resolution.
        """
        if self.reference_tokens is None or tokens is None:
            return self.shift
        return self.shift * math.sqrt(tokens / self.reference_tokens)

    def quantile(self, clip: Clip, epoch: int, batch: int, position: int, num_real: int) -> float:
        """Of the clip at a position of an epoch's batch with `num_real` clips before its fillings."""
        if self.train.timestep_stratified:
            return stratum(self.train.seed, epoch, batch, position, num_real)
        return unit_interval(self.train.seed, epoch, clip.key, "sigma")

    def drops_caption(self, key: str, epoch: int) -> bool:
        return unit_interval(self.train.seed, epoch, key, "caption") < self.train.caption_dropout

    def drops_first_frame(self, key: str, epoch: int) -> bool:
        """Whether an image-to-video run sees the clip as text-to-video: mask 0, frame 0 noisy, loss over all frames."""
        return unit_interval(self.train.seed, epoch, key, "first frame") < self.train.first_frame_dropout

    def training_loss(
        self,
        transformer: nn.Module,
        clip: Clip,
        text: Text,
        epoch: int,
        quantile: float | None = None,
        rollout: Rollout | None = None,
    ) -> Tensor:
        """The weighted loss of one clip, with CREPA's alignment where it is on, fp32, scalar, at a quantile of σ (the
        clip's own where none is given)."""
        return self.training_losses(transformer, clip, text, epoch, quantile, rollout)[0]

    def training_losses(
        self,
        transformer: nn.Module,
        clip: Clip,
        text: Text,
        epoch: int,
        quantile: float | None = None,
        rollout: Rollout | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """`training_loss`, and the alignment that is part of it, unweighted and detached; None without CREPA."""
        where = (self.train.seed, epoch, clip.key)
        sigma = self.sigma(unit_interval(*where, "sigma") if quantile is None else quantile, clip.tokens)
        if rollout is not None:
            chosen = rollout_draw(*where) < rollout.chance and sigma >= rollout.min_sigma
            rollout = dataclasses.replace(rollout, chosen=chosen)
        # A dropped first frame's tokens are kept all the same: a bucket's routes have one length, whatever is dropped.
        routing = Routing(self.routes, seed_of(*where, "tread"), self.first_frame) if self.routes else None
        error, alignment = self._error(
            transformer, clip, text, sigma, where, draw=self.draw, rollout=rollout, routing=routing, align=True,
            first_frame=self.first_frame and not self.drops_first_frame(clip.key, epoch),
        )  # fmt: skip
        loss = self._mean(self._of_error(error), clip) * loss_weight(self.train, sigma)
        if alignment is None:
            return loss, None
        return loss - self.crepa_weight * alignment, alignment.detach()

    @torch.no_grad()
    def validation_loss(self, transformer: nn.Module, clip: Clip, text: Text, level: int, levels: int) -> Tensor:
        """Mean squared error at the fixed timestep `level` of `levels` strata, with fixed noise and the posterior's
        mean; whatever loss and weights are trained with, so that runs compare."""
        where = (self.train.seed, "validation", level, clip.key)
        sigma = self.sigma((level + 0.5) / levels, clip.tokens)
        error, _ = self._error(transformer, clip, text, sigma, where, draw=False, first_frame=self.first_frame)
        return self._mean(error.square(), clip)

    def _of_error(self, error: Tensor) -> Tensor:
        """Square, or pseudo-Huber 2c (√(e² + c²) − c): the square of small errors, times 2c of large ones
        (Charbonnier et al. 1997; for diffusion arXiv 2403.16728)."""
        if self.train.loss == "mse":
            return error.square()
        c = self.train.huber_c
        return 2 * c * ((error.square() + c * c).sqrt() - c)

    def _mean(self, loss_THWC: Tensor, clip: Clip) -> Tensor:
        """The mean over the clip, weighted by its mask where it has one: background + (1 − background) mask.

        Divided by the weights' sum, so that a small part of the picture counts as much as a large one.
        """
        if clip.mask_THW1 is None:
            return loss_THWC.mean()
        mask = clip.mask_THW1.to(self.device, non_blocking=True).float()[-len(loss_THWC) :]
        weight = self.train.mask_background + (1 - self.train.mask_background) * mask
        return (loss_THWC * weight).sum() / (weight.sum() * loss_THWC.shape[-1]).clamp(min=1e-6)

    def _error(
        self, transformer: nn.Module, clip: Clip, text: Text, sigma: float, where: tuple[object, ...], *, draw: bool,
        first_frame: bool, rollout: Rollout | None = None, routing: Routing | None = None, align: bool = False,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        clean = self._latents(clip.mean_THWC, clip.logvar_THWC, (*where, "posterior") if draw else None)
        noise = self._noise(clean.shape, (*where, "noise"))
        noisy, target = (1 - sigma) * clean + sigma * noise, noise - clean
        if first_frame:
            assert clip.first_mean_1HWC is not None and clip.first_logvar_1HWC is not None
            first = (*where, "first") if draw else None
            noisy[:1] = self._latents(clip.first_mean_1HWC, clip.first_logvar_1HWC, first)
        features = None
        if self.crepa_weight and align:
            assert clip.features_ThwD is not None, "training with CREPA reads features"
            features = clip.features_ThwD.to(self.device, non_blocking=True)

        def forward(
            noisy_THWC: Tensor, sigma: float, routing: Routing | None, features: Tensor | None
        ) -> tuple[Tensor, Tensor | None]:
            # Filled, not copied: a copy from the host's ordinary memory would wait for all that the device has to do.
            timestep = torch.full((1,), TRAIN_TIMESTEPS * sigma, device=self.device, dtype=torch.float32)
            latents = noisy_THWC[None].to(self.dtype)
            out, alignment = predict(transformer, self.model, latents, first_frame, timestep, text, routing, features)
            return out[0].float(), alignment

        free = 1 if first_frame else 0
        if rollout is not None:  # with forwards on every worker, whether its own clip is among those chosen or not
            sigmas = rollout.sigmas(sigma, self.shift_of(clip.tokens))
            start = (1 - sigmas[0]) * clean + sigmas[0] * noise
            start[:free] = noisy[:free]
            reached = roll_out(transformer, lambda x, s: forward(x, s, None, None)[0], start, sigmas, first=free)
            if rollout.chosen:
                noisy, target = reached, (reached - clean) / sigma
        velocity, alignment = forward(noisy, sigma, routing, features)
        return (velocity - target)[free:], alignment

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
