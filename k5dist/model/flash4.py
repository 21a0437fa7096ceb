"""Dense attention by FlashAttention 4 (package `flash-attn-4`, Hopper and later), as operators of our own.

PyTorch's own way to it (`activate_flash_attention_impl("FA4")`) is bound to the return values of one release of the
package, and replaces every FlashAttention of the process. `k5dist::flash4` and `k5dist::flash4_backward` trace as one
node each, so that the compiler passes them by and a checkpointing policy can tell them by name.

Shape suffixes: B batch, S queries, L keys, H heads, D head_dim.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

_INTERFACE = "flash_attn.cute.interface"


@cache
def interface() -> ModuleType:
    """The package's kernels. Raises ImportError where they are not installed, or are none that we know."""
    import importlib

    module = importlib.import_module(_INTERFACE)
    if not (hasattr(module, "_flash_attn_fwd") and hasattr(module, "_flash_attn_bwd")):
        raise ImportError(f"{_INTERFACE} has other kernels than flash-attn-4 4.0.0b36")
    return module


def flash4_attention(query_BSHD: Tensor, key_BLHD: Tensor, value_BLHD: Tensor) -> Tensor:
    """[B, S, H, D] in bf16 or fp16 on a GPU, differentiable in q, k and v; gradients are summed in no fixed order."""
    return _attention_op(query_BSHD, key_BLHD, value_BLHD)[0]


@torch.library.custom_op("k5dist::flash4", mutates_args=())
def _attention_op(query_BSHD: Tensor, key_BLHD: Tensor, value_BLHD: Tensor) -> tuple[Tensor, Tensor]:
    """(out [B, S, H, D], lse fp32 [B, H, S]: natural logarithm of the sum of exponentials of each row's logits)."""
    out, lse, *_ = interface()._flash_attn_fwd(query_BSHD, key_BLHD, value_BLHD, return_lse=True)
    return out, lse


@_attention_op.register_fake
def _attention_fake(query_BSHD: Tensor, key_BLHD: Tensor, value_BLHD: Tensor) -> tuple[Tensor, Tensor]:
    batch, queries, heads, _ = query_BSHD.shape
    lse_BHS = query_BSHD.new_empty(batch, heads, queries, dtype=torch.float32)
    return query_BSHD.new_empty(query_BSHD.shape), lse_BHS


@torch.library.custom_op("k5dist::flash4_backward", mutates_args=())
def _attention_backward_op(
    grad_BSHD: Tensor, query_BSHD: Tensor, key_BLHD: Tensor, value_BLHD: Tensor, out_BSHD: Tensor, lse_BHS: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv), of the inputs' shapes and contiguous."""
    inputs = (query_BSHD, key_BLHD, value_BLHD)
    gradients = [x.new_empty(x.shape) for x in inputs]
    dq, dk, dv = gradients
    interface()._flash_attn_bwd(*inputs, out_BSHD, grad_BSHD.contiguous(), lse_BHS, dq=dq, dk=dk, dv=dv)
    return dq, dk, dv


@_attention_backward_op.register_fake
def _attention_backward_fake(
    grad_BSHD: Tensor, query_BSHD: Tensor, key_BLHD: Tensor, value_BLHD: Tensor, out_BSHD: Tensor, lse_BHS: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (x.new_empty(x.shape) for x in (query_BSHD, key_BLHD, value_BLHD))
    return dq, dk, dv


def _keep_for_backward(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, *output)
    ctx.mark_non_differentiable(output[1])


def _attention_gradients(ctx: Any, grad_BSHD: Tensor, _: Tensor | None) -> tuple[Tensor, ...]:
    return _attention_backward_op(grad_BSHD, *ctx.saved_tensors)


_attention_op.register_autograd(_attention_gradients, setup_context=_keep_for_backward)
