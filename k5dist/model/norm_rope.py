"""RMS norm of heads and their rotation in one pass: what queries and keys go through before attention.

The compiler makes three kernels of it forward and two backward, which read and write the same tensor again and again; a
kernel of our own does each way in one. A custom operator, `k5dist::norm_rope`, so that the compiler traces through it.
It is for GPUs: elsewhere `attention.py` computes the same with PyTorch's own operators.

Shape suffixes: B batch, S tokens, H heads, D head_dim, E head_dim / 2, P programs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

KERNEL_DTYPES = (torch.bfloat16,)
KERNEL_HEAD_DIMS = (64, 128)


def has_kernel(x_BSHD: Tensor) -> bool:
    return x_BSHD.is_cuda and x_BSHD.dtype in KERNEL_DTYPES and x_BSHD.shape[-1] in KERNEL_HEAD_DIMS


def norm_rope(x_BSHD: Tensor, weight_D: Tensor, eps: float, rope: tuple[Tensor, Tensor] | None) -> Tensor:
    """rotate(rms_norm(x) · weight), [B, S, H, D] contiguous and of x's type, differentiable in x and weight.

    The norm is taken in fp32 and rounded to x's type before it is rotated, as the reference does. Without `rope`
    (cosines and sines, fp32 [S, E]) nothing is rotated. Neighbouring dimensions are a pair.
    """
    cosine, sine = rope if rope is not None else (None, None)
    return _norm_rope_op(x_BSHD, weight_D, cosine, sine, eps)


@torch.library.custom_op("k5dist::norm_rope", mutates_args=())
def _norm_rope_op(
    x_BSHD: Tensor, weight_D: Tensor, cosine_SE: Tensor | None, sine_SE: Tensor | None, eps: float
) -> Tensor:
    if has_kernel(x_BSHD):
        from k5dist.model.norm_rope_triton import forward

        return forward(x_BSHD, weight_D, cosine_SE, sine_SE, eps)
    return reference_forward(x_BSHD, weight_D, cosine_SE, sine_SE, eps)


@_norm_rope_op.register_fake
def _norm_rope_fake(
    x_BSHD: Tensor, weight_D: Tensor, cosine_SE: Tensor | None, sine_SE: Tensor | None, eps: float
) -> Tensor:
    return torch.empty_like(x_BSHD, memory_format=torch.contiguous_format)


@torch.library.custom_op("k5dist::norm_rope_backward", mutates_args=())
def _norm_rope_backward_op(
    grad_BSHD: Tensor,
    x_BSHD: Tensor,
    weight_D: Tensor,
    cosine_SE: Tensor | None,
    sine_SE: Tensor | None,
    eps: float,
    weighs: bool,
) -> tuple[Tensor, Tensor]:
    """(dx, contiguous; dweight fp32 [D], or [0] where it is not asked for)."""
    if has_kernel(x_BSHD):
        from k5dist.model.norm_rope_triton import backward

        return backward(grad_BSHD, x_BSHD, weight_D, cosine_SE, sine_SE, eps, weighs)
    return reference_backward(grad_BSHD, x_BSHD, weight_D, cosine_SE, sine_SE, eps, weighs)


@_norm_rope_backward_op.register_fake
def _norm_rope_backward_fake(
    grad_BSHD: Tensor,
    x_BSHD: Tensor,
    weight_D: Tensor,
    cosine_SE: Tensor | None,
    sine_SE: Tensor | None,
    eps: float,
    weighs: bool,
) -> tuple[Tensor, Tensor]:
    dx = torch.empty_like(x_BSHD, memory_format=torch.contiguous_format)
    return dx, x_BSHD.new_empty(len(weight_D) if weighs else 0, dtype=torch.float32)


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, cosine, sine, ctx.eps = inputs
    ctx.save_for_backward(x, weight, cosine, sine)


def _gradients(ctx: Any, grad_BSHD: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, cosine, sine = ctx.saved_tensors
    weighs = ctx.needs_input_grad[1]
    dx, dweight = _norm_rope_backward_op(grad_BSHD, x, weight, cosine, sine, ctx.eps, weighs)
    return dx, dweight.to(weight.dtype) if weighs else None, None, None, None


_norm_rope_op.register_autograd(_gradients, setup_context=_keep_for_backward)


# --- references


def _turn(x_BSHD: Tensor, cosine_SE: Tensor, sine_SE: Tensor) -> Tensor:
    cosine, sine = cosine_SE[:, None], sine_SE[:, None]
    first, second = x_BSHD.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([cosine * first - sine * second, sine * first + cosine * second], dim=-1).flatten(-2)


def reference_forward(
    x_BSHD: Tensor, weight_D: Tensor, cosine_SE: Tensor | None, sine_SE: Tensor | None, eps: float
) -> Tensor:
    normed = F.rms_norm(x_BSHD.float(), weight_D.shape, weight_D.float(), eps).type_as(x_BSHD)
    if cosine_SE is None or sine_SE is None:
        return normed
    return _turn(normed.float(), cosine_SE, sine_SE).type_as(x_BSHD).contiguous()


def reference_backward(
    grad_BSHD: Tensor,
    x_BSHD: Tensor,
    weight_D: Tensor,
    cosine_SE: Tensor | None,
    sine_SE: Tensor | None,
    eps: float,
    weighs: bool,
) -> tuple[Tensor, Tensor]:
    """With x̂ = x / rms and g the gradient turned back: dx = (wg − x̂ · mean(wg · x̂)) / rms, dw = Σ g · x̂."""
    x, grad = x_BSHD.float(), grad_BSHD.float()
    if cosine_SE is not None and sine_SE is not None:
        grad = _turn(grad, cosine_SE, -sine_SE)
    inverse = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    hat, weighed = x * inverse, grad * weight_D.float()
    dx = inverse * (weighed - hat * (weighed * hat).mean(-1, keepdim=True))
    dweight = (grad * hat).sum((0, 1, 2)) if weighs else x.new_empty(0)
    return dx.type_as(x_BSHD).contiguous(), dweight
