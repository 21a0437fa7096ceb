"""The HunyuanVideo VAE's encoder: what stock diffusers computes by default, at the speed of its convolutions.

Stock `AutoencoderKLHunyuanVideo.encode` (diffusers 0.42.1) is framewise by default: a clip of more than 16 frames is
cut into tiles of 17 frames, one every 12, and each is encoded as a clip of its own, so that its GroupNorms see that
tile only and its first frame stands in for the past. A tile's first latent is dropped; of the next, the blend over one
latent takes all from the tile before (weight 1 − 0 / 1). What comes out is a choice, not a mixture: latents 0 to 4 from
the first tile, then three from each (its third to fifth, or fewer at the end), `(frames − 1) / 4 + 1` in all, the tail
included. Tiles of fewer than 9 frames reach nothing and are not computed here. There is no spatial tiling, unless
`enable_tiling` is called.

Here, in the same order of operations on the same weights:
- activations are [B, T, H, W, C], what cuDNN calls channels_last_3d;
- a convolution's replicated border is written by the normalisation before it (`pad`), and biases go into the next
  normalisation or the residual sum (`moments`), which also gathers what the next GroupNorm needs: per-channel moments;
- a convolution works on a few frames at a time, with the two frames before them as its halo, and the residual stream is
  updated in place. The chunk follows from the shape alone: 2^30 elements (byte offsets within 2^31), with
  `patch_conv` 2^29. No GroupNorm notices: its moments are joined over all chunks;
- attention reads whole frames up to the query's own, with no mask.

`patch_conv` at 121 × 768 × 1280 in bf16: a 128-channel tensor of a tile is 3.98 GiB. Two of them live at once (the
residual stream and the first convolution's output), a padded chunk of four frames is 0.94 GiB and its output 0.47:
9.4 GiB, and weights and clip 0.8. Holding fewer than two would need every first convolution twice.

Shape suffixes: B tiles, T frames, H W sides, C channels, P partial results, S tokens of a frame.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from k5dist.config import VAE_TIME_COMPRESSION
from k5dist.model.vae_tiles import encode_in_tiles

CHUNK_ELEMENTS = 1 << 30
PATCH_ELEMENTS = 1 << 29
# Tiles encoded together, by their pixels: small pictures fill a GPU only so, large ones gain nothing. Always of one
# clip, so that its latents do not depend on what else was in a batch.
GROUP_PIXELS = 1 << 23
CHANNEL_MULTIPLE = 8  # tensor cores take 16 bytes of channels: RGB is filled up with zeros
Affine = tuple[Tensor, Tensor]  # scale and shift, fp32 [B, C]


@dataclass(frozen=True)
class TimeTile:
    """Frames [start, stop), encoded on their own; the latents from `first` on are kept."""

    start: int
    stop: int
    first: int


def time_tiles(num_frames: int, tile_frames: int, stride: int) -> list[TimeTile]:
    """Of 4k + 1 frames, the tiles whose latents stock's result holds; `tile_frames` is stock's minimum, 16."""
    ratio = VAE_TIME_COMPRESSION
    if num_frames % ratio != 1:
        raise ValueError(f"{num_frames} frames: must be {ratio}k + 1, or the last ones would not reach the latents")
    if num_frames <= tile_frames:
        return [TimeTile(0, num_frames, 0)]
    starts = [start for start in range(0, num_frames, stride) if start == 0 or num_frames - start > 2 * ratio]
    return [TimeTile(s, min(s + tile_frames + 1, num_frames), 0 if s == 0 else 2) for s in starts]


def chunk_frames(out_frames: int, stride: int, frame_elements: int, limit: int) -> int:
    """Output frames at a time, shared out evenly: a chunk's padded input has (n − 1) · stride + 3 frames."""
    most = max(1, (limit // frame_elements - 3) // stride + 1)
    chunks = -(-out_frames // most)
    return -(-out_frames // chunks)


class Operations(Protocol):
    """What happens between convolutions. `TorchOperations` is the reference, `TritonOperations` what GPUs run."""

    def pad(self, x_BTHWC: Tensor, affine: Affine | None, *, silu: bool, frames: range, border: int) -> Tensor:
        """Frames `frames` (before the first: the first) of silu(x · scale + shift), a replicated border around each."""
        ...

    def moments(
        self, value_BTHWC: Tensor, *, bias: Tensor | None = None, residual: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """fp32 [B, P, 3, C] of value + bias + residual: count, mean, sum of squared deviations of each of P parts.

        The sum is written to `out`, which may be the value or the residual.
        """
        ...

    def attend(self, q_BTSC: Tensor, k_BTSC: Tensor, v_BTSC: Tensor) -> Tensor:
        """One head; a query sees all tokens of its own and of earlier frames."""
        ...


class TorchOperations:
    """Plain torch: for CPUs, and what the kernels are tested against."""

    @staticmethod
    def pad(x_BTHWC: Tensor, affine: Affine | None, *, silu: bool, frames: range, border: int) -> Tensor:
        index = torch.arange(frames.start, frames.stop, device=x_BTHWC.device).clamp(min=0)
        x = x_BTHWC.index_select(1, index)
        if affine is not None:
            scale, shift = (each[:, None, None, None] for each in affine)
            x = torch.addcmul(shift, x.float(), scale)
            x = (F.silu(x) if silu else x).to(x_BTHWC.dtype)
        if border:
            x = F.pad(x.permute(0, 4, 1, 2, 3), (border,) * 4 + (0, 0), mode="replicate").permute(0, 2, 3, 4, 1)
        return x.contiguous()

    @staticmethod
    def moments(
        value_BTHWC: Tensor, *, bias: Tensor | None = None, residual: Tensor | None = None, out: Tensor | None = None
    ) -> Tensor:
        total = value_BTHWC.float()
        for term in (bias, residual):
            total = total if term is None else total + term
        if out is not None:
            total = out.copy_(total).float()
        variance, mean = torch.var_mean(total, dim=(1, 2, 3), correction=0)
        count = torch.full_like(mean, total[0, ..., 0].numel())
        return torch.stack([count, mean, variance * count], dim=1)[:, None]

    @staticmethod
    def attend(q_BTSC: Tensor, k_BTSC: Tensor, v_BTSC: Tensor) -> Tensor:
        outs = []
        for frame in range(q_BTSC.shape[1]):
            keys, values = (x[:, : frame + 1].flatten(1, 2)[:, None] for x in (k_BTSC, v_BTSC))
            outs.append(F.scaled_dot_product_attention(q_BTSC[:, frame, None], keys, values))
        return torch.cat(outs, dim=1)


@dataclass(frozen=True)
class Norm:
    """A GroupNorm, applied as a scale and a shift a channel."""

    module: nn.GroupNorm

    def affine(self, parts_BP3C: Tensor, bias: Tensor | None = None) -> Affine:
        """From the moments of x, the scale and shift that make x GroupNorm(x + bias)."""
        groups = self.module.num_groups
        count, mean, squares = (part.unflatten(-1, (groups, -1)) for part in parts_BP3C.unbind(2))  # [B, P, G, C/G]
        own = torch.zeros_like(mean[0, 0]) if bias is None else bias.float().view(groups, -1)
        mean, total = mean + own, count.sum((1, 3), keepdim=True)
        group_mean = (count * mean).sum((1, 3), keepdim=True) / total
        variance = (squares + count * (mean - group_mean).square()).sum((1, 3), keepdim=True) / total
        scale = torch.rsqrt(variance + self.module.eps) * self.module.weight.float().view(groups, -1)
        shift = self.module.bias.float().view(groups, -1) + (own - group_mean) * scale
        return scale.flatten(1), shift.flatten(1)


class Encoder:
    """uint8 frames → the posterior's parameters, with the weights of a stock VAE, in its dtype and on its device.

    Args:
        vae: a stock `AutoencoderKLHunyuanVideo`; its encoder's weights are put into channels_last_3d, in place.
        patch_conv: convolutions in smaller chunks; the same result in less memory.
        tiling: pictures in spatial tiles, which is another result (`k5dist.model.vae_tiles`) in far less memory.
        compile: the compiled (Triton) operations between convolutions; needs a GPU.
    """

    def __init__(self, vae: Any, *, patch_conv: bool = False, tiling: bool = False, compile: bool = False) -> None:
        overlap = (vae.tile_sample_min_num_frames - vae.tile_sample_stride_num_frames) / VAE_TIME_COMPRESSION
        if not vae.use_framewise_encoding or overlap != 1 or vae.temporal_compression_ratio != VAE_TIME_COMPRESSION:
            raise ValueError(
                "the installed diffusers cuts a clip into other tiles than its release 0.42 (17 frames, one every 12);"
                " install diffusers 0.42 or 0.43"
            )
        self.time_tiling = vae.tile_sample_min_num_frames, vae.tile_sample_stride_num_frames
        assert vae.tile_sample_min_height == vae.tile_sample_min_width
        self.tiling = tiling
        self.tile = vae.tile_sample_min_height, vae.tile_sample_stride_height
        self.limit = PATCH_ELEMENTS if patch_conv else CHUNK_ELEMENTS
        self.encoder = vae.encoder.to(memory_format=torch.channels_last_3d)
        conv_in = self.encoder.conv_in.conv
        filling = (0, 0) * 3 + (0, -conv_in.in_channels % CHANNEL_MULTIPLE)
        self.weight_in = F.pad(conv_in.weight, filling).to(memory_format=torch.channels_last_3d)
        self.quant_conv: nn.Conv3d = vae.quant_conv
        self.operations: Operations = _operations(compile)

    def __call__(self, frames_THW3: Tensor) -> Tensor:
        """uint8 [T, H, W, 3] on the device → mean and log-variance [t, h, w, 2C], unclamped."""
        return self.encode(frames_THW3, self.tiling)

    @torch.no_grad()
    def encode(self, frames_THW3: Tensor, tiling: bool) -> Tensor:
        num_frames, height, width, _ = frames_THW3.shape
        latents = []
        for length, same in groupby(time_tiles(num_frames, *self.time_tiling), lambda tile: tile.stop - tile.start):
            tiles = list(same)
            step = max(1, GROUP_PIXELS // (length * height * width))
            for at in range(0, len(tiles), step):
                group = tiles[at : at + step]
                with torch.cuda.device_of(frames_THW3):  # where Triton launches its kernels
                    frames_BTHW3 = torch.stack([frames_THW3[tile.start : tile.stop] for tile in group])
                    if tiling:
                        moments = encode_in_tiles(self._encode, frames_BTHW3, *self.tile)
                    else:
                        moments = self._encode(frames_BTHW3)
                latents += [x[tile.first :] for tile, x in zip(group, moments, strict=True)]
        latents_thwC = torch.cat(latents)
        assert len(latents_thwC) == (num_frames - 1) // VAE_TIME_COMPRESSION + 1, "every frame reaches the latents"
        return latents_thwC

    def _encode(self, frames_BTHW3: Tensor) -> Tensor:
        """Tiles of one length, [B, t, h, w, 2C]."""
        # Scaled in fp32: in bf16 the mid greys would lose half a level before the VAE sees them.
        video = (frames_BTHW3.float() / 127.5 - 1.0).to(self.weight_in.dtype)
        video = F.pad(video, (0, self.weight_in.shape[1] - video.shape[-1]))
        x, parts = self._conv(video, self.encoder.conv_in, weight=self.weight_in)
        del video
        for block in self.encoder.down_blocks:
            for resnet in block.resnets:
                x, parts = self._resnet(x, parts, resnet)
            for downsampler in block.downsamplers or ():
                x, parts = self._conv(x, downsampler.conv)
        middle = self.encoder.mid_block
        x, parts = self._resnet(x, parts, middle.resnets[0])
        for attention, resnet in zip(middle.attentions, middle.resnets[1:], strict=True):
            if attention is not None:
                parts = self._attention(x, parts, attention)
            x, parts = self._resnet(x, parts, resnet)
        affine = Norm(self.encoder.conv_norm_out).affine(parts)
        x, _ = self._conv(x, self.encoder.conv_out, affine)
        return F.linear(x, self.quant_conv.weight.flatten(1), self.quant_conv.bias)

    def _resnet(self, x_BTHWC: Tensor, parts: Tensor, block: Any) -> tuple[Tensor, Tensor]:
        """The sum, where the channels allow it in x's place, and its moments."""
        affine = Norm(block.norm1).affine(parts)
        inner, inner_parts = self._conv(x_BTHWC, block.conv1, affine, add_bias=False)
        affine = Norm(block.norm2).affine(inner_parts, bias=block.conv1.conv.bias)
        if block.conv_shortcut is not None:
            shortcut = block.conv_shortcut.conv
            x_BTHWC = F.linear(x_BTHWC, shortcut.weight.flatten(1), shortcut.bias)
        return self._conv(inner, block.conv2, affine, residual=x_BTHWC)

    def _conv(
        self, x_BTHWC: Tensor, causal: Any, affine: Affine | None = None, *, weight: Tensor | None = None,
        residual: Tensor | None = None, add_bias: bool = True,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """A causal 3×3×3 convolution of silu(x · scale + shift), or of x; and the result's moments.

        With `residual` the result is added to it, in its place.
        """
        conv: nn.Conv3d = causal.conv
        weight = conv.weight if weight is None else weight
        batch, frames, height, width, channels = x_BTHWC.shape
        stride = conv.stride[0]
        out_frames = (frames - 1) // stride + 1
        frame_elements = batch * (height + 2) * (width + 2) * max(channels, conv.out_channels)
        step = chunk_frames(out_frames, stride, frame_elements, self.limit)
        bias = conv.bias if add_bias else None
        out, parts = residual, []
        for first in range(0, out_frames, step):
            last = min(first + step, out_frames) - 1
            # An output frame sees the two frames before its own and that one.
            needed = range(first * stride - 2, last * stride + 1)
            padded = self.operations.pad(x_BTHWC, affine, silu=True, frames=needed, border=1)
            value = F.conv3d(padded.permute(0, 4, 1, 2, 3), weight, None, conv.stride)
            value = value.permute(0, 2, 3, 4, 1).contiguous()
            del padded
            whole = out is None and step == out_frames
            if out is None:
                out = value if whole else value.new_empty(batch, out_frames, *value.shape[2:])
            place = out[:, first : last + 1]
            store = None if whole and bias is None else place
            added = None if residual is None else place
            parts.append(self.operations.moments(value, bias=bias, residual=added, out=store))
        assert out is not None
        return out, torch.cat(parts, dim=1)

    def _attention(self, x_BTHWC: Tensor, parts: Tensor, attention: Any) -> Tensor:
        """Adds the attention to x, in its place; the sum's moments."""
        assert attention.heads == 1 and attention.rescale_output_factor == 1
        affine = Norm(attention.group_norm).affine(parts)
        frames = range(x_BTHWC.shape[1])
        normed = self.operations.pad(x_BTHWC, affine, silu=False, frames=frames, border=0).flatten(2, 3)
        q, k, v = (layer(normed) for layer in (attention.to_q, attention.to_k, attention.to_v))
        out = F.linear(self.operations.attend(q, k, v), attention.to_out[0].weight).view_as(x_BTHWC)
        return self.operations.moments(out, bias=attention.to_out[0].bias, residual=x_BTHWC, out=x_BTHWC)


def _operations(compile: bool) -> Operations:
    if not compile:
        return TorchOperations()
    from k5dist.model.vae_triton import TritonOperations

    return TritonOperations()
