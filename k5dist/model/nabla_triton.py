"""NABLA's block-sparse attention through its Triton kernels, forward and backward: chunks of heads, passes over keys.

No tuning at run time; `DEFAULTS` holds the variants that the compiler's reports and machine code speak for; `python -m
k5dist.benchmark nabla` times all.

Shape suffixes: B batch, S tokens, H heads, D head_dim, N blocks of 64 tokens, W = ceil(N / 32) words of a row's bits,
P pairs of (batch, head), flattened.
"""

# triton has no wheel for every platform it runs on.
# pyright: reportMissingImports=false

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from k5dist.model.nabla_blocks_triton import block_lists, row_products
from k5dist.model.nabla_kernels_triton import dkdv_kernel, dq_kernel, forward_kernel, forward_online_kernel

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
