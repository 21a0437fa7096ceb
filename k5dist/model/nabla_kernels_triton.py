"""Triton kernels of NABLA's block-sparse attention, forward and backward; `nabla_triton` launches them.

One program owns one block of 64 rows of one head and walks the blocks its list names, in ascending order, so every sum
has one fixed order: results are the same to the bit from run to run. No atomics.

Shape suffixes: D head_dim.
"""

# Kernels are not Python to a type checker, and triton has no wheel for every platform it runs on.
# pyright: reportMissingImports=false, reportIndexIssue=false, reportPossiblyUnboundVariable=false

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

jit: Any = triton.jit  # untyped: a launch takes more than the function's parameters


@jit
def _tile(x, row, column, stride, D: tl.constexpr, TMA: tl.constexpr):
    """The [64, D] tile at (row, column) of a matrix that is a tensor descriptor or a pointer."""
    if TMA:
        tile = x.load([row, column])
    else:
        rows = row.to(tl.int64) + tl.arange(0, 64)
        tile = tl.load(x + rows[:, None] * stride + (column + tl.arange(0, D))[None, :])
    return tile


@jit
def _partial(scratch, entry, D: tl.constexpr):
    """Where a block's running [64, D] sum stands between passes."""
    return scratch + (entry * 64 + tl.arange(0, 64)[:, None]) * D + tl.arange(0, D)[None, :]


@jit
def _start(scratch, entry, D: tl.constexpr, FIRST: tl.constexpr):
    """The running sum as the pass before left it."""
    return tl.zeros((64, D), tl.float32) if FIRST else tl.load(_partial(scratch, entry, D))


@jit
def _attend(  # noqa: PLR0915 - a kernel's body: calls inside the loop hide what the compiler sees
    q, k, v, out, lse, lists, starts, scratch, state, block, local, pair, active, num_heads, num_blocks, step,
    stride_q, stride_k, stride_v, scale, D: tl.constexpr, PASSES: tl.constexpr, TMA: tl.constexpr,
    RESIDENT: tl.constexpr, AHEAD: tl.constexpr, ONLINE: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """Attention of one query block over its list's key blocks of range `step`, or of all ranges (FIRST and LAST)."""
    base = (pair // num_heads) * num_blocks * 64
    column = (pair % num_heads) * D
    q_tile = _tile(q, base + block * 64, column, stride_q, D, TMA)
    if RESIDENT:  # an operand that comes out of arithmetic is kept in registers; × 2^-1 loses nothing
        q_tile = q_tile * 0.5
        scale = scale * 2
    entry = local.to(tl.int64) * num_blocks + block
    starts += entry * (PASSES + 1)
    start = tl.load(starts + step)
    end = tl.where(active, tl.load(starts + (PASSES if FIRST and LAST else step + 1)), start)
    lists += entry * num_blocks
    acc = _start(scratch, entry, D, FIRST)
    peak = tl.full((64,), -float("inf"), tl.float32)
    total = tl.zeros((64,), tl.float32)
    # Eight partial sums a row: adding them up over the loop stays inside a thread.
    partial = tl.zeros((64, 8), tl.float32)
    if AHEAD:
        index = tl.load(lists + start, mask=start < end, other=0).to(tl.int32)
        scores = tl.dot(q_tile, _tile(k, base + index * 64, column, stride_k, D, TMA).T, input_precision="ieee")
    for n in range(start, end):
        if AHEAD:  # the last turn computes its own scores once more, and drops them
            ahead = tl.load(lists + tl.minimum(n + 1, end - 1)).to(tl.int32)
            k_tile = _tile(k, base + ahead * 64, column, stride_k, D, TMA)
            scores_ahead = tl.dot(q_tile, k_tile.T, input_precision="ieee")
        else:
            index = tl.load(lists + n).to(tl.int32)
            k_tile = _tile(k, base + index * 64, column, stride_k, D, TMA)
            scores = tl.dot(q_tile, k_tile.T, input_precision="ieee")
        if ONLINE:
            peak_now = tl.maximum(peak, tl.max(scores, 1) * scale)
            p = tl.exp2(scores * scale - peak_now[:, None])
            shrink = tl.exp2(peak - peak_now)
            total = total * shrink + tl.sum(p, 1)
            acc = acc * shrink[:, None]
            peak = peak_now
        else:
            p = tl.exp2(scores * scale)
            partial += tl.sum(p.reshape(64, 8, 8), 1)
        v_tile = _tile(v, base + index * 64, column, stride_v, D, TMA)
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc, input_precision="ieee")
        if AHEAD:
            scores = scores_ahead
            index = ahead
    if not ONLINE:
        total = tl.sum(partial, 1)
        peak = tl.zeros((64,), tl.float32)
    rows = tl.arange(0, 64)
    if not FIRST:
        total += tl.load(state + entry * 64 + rows)
    if not LAST:
        tl.store(_partial(scratch, entry, D), acc)
        tl.store(state + entry * 64 + rows, total)
    else:
        acc = tl.where(total[:, None] > 0, acc / total[:, None], 0.0)
        at = (base + block * 64 + rows).to(tl.int64)[:, None] * (num_heads * D) + column + tl.arange(0, D)[None, :]
        tl.store(out + at, acc.to(out.dtype.element_ty))
        tl.store(lse + (pair.to(tl.int64) * num_blocks + block) * 64 + rows, peak + tl.log2(total))


@jit(do_not_specialize=["first_pair", "num_heads", "num_blocks", "step"])
def forward_kernel(
    q, k, v, out, lse, lists, starts, scratch, state, unsafe, first_pair, num_heads, num_blocks, step,
    stride_q, stride_k, stride_v, scale, D: tl.constexpr, PASSES: tl.constexpr, TMA: tl.constexpr,
    RESIDENT: tl.constexpr, AHEAD: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """Heads whose logits are proved small: no maximum, no rescaling. Programs: (query blocks, pairs)."""
    local = tl.program_id(1)
    pair = first_pair + local
    active = tl.load(unsafe + pair) == 0
    _attend(
        q, k, v, out, lse, lists, starts, scratch, state, tl.program_id(0), local, pair, active, num_heads, num_blocks,
        step, stride_q, stride_k, stride_v, scale, D, PASSES, TMA, RESIDENT, AHEAD, False, FIRST, LAST,
    )  # fmt: skip


@jit(do_not_specialize=["first_pair", "num_heads", "num_blocks"])
def forward_online_kernel(
    q, k, v, out, lse, lists, starts, unsafe, first_pair, num_heads, num_blocks, stride_q, stride_k, stride_v, scale,
    D: tl.constexpr, PASSES: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """The other heads, with the running maximum, all ranges at once. Programs: (a few a head, pairs)."""
    local = tl.program_id(1)
    pair = first_pair + local
    active = tl.load(unsafe + pair) != 0
    stop = tl.where(active, num_blocks, 0)
    for block in range(tl.program_id(0), stop, tl.num_programs(0)):
        _attend(
            q, k, v, out, lse, lists, starts, lse, lse, block, local, pair, active, num_heads, num_blocks, 0,
            stride_q, stride_k, stride_v, scale, D, PASSES, TMA, 0, False, True, True, True,
        )  # fmt: skip


@jit(do_not_specialize=["first_pair", "num_heads", "num_blocks", "step"])
def dkdv_kernel(
    q, k, v, grad, dk, dv, lse, delta, lists, starts, scratch, state, first_pair, num_heads, num_blocks, step,
    stride_q, stride_k, stride_v, stride_grad, scale, scale_out, D: tl.constexpr, PASSES: tl.constexpr,
    TMA: tl.constexpr, RESIDENT: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """dk and dv of one key block over the query blocks that see it; all products transposed (keys × queries).

    So the probabilities leave one product and enter the next in registers, and no multiplication but the exponent's
    is done for each element. `scratch` holds dk's partial sums, `state` dv's.
    """
    block, local = tl.program_id(0), tl.program_id(1)
    pair = first_pair + local
    base = (pair // num_heads) * num_blocks * 64
    column = (pair % num_heads) * D
    k_tile = _tile(k, base + block * 64, column, stride_k, D, TMA)
    v_tile = _tile(v, base + block * 64, column, stride_v, D, TMA)
    if RESIDENT > 0:
        k_tile = k_tile * 0.5
        scale = scale * 2
    entry = local.to(tl.int64) * num_blocks + block
    start = tl.load(starts + entry * (PASSES + 1) + step)
    end = tl.load(starts + entry * (PASSES + 1) + step + 1)
    lists += entry * num_blocks
    lse += pair.to(tl.int64) * num_blocks * 64
    delta += pair.to(tl.int64) * num_blocks * 64
    dk_acc = _start(scratch, entry, D, FIRST)
    dv_acc = _start(state, entry, D, FIRST)
    for n in range(start, end):
        at = tl.load(lists + n).to(tl.int32) * 64
        q_tile = _tile(q, base + at, column, stride_q, D, TMA)
        grad_tile = _tile(grad, base + at, column, stride_grad, D, TMA)
        p = tl.dot(k_tile, q_tile.T, input_precision="ieee")
        p = tl.exp2(p * scale - tl.load(lse + at + tl.arange(0, 64))[None, :])
        dv_acc = tl.dot(p.to(q_tile.dtype), grad_tile, dv_acc, input_precision="ieee")
        # After the exponent, not before: both products' results at once do not fit in the registers.
        dp = tl.dot(v_tile, grad_tile.T, input_precision="ieee")
        ds = p * (dp - tl.load(delta + at + tl.arange(0, 64))[None, :])
        dk_acc = tl.dot(ds.to(q_tile.dtype), q_tile, dk_acc, input_precision="ieee")
    if not LAST:
        tl.store(_partial(scratch, entry, D), dk_acc)
        tl.store(_partial(state, entry, D), dv_acc)
    else:
        rows = (base + block * 64 + tl.arange(0, 64)).to(tl.int64)
        to = rows[:, None] * (num_heads * D) + column + tl.arange(0, D)[None, :]
        tl.store(dk + to, (dk_acc * scale_out).to(dk.dtype.element_ty))
        tl.store(dv + to, dv_acc.to(dv.dtype.element_ty))


@jit(do_not_specialize=["first_pair", "num_heads", "num_blocks", "step"])
def dq_kernel(
    q, k, v, grad, dq, lse, delta, lists, starts, scratch, first_pair, num_heads, num_blocks, step,
    stride_q, stride_k, stride_v, stride_grad, scale, scale_out, D: tl.constexpr, PASSES: tl.constexpr,
    TMA: tl.constexpr, RESIDENT: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """dq of one query block over the key blocks it sees."""
    block, local = tl.program_id(0), tl.program_id(1)
    pair = first_pair + local
    base = (pair // num_heads) * num_blocks * 64
    column = (pair % num_heads) * D
    q_tile = _tile(q, base + block * 64, column, stride_q, D, TMA)
    grad_tile = _tile(grad, base + block * 64, column, stride_grad, D, TMA)
    at = (pair.to(tl.int64) * num_blocks + block) * 64 + tl.arange(0, 64)
    lse_row, delta_row = tl.load(lse + at), tl.load(delta + at)
    if RESIDENT > 0:
        q_tile = q_tile * 0.5
        scale = scale * 2
    if RESIDENT > 1:
        grad_tile = grad_tile * 0.5
        delta_row = delta_row * 0.5
        scale_out = scale_out * 2
    entry = local.to(tl.int64) * num_blocks + block
    start = tl.load(starts + entry * (PASSES + 1) + step)
    end = tl.load(starts + entry * (PASSES + 1) + step + 1)
    lists += entry * num_blocks
    acc = _start(scratch, entry, D, FIRST)
    for n in range(start, end):
        key = base + tl.load(lists + n).to(tl.int32) * 64
        k_tile = _tile(k, key, column, stride_k, D, TMA)
        v_tile = _tile(v, key, column, stride_v, D, TMA)
        p = tl.dot(q_tile, k_tile.T, input_precision="ieee")
        dp = tl.dot(grad_tile, v_tile.T, input_precision="ieee")
        ds = tl.exp2(p * scale - lse_row[:, None]) * (dp - delta_row[:, None])
        acc = tl.dot(ds.to(k_tile.dtype), k_tile, acc, input_precision="ieee")
    if not LAST:
        tl.store(_partial(scratch, entry, D), acc)
    else:
        rows = (base + block * 64 + tl.arange(0, 64)).to(tl.int64)
        to = rows[:, None] * (num_heads * D) + column + tl.arange(0, D)[None, :]
        tl.store(dq + to, (acc * scale_out).to(dq.dtype.element_ty))
