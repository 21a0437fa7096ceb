"""Triton kernels around NABLA's attention: block means, the map's rows, block lists, and sums over rows.

None of them comes near the attention's time; each reads its input once.

Shape suffixes: B batch, S tokens, H heads, D head_dim, N blocks of 64 tokens, W = ceil(N / 32) words of a row's bits,
P pairs of (batch, head), flattened.
"""

# Kernels are not Python to a type checker, and triton has no wheel for every platform it runs on.
# pyright: reportMissingImports=false, reportIndexIssue=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

jit: Any = triton.jit  # untyped: a launch takes more than the function's parameters


@jit
def _mean_kernel(x, means, stride_b, stride_s, stride_h, D: tl.constexpr):
    """Mean of a block's 64 rows, in fp32."""
    block, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    rows = (block * 64 + tl.arange(0, 64)).to(tl.int64)
    columns = tl.arange(0, D)
    x += batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h
    tile = tl.load(x + rows[:, None] * stride_s + columns[None, :]).to(tl.float32)
    entry = (batch * tl.num_programs(1) + head) * tl.num_programs(0) + block
    tl.store(means + entry.to(tl.int64) * D + columns, tl.sum(tile, 0) * 0.015625)


@jit
def _row_product_kernel(x, y, out, stride_xb, stride_xs, stride_xh, stride_yb, stride_ys, stride_yh, D: tl.constexpr):
    """The inner product of each row of x with the same row of y, in fp32."""
    block, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    rows = (block * 64 + tl.arange(0, 64)).to(tl.int64)
    columns = tl.arange(0, D)
    x += batch.to(tl.int64) * stride_xb + head.to(tl.int64) * stride_xh
    y += batch.to(tl.int64) * stride_yb + head.to(tl.int64) * stride_yh
    x_tile = tl.load(x + rows[:, None] * stride_xs + columns[None, :]).to(tl.float32)
    y_tile = tl.load(y + rows[:, None] * stride_ys + columns[None, :]).to(tl.float32)
    entry = (batch * tl.num_programs(1) + head) * tl.num_programs(0) + block
    tl.store(out + entry.to(tl.int64) * 64 + tl.arange(0, 64), tl.sum(x_tile * y_tile, 1))


@jit(do_not_specialize=["first_row"])
def _keep_kernel(
    scores, window, words, first_row, num_blocks, num_words, scale, dropped, SIZE: tl.constexpr, WORDS: tl.constexpr
):
    """One row of the map: softmax, the smallest set of blocks whose probabilities sum to P, the window, bits.

    A block is dropped if and only if the sum of all probabilities not above its own is below 1 - P; the threshold is
    found by bisection over the bits of a float, which are in the order of the floats themselves where none is negative.
    """
    row, pair = tl.program_id(0), tl.program_id(1)
    index = tl.arange(0, SIZE)
    scores += (pair.to(tl.int64) * tl.num_programs(0) + row) * num_blocks
    logits = tl.load(scores + index, mask=index < num_blocks, other=-float("inf")) * scale
    p = tl.exp(logits - tl.max(logits, 0))
    p = p / tl.sum(p, 0)
    bits = p.to(tl.int32, bitcast=True)
    low, high = tl.min(bits, 0) * 0 - 1, tl.max(bits, 0)
    for _ in range(31):
        middle = (low + high) >> 1
        enough = tl.sum(tl.where(bits <= middle, p, 0.0), 0) >= dropped
        low, high = tl.where(enough, low, middle), tl.where(enough, middle, high)
    kept = (bits >= high) & (index < num_blocks)
    packed = tl.sum(kept.to(tl.int32).reshape(WORDS, 32) << tl.arange(0, 32)[None, :], 1)
    word = tl.arange(0, WORDS)
    near = tl.load(window + (first_row + row).to(tl.int64) * num_words + word, mask=word < num_words, other=0)
    words += (pair.to(tl.int64) * num_blocks + first_row + row) * num_words
    tl.store(words + word, packed | near, mask=word < num_words)


@jit
def _store_list(flags, index, entry, lists, starts, num_blocks, span, PASSES: tl.constexpr):
    """The indices whose flag is set, ascending, and where each range of `span` blocks begins among them."""
    lists += entry.to(tl.int64) * num_blocks
    tl.store(lists + tl.cumsum(flags, 0) - flags, index.to(tl.int16), mask=flags != 0)
    starts += entry.to(tl.int64) * (PASSES + 1)
    for step in tl.static_range(PASSES + 1):
        tl.store(starts + step, tl.sum(tl.where(index < step * span, flags, 0), 0))


@jit
def _row_list_kernel(
    words, lists, starts, num_blocks, num_words, span, WORDS: tl.constexpr, PASSES: tl.constexpr
):  # fmt: skip
    """The key blocks of one query block. Programs: (query blocks, pairs)."""
    entry = tl.program_id(1) * num_blocks + tl.program_id(0)
    word = tl.arange(0, WORDS)
    packed = tl.load(words + entry.to(tl.int64) * num_words + word, mask=word < num_words, other=0)
    flags = ((packed[:, None] >> tl.arange(0, 32)[None, :]) & 1).reshape(WORDS * 32)
    _store_list(flags, tl.arange(0, WORDS * 32), entry, lists, starts, num_blocks, span, PASSES)


@jit
def _column_list_kernel(
    words, lists, starts, num_blocks, num_words, span, SIZE: tl.constexpr, PASSES: tl.constexpr
):  # fmt: skip
    """The query blocks that see each of eight key blocks. Programs: (eights of key blocks, pairs)."""
    first, pair = tl.program_id(0) * 8, tl.program_id(1)
    index = tl.arange(0, SIZE)
    words += pair.to(tl.int64) * num_blocks * num_words + first // 32
    packed = tl.load(words + index.to(tl.int64) * num_words, mask=index < num_blocks, other=0)
    for offset in range(8):
        key = first + offset
        if key < num_blocks:
            flags = (packed >> (key % 32)) & 1
            _store_list(flags, index, pair * num_blocks + key, lists, starts, num_blocks, span, PASSES)


def _rows_contiguous(x_BSHD: Tensor) -> Tensor:
    return x_BSHD if x_BSHD.stride(-1) == 1 else x_BSHD.contiguous()


def block_means(x_BSHD: Tensor) -> Tensor:
    """Means over blocks of 64 tokens, fp32 [B, H, N, D]."""
    x_BSHD = _rows_contiguous(x_BSHD)
    batch, tokens, heads, dim = x_BSHD.shape
    means_BHND = x_BSHD.new_empty(batch, heads, tokens // 64, dim, dtype=torch.float32)
    stride_b, stride_s, stride_h, _ = x_BSHD.stride()
    _mean_kernel[(tokens // 64, heads, batch)](x_BSHD, means_BHND, stride_b, stride_s, stride_h, D=dim)
    return means_BHND


def row_products(x_BSHD: Tensor, y_BSHD: Tensor) -> Tensor:
    """Sum of x · y over the last axis, fp32 [B, H, S]."""
    x_BSHD, y_BSHD = _rows_contiguous(x_BSHD), _rows_contiguous(y_BSHD)
    batch, tokens, heads, dim = x_BSHD.shape
    out_BHS = x_BSHD.new_empty(batch, heads, tokens, dtype=torch.float32)
    strides = (*x_BSHD.stride()[:3], *y_BSHD.stride()[:3])
    _row_product_kernel[(tokens // 64, heads, batch)](x_BSHD, y_BSHD, out_BHS, *strides, D=dim)
    return out_BHS


def keep(
    scores_PRN: Tensor, window_NW: Tensor, words_PNW: Tensor, first_row: int, scale: float, probability: float
) -> None:
    """Writes the map's bits of R rows from `first_row` on into int32 [P, N, W], from unscaled fp32 scores."""
    pairs, rows, num_blocks = scores_PRN.shape
    size = max(32, triton.next_power_of_2(num_blocks))
    _keep_kernel[(rows, pairs)](
        scores_PRN, window_NW, words_PNW, first_row, num_blocks, window_NW.shape[1], scale, 1 - probability,
        SIZE=size, WORDS=size // 32, num_warps=4 if size > 1024 else 1,
    )  # fmt: skip


def block_lists(words_PNW: Tensor, passes: int, transposed: bool) -> tuple[Tensor, Tensor]:
    """Ascending lists from bits: int16 [P, N, N], written only as far as they go, and int32 [P, N, passes + 1].

    The second says where each of `passes` equal ranges of block numbers begins in its list, and where the last ends.
    `transposed` lists the query blocks of each key block.
    """
    pairs, num_blocks, num_words = words_PNW.shape
    lists_PNN = words_PNW.new_empty(pairs, num_blocks, num_blocks, dtype=torch.int16)
    starts_PNR = words_PNW.new_empty(pairs, num_blocks, passes + 1)
    size = max(32, triton.next_power_of_2(num_blocks))
    span = triton.cdiv(num_blocks, passes)
    arguments = (words_PNW, lists_PNN, starts_PNR, num_blocks, num_words, span)
    if transposed:
        _column_list_kernel[(triton.cdiv(num_blocks, 8), pairs)](*arguments, SIZE=size, PASSES=passes)
    else:
        _row_list_kernel[(num_blocks, pairs)](*arguments, WORDS=size // 32, PASSES=passes)
    return lists_PNN, starts_PNR
