"""NABLA's kernels on a real GPU: against fp64, against diffusers' map, to the bit from run to run, and compiled."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from k5dist.model import nabla
from k5dist.model.nabla import (
    BLOCK_TOKENS,
    NablaParameters,
    density,
    nabla_attention,
    nabla_map,
    pack_bits,
    unpack_bits,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICE = torch.device("cuda")
BF16 = 1e-2  # noise of bf16 sums against fp64: 2.2e-3 to 2.4e-3 where logits are moderate
Triple = tuple[Tensor, Tensor, Tensor]


def make_qkv(tokens: int, heads: int, dim: int, factor: float = 1, batch: int = 1) -> Triple:
    """bf16 views into one tensor, q and k RMS-normed; `factor` on q leaves the range that needs no running maximum."""
    generator = torch.Generator(DEVICE).manual_seed(tokens + heads)
    fused = torch.randn(batch, tokens, 3, heads, dim, generator=generator, device=DEVICE)
    fused[:, :, :2] = torch.nn.functional.rms_norm(fused[:, :, :2], (dim,))
    fused[:, :, 0] *= factor
    query, key, value = fused.to(torch.bfloat16).unbind(2)
    return query, key, value


def leaves(qkv: Triple, dtype: torch.dtype | None = None) -> Triple:
    query, key, value = (x.detach().to(dtype or x.dtype).requires_grad_() for x in qkv)
    return query, key, value


def make_words(blocks: int, heads: int, share: float = 0.2, batch: int = 1) -> Tensor:
    mask = torch.rand(batch, heads, blocks, blocks, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(1))
    kept = (mask < share) | torch.eye(blocks, dtype=torch.bool, device=DEVICE)
    kept[..., 0, 1:] = False  # the shortest row: its own block only
    return pack_bits(kept)


def relative(got: Tensor, expected: Tensor) -> float:
    return ((got.double() - expected).norm() / expected.norm()).item()


def run(qkv: Triple, words: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    inputs = leaves(qkv)
    out = nabla_attention(*inputs, words)
    return (out.detach(), *torch.autograd.grad(out, inputs, grad))


@torch.no_grad()
def exact(qkv: Triple, words: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    inputs = leaves(qkv, torch.float64)
    out, lse = nabla.reference_forward(*inputs, words)
    return out, *nabla.reference_backward(grad.double(), *inputs, out, lse, words)


@pytest.mark.parametrize("factor", [1, 8])
@pytest.mark.parametrize(("dim", "tokens", "batch"), [(64, 8192, 1), (128, 4096, 1), (128, 4160, 2)])
def test_attention_and_gradients_equal_fp64(dim: int, tokens: int, batch: int, factor: float) -> None:
    from k5dist.model.nabla_triton import LOG2E, unsafe_pairs

    heads = 3
    qkv = make_qkv(tokens, heads, dim, factor, batch)
    words = make_words(tokens // BLOCK_TOKENS, heads, batch=batch)
    assert bool(unsafe_pairs(qkv[0], qkv[1], LOG2E / math.sqrt(dim)).all()) == (factor > 1)
    grad = torch.randn_like(qkv[0])
    found, expected = run(qkv, words, grad), exact(qkv, words, grad)
    errors = {n: relative(a, b) for n, a, b in zip(("out", "dq", "dk", "dv"), found, expected, strict=True)}
    assert {name: value for name, value in errors.items() if not value < BF16} == {}
    everything = make_words(tokens // BLOCK_TOKENS, heads, share=2, batch=batch)
    assert relative(run(qkv, everything, grad)[0], expected[0]) > 0.1  # sparse is not dense


@pytest.mark.parametrize(("passes", "tma", "resident"), [(1, True, 2), (5, True, 0), (2, False, 1)])
def test_every_variant_computes_the_same(passes: int, tma: bool, resident: int) -> None:
    from k5dist.model import nabla_triton as kernels

    qkv, words = make_qkv(2048, 2, 128), make_words(32, 2)
    grad = torch.randn_like(qkv[0])
    expected = exact(qkv, words, grad)
    for ahead in (False, True):
        variant = kernels.Variant(passes=passes, tma=tma, resident=resident, ahead=ahead)
        out, lse = kernels.forward(*qkv, words, variant)
        grads = kernels.backward(grad, *qkv, out, lse, words, variant, variant)
        for got, reference in zip((out, *grads), expected, strict=True):
            assert relative(got, reference) < BF16


def test_strides_that_the_hardware_cannot_express_are_copied() -> None:
    qkv, words = make_qkv(1024, 2, 64), make_words(16, 2)
    grad = torch.randn_like(qkv[0])
    query, key, value = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv)
    assert all(map(torch.equal, run((query, key, value), words, grad), run(qkv, words, grad)))


def test_two_runs_are_equal_to_the_bit() -> None:
    qkv, words = make_qkv(8192, 4, 128), make_words(128, 4)
    grad = torch.randn_like(qkv[0])
    first = run(qkv, words, grad)
    for _ in range(3):
        assert all(map(torch.equal, run(qkv, words, grad), first))


@pytest.mark.parametrize(("tokens", "probability"), [(4160, 0.8), (8192, 0.5), (66_560, 0.9)])
def test_the_map_is_diffusers_up_to_ties(tokens: int, probability: float) -> None:
    heads, blocks = 2, tokens // BLOCK_TOKENS
    query, key, _ = make_qkv(tokens, heads, 128)
    # Every block's tokens share a direction, so that the means stand out and the map is uneven.
    query, key = (x + 2 * x[:, ::BLOCK_TOKENS].repeat_interleave(BLOCK_TOKENS, 1) for x in (query, key))
    near = torch.eye(blocks, dtype=torch.bool, device=DEVICE)
    words = nabla_map(query, key, NablaParameters(probability, pack_bits(near)))
    means = [x.float().unflatten(1, (-1, BLOCK_TOKENS)).mean(2).transpose(1, 2) for x in (query, key)]
    scores = means[0] @ means[1].transpose(-2, -1) / math.sqrt(128)
    expected = nabla._kept_blocks(scores, probability) | near
    differing = (unpack_bits(words, blocks) != expected).float().mean().item()
    assert differing < 1e-4  # blocks whose probability lies at the threshold within rounding
    assert 0.01 < density(words, blocks).item() < 0.9


def test_the_map_is_the_same_where_the_process_chose_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, _ = make_qkv(8192, 2, 128)
    parameters = NablaParameters(0.5, pack_bits(torch.eye(128, dtype=torch.bool, device=DEVICE)))
    expected = nabla_map(query, key, parameters)
    monkeypatch.setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32")
    assert torch.equal(nabla_map(query, key, parameters), expected)


def test_the_map_of_a_long_clip_needs_little_memory() -> None:
    tokens, heads = 119_040, 4
    query, key, _ = make_qkv(tokens, heads, 128)
    parameters = NablaParameters(0.8, pack_bits(torch.eye(tokens // BLOCK_TOKENS, dtype=torch.bool, device=DEVICE)))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    nabla_map(query, key, parameters)
    assert torch.cuda.max_memory_allocated() - before < nabla.MAP_SCRATCH_BYTES + (64 << 20)


def test_compiles_into_one_graph() -> None:
    def attend(query: Tensor, key: Tensor, value: Tensor, parameters: NablaParameters) -> Tensor:
        return nabla_attention(query, key, value, nabla_map(query, key, parameters)) * 2

    qkv = leaves(make_qkv(2048, 2, 128))
    parameters = NablaParameters(0.5, pack_bits(torch.eye(32, dtype=torch.bool, device=DEVICE)))
    eager = attend(*qkv, parameters)
    expected = torch.autograd.grad(eager.sum(), qkv)
    compiled = torch.compile(attend, fullgraph=True)(*qkv, parameters)
    assert torch.equal(compiled, eager)
    assert all(map(torch.equal, torch.autograd.grad(compiled.sum(), qkv), expected))
