"""Norm and rotation, and GELU, on a real GPU: the kernels against the reference in fp32, compiled as in a block."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from k5dist.model.attention import Rope, _normed, rotate
from k5dist.model.gelu import gelu
from k5dist.model.norm_rope import has_kernel, norm_rope, reference_backward, reference_forward

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
EPS = torch.finfo(torch.float32).eps


def relative(got: Tensor, expected: Tensor) -> float:
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize("turned", [False, True], ids=["norm", "rope"])
@pytest.mark.parametrize(("heads", "dim"), [(28, 64), (32, 128)])
@pytest.mark.parametrize("tokens", [77, 12_345])
def test_the_kernels_equal_the_reference(tokens: int, heads: int, dim: int, turned: bool) -> None:
    generator = torch.Generator("cuda").manual_seed(tokens)
    x = torch.randn(1, tokens, heads, dim, generator=generator, device="cuda").bfloat16()
    grad = torch.randn(1, heads, tokens, dim, generator=generator, device="cuda").bfloat16().transpose(1, 2)
    weight = (1 + 0.3 * torch.randn(dim, generator=generator, device="cuda")).bfloat16()
    angles = 50 * torch.rand(tokens, dim // 2, generator=generator, device="cuda")
    tables = (angles.cos(), angles.sin()) if turned else (None, None)
    rope = Rope(angles.cos(), angles.sin()) if turned else None
    assert has_kernel(x)
    leaf, leaf_weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    out = torch.compile(norm_rope, fullgraph=True)(leaf, leaf_weight, EPS, rope)
    dx, dweight = torch.autograd.grad(out, (leaf, leaf_weight), grad)
    wide, wide_weight = x.float(), weight.float()
    assert relative(out, reference_forward(wide, wide_weight, *tables, EPS)) < 5e-3
    exact_dx, exact_dweight = reference_backward(grad.float(), wide, wide_weight, *tables, EPS, True)
    assert relative(dx, exact_dx) < 3e-3
    assert relative(dweight, exact_dweight) < 3e-3
    norm = torch.nn.RMSNorm(dim).cuda().bfloat16()
    norm.weight.data.copy_(weight)
    stock = _normed(norm, x)
    stock = stock if rope is None else rotate(stock, rope)
    assert (out != stock).double().mean() < 2e-3, "the same numbers, but where fp32 sums fall on a rounding's edge"
    assert torch.equal(norm_rope(x, weight, EPS, rope), norm_rope(x, weight, EPS, rope))


def test_gelu_is_pytorchs_to_bf16() -> None:
    x = 3 * torch.randn(1000, 1024, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    x = x.bfloat16()
    grad = torch.randn_like(x)
    results = []
    for function, of in ((torch.compile(gelu, fullgraph=True), x), (F.gelu, x.double())):
        leaf = of.clone().requires_grad_()
        out = function(leaf)
        results.append((out, *torch.autograd.grad(out, leaf, grad.type_as(out))))
    assert relative(results[0][0], results[1][0]) < 2.5e-3
    assert relative(results[0][1], results[1][1]) < 2.5e-3
