"""NABLA, Kandinsky 5.0's block-sparse attention: which blocks of 64 tokens see each other, and attention over those.

Two custom operators, so that the compiler traces through them and a checkpointing policy can keep their results by
name: `k5dist::nabla_map` and `k5dist::nabla_attention` (with `k5dist::nabla_attention_backward`). On CUDA in bf16
with head_dim 64 or 128 they run the kernels of `nabla_triton`; everywhere else the plain references below, whose memory
is S × S of one head.

Shape suffixes: B batch, S tokens, H heads, D head_dim, N blocks of 64 tokens, W = ceil(N / 32) words of a row's bits,
P pairs of (batch, head), flattened.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from k5dist.config import NABLA_BLOCK

BLOCK_TOKENS = NABLA_BLOCK**2
WORD_BITS = 32
KERNEL_HEAD_DIMS = (64, 128)
MAP_SCRATCH_BYTES = 256 << 20


@dataclass(frozen=True)
class NablaParameters:
    """What the checkpoint asks of the map: the probability kept, and the sliding-tile window or-ed to it.

    `window_NW` is int32 [N, W]: bit j % 32 of word j // 32 in row i says that query block i sees key block j.
    """

    probability: float
    window_NW: Tensor


def pack_bits(mask: Tensor) -> Tensor:
    """bool [..., N] to int32 [..., ceil(N / 32)]: element j becomes bit j % 32 of word j // 32."""
    padding = -mask.shape[-1] % WORD_BITS
    bits = torch.nn.functional.pad(mask, (0, padding)).unflatten(-1, (-1, WORD_BITS)).int()
    shifts = torch.arange(WORD_BITS, device=mask.device, dtype=torch.int32)
    return (bits << shifts).sum(-1, dtype=torch.int32)


def unpack_bits(words: Tensor, num_blocks: int) -> Tensor:
    """int32 [..., W] to bool [..., num_blocks]; the inverse of `pack_bits`."""
    shifts = torch.arange(WORD_BITS, device=words.device, dtype=torch.int32)
    return ((words[..., None] >> shifts) & 1).bool().flatten(-2)[..., :num_blocks]


def sliding_tile_window(shape: tuple[int, int, int], window: tuple[int, int, int], device: torch.device) -> Tensor:
    """Which blocks see each other whatever the map says, bool [N, N] over blocks in (T, H, W) order.

    `shape` is the number of blocks and `window` the width in blocks along (T, H, W); a block sees those at most half a
    width away, along each axis.
    """
    near = []
    for size, width in zip(shape, window, strict=True):
        at = torch.arange(size, device=device)
        near.append((at[:, None] - at[None, :]).abs() <= width // 2)
    t, h, w = near
    mask = t[:, None, None, :, None, None] & h[None, :, None, None, :, None] & w[None, None, :, None, None, :]
    num_blocks = math.prod(shape)
    return mask.reshape(num_blocks, num_blocks)


def nabla_map(query_BSHD: Tensor, key_BSHD: Tensor, parameters: NablaParameters) -> Tensor:
    """The blocks each query block attends to, as bits: int32 [B, H, N, W]. No gradient flows through it.

    Softmax over the scaled products of block means; the smallest set of key blocks whose probabilities sum to P is
    kept, or-ed with the window (Kandinsky 5.0's NABLA, as diffusers' `nablaT_v2` computes it; all of it in fp32).
    Raises ValueError for tokens that do not make whole blocks and for a window of another number of blocks.
    """
    return _map_op(query_BSHD.detach(), key_BSHD.detach(), parameters.window_NW, parameters.probability)


def nabla_attention(query_BSHD: Tensor, key_BSHD: Tensor, value_BSHD: Tensor, words_BHNW: Tensor) -> Tensor:
    """Attention of each query block over the key blocks whose bit is set: [B, S, H, D], differentiable in q, k, v.

    A query block that sees nothing gives zeros. Raises ValueError for shapes that do not belong together.
    """
    return _attention_op(query_BSHD, key_BSHD, value_BSHD, words_BHNW)[0]


def density(words_BHNW: Tensor, num_blocks: int) -> Tensor:
    """The share of blocks kept, fp32, 0-dim, on the words' device."""
    x = words_BHNW  # bits counted in parallel: pairs, fours, eights, then all bytes by one product
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    counts = (((x + (x >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24
    return counts.sum() / (words_BHNW[..., 0].numel() * num_blocks)


def _has_kernel(query_BSHD: Tensor) -> bool:
    """Not in fp16, whose exponent has no room for the probabilities without a running maximum."""
    kernels = query_BSHD.dtype == torch.bfloat16 and query_BSHD.shape[-1] in KERNEL_HEAD_DIMS
    return query_BSHD.is_cuda and kernels


def _check(query_BSHD: Tensor, key_BSHD: Tensor, words_NW: Tensor) -> None:
    """Shapes only, so that tracing checks them as well."""
    tokens = query_BSHD.shape[1]
    if query_BSHD.shape != key_BSHD.shape:
        raise ValueError(f"NABLA is self-attention: queries {list(query_BSHD.shape)}, keys {list(key_BSHD.shape)}")
    if tokens % BLOCK_TOKENS:
        raise ValueError(f"NABLA needs whole blocks of {BLOCK_TOKENS} tokens, got {tokens} tokens")
    expected = [tokens // BLOCK_TOKENS, -(-tokens // (BLOCK_TOKENS * WORD_BITS))]
    if list(words_NW.shape[-2:]) != expected or words_NW.dtype != torch.int32:
        raise ValueError(
            f"{tokens} tokens need block bits int32 {expected}, got {words_NW.dtype} {list(words_NW.shape)}"
        )


# --- the map


def compute_map(query_BSHD: Tensor, key_BSHD: Tensor, window_NW: Tensor, probability: float) -> Tensor:
    """The operator's body: int32 [B, H, N, W], with at most MAP_SCRATCH_BYTES of scores alive."""
    _check(query_BSHD, key_BSHD, window_NW)
    batch, _, heads, dim = query_BSHD.shape
    num_blocks, num_words = window_NW.shape
    kernels = query_BSHD.is_cuda and dim in KERNEL_HEAD_DIMS
    query_PND, key_PND = (_block_means(x, kernels).flatten(0, 1) for x in (query_BSHD, key_BSHD))
    words_PNW = window_NW.new_empty(batch * heads, num_blocks, num_words)
    with _full_precision_products():
        for pairs, rows in _map_chunks(batch * heads, num_blocks, bytes_each=4 if kernels else 32):
            scores_PRN = query_PND[pairs, rows] @ key_PND[pairs].transpose(-2, -1)
            if kernels:
                from k5dist.model.nabla_blocks_triton import keep

                keep(scores_PRN, window_NW, words_PNW[pairs], rows.start, 1 / math.sqrt(dim), probability)
            else:
                kept = _kept_blocks(scores_PRN / math.sqrt(dim), probability)
                words_PNW[pairs, rows] = pack_bits(kept) | window_NW[rows]
    return words_PNW.unflatten(0, (batch, heads))


_map_op = torch.library.custom_op("k5dist::nabla_map", compute_map, mutates_args=())


@_map_op.register_fake
def _map_fake(query_BSHD: Tensor, key_BSHD: Tensor, window_NW: Tensor, probability: float) -> Tensor:
    _check(query_BSHD, key_BSHD, window_NW)
    return window_NW.new_empty(query_BSHD.shape[0], query_BSHD.shape[2], *window_NW.shape)


def _block_means(x_BSHD: Tensor, kernels: bool) -> Tensor:
    """fp32 [B, H, N, D]."""
    if kernels:
        from k5dist.model.nabla_blocks_triton import block_means

        return block_means(x_BSHD)
    # Head by head, so that no second copy of the queries is ever alive.
    heads = [x.float().contiguous().unflatten(1, (-1, BLOCK_TOKENS)).mean(2) for x in x_BSHD.unbind(2)]
    return torch.stack(heads, dim=1)


def _map_chunks(num_pairs: int, num_blocks: int, bytes_each: int) -> Iterator[tuple[slice, slice]]:
    """(pairs, rows) whose scores stay within MAP_SCRATCH_BYTES."""
    num_rows = max(1, MAP_SCRATCH_BYTES // (num_blocks * bytes_each))
    pairs_each, rows_each = max(1, num_rows // num_blocks), min(num_rows, num_blocks)
    for pair in range(0, num_pairs, pairs_each):
        for row in range(0, num_blocks, rows_each):
            yield slice(pair, pair + pairs_each), slice(row, min(row + rows_each, num_blocks))


def _kept_blocks(scores_PRN: Tensor, probability: float) -> Tensor:
    """bool, as the scores: the smallest set of blocks in each row whose probabilities sum to P."""
    values, order = torch.softmax(scores_PRN, dim=-1).sort(-1)
    kept = values.cumsum_(-1) >= 1 - probability
    return torch.zeros_like(kept).scatter_(-1, order, kept)


@contextmanager
def _full_precision_products() -> Iterator[None]:
    """fp32 products without TF32, whatever the process chose: blocks near the threshold would be swapped."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


# --- attention


@torch.library.custom_op("k5dist::nabla_attention", mutates_args=())
def _attention_op(
    query_BSHD: Tensor, key_BSHD: Tensor, value_BSHD: Tensor, words_BHNW: Tensor
) -> tuple[Tensor, Tensor]:
    """(out [B, S, H, D], lse fp32 [B, H, S]: base-2 logarithm of the sum of exponentials of each row's logits)."""
    _check(query_BSHD, key_BSHD, words_BHNW)
    if _has_kernel(query_BSHD):
        from k5dist.model.nabla_triton import forward

        return forward(query_BSHD, key_BSHD, value_BSHD, words_BHNW)
    return reference_forward(query_BSHD, key_BSHD, value_BSHD, words_BHNW)


@_attention_op.register_fake
def _attention_fake(
    query_BSHD: Tensor, key_BSHD: Tensor, value_BSHD: Tensor, words_BHNW: Tensor
) -> tuple[Tensor, Tensor]:
    _check(query_BSHD, key_BSHD, words_BHNW)
    batch, tokens, heads, _ = query_BSHD.shape
    return _like(query_BSHD), query_BSHD.new_empty(batch, heads, tokens, dtype=_statistics_dtype(query_BSHD))


@torch.library.custom_op("k5dist::nabla_attention_backward", mutates_args=())
def _attention_backward_op(
    grad_BSHD: Tensor, query_BSHD: Tensor, key_BSHD: Tensor, value_BSHD: Tensor, out_BSHD: Tensor, lse_BHS: Tensor,
    words_BHNW: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dk, dv), each [B, S, H, D] and contiguous."""
    arguments = (grad_BSHD, query_BSHD, key_BSHD, value_BSHD, out_BSHD, lse_BHS, words_BHNW)
    if _has_kernel(query_BSHD):
        from k5dist.model.nabla_triton import backward

        return backward(*arguments)
    return reference_backward(*arguments)


@_attention_backward_op.register_fake
def _attention_backward_fake(
    grad_BSHD: Tensor, query_BSHD: Tensor, key_BSHD: Tensor, value_BSHD: Tensor, out_BSHD: Tensor, lse_BHS: Tensor,
    words_BHNW: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dq, dk, dv = (
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query_BSHD, key_BSHD, value_BSHD)
    )
    return dq, dk, dv


def _keep_for_backward(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    query_BSHD, key_BSHD, value_BSHD, words_BHNW = inputs
    out_BSHD, lse_BHS = output
    ctx.save_for_backward(query_BSHD, key_BSHD, value_BSHD, out_BSHD, lse_BHS, words_BHNW)
    ctx.mark_non_differentiable(lse_BHS)


def _attention_gradients(ctx: Any, grad_BSHD: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    return *_attention_backward_op(grad_BSHD, *ctx.saved_tensors), None


_attention_op.register_autograd(_attention_gradients, setup_context=_keep_for_backward)


# --- references


def _like(x_BSHD: Tensor) -> Tensor:
    return torch.empty_like(x_BSHD, memory_format=torch.contiguous_format)


def _statistics_dtype(query_BSHD: Tensor) -> torch.dtype:
    return torch.promote_types(query_BSHD.dtype, torch.float32)


def _heads(words_BHNW: Tensor, *tensors_BSHD: Tensor) -> Iterator[tuple[int, int, Tensor, list[Tensor]]]:
    """Batch entry, head, its mask [S, S], and of each tensor [S, D] in at least fp32."""
    for batch in range(words_BHNW.shape[0]):
        for head in range(words_BHNW.shape[1]):
            blocks = unpack_bits(words_BHNW[batch, head], words_BHNW.shape[2])
            mask = blocks.repeat_interleave(BLOCK_TOKENS, 0).repeat_interleave(BLOCK_TOKENS, 1)
            yield batch, head, mask, [x[batch, :, head].to(_statistics_dtype(x)) for x in tensors_BSHD]


def reference_forward(
    query_BSHD: Tensor, key_BSHD: Tensor, value_BSHD: Tensor, words_BHNW: Tensor
) -> tuple[Tensor, Tensor]:
    """What the operator computes, by PyTorch's masked attention: (out, base-2 lse)."""
    batch, tokens, heads, dim = query_BSHD.shape
    out_BSHD = _like(query_BSHD)
    lse_BHS = query_BSHD.new_empty(batch, heads, tokens, dtype=_statistics_dtype(query_BSHD))
    for b, h, mask, (q, k, v) in _heads(words_BHNW, query_BSHD, key_BSHD, value_BSHD):
        out = F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=mask[None])
        out_BSHD[b, :, h] = out[0].masked_fill_(~mask.any(-1, keepdim=True), 0)
        logits = (q @ k.T / math.sqrt(dim)).masked_fill_(~mask, -math.inf)
        lse_BHS[b, h] = torch.logsumexp(logits, -1) * math.log2(math.e)
    return out_BSHD, lse_BHS


def reference_backward(
    grad_BSHD: Tensor, query_BSHD: Tensor, key_BSHD: Tensor, value_BSHD: Tensor, out_BSHD: Tensor, lse_BHS: Tensor,
    words_BHNW: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dk, dv) by the formula of FlashAttention-2 (arXiv 2307.08691, algorithm 2)."""
    scale = 1 / math.sqrt(query_BSHD.shape[-1])
    dq, dk, dv = (
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query_BSHD, key_BSHD, value_BSHD)
    )
    tensors = (query_BSHD, key_BSHD, value_BSHD, out_BSHD, grad_BSHD)
    for b, h, mask, (q, k, v, out, grad) in _heads(words_BHNW, *tensors):
        # Not from the lse as the kernels have it: in fp32 the difference of large logits loses digits.
        p = torch.softmax((q @ k.T * scale).masked_fill_(~mask, -math.inf), -1).masked_fill_(~mask, 0)
        ds = p * (grad @ v.T - (grad * out).sum(-1, keepdim=True)) * scale
        dq[b, :, h] = ds @ k
        dk[b, :, h] = ds.T @ q
        dv[b, :, h] = p.T @ grad
    return dq, dk, dv
