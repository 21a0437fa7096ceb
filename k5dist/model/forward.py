"""One forward of the DiT, the same for training and for sampling: positions, scale factors and sparsity from the shape.

Shape suffixes: B clips, T H W latent frames and sides, C 16 latent channels, L text tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from k5dist.config import NABLA_BLOCK, PATCH, VAE_SPACE_COMPRESSION, ModelConfig
from k5dist.model.nabla import NablaParameters, pack_bits, sliding_tile_window
from k5dist.model.tread import Routing


@dataclass(frozen=True)
class Text:
    """One caption's features at its true length: no padding, so nothing ever attends to padding."""

    qwen_1LD: Tensor
    clip_1D: Tensor

    def to(self, device: torch.device, dtype: torch.dtype) -> Text:
        return Text(*(x.to(device, non_blocking=True).to(dtype) for x in (self.qwen_1LD, self.clip_1D)))


def rope_scale_factor(height: int, width: int) -> tuple[float, float, float]:
    """RoPE's divisors along (T, H, W) for pixel sides: the pipeline's rule for standard definition, else for HD."""
    standard = all(480 <= side <= 854 for side in (height, width))
    return (1.0, 2.0, 2.0) if standard else (1.0, 3.16, 3.16)


@lru_cache(maxsize=8)
def nabla_parameters(model: ModelConfig, tokens_THW: tuple[int, int, int], device: torch.device) -> NablaParameters:
    """For a clip of (T, H, W) tokens; H and W are multiples of 8 (the plan saw to it).

    The window is always or-ed in: the inference pipeline never reads `attention_add_sta` either.
    """
    probability, wt, wh, ww = model.attention_P, model.attention_wT, model.attention_wH, model.attention_wW
    assert probability is not None and wt and wh and ww, "NABLA checkpoints say P and windows"
    frames, height, width = tokens_THW
    blocks = (frames, height // NABLA_BLOCK, width // NABLA_BLOCK)
    return NablaParameters(probability, pack_bits(sliding_tile_window(blocks, (wt, wh, ww), device)))


def predict(
    transformer: nn.Module,
    model: ModelConfig,
    latents_BTHWC: Tensor,
    first_frame: bool,
    timestep_B: Tensor,
    text: Text,
    routing: Routing | None = None,
    features_ThwD: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`predict_velocity`, and where CREPA's features of the clip are given, their alignment (fp32, 0-dim)."""
    options = {"routing": routing, "features_ThwD": features_ThwD}
    out = _run(transformer, model, latents_BTHWC, first_frame, timestep_B, text, options)
    return (out, None) if features_ThwD is None else out


def predict_velocity(
    transformer: nn.Module,
    model: ModelConfig,
    latents_BTHWC: Tensor,
    first_frame: bool,
    timestep_B: Tensor,
    text: Text,
    routing: Routing | None = None,
) -> Tensor:
    """The model's velocity for noisy latents: [B, T, H, W, C], in the latents' dtype.

    The conditioning channels are zero and the mask is 1 at frame 0 for image-to-video (whose clean first frame stands
    in the noise channels already), 0 everywhere for text-to-video, as the inference pipelines have it.

    Args:
        latents_BTHWC: in the run's compute dtype.
        first_frame: image-to-video conditioning.
        timestep_B: 1000 σ, fp32.
        text: one caption, in the latents' dtype.
        routing: TREAD's routes for this clip; in training alone.
    """
    return _run(transformer, model, latents_BTHWC, first_frame, timestep_B, text, {"routing": routing})


def _run(
    transformer: nn.Module,
    model: ModelConfig,
    latents_BTHWC: Tensor,
    first_frame: bool,
    timestep_B: Tensor,
    text: Text,
    options: dict[str, Any],
) -> Any:
    batch, frames, height, width, _ = latents_BTHWC.shape
    device = latents_BTHWC.device
    hidden = latents_BTHWC
    if model.visual_cond:
        mask = latents_BTHWC.new_zeros(batch, frames, height, width, 1)
        if first_frame:
            mask[:, 0] = 1
        hidden = torch.cat([latents_BTHWC, torch.zeros_like(latents_BTHWC), mask], dim=-1)
    tokens = (frames, height // PATCH, width // PATCH)
    sparsity = nabla_parameters(model, tokens, device) if model.is_sparse else None
    pixels = (height * VAE_SPACE_COMPRESSION, width * VAE_SPACE_COMPRESSION)
    options = {name: value for name, value in options.items() if value is not None}
    return transformer(hidden, text.qwen_1LD, text.clip_1D, timestep_B, rope_scale_factor(*pixels), sparsity, **options)
