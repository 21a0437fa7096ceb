"""Triton kernels of NABLA's block-sparse attention, forward and backward, and how they are launched.

One program owns one block of 64 rows of one head and walks the blocks its list names, in ascending order, so every sum
has one fixed order: results are the same to the bit from run to run. No atomics, no tuning at run time; `DEFAULTS`
holds the variants that the compiler's reports and machine code speak for; `python -m k5dist.benchmark nabla` times all.

Shape suffixes: B batch, S tokens, H heads, D head_dim, N blocks of 64 tokens, W = ceil(N / 32) words of a row's bits,
P pairs of (batch, head), flattened.
"""

# Kernels are not Python to a type checker, and triton has no wheel for every platform it runs on.
# pyright: reportMissingImports=false, reportIndexIssue=false, reportPossiblyUnboundVariable=false

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from k5dist.model.nabla_blocks_triton import block_lists, row_products

jit: Any = triton.jit  # untyped: a launch takes more than the function's parameters
LOG2E = math.log2(math.e)
# Without a running maximum, exp2 of the logits themselves is exact as long as nothing leaves fp32's range: with logits
# (base 2) within ±80 a row's sum stays below 2^98 and its largest term above 2^-80, far from 2^127 and 2^-126; bf16,
# to which the probabilities are rounded, has the same range.
SAFE_LOGIT = 80.0
SCRATCH_BYTES = 640 << 20  # lists and the partial sums between passes, alive inside one call
PASS_BYTES = 24 << 20  # what one pass streams of a head (two operands): half of the L2 cache of H100 and H200
ONLINE_PROGRAMS = 256  # a head; the fallback's launch must cost nothing where no head needs it


@dataclass(frozen=True)
class Variant:
    """How a kernel is compiled and launched; every variant computes the same thing.

    `resident` is how many of the program's own operands stay in registers instead of shared memory (forward: q; dk/dv:
    k; dq: q, then the gradient), `ahead` issues the next block's Q·Kᵀ before this block's softmax (forward only),
    `passes` splits each list by ranges of blocks so that one range of a head stays in L2 (None: from the sizes), and
    `tma` loads through tensor descriptors (Hopper and later) instead of pointers.
    """

    num_stages: int = 2
    max_registers: int | None = None
    tma: bool = True
    resident: int = 0
    ahead: bool = False
    passes: int | None = None

    def options(self) -> dict[str, int]:
        limit = {} if self.max_registers is None else {"maxnreg": self.max_registers}
        return {"num_warps": 4, "num_stages": self.num_stages, **limit}


# Each leaves room for two programs an SM at head_dim 128 and three at 64, in registers and in shared memory.
DEFAULTS = {
    ("forward", 128): Variant(resident=1, ahead=True, num_stages=3),
    ("forward", 64): Variant(resident=1, ahead=True, num_stages=3),
    ("dkdv", 128): Variant(resident=1),
    ("dkdv", 64): Variant(),
    ("dq", 128): Variant(resident=2, num_stages=3),
    ("dq", 64): Variant(resident=2, num_stages=3),
}


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


def _operand(x_BSHD: Tensor) -> Tensor:
    """The tensor as a matrix [B · S, H · D] with one row stride, copied only where its strides do not allow that."""
    batch, tokens, heads, dim = x_BSHD.shape
    stride_b, stride_s, stride_h, stride_d = x_BSHD.stride()
    regular = stride_d == 1 and stride_h == dim and (batch == 1 or stride_b == tokens * stride_s)
    aligned = x_BSHD.data_ptr() % 16 == 0 and stride_s * x_BSHD.element_size() % 16 == 0
    if not (regular and aligned):
        x_BSHD = x_BSHD.clone(memory_format=torch.contiguous_format)  # what is only misaligned would stay as it is
        stride_s = heads * dim
    return x_BSHD.as_strided((batch * tokens, heads * dim), (stride_s, 1))


def _handle(matrix: Tensor, dim: int, variant: Variant) -> TensorDescriptor | Tensor:
    return TensorDescriptor.from_tensor(matrix, [64, dim]) if variant.tma else matrix


def _variant(kernel: str, query_BSHD: Tensor, variant: Variant | None) -> Variant:
    """The caller's, or the default; tensor descriptors only where the hardware has them."""
    variant = variant or DEFAULTS[kernel, query_BSHD.shape[-1]]
    if query_BSHD.is_cuda and torch.cuda.get_device_capability(query_BSHD.device)[0] < 9:
        variant = replace(variant, tma=False, num_stages=2)
    return variant


def _num_passes(query_BSHD: Tensor, variant: Variant) -> int:
    if variant.passes is not None:
        return variant.passes
    _, tokens, _, dim = query_BSHD.shape
    return max(1, -(-2 * tokens * dim * query_BSHD.element_size() // PASS_BYTES))


def _chunks(words_PNW: Tensor, dim: int, num_sums: int) -> Iterator[tuple[int, int]]:
    """Ranges of pairs whose lists and partial sums stay within SCRATCH_BYTES."""
    pairs, num_blocks, _ = words_PNW.shape
    size = num_blocks * num_blocks * 2 + num_sums * num_blocks * 64 * (dim + 1) * 4
    count = -(-pairs // max(1, SCRATCH_BYTES // size))
    edges = [pairs * i // count for i in range(count + 1)]
    yield from pairwise(edges)


def unsafe_pairs(query_BSHD: Tensor, key_BSHD: Tensor, scale: float) -> Tensor:
    """1 where a head's logits (base 2) are not proved to lie within ±SAFE_LOGIT by |q·k| <= |q| |k|: int32 [P]."""
    squares = [row_products(x, x).flatten(0, 1).amax(-1) for x in (query_BSHD, key_BSHD)]
    bound = (squares[0] * squares[1]).sqrt() * scale
    return (~(bound <= SAFE_LOGIT)).int()  # so that NaN is unsafe too


def forward(
    query_BSHD: Tensor, key_BSHD: Tensor, value_BSHD: Tensor, words_BHNW: Tensor, variant: Variant | None = None
) -> tuple[Tensor, Tensor]:
    """(out [B, S, H, D], lse fp32 [B, H, S], the base-2 logarithm of each row's sum of exponentials)."""
    batch, tokens, heads, dim = query_BSHD.shape
    variant = _variant("forward", query_BSHD, variant)
    out_BSHD = torch.empty_like(query_BSHD, memory_format=torch.contiguous_format)
    lse_BHS = query_BSHD.new_empty(batch, heads, tokens, dtype=torch.float32)
    scale = LOG2E / math.sqrt(dim)
    matrices = [_operand(x) for x in (query_BSHD, key_BSHD, value_BSHD)]
    q, k, v = (_handle(x, dim, variant) for x in matrices)
    strides = [x.stride(0) for x in matrices]
    unsafe_P = unsafe_pairs(query_BSHD, key_BSHD, scale)
    words_PNW = words_BHNW.flatten(0, 1)
    num_blocks = tokens // 64
    passes = _num_passes(query_BSHD, variant)
    for first, last in _chunks(words_PNW, dim, num_sums=int(passes > 1)):
        lists, starts = block_lists(words_PNW[first:last], passes, transposed=False)
        shape = (last - first, num_blocks, 64) if passes > 1 else (0, 0, 0)
        scratch = lse_BHS.new_empty(*shape, dim)
        state = lse_BHS.new_empty(shape)
        for step in range(passes):
            forward_kernel[(num_blocks, last - first)](
                q, k, v, out_BSHD, lse_BHS, lists, starts, scratch, state, unsafe_P, first, heads, num_blocks, step,
                *strides, scale, D=dim, PASSES=passes, TMA=variant.tma, RESIDENT=variant.resident, AHEAD=variant.ahead,
                FIRST=step == 0, LAST=step == passes - 1, **variant.options(),
            )  # fmt: skip
        forward_online_kernel[(min(num_blocks, ONLINE_PROGRAMS), last - first)](
            q, k, v, out_BSHD, lse_BHS, lists, starts, unsafe_P, first, heads, num_blocks, *strides, scale,
            D=dim, PASSES=passes, TMA=variant.tma, num_warps=4, num_stages=2,
        )  # fmt: skip
    return out_BSHD, lse_BHS


def backward(
    grad_BSHD: Tensor, query_BSHD: Tensor, key_BSHD: Tensor, value_BSHD: Tensor, out_BSHD: Tensor, lse_BHS: Tensor,
    words_BHNW: Tensor, dkdv: Variant | None = None, dq: Variant | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dk, dv), each [B, S, H, D] in the inputs' dtype."""
    inputs = (grad_BSHD, query_BSHD, key_BSHD, value_BSHD)
    statistics = (lse_BHS, row_products(out_BSHD, grad_BSHD))
    dk_BSHD, dv_BSHD = launch_backward("dkdv", dkdv, *inputs, statistics, words_BHNW)
    (dq_BSHD,) = launch_backward("dq", dq, *inputs, statistics, words_BHNW)
    return dq_BSHD, dk_BSHD, dv_BSHD


def launch_backward(
    name: str, variant: Variant | None, grad_BSHD: Tensor, query_BSHD: Tensor, key_BSHD: Tensor, value_BSHD: Tensor,
    statistics: tuple[Tensor, Tensor], words_BHNW: Tensor,
) -> list[Tensor]:  # fmt: skip
    """One of the two backward kernels over all chunks of heads and all passes, from (lse, delta), fp32 [B, H, S]."""
    _, tokens, heads, dim = query_BSHD.shape
    keys = name == "dkdv"
    kernel = dkdv_kernel if keys else dq_kernel
    variant = _variant(name, query_BSHD, variant)
    matrices = [_operand(x) for x in (query_BSHD, key_BSHD, value_BSHD, grad_BSHD)]
    targets = (key_BSHD, value_BSHD) if keys else (query_BSHD,)
    results = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in targets]
    num_blocks, passes = tokens // 64, _num_passes(query_BSHD, variant)
    operands = [_handle(x, dim, variant) for x in matrices]
    scales = (LOG2E / math.sqrt(dim), 1 / math.sqrt(dim))
    words_PNW = words_BHNW.flatten(0, 1)
    for first, last in _chunks(words_PNW, dim, num_sums=len(results) if passes > 1 else 0):
        lists, starts = block_lists(words_PNW[first:last], passes, transposed=keys)
        pairs = last - first if passes > 1 else 0
        scratch = [statistics[0].new_empty(pairs, num_blocks, 64, dim) for _ in results]
        for step in range(passes):
            kernel[(num_blocks, last - first)](
                *operands, *results, *statistics, lists, starts, *scratch, first, heads, num_blocks, step,
                *(x.stride(0) for x in matrices), *scales, D=dim, PASSES=passes, TMA=variant.tma,
                RESIDENT=variant.resident, FIRST=step == 0, LAST=step == passes - 1, **variant.options(),
            )  # fmt: skip
    return results
