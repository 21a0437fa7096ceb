"""Triton kernels of the attention to a text, forward and backward, and how they are launched.

Reading the clip's queries and writing its output is what bounds them, so each is read as seldom as can be. A text that
fits one block of keys has a backward in one kernel, which reads queries and output gradients once and writes all three
gradients; a longer one takes two kernels. Gradients of keys and values are sums over all queries: each program sums a
run of them in order and stores the sum, and the runs' sums are added in order, too. No atomics: results are the same
to the bit from run to run. The text's length is no part of what is compiled.

Shape suffixes: B batch, S tokens of the clip (queries), L tokens of the text (keys), H heads, D head_dim, R runs.
"""

# Kernels are not Python to a type checker, and triton has no wheel for every platform it runs on.
# pyright: reportMissingImports=false, reportIndexIssue=false, reportPossiblyUnboundVariable=false

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

jit: Any = triton.jit  # untyped: a launch takes more than the function's parameters
LOG2E = math.log2(math.e)
# Programs that sum over runs of queries: four waves over the 132 SMs of H100 and H200, or two of two programs an SM. A
# number of its own and not the device's, so that the order of a sum does not depend on the device.
PROGRAMS = 4 * 132


@dataclass(frozen=True)
class Variant:
    """How a kernel is compiled: queries and keys of a tile, warps, and how many tiles are loaded ahead."""

    queries: int
    keys: int
    num_warps: int = 8
    num_stages: int = 2

    def options(self) -> dict[str, int]:
        return {"M": self.queries, "N": self.keys, "num_warps": self.num_warps, "num_stages": self.num_stages}


# By kernel and head_dim. "short" and "whole" are the backward in one kernel, for texts within their number of keys,
# "dkdv" and "dq" the two kernels of any other text.
DEFAULTS = {
    ("forward", 64): Variant(128, 64),
    ("forward", 128): Variant(128, 64),
    ("short", 64): Variant(64, 64),
    ("short", 128): Variant(64, 64),
    ("whole", 64): Variant(64, 128),
    ("whole", 128): Variant(64, 128),
    ("dkdv", 64): Variant(64, 128),
    ("dkdv", 128): Variant(64, 128),
    ("dq", 64): Variant(128, 64),
    ("dq", 128): Variant(128, 64),
}


@jit
def _tile(x, rows, count, stride, D: tl.constexpr):
    """The rows [n, D] of one head; zeros below the last."""
    at = rows.to(tl.int64)[:, None] * stride + tl.arange(0, D)[None, :]
    return tl.load(x + at, mask=rows[:, None] < count, other=0.0)


@jit
def _put(x, rows, count, stride, tile, D: tl.constexpr):
    at = rows.to(tl.int64)[:, None] * stride + tl.arange(0, D)[None, :]
    tl.store(x + at, tile.to(x.dtype.element_ty), mask=rows[:, None] < count)


@jit
def _head(x, batch, head, stride_b, stride_h):
    return x + batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h


@jit(do_not_specialize=["tokens", "length"])
def text_forward_kernel(
    q, k, v, out, lse, tokens, length, stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh,
    stride_vb, stride_vs, stride_vh, scale, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """One block of queries of one head over all keys. Programs: (heads, blocks of queries, batch).

    Heads go first: those that run together read whole rows of the queries.
    """
    head, block, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    num_heads = tl.num_programs(0)
    rows = block * M + tl.arange(0, M)
    q_tile = _tile(_head(q, batch, head, stride_qb, stride_qh), rows, tokens, stride_qs, D)
    k, v = _head(k, batch, head, stride_kb, stride_kh), _head(v, batch, head, stride_vb, stride_vh)
    acc = tl.zeros((M, D), tl.float32)
    peak = tl.full((M,), -float("inf"), tl.float32)
    total = tl.zeros((M,), tl.float32)
    for first in range(0, length, N):
        keys = first + tl.arange(0, N)
        scores = tl.dot(q_tile, _tile(k, keys, length, stride_ks, D).T, input_precision="ieee") * scale
        scores = tl.where(keys[None, :] < length, scores, -float("inf"))
        peak_now = tl.maximum(peak, tl.max(scores, 1))
        p = tl.exp2(scores - peak_now[:, None])
        shrink = tl.exp2(peak - peak_now)
        total = total * shrink + tl.sum(p, 1)
        v_tile = _tile(v, keys, length, stride_vs, D)
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * shrink[:, None], input_precision="ieee")
        peak = peak_now
    row = num_heads * D  # of the output, which is contiguous
    out += batch.to(tl.int64) * tokens * row + head * D
    _put(out, rows, tokens, row, acc / total[:, None], D)
    lse += (batch * num_heads + head).to(tl.int64) * tokens
    tl.store(lse + rows, peak + tl.log2(total), mask=rows < tokens)


@jit(do_not_specialize=["tokens", "length"])
def text_dq_kernel(
    q, k, v, grad, out, dq, lse, delta, tokens, length, stride_qb, stride_qs, stride_qh,
    stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh, stride_gb, stride_gs, stride_gh,
    stride_ob, stride_os, stride_oh, scale, scale_out, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """dq of one block of queries over all keys, and each row's gradient · output, which the other kernel needs, too."""
    head, block, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    num_heads = tl.num_programs(0)
    rows = block * M + tl.arange(0, M)
    inside = rows < tokens
    grad_tile = _tile(_head(grad, batch, head, stride_gb, stride_gh), rows, tokens, stride_gs, D)
    out_tile = _tile(_head(out, batch, head, stride_ob, stride_oh), rows, tokens, stride_os, D)
    delta_row = tl.sum(grad_tile.to(tl.float32) * out_tile.to(tl.float32), 1)
    statistics = (batch * num_heads + head).to(tl.int64) * tokens + rows
    tl.store(delta + statistics, delta_row, mask=inside)
    lse_row = tl.load(lse + statistics, mask=inside, other=0.0)
    q_tile = _tile(_head(q, batch, head, stride_qb, stride_qh), rows, tokens, stride_qs, D)
    k, v = _head(k, batch, head, stride_kb, stride_kh), _head(v, batch, head, stride_vb, stride_vh)
    acc = tl.zeros((M, D), tl.float32)
    for first in range(0, length, N):
        keys = first + tl.arange(0, N)
        k_tile = _tile(k, keys, length, stride_ks, D)
        p = tl.dot(q_tile, k_tile.T, input_precision="ieee")
        p = tl.exp2(p * scale - lse_row[:, None])
        p = tl.where(keys[None, :] < length, p, 0.0)  # may be infinite there, which zeros in k would make NaN
        dp = tl.dot(grad_tile, _tile(v, keys, length, stride_vs, D).T, input_precision="ieee")
        ds = p * (dp - delta_row[:, None])
        acc = tl.dot(ds.to(k_tile.dtype), k_tile, acc, input_precision="ieee")
    row = num_heads * D
    _put(dq + batch.to(tl.int64) * tokens * row + head * D, rows, tokens, row, acc * scale_out, D)


@jit(do_not_specialize=["tokens", "length", "num_runs"])
def text_dkdv_kernel(
    q, k, v, grad, dq, dk, dv, lse, delta, tokens, length, num_runs, stride_qb, stride_qs, stride_qh,
    stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh, stride_gb, stride_gs, stride_gh,
    scale, scale_out, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """dk and dv of one block of keys, summed over one run of query blocks; all products transposed (keys × queries).

    So the probabilities leave one product and enter the next in registers. With WHOLE the block is the whole text:
    then each row's gradient · output is the sum over its keys of p · dp, and dq has but this one part, so both are had
    here and neither output nor `delta` is read. Programs: (blocks of keys, heads, batch × runs).
    """
    keys = tl.program_id(0) * N + tl.arange(0, N)
    head, num_heads = tl.program_id(1), tl.num_programs(1)
    batch, run = tl.program_id(2) // num_runs, tl.program_id(2) % num_runs
    k_tile = _tile(_head(k, batch, head, stride_kb, stride_kh), keys, length, stride_ks, D)
    v_tile = _tile(_head(v, batch, head, stride_vb, stride_vh), keys, length, stride_vs, D)
    q, grad = _head(q, batch, head, stride_qb, stride_qh), _head(grad, batch, head, stride_gb, stride_gh)
    statistics = (batch * num_heads + head).to(tl.int64) * tokens
    row = num_heads * D
    dq += batch.to(tl.int64) * tokens * row + head * D
    dk_acc = tl.zeros((N, D), tl.float32)
    dv_acc = tl.zeros((N, D), tl.float32)
    num_blocks = tl.cdiv(tokens, M)
    for block in range(run * num_blocks // num_runs, (run + 1) * num_blocks // num_runs):
        rows = block * M + tl.arange(0, M)
        q_tile = _tile(q, rows, tokens, stride_qs, D)
        grad_tile = _tile(grad, rows, tokens, stride_gs, D)
        p = tl.dot(k_tile, q_tile.T, input_precision="ieee")
        p = tl.exp2(p * scale - tl.load(lse + statistics + rows, mask=rows < tokens, other=0.0)[None, :])
        p = tl.where(keys[:, None] < length, p, 0.0)
        dv_acc = tl.dot(p.to(q_tile.dtype), grad_tile, dv_acc, input_precision="ieee")
        dp = tl.dot(v_tile, grad_tile.T, input_precision="ieee")
        if WHOLE:  # noqa: SIM108 - one line would not fit
            delta_row = tl.sum(p * dp, 0)
        else:
            delta_row = tl.load(delta + statistics + rows, mask=rows < tokens, other=0.0)
        ds = (p * (dp - delta_row[None, :])).to(q_tile.dtype)
        dk_acc = tl.dot(ds, q_tile, dk_acc, input_precision="ieee")
        if WHOLE:
            _put(dq, rows, tokens, row, tl.dot(ds.T, k_tile, input_precision="ieee") * scale_out, D)
    part = tl.program_id(2).to(tl.int64) * length * row + head * D
    _put(dk + part, keys, length, row, dk_acc * scale_out, D)
    _put(dv + part, keys, length, row, dv_acc, D)


def _rows(x_BSHD: Tensor) -> Tensor:
    """Any strides will do but a head's own; an expanded gradient has none."""
    return x_BSHD if x_BSHD.stride(-1) == 1 else x_BSHD.contiguous()


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for x in tensors for stride in x.stride()[:3]]


def forward(
    query_BSHD: Tensor, key_BLHD: Tensor, value_BLHD: Tensor, variant: Variant | None = None
) -> tuple[Tensor, Tensor]:
    """(out [B, S, H, D], lse fp32 [B, H, S], the base-2 logarithm of each row's sum of exponentials)."""
    batch, tokens, heads, dim = query_BSHD.shape
    variant = variant or DEFAULTS["forward", dim]
    inputs = [_rows(x) for x in (query_BSHD, key_BLHD, value_BLHD)]
    out_BSHD = torch.empty_like(query_BSHD, memory_format=torch.contiguous_format)
    lse_BHS = query_BSHD.new_empty(batch, heads, tokens, dtype=torch.float32)
    text_forward_kernel[(heads, triton.cdiv(tokens, variant.queries), batch)](
        *inputs, out_BSHD, lse_BHS, tokens, key_BLHD.shape[1], *_strides(*inputs), LOG2E / math.sqrt(dim),
        D=dim, **variant.options(),
    )  # fmt: skip
    return out_BSHD, lse_BHS


def backward(
    grad_BSHD: Tensor, query_BSHD: Tensor, key_BLHD: Tensor, value_BLHD: Tensor, out_BSHD: Tensor, lse_BHS: Tensor,
    variants: dict[str, Variant] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dk, dv), contiguous, in the inputs' dtype; `variants` by name in place of the defaults."""
    dim, length = query_BSHD.shape[-1], key_BLHD.shape[1]
    chosen = {name: variant for (name, size), variant in DEFAULTS.items() if size == dim} | (variants or {})
    inputs = [_rows(x) for x in (query_BSHD, key_BLHD, value_BLHD, grad_BSHD)]
    dq_BSHD = torch.empty_like(query_BSHD, memory_format=torch.contiguous_format)
    for name in ("short", "whole"):
        if length <= chosen[name].keys:
            return dq_BSHD, *_launch_dkdv(inputs, dq_BSHD, lse_BHS, lse_BHS, chosen[name], whole=True)
    delta_BHS = torch.empty_like(lse_BHS)
    _launch_dq([*inputs, _rows(out_BSHD)], dq_BSHD, lse_BHS, delta_BHS, chosen["dq"])
    return dq_BSHD, *_launch_dkdv(inputs, dq_BSHD, lse_BHS, delta_BHS, chosen["dkdv"], whole=False)


def _launch_dq(inputs: list[Tensor], dq_BSHD: Tensor, lse_BHS: Tensor, delta_BHS: Tensor, variant: Variant) -> None:
    batch, tokens, heads, dim = dq_BSHD.shape
    text_dq_kernel[(heads, triton.cdiv(tokens, variant.queries), batch)](
        *inputs, dq_BSHD, lse_BHS, delta_BHS, tokens, inputs[1].shape[1], *_strides(*inputs),
        LOG2E / math.sqrt(dim), 1 / math.sqrt(dim), D=dim, **variant.options(),
    )  # fmt: skip


def _launch_dkdv(
    inputs: list[Tensor], dq_BSHD: Tensor, lse_BHS: Tensor, delta_BHS: Tensor, variant: Variant, *, whole: bool
) -> tuple[Tensor, Tensor]:
    batch, tokens, heads, dim = dq_BSHD.shape
    length = inputs[1].shape[1]
    blocks, most = -(-length // variant.keys), -(-tokens // variant.queries)
    # Rounded down: a program more than whole waves hold would run when all others are done.
    runs = max(1, min(PROGRAMS // (blocks * heads * batch), most))
    dk_BRLHD, dv_BRLHD = (lse_BHS.new_empty(batch, runs, length, heads, dim) for _ in range(2))
    text_dkdv_kernel[(blocks, heads, batch * runs)](
        *inputs, dq_BSHD, dk_BRLHD, dv_BRLHD, lse_BHS, delta_BHS, tokens, length, runs, *_strides(*inputs),
        LOG2E / math.sqrt(dim), 1 / math.sqrt(dim), D=dim, WHOLE=whole, **variant.options(),
    )  # fmt: skip
    return dk_BRLHD.sum(1).to(dq_BSHD.dtype), dv_BRLHD.sum(1).to(dq_BSHD.dtype)
