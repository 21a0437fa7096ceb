"""The kernels of the attention to a text on a real GPU: against fp64 and FlashAttention, to the bit from run to run."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from k5dist.model.attention import Attention
from k5dist.model.text_attention import text_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICE = torch.device("cuda")
LENGTHS = (1, 7, 64, 77, 128, 130, 256, 300)
NAMES = ("out", "dq", "dk", "dv")
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
Triple = tuple[Tensor, Tensor, Tensor]


def make_qkv(tokens: int, length: int, heads: int, dim: int, dtype: torch.dtype = torch.bfloat16) -> Triple:
    """q and k RMS-normed as in the model; keys and values are views into one tensor."""
    generator = torch.Generator(DEVICE).manual_seed(length)
    query = torch.randn(1, tokens, heads, dim, generator=generator, device=DEVICE)
    key, value = torch.randn(1, length, 2, heads, dim, generator=generator, device=DEVICE).unbind(2)
    fused = torch.stack([F.rms_norm(key, (dim,)), value], 2).to(dtype)
    return F.rms_norm(query, (dim,)).to(dtype), *fused.unbind(2)  # type: ignore[return-value]


def dense(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def flash(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return dense(query, key, value)


def run(attend: Attend, qkv: Triple, grad: Tensor) -> tuple[Tensor, ...]:
    inputs = [x.detach().requires_grad_() for x in qkv]
    out = attend(*inputs)
    return (out.detach(), *torch.autograd.grad(out, inputs, grad))


def exact(qkv: Triple, grad: Tensor) -> list[Tensor]:
    """In fp64, head by head."""
    heads = []
    for head in range(qkv[0].shape[2]):
        one = [x[:, :, head : head + 1].double() for x in qkv]
        with sdpa_kernel(SDPBackend.MATH):
            heads.append(run(dense, (one[0], one[1], one[2]), grad[:, :, head : head + 1].double()))
    return [torch.cat(parts, 2) for parts in zip(*heads, strict=True)]


def check(qkv: Triple) -> None:
    grad = torch.randn_like(qkv[0])
    expected = exact(qkv, grad)
    ours, theirs = run(text_attention, qkv, grad), run(flash, qkv, grad)
    for name, got, stock, reference in zip(NAMES, ours, theirs, expected, strict=True):
        if qkv[1].shape[1] == 1 and name in ("dq", "dk"):  # no gradient but rounding's
            assert got.abs().max() < 0.1 * max(1.0, stock.abs().max().item())
            continue
        error, noise = (((x.double() - reference).norm() / reference.norm()).item() for x in (got, stock))
        assert error <= 1.5 * noise + 1e-4, f"{name}: {error:.2e}, FlashAttention {noise:.2e}"


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(("heads", "dim"), [(3, 64), (3, 128)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_as_near_to_fp64_as_flash(heads: int, dim: int, length: int, dtype: torch.dtype) -> None:
    check(make_qkv(4100, length, heads, dim, dtype))


@pytest.mark.parametrize(("heads", "dim", "length"), [(28, 64, 200), (32, 128, 77), (32, 128, 200)])
def test_a_whole_clip_is_as_near_to_fp64_as_flash(heads: int, dim: int, length: int) -> None:
    check(make_qkv(47_616, length, heads, dim))


@pytest.mark.parametrize("length", [20, 77, 200])
def test_two_runs_are_equal_to_the_bit(length: int) -> None:
    qkv = make_qkv(47_616, length, 8, 128)
    grad = torch.randn_like(qkv[0])
    first = run(text_attention, qkv, grad)
    for _ in range(3):
        assert all(map(torch.equal, run(text_attention, qkv, grad), first))


def test_no_text_length_compiles_the_kernels_anew() -> None:
    from k5dist.model.text_attention_triton import text_dkdv_kernel, text_dq_kernel, text_forward_kernel

    def variants() -> int:
        kernels = (text_forward_kernel, text_dq_kernel, text_dkdv_kernel)
        return sum(len(kernel.device_caches[torch.cuda.current_device()][0]) for kernel in kernels)

    def attend(length: int) -> None:
        qkv = make_qkv(1000, length, 2, 64)
        run(text_attention, qkv, torch.randn_like(qkv[0]))

    for length in (33, 100, 200):
        attend(length)
    before = variants()
    for length in (1, 16, 32, 64, 65, 128, 129, 256, 300):
        attend(length)
    assert variants() == before


@pytest.mark.parametrize("compiled", [False, True])
def test_cross_attention_in_bf16_is_near_fp32(compiled: bool) -> None:
    torch.manual_seed(0)
    module = Attention(512, 128).to(DEVICE)
    x, text = torch.randn(1, 3000, 512, device=DEVICE), torch.randn(1, 90, 512, device=DEVICE)
    expected = module(x, text=text)
    module = module.bfloat16()
    call = torch.compile(module, fullgraph=True) if compiled else module
    out = call(x.bfloat16(), text=text.bfloat16())
    out.float().square().sum().backward()
    assert (out.float() - expected).norm() / expected.norm() < 2e-2
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())
