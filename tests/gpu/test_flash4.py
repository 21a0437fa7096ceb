"""FlashAttention 4's package against cuDNN and fp64, in a compiled block as a policy keeps it."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import Tensor

from k5dist.model.attention import Attention, DenseAttention, dense_attention, prefer_flash
from k5dist.model.flash4 import flash4_attention
from k5dist.model.recompute import run_block

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(importlib.util.find_spec("flash_attn") is None, reason="needs the package flash-attn-4"),
]
DEVICE = torch.device("cuda")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator(DEVICE).manual_seed(seed), device=DEVICE, dtype=torch.bfloat16)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("tokens", [200, 1536])
def test_outputs_and_gradients(dim: int, tokens: int) -> None:
    grad = random(1, tokens, 3, dim, seed=9)
    found = []
    kinds: list[tuple[DenseAttention, torch.dtype]] = [
        (flash4_attention, torch.bfloat16),
        (dense_attention, torch.float64),
    ]
    for attend, dtype in kinds:
        inputs = [random(1, tokens, 3, dim, seed=seed).to(dtype).requires_grad_() for seed in range(3)]
        out = attend(*inputs)
        found.append((out, *torch.autograd.grad(out, inputs, grad.to(dtype))))
    for name, ours, expected in zip(("out", "dq", "dk", "dv"), *found, strict=True):
        assert relative(ours, expected) < 6e-3, name


@pytest.mark.parametrize("recompute", ["none", "attention", "linear"])
def test_in_a_compiled_attention(recompute: str) -> None:
    torch.manual_seed(0)
    module = Attention(256, 64).to(DEVICE, torch.bfloat16)
    x, grad = random(1, 512, 256), random(1, 512, 256, seed=1)

    def gradients() -> list[Tensor]:
        compiled = torch.compile(module.forward, fullgraph=True)
        leaf = x.clone().requires_grad_()
        out = run_block(recompute, compiled, leaf)
        return [out.detach(), *torch.autograd.grad(out, [leaf, *module.parameters()], grad)]

    expected = gradients()
    prefer_flash(module, "flash4")
    assert module.dense is flash4_attention
    for ours, by_cudnn in zip(gradients(), expected, strict=True):
        assert relative(ours, by_cudnn) < 2e-2
