"""Attention of a clip's many tokens to a text's few: kernels of our own, where FlashAttention's backward stands idle.

FlashAttention parallelises its backward over keys, and a text has one or two blocks of them. The kernels of
`text_attention_triton` parallelise over queries. A custom operator, `k5dist::text_attention` (with
`k5dist::text_attention_backward`), so that the compiler traces through it, with a text of any length as one graph, and
a checkpointing policy can tell it by name. Without a kernel it runs the plain references below.

Shape suffixes: B batch, S tokens of the clip (queries), L tokens of the text (keys), H heads, D head_dim.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

KERNEL_HEAD_DIMS = (64, 128)
KERNEL_DTYPES = (torch.bfloat16, torch.float16)


def text_attention(query_BSHD: Tensor, key_BLHD: Tensor, value_BLHD: Tensor) -> Tensor:
    """Every token of the clip attends to the whole text: [B, S, H, D], differentiable in q, k, v.

    Raises ValueError for shapes that do not belong together.
    """
    return _attention_op(query_BSHD, key_BLHD, value_BLHD)[0]


def has_kernel(query_BSHD: Tensor) -> bool:
    return query_BSHD.is_cuda and query_BSHD.dtype in KERNEL_DTYPES and query_BSHD.shape[-1] in KERNEL_HEAD_DIMS


def _check(query_BSHD: Tensor, key_BLHD: Tensor, value_BLHD: Tensor) -> None:
    """Shapes only, so that tracing checks them as well; nothing is asked of L, which would bind the graph to it."""
    batch, _, heads, dim = query_BSHD.shape
    for name, x_BLHD in (("keys", key_BLHD), ("values", value_BLHD)):
        if (x_BLHD.shape[0], *x_BLHD.shape[2:]) != (batch, heads, dim):
            raise ValueError(f"{name} {list(x_BLHD.shape)} do not belong to queries {list(query_BSHD.shape)}")
    if key_BLHD.shape[1] != value_BLHD.shape[1]:
        raise ValueError(f"{key_BLHD.shape[1]} keys, {value_BLHD.shape[1]} values")


@torch.library.custom_op("k5dist::text_attention", mutates_args=())
def _attention_op(query_BSHD: Tensor, key_BLHD: Tensor, value_BLHD: Tensor) -> tuple[Tensor, Tensor]:
    """(out [B, S, H, D], lse fp32 [B, H, S]: base-2 logarithm of the sum of exponentials of each row's logits)."""
    _check(query_BSHD, key_BLHD, value_BLHD)
    if has_kernel(query_BSHD):
        from k5dist.model.text_attention_triton import forward

        return forward(query_BSHD, key_BLHD, value_BLHD)
    return reference_forward(query_BSHD, key_BLHD, value_BLHD)


@_attention_op.register_fake
def _attention_fake(query_BSHD: Tensor, key_BLHD: Tensor, value_BLHD: Tensor) -> tuple[Tensor, Tensor]:
    _check(query_BSHD, key_BLHD, value_BLHD)
    batch, tokens, heads, _ = query_BSHD.shape
    lse_BHS = query_BSHD.new_empty(batch, heads, tokens, dtype=_at_least_fp32(query_BSHD))
    return _empty(query_BSHD), lse_BHS


@torch.library.custom_op("k5dist::text_attention_backward", mutates_args=())
def _attention_backward_op(
    grad_BSHD: Tensor, query_BSHD: Tensor, key_BLHD: Tensor, value_BLHD: Tensor, out_BSHD: Tensor, lse_BHS: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv), of the inputs' shapes and contiguous."""
    arguments = (grad_BSHD, query_BSHD, key_BLHD, value_BLHD, out_BSHD, lse_BHS)
    if has_kernel(query_BSHD):
        from k5dist.model.text_attention_triton import backward

        return backward(*arguments)
    return reference_backward(*arguments)


@_attention_backward_op.register_fake
def _attention_backward_fake(
    grad_BSHD: Tensor, query_BSHD: Tensor, key_BLHD: Tensor, value_BLHD: Tensor, out_BSHD: Tensor, lse_BHS: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty(query_BSHD), _empty(key_BLHD), _empty(value_BLHD)


def _keep_for_backward(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, *output)
    ctx.mark_non_differentiable(output[1])


def _attention_gradients(ctx: Any, grad_BSHD: Tensor, _: Tensor | None) -> tuple[Tensor, ...]:
    return _attention_backward_op(grad_BSHD, *ctx.saved_tensors)


_attention_op.register_autograd(_attention_gradients, setup_context=_keep_for_backward)


# --- references


def _empty(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _at_least_fp32(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _heads_first(*tensors: Tensor) -> list[Tensor]:
    """[B, S, H, D] → [B, H, S, D], in at least fp32."""
    return [x.transpose(1, 2).to(_at_least_fp32(x)) for x in tensors]


def _stored(x_BHSD: Tensor, dtype: torch.dtype) -> Tensor:
    return x_BHSD.transpose(1, 2).to(dtype).contiguous()


def reference_forward(query_BSHD: Tensor, key_BLHD: Tensor, value_BLHD: Tensor) -> tuple[Tensor, Tensor]:
    """(out, base-2 lse), holding the logits of all heads."""
    q, k, v = _heads_first(query_BSHD, key_BLHD, value_BLHD)
    logits = q @ k.mT / math.sqrt(q.shape[-1])
    out = torch.softmax(logits, -1) @ v
    return _stored(out, query_BSHD.dtype), torch.logsumexp(logits, -1) * math.log2(math.e)


def reference_backward(
    grad_BSHD: Tensor, query_BSHD: Tensor, key_BLHD: Tensor, value_BLHD: Tensor, out_BSHD: Tensor, lse_BHS: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) by the formula of FlashAttention-2 (arXiv 2307.08691, algorithm 2)."""
    grad, q, k, v, out = _heads_first(grad_BSHD, query_BSHD, key_BLHD, value_BLHD, out_BSHD)
    scale = 1 / math.sqrt(q.shape[-1])
    # Not from the lse as the kernels have it: in fp32 the difference of large logits loses digits.
    p = torch.softmax(q @ k.mT * scale, -1)
    ds = p * (grad @ v.mT - (grad * out).sum(-1, keepdim=True)) * scale
    dq, dk, dv = (_stored(x, query_BSHD.dtype) for x in (ds @ k, ds.mT @ q, p.mT @ grad))
    return dq, dk, dv
