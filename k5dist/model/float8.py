"""Linear layers in float8, after "FP8 formats for deep learning" (arXiv 2209.05433), scaled by the tensors at hand.

Forward and the input's gradient multiply in float8 (values and weights e4m3, gradients e5m2, one scale a tensor, sums
in fp32); the weight's gradient, where errors would gather over a whole clip, stays in the compute type. Weights are
stored, gathered and updated as before.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from k5dist.config import ConfigError

LARGEST = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}
# The large products of a visual block. The text's keys and values are too small to gain.
_TARGETS = re.compile(
    r"(self_attention\.(to_query|to_key|to_value|out_layer)|cross_attention\.(to_query|out_layer)"
    r"|feed_forward\.(in_layer|out_layer))(\.base_layer)?"
)


class Float8Linear(nn.Linear):
    """An `nn.Linear` that multiplies in float8; made of one in place by `use_float8`."""

    def forward(self, input: Tensor) -> Tensor:
        out = _Product.apply(input.flatten(0, -2), self.weight).unflatten(0, input.shape[:-1])
        return out if self.bias is None else out + self.bias


class _Product(torch.autograd.Function):
    """x [S, K] times weight [N, K]ᵀ → [S, N]."""

    @staticmethod
    def forward(ctx: Any, x_SK: Tensor, weight_NK: Tensor) -> Tensor:
        ctx.save_for_backward(x_SK if weight_NK.requires_grad else None, weight_NK)
        return _multiply(quantise(x_SK, torch.float8_e4m3fn), quantise(weight_NK, torch.float8_e4m3fn), x_SK.dtype)

    @staticmethod
    def backward(ctx: Any, grad_SN: Tensor) -> tuple[Tensor | None, Tensor | None]:  # type: ignore[override]
        x_SK, weight_NK = ctx.saved_tensors
        grad_x, grad_weight = None, None
        if ctx.needs_input_grad[0]:
            weight, scale = quantise(weight_NK, torch.float8_e4m3fn)
            transposed = weight.t().contiguous()  # the hardware multiplies along contiguous rows of both
            grad_x = _multiply(quantise(grad_SN, torch.float8_e5m2), (transposed, scale), grad_SN.dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = grad_SN.t() @ x_SK
        return grad_x, grad_weight


def quantise(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(x / scale in float8, scale fp32 0-dim), so that the largest magnitude is the format's own."""
    scale = x.detach().abs().amax().float().clamp_min(1e-12) / LARGEST[dtype]
    return (x.float() / scale).clamp(-LARGEST[dtype], LARGEST[dtype]).to(dtype), scale


def _multiply(a_SK: tuple[Tensor, Tensor], b_NK: tuple[Tensor, Tensor], dtype: torch.dtype) -> Tensor:
    return torch._scaled_mm(a_SK[0], b_NK[0].t(), scale_a=a_SK[1], scale_b=b_NK[1], out_dtype=dtype)


def use_float8(blocks: nn.ModuleList, device_type: str) -> None:
    """Let the large linear layers of visual blocks multiply in float8, in place; adapters stay as they are.

    Raises ConfigError on a GPU without float8 products.
    """
    if device_type == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        rule = f"{torch.cuda.get_device_name()} has no float8 products (Ada, Hopper and later have)"
        raise ConfigError("train.float8", True, rule, "train.float8=false")
    for block in blocks:
        for path, module in block.named_modules():
            if type(module) is nn.Linear and _TARGETS.fullmatch(path):
                module.__class__ = Float8Linear
