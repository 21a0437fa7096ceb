"""Triton kernels of RMS norm and rotation, one forward and one backward, and how they are launched.

Both are bound by memory: each tensor is read once and written once. A program takes a run of tokens through some of the
heads, so that a token's cosines and sines are read once for all of these. The weight's gradient is a sum over all
tokens: each program stores its own, and those are added in order, so results are the same to the bit from run to run.
"""

# Kernels are not Python to a type checker, and triton has no wheel for every platform it runs on.
# pyright: reportMissingImports=false, reportIndexIssue=false, reportPossiblyUnboundVariable=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

jit: Any = triton.jit  # untyped: a launch takes more than the function's parameters
TOKENS = 32  # of a program
HEADS = 8  # of a program, at most
WARPS = 4


@jit
def _rows(x, rows, inside, stride, D: tl.constexpr):
    at = rows.to(tl.int64)[:, None] * stride + tl.arange(0, D)[None, :]
    return tl.load(x + at, mask=inside[:, None], other=0.0).to(tl.float32)


@jit
def _put(x, rows, inside, stride, tile, D: tl.constexpr):
    at = rows.to(tl.int64)[:, None] * stride + tl.arange(0, D)[None, :]
    tl.store(x + at, tile.to(x.dtype.element_ty), mask=inside[:, None])


@jit
def _turned(tile, cosine, sine, T: tl.constexpr, D: tl.constexpr):
    first, second = tl.split(tl.reshape(tile, (T, D // 2, 2)))
    return tl.reshape(tl.join(cosine * first - sine * second, sine * first + cosine * second), (T, D))


@jit(do_not_specialize=["tokens"])
def norm_rope_kernel(
    x, weight, cosine, sine, out, tokens, heads, stride_b, stride_s, stride_h, eps,
    D: tl.constexpr, T: tl.constexpr, H: tl.constexpr, ROPE: tl.constexpr,
):  # fmt: skip
    """Programs: (runs of tokens, groups of heads, batch)."""
    run, group, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    rows = run * T + tl.arange(0, T)
    inside = rows < tokens
    w = tl.load(weight + tl.arange(0, D)).to(tl.float32)
    if ROPE:
        c = _rows(cosine, rows, inside, D // 2, D // 2)
        s = _rows(sine, rows, inside, D // 2, D // 2)
    for head in range(group * H, min(heads, group * H + H)):
        tile = _rows(x + batch * stride_b + head * stride_h, rows, inside, stride_s, D)
        inverse = tl.rsqrt(tl.sum(tile * tile, 1) / D + eps)
        y = tile * inverse[:, None] * w[None, :]
        if ROPE:
            y = _turned(y.to(x.dtype.element_ty).to(tl.float32), c, s, T, D)
        _put(out + batch * tokens * heads * D + head * D, rows, inside, heads * D, y, D)


@jit(do_not_specialize=["tokens"])
def norm_rope_backward_kernel(
    grad, x, weight, cosine, sine, dx, dweight, tokens, heads, grad_b, grad_s, grad_h, stride_b, stride_s, stride_h,
    eps, D: tl.constexpr, T: tl.constexpr, H: tl.constexpr, ROPE: tl.constexpr, WEIGHS: tl.constexpr,
):  # fmt: skip
    """Programs: (runs of tokens, groups of heads, batch)."""
    run, group, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    rows = run * T + tl.arange(0, T)
    inside = rows < tokens
    w = tl.load(weight + tl.arange(0, D)).to(tl.float32)
    if ROPE:
        c = _rows(cosine, rows, inside, D // 2, D // 2)
        s = _rows(sine, rows, inside, D // 2, D // 2)
    total = tl.zeros((D,), tl.float32)
    for head in range(group * H, min(heads, group * H + H)):
        g = _rows(grad + batch * grad_b + head * grad_h, rows, inside, grad_s, D)
        tile = _rows(x + batch * stride_b + head * stride_h, rows, inside, stride_s, D)
        if ROPE:
            g = _turned(g, c, -s, T, D)
        inverse = tl.rsqrt(tl.sum(tile * tile, 1) / D + eps)[:, None]
        hat = tile * inverse
        weighed = g * w[None, :]
        along = (tl.sum(weighed * hat, 1) / D)[:, None]
        _put(dx + batch * tokens * heads * D + head * D, rows, inside, heads * D, inverse * (weighed - hat * along), D)
        if WEIGHS:
            total += tl.sum(g * hat, 0)
    if WEIGHS:
        program = (batch * tl.num_programs(1) + group) * tl.num_programs(0) + run
        tl.store(dweight + program * D + tl.arange(0, D), total)


def _grid(x_BSHD: Tensor) -> tuple[int, int, int]:
    batch, tokens, heads, _ = x_BSHD.shape
    return -(-tokens // TOKENS), -(-heads // HEADS), batch


def _options(x_BSHD: Tensor, cosine_SE: Tensor | None) -> dict[str, Any]:
    return {"D": x_BSHD.shape[-1], "T": TOKENS, "H": HEADS, "ROPE": cosine_SE is not None, "num_warps": WARPS}


def _plain(x_BSHD: Tensor) -> Tensor:
    """With the dimensions of a head side by side, as the kernels read them."""
    return x_BSHD if x_BSHD.stride(-1) == 1 else x_BSHD.contiguous()


def _tables(*tables: Tensor | None) -> list[Tensor | None]:
    return [None if table is None else table.contiguous() for table in tables]


def forward(x_BSHD: Tensor, weight_D: Tensor, cosine_SE: Tensor | None, sine_SE: Tensor | None, eps: float) -> Tensor:
    x, (cosine, sine) = _plain(x_BSHD), _tables(cosine_SE, sine_SE)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    _, tokens, heads, _ = x.shape
    norm_rope_kernel[_grid(x)](
        x, weight_D, cosine, sine, out, tokens, heads, *x.stride()[:3], eps, **_options(x, cosine)
    )  # fmt: skip
    return out


def backward(
    grad_BSHD: Tensor,
    x_BSHD: Tensor,
    weight_D: Tensor,
    cosine_SE: Tensor | None,
    sine_SE: Tensor | None,
    eps: float,
    weighs: bool,
) -> tuple[Tensor, Tensor]:
    grad, x, (cosine, sine) = _plain(grad_BSHD), _plain(x_BSHD), _tables(cosine_SE, sine_SE)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    _, tokens, heads, dim = x.shape
    grid = _grid(x)
    partial = x.new_empty(grid[0] * grid[1] * grid[2] if weighs else 0, dim, dtype=torch.float32)
    norm_rope_backward_kernel[grid](
        grad, x, weight_D, cosine, sine, dx, partial, tokens, heads, *grad.stride()[:3], *x.stride()[:3], eps,
        **_options(x, cosine), WEIGHS=weighs,
    )  # fmt: skip
    return dx, partial.sum(0) if weighs else partial.view(0)
