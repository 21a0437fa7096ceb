"""Latents and tokens: the order in which a clip's tokens stand.

Shape suffixes: B clips, T H W latent frames and sides in tokens, S tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from k5dist.config import NABLA_BLOCK, PATCH


def flatten(x_BTHWC: Tensor, blocked: bool) -> Tensor:
    """Tokens in (T, H, W) order, [B, S, C]; with `blocked`, NABLA's 8 × 8 squares of a frame one after another."""
    if not blocked:
        return x_BTHWC.flatten(1, 3)
    batch, frames, height, width, channels = x_BTHWC.shape
    n = NABLA_BLOCK
    x = x_BTHWC.reshape(batch, frames, height // n, n, width // n, n, channels)
    return x.transpose(3, 4).reshape(batch, -1, channels)


def unflatten(x_BSC: Tensor, tokens_THW: Sequence[int], blocked: bool) -> Tensor:
    """[B, T, H, W, C], the way back."""
    frames, height, width = tokens_THW
    if not blocked:
        return x_BSC.unflatten(1, (frames, height, width))
    n = NABLA_BLOCK
    x = x_BSC.unflatten(1, (frames, height // n, width // n, n, n))
    return x.transpose(3, 4).reshape(len(x_BSC), frames, height, width, -1)


def unpatchify(x_BTHWC: Tensor) -> Tensor:
    """[B, T, H, W, 4C] → [B, T, 2H, 2W, C]; a token's channels are (C, 2, 2), as diffusers' output layer has them."""
    batch, frames, height, width, _ = x_BTHWC.shape
    x = x_BTHWC.reshape(batch, frames, height, width, -1, PATCH, PATCH)
    return x.permute(0, 1, 2, 5, 3, 6, 4).reshape(batch, frames, PATCH * height, PATCH * width, -1)
