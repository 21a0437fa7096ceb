"""Triton kernels of the VAE's encoder: padding with normalisation, moments, attention's softmax; and their launches.

Each reads and writes a tensor once, at the memory's speed, in the convolutions' own layout [.., H, W, C]. The compiler
does not get there by itself: a group's few channels lie side by side, so its reduction over (C/G, T, H, W) reads
sectors for 8 bytes in 256, and it would build every kernel anew for each of a data set's many shapes. Every sum has one
fixed order: no atomics, no tuning at run time.

The functions mirror `TorchOperations` of `k5dist.model.vae`, which documents them and is their reference.
Shape suffixes: B batch, T frames, H W sides, C channels, S tokens of a frame, P partial results.
"""

# Kernels are not Python to a type checker, and triton has no wheel for every platform it runs on.
# pyright: reportMissingImports=false, reportIndexIssue=false

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

jit: Any = triton.jit  # untyped: a launch takes more than the function's parameters
TILE = 4096  # elements of a program's tile: 32 a thread, in 16-byte loads
PROGRAMS = 2112  # at most, of one sample's moments: 16 for each of 132 SMs, three at a time
SCORES = 1 << 27  # attention scores alive at once: 512 MiB in fp32
SOFTMAX_TILE = 4096
LOWEST = tl.constexpr(-1.0e30)  # stands for −∞ where −∞ − −∞ must not become NaN


@jit(do_not_specialize=["first", "height", "width", "border", "rows"])
def _pad_kernel(
    x, out, scale, shift, x_batch, first, height, width, border, rows,
    C: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr, AFFINE: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, BLOCK_C)
    wide, high = width + 2 * border, height + 2 * border
    # Replication is a clamp of the place that is read, so no padded copy precedes the normalised one.
    w = tl.minimum(tl.maximum(row % wide - border, 0), width - 1)
    h = tl.minimum(tl.maximum(row // wide % high - border, 0), height - 1)
    t = tl.maximum(row // (wide * high) + first, 0)
    source = ((t * height + h) * width + w).to(tl.int64)
    mask = (row < rows)[:, None] & (c < C)[None, :]
    value = tl.load(x + batch * x_batch + source[:, None] * C + c[None, :], mask=mask, other=0.0)
    if AFFINE:
        factor = tl.load(scale + batch * C + c, mask=c < C, other=0.0)
        offset = tl.load(shift + batch * C + c, mask=c < C, other=0.0)
        result = value.to(tl.float32) * factor[None, :] + offset[None, :]
        if SILU:
            result = result / (1.0 + tl.exp(-result))
        value = result.to(x.dtype.element_ty)
    target = batch * rows + row.to(tl.int64)
    tl.store(out + target[:, None] * C + c[None, :], value, mask=mask)


@jit
def _sum_tile(
    value, bias, residual, out, row, c, stop,
    C: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, STORE: tl.constexpr,
):  # fmt: skip
    """value + bias + residual of one tile, stored if asked for; as stored (rounded), in fp32."""
    place = row.to(tl.int64)[:, None] * C + c[None, :]
    mask = (row < stop)[:, None] & (c < C)[None, :]
    result = tl.load(value + place, mask=mask, other=0.0).to(tl.float32)
    if BIAS:
        result += tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    if RESIDUAL:
        result += tl.load(residual + place, mask=mask, other=0.0).to(tl.float32)
    rounded = result.to(value.dtype.element_ty)
    if STORE:
        tl.store(out + place, rounded, mask=mask)
    return rounded.to(tl.float32)


@jit(do_not_specialize=["rows", "rows_each"])
def _moments_kernel(
    value, bias, residual, out, parts, value_batch, residual_batch, out_batch, rows, rows_each,
    C: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr,
    BIAS: tl.constexpr, RESIDUAL: tl.constexpr, STORE: tl.constexpr,
):  # fmt: skip
    part, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    start = part * rows_each
    stop = tl.minimum(start + rows_each, rows)
    value += batch * value_batch
    residual += batch * residual_batch
    out += batch * out_batch
    local, c = tl.arange(0, ROWS), tl.arange(0, BLOCK_C)
    tile = _sum_tile(value, bias, residual, out, start + local, c, stop, C, BIAS, RESIDUAL, STORE)
    # Sums of squares are taken about the program's first row: about zero they would cancel where |mean| ≫ deviation.
    origin = tl.sum(tl.where((local == 0)[:, None], tile, 0.0), axis=0)
    inside = (start + local < stop)[:, None]
    deviation = tl.where(inside, tile - origin[None, :], 0.0)
    sums, squares = deviation, deviation * deviation
    for begin in range(start + ROWS, stop, ROWS):
        tile = _sum_tile(value, bias, residual, out, begin + local, c, stop, C, BIAS, RESIDUAL, STORE)
        inside = (begin + local < stop)[:, None]
        deviation = tl.where(inside, tile - origin[None, :], 0.0)
        sums += deviation
        squares += deviation * deviation
    count = (stop - start).to(tl.float32)
    total = tl.sum(sums, axis=0)
    spread = tl.maximum(tl.sum(squares, axis=0) - total * total / count, 0.0)
    place = parts + ((batch * tl.num_programs(0) + part) * 3) * C + c
    tl.store(place, tl.zeros([BLOCK_C], tl.float32) + count, mask=c < C)
    tl.store(place + C, origin + total / count, mask=c < C)
    tl.store(place + 2 * C, spread, mask=c < C)


@jit
def _softmax_kernel(scores, out, columns, scale, BLOCK: tl.constexpr):
    """One row: 2^(scale · scores) over its sum, in two passes."""
    row = tl.program_id(0).to(tl.int64)
    scores += row * columns
    out += row * columns
    at = tl.arange(0, BLOCK)
    most = tl.zeros([BLOCK], tl.float32) + LOWEST
    total = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, columns, BLOCK):
        logit = tl.load(scores + begin + at, mask=begin + at < columns, other=LOWEST) * scale
        larger = tl.maximum(most, logit)
        total = total * tl.exp2(most - larger) + tl.exp2(logit - larger)
        most = larger
    maximum = tl.max(most, axis=0)
    whole = tl.sum(total * tl.exp2(most - maximum), axis=0)
    for begin in range(0, columns, BLOCK):
        inside = begin + at < columns
        logit = tl.load(scores + begin + at, mask=inside, other=LOWEST) * scale
        tl.store(out + begin + at, (tl.exp2(logit - maximum) / whole).to(out.dtype.element_ty), mask=inside)


class TritonOperations:
    """`TorchOperations` in one pass over memory each, and attention through cuBLAS."""

    @staticmethod
    def pad(x_BTHWC: Tensor, affine: tuple[Tensor, Tensor] | None, *, silu: bool, frames: range, border: int) -> Tensor:
        batch, num_frames, height, width, channels = x_BTHWC.shape
        assert frames.stop <= num_frames
        shape = (batch, len(frames), height + 2 * border, width + 2 * border, channels)
        out = x_BTHWC.new_empty(shape)
        rows, (block, tile_rows) = math.prod(shape[1:4]), _tile(channels)
        scale, shift = affine or (x_BTHWC, x_BTHWC)
        assert x_BTHWC[0].is_contiguous() and scale.is_contiguous() and shift.is_contiguous()
        _pad_kernel[_divide_up(rows, tile_rows), batch](
            x_BTHWC, out, scale, shift, x_BTHWC.stride(0), frames.start, height, width, border, rows,
            C=channels, BLOCK_C=block, ROWS=tile_rows, AFFINE=affine is not None, SILU=silu,
        )  # fmt: skip
        return out

    @staticmethod
    def moments(
        value_BTHWC: Tensor, *, bias: Tensor | None = None, residual: Tensor | None = None, out: Tensor | None = None
    ) -> Tensor:
        batch, channels = value_BTHWC.shape[0], value_BTHWC.shape[-1]
        rows, (block, tile_rows) = math.prod(value_BTHWC.shape[1:4]), _tile(channels)
        rows_each = tile_rows * _divide_up(rows, tile_rows * PROGRAMS)
        programs = _divide_up(rows, rows_each)
        parts = torch.empty(batch, programs, 3, channels, device=value_BTHWC.device)
        added, stored = (value_BTHWC if x is None else x for x in (residual, out))
        assert all(x.shape == value_BTHWC.shape and x[0].is_contiguous() for x in (value_BTHWC, added, stored))
        _moments_kernel[programs, batch](
            value_BTHWC, value_BTHWC if bias is None else bias, added, stored, parts,
            value_BTHWC.stride(0), added.stride(0), stored.stride(0), rows, rows_each,
            C=channels, BLOCK_C=block, ROWS=tile_rows,
            BIAS=bias is not None, RESIDUAL=residual is not None, STORE=out is not None,
        )  # fmt: skip
        return parts

    @staticmethod
    def attend(q_BTSC: Tensor, k_BTSC: Tensor, v_BTSC: Tensor) -> Tensor:
        """No fused kernel takes heads this wide (512) at speed; two matrix products of cuBLAS and a softmax do."""
        batch, num_frames, tokens, channels = q_BTSC.shape
        out = torch.empty_like(q_BTSC)
        for frame in range(num_frames):
            keys, values = (x[:, : frame + 1].flatten(1, 2) for x in (k_BTSC, v_BTSC))
            columns = keys.shape[1]
            step = max(1, min(tokens, SCORES // (batch * columns)))
            for begin in range(0, tokens, step):
                query = q_BTSC[:, frame, begin : begin + step]
                weights = softmax(_scores(query, keys), channels**-0.5, q_BTSC.dtype)
                out[:, frame, begin : begin + step] = torch.bmm(weights, values)
        return out


def softmax(scores: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """softmax(scale · scores) over the last dimension: fp32 [B, S, S'] → `dtype`."""
    assert scores.is_contiguous() and scores.dtype == torch.float32
    out = torch.empty_like(scores, dtype=dtype)
    rows, columns = math.prod(scores.shape[:-1]), scores.shape[-1]
    _softmax_kernel[(rows,)](scores, out, columns, scale * math.log2(math.e), BLOCK=SOFTMAX_TILE, num_warps=8)
    return out


def _scores(query: Tensor, keys: Tensor) -> Tensor:
    """q · kᵀ in fp32 [B, S, S']; the bits of bf16 products are kept, as a fused kernel keeps them."""
    if query.dtype == torch.float32:
        return torch.bmm(query, keys.transpose(1, 2))
    return torch.bmm(query, keys.transpose(1, 2), out_dtype=torch.float32)  # type: ignore[call-overload]


def _tile(channels: int) -> tuple[int, int]:
    """(channels, rows) of a program's tile, powers of two."""
    block = 1 << (channels - 1).bit_length()
    return block, max(1, TILE // block)


def _divide_up(a: int, b: int) -> int:
    return -(-a // b)
