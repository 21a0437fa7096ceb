"""The fast GELU against fp64."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from k5dist.model.gelu import _Gelu, distribution, gelu


def every_bf16() -> Tensor:
    """All finite bf16 from −100 to 100."""
    values = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    return values[values.abs() <= 100]


def test_the_distribution_is_exact_to_seven_digits() -> None:
    x = every_bf16().double()
    exact = 0.5 * torch.special.erfc(-x / math.sqrt(2))
    found, bell = distribution(x.float())
    assert (found.double() - exact).abs().max() < 3e-7
    assert torch.allclose(bell.double(), torch.exp(-x * x / 2), atol=1e-6)


def test_values_and_gradients_are_bf16s_nearest_almost_everywhere() -> None:
    x = every_bf16()
    leaf, exact = x.clone().requires_grad_(), x.double().requires_grad_()
    out, reference = _Gelu.apply(leaf), F.gelu(exact)
    (grad,) = torch.autograd.grad(out, leaf, torch.ones_like(out))
    (exact_grad,) = torch.autograd.grad(reference, exact, torch.ones_like(reference))
    for found, wanted in ((out, reference), (grad, exact_grad)):
        off = (found.double() - wanted).abs()
        assert (off <= wanted.abs() * 2**-8 + 1e-6).all()
        assert (found != wanted.to(torch.bfloat16))[wanted.abs() > 1e-4].double().mean() < 2e-3


def test_elsewhere_it_is_pytorchs() -> None:
    x = torch.randn(64)
    assert torch.equal(gelu(x), F.gelu(x))


def test_the_compiler_traces_through_it_and_its_recomputation() -> None:
    x = torch.randn(64, dtype=torch.bfloat16)
    results = []
    for compiled in (False, True):
        leaf = x.clone().requires_grad_()

        def run(leaf: Tensor) -> Tensor:
            return checkpoint(_Gelu.apply, leaf, use_reentrant=False, preserve_rng_state=False)

        out = (torch.compile(run, fullgraph=True, backend="aot_eager") if compiled else run)(leaf)
        results.append((out, *torch.autograd.grad(out, leaf, torch.ones_like(out))))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
