"""Spatial tiles of the VAE's encoder, for GPUs too small for a whole picture: as stock's `enable_tiling` has them.

Not exact: a tile's GroupNorms and its attention see that tile only, and its border stands in for what lies beyond. The
difference is a property of the clip; `tiling_error` measures it.

Shape suffixes: B tiles in time, T frames, H W pixels, t h w latent sides, C channels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from k5dist.config import VAE_SPACE_COMPRESSION

Encode = Callable[[Tensor], Tensor]  # [B, T, H, W, 3] → [B, t, h, w, C]


def encode_in_tiles(encode: Encode, frames_BTHW3: Tensor, side: int, stride: int) -> Tensor:
    """Tiles of `side` × `side` pixels, one every `stride`, blended linearly where they overlap (diffusers 0.42's
    `tiled_encode`, in its order: with the tile above, then with the tile to the left)."""
    height, width = frames_BTHW3.shape[2:4]
    if max(height, width) <= side:
        return encode(frames_BTHW3)
    keep, blend = stride // VAE_SPACE_COMPRESSION, (side - stride) // VAE_SPACE_COMPRESSION
    rows: list[Tensor] = []
    above: list[Tensor] = []
    for top in range(0, height, stride):
        row: list[Tensor] = []
        for left in range(0, width, stride):
            tile = encode(frames_BTHW3[:, :, top : top + side, left : left + side])
            if above:
                _blend(above[len(row)], tile, blend, dim=2)
            if row:
                _blend(row[-1], tile, blend, dim=3)
            row.append(tile)
        rows.append(torch.cat([tile[:, :, :keep, :keep] for tile in row], dim=3))
        above = row
    return torch.cat(rows, dim=2)


def _blend(before: Tensor, tile: Tensor, extent: int, dim: int) -> None:
    """The first `extent` places of `tile` along `dim` go over from the last ones of `before`, in place."""
    extent = min(before.shape[dim], tile.shape[dim], extent)
    if not extent:
        return
    shape = [1] * tile.dim()
    shape[dim] = extent
    weight = (torch.arange(extent, device=tile.device) / extent).view(shape).to(tile.dtype)
    here = tile.narrow(dim, 0, extent)
    here.copy_(before.narrow(dim, before.shape[dim] - extent, extent) * (1 - weight) + here * weight)


def tiling_error(whole: Tensor, tiled: Tensor) -> float:
    """Root mean square of the difference, relative to the whole picture's latents (means only)."""
    mean, off = whole.float().chunk(2, dim=-1)[0], tiled.float().chunk(2, dim=-1)[0]
    return float((off - mean).square().mean().sqrt() / mean.square().mean().sqrt())
