"""NABLA's map and block-sparse attention on CPU: the operators against diffusers and dense attention.

The Triton kernels run in Triton's interpreter, in a process of its own (this file as a script): it is chosen at import.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from k5dist.model import nabla
from k5dist.model.nabla import (
    BLOCK_TOKENS,
    NablaParameters,
    density,
    nabla_attention,
    nabla_map,
    pack_bits,
    sliding_tile_window,
    unpack_bits,
)

ROOT = Path(__file__).parents[2]
Triple = tuple[Tensor, Tensor, Tensor]
CPU = torch.device("cpu")


def make_qkv(batch: int, blocks: int, heads: int, dim: int, dtype: torch.dtype = torch.float64) -> Triple:
    """Three views into one tensor, as a fused projection gives them."""
    generator = torch.Generator().manual_seed(blocks * 100 + heads)
    fused = torch.randn(batch, blocks * BLOCK_TOKENS, 3, heads, dim, generator=generator, dtype=dtype)
    query, key, value = fused.unbind(2)
    return query, key, value


def leaves(qkv: Triple, dtype: torch.dtype | None = None) -> Triple:
    query, key, value = (x.detach().to(dtype or x.dtype).requires_grad_() for x in qkv)
    return query, key, value


def make_mask(batch: int, blocks: int, heads: int, share: float = 0.3) -> Tensor:
    """Uneven rows: each block sees itself and others at random, the first itself only; only itself sees the last."""
    mask = torch.rand(batch, heads, blocks, blocks, generator=torch.Generator().manual_seed(1)) < share
    mask |= torch.eye(blocks, dtype=torch.bool)
    mask[..., 0, 1:] = False
    mask[..., :-1, -1] = False
    return mask


def dense(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """SDPA in the inputs' precision, under the blocks' mask expanded to tokens."""
    if mask is not None:
        mask = mask.repeat_interleave(BLOCK_TOKENS, -1).repeat_interleave(BLOCK_TOKENS, -2)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def relative(got: Tensor, expected: Tensor) -> float:
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()


# --- bits, window, map


@pytest.mark.parametrize("blocks", [1, 31, 32, 33, 70])
def test_bits_come_back(blocks: int) -> None:
    mask = torch.rand(2, 3, blocks, blocks) < 0.5
    words = pack_bits(mask)
    assert words.shape == (2, 3, blocks, math.ceil(blocks / 32))
    assert words.dtype == torch.int32
    assert torch.equal(unpack_bits(words, blocks), mask)
    assert density(words, blocks).item() == pytest.approx(mask.float().mean().item(), abs=1e-6)


def test_bit_j_is_bit_j_mod_32_of_word_j_over_32() -> None:
    mask = torch.zeros(40, dtype=torch.bool)
    mask[[0, 31, 33]] = True
    assert pack_bits(mask).tolist() == [1 - 2**31, 2]


@pytest.mark.parametrize("probability", [0.1, 0.8, 0.95])
@pytest.mark.parametrize(("shape", "window"), [((3, 2, 2), (3, 1, 1)), ((5, 2, 4), (1, 3, 3)), ((1, 1, 1), (1, 1, 1))])
@pytest.mark.parametrize("heads", [1, 5])
def test_the_map_is_diffusers(
    shape: tuple[int, int, int], window: tuple[int, int, int], probability: float, heads: int
) -> None:
    from diffusers.models.transformers import transformer_kandinsky as stock

    blocks = math.prod(shape)
    query, key, _ = make_qkv(2, blocks, heads, 64, torch.float32)
    near = sliding_tile_window(shape, window, CPU)
    # Means of noise are small and the map almost uniform; contrast makes it as uneven as a trained model's.
    query, key = query * 12, key * 12
    words = nabla_map(query, key, NablaParameters(probability, pack_bits(near)))
    theirs = stock.nablaT_v2(query, key, near, thr=probability).to_dense().bool()
    assert torch.equal(unpack_bits(words, blocks), theirs)
    if blocks > 1 and probability < 0.9:
        assert not theirs.all()


@pytest.mark.parametrize("budget", [2_000, 8_000])
def test_the_map_is_the_same_in_chunks(budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, _ = make_qkv(1, 12, 4, 64, torch.float32)
    parameters = NablaParameters(0.6, pack_bits(torch.eye(12, dtype=torch.bool)))
    whole = nabla_map(query, key, parameters)
    monkeypatch.setattr(nabla, "MAP_SCRATCH_BYTES", budget)
    assert torch.equal(nabla_map(query, key, parameters), whole)


class Largest(TorchDispatchMode):
    """The most elements any one result has."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


def test_the_map_never_holds_tokens_by_tokens_nor_all_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks, heads = 256, 4
    query, key = (torch.randn(1, blocks * BLOCK_TOKENS, heads, 2) for _ in range(2))
    monkeypatch.setattr(nabla, "MAP_SCRATCH_BYTES", blocks * blocks * 32)
    with Largest() as largest:
        nabla.compute_map(query, key, pack_bits(torch.eye(blocks, dtype=torch.bool)), 0.5)
    assert largest.elements <= query.numel() < heads * blocks * blocks  # never the scores of all heads at once


# --- attention


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_attention_and_its_gradients_are_those_of_masked_attention(dim: int, dtype: torch.dtype) -> None:
    batch, blocks, heads = 2, 4, 1
    mask = make_mask(batch, blocks, heads)
    exact = leaves(make_qkv(batch, blocks, heads, dim))
    ours = leaves(exact, dtype)
    expected = dense(*exact, mask)
    grad = torch.randn_like(expected)
    expected.backward(grad)
    out = nabla_attention(*ours, pack_bits(mask))
    out.backward(grad.to(dtype))
    assert relative(out, expected) < 1e-5
    for got, reference in zip(ours, exact, strict=True):
        assert got.grad is not None and reference.grad is not None
        assert relative(got.grad, reference.grad) < 1e-5
    assert relative(dense(*exact, None), expected) > 0.1  # sparse is not dense


def test_a_block_that_sees_nothing_gives_zeros() -> None:
    mask = make_mask(1, 4, 1)
    mask[..., 2, :] = False
    qkv = leaves(make_qkv(1, 4, 1, 64))
    out = nabla_attention(*qkv, pack_bits(mask))
    out.sum().backward()
    rows = slice(2 * BLOCK_TOKENS, 3 * BLOCK_TOKENS)
    assert not out[:, rows].any()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in qkv)
    assert qkv[0].grad is not None and not qkv[0].grad[:, rows].any()


def test_shapes_that_do_not_belong_together_are_refused() -> None:
    query, key, value = make_qkv(1, 3, 1, 64)
    with pytest.raises(ValueError, match="whole blocks of 64 tokens, got 190"):
        nabla_attention(query[:, :190], key[:, :190], value[:, :190], pack_bits(make_mask(1, 3, 1)))
    with pytest.raises(ValueError, match="need block bits"):
        nabla_map(query, key, NablaParameters(0.5, pack_bits(make_mask(1, 4, 1)[0, 0])))


def test_the_operators_keep_torchs_rules() -> None:
    query, key, value = leaves(make_qkv(1, 2, 1, 64, torch.float32))
    words = pack_bits(make_mask(1, 2, 1))
    torch.library.opcheck(torch.ops.k5dist.nabla_attention.default, (query, key, value, words))
    detached = make_qkv(1, 2, 1, 64, torch.float32)
    out, lse = torch.ops.k5dist.nabla_attention(*detached, words)
    backward = torch.ops.k5dist.nabla_attention_backward.default
    torch.library.opcheck(backward, (torch.ones_like(out), *detached, out, lse, words))
    torch.library.opcheck(torch.ops.k5dist.nabla_map.default, (*detached[:2], words[0, 0], 0.5))


def attend(query: Tensor, key: Tensor, value: Tensor, parameters: NablaParameters) -> Tensor:
    words = nabla_map(query, key, parameters)
    return nabla_attention(query, key, value, words) * 2


def test_compiles_into_one_graph() -> None:
    qkv = leaves(make_qkv(1, 4, 2, 64, torch.float32))
    parameters = NablaParameters(0.5, pack_bits(torch.eye(4, dtype=torch.bool)))
    eager = attend(*qkv, parameters)
    expected = torch.autograd.grad(eager.sum(), qkv)
    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)(*qkv, parameters)
    assert torch.equal(compiled, eager)
    assert all(map(torch.equal, torch.autograd.grad(compiled.sum(), qkv), expected))


class Count(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[str(func)] = self.calls.get(str(func), 0) + 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("keep", [True, False])
def test_a_checkpointing_policy_can_keep_the_operators(keep: bool) -> None:
    kept = [torch.ops.k5dist.nabla_attention.default, torch.ops.k5dist.nabla_map.default] if keep else []

    def policy(_: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if op in kept else CheckpointPolicy.PREFER_RECOMPUTE

    qkv = leaves(make_qkv(1, 3, 2, 64))
    parameters = NablaParameters(0.5, pack_bits(torch.eye(3, dtype=torch.bool)))
    expected = torch.autograd.grad(attend(*qkv, parameters).sum(), qkv)
    with Count() as count:
        contexts = lambda: create_selective_checkpoint_contexts(policy)  # noqa: E731
        out = checkpoint(attend, *qkv, parameters, use_reentrant=False, context_fn=contexts)
        assert isinstance(out, Tensor)
        grads = torch.autograd.grad(out.sum(), qkv)
    assert all(map(torch.equal, grads, expected))
    for op in ("nabla_attention", "nabla_map"):
        assert count.calls[f"k5dist.{op}.default"] == (1 if keep else 2)


# --- the kernels, interpreted


@pytest.fixture(scope="module")
def interpreted() -> dict[str, Any]:
    """What each case of `main` below found, from one process that runs the kernels in Triton's interpreter."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs triton, which has wheels for Linux only")
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


# (batch, heads, head_dim), factor on the queries (16 leaves the range that needs no running maximum), variant
KERNEL_CASES: dict[str, tuple[tuple[int, int, int], float, dict[str, Any]]] = {
    "plain": ((1, 1, 64), 1, {}),
    "ahead": ((1, 1, 64), 1, {"ahead": True, "resident": 1}),
    "passes": ((2, 2, 64), 1, {"ahead": True, "passes": 3, "resident": 2}),
    "pointers": ((1, 2, 64), 1, {"tma": False, "passes": 2}),
    "online": ((1, 2, 64), 16, {"passes": 2}),
    "wide": ((1, 1, 128), 1, {"ahead": True, "resident": 2, "passes": 2}),
}


@pytest.mark.parametrize("case", KERNEL_CASES)
def test_the_kernels_compute_the_reference(interpreted: dict[str, Any], case: str) -> None:
    _, factor, _ = KERNEL_CASES[case]
    found = interpreted[case]
    assert found["unsafe"] == (factor > 1)
    assert {k: v for k, v in found["errors"].items() if not v < 1e-5} == {}


@pytest.mark.parametrize("case", ["map", "rows", "columns", "means"])
def test_the_kernels_around_the_attention_are_exact(interpreted: dict[str, Any], case: str) -> None:
    assert interpreted[case] == {"5": True, "33": True}


def run_attention(shape: tuple[int, int, int], factor: float, variant: dict[str, Any]) -> dict[str, Any]:
    """In fp32: the interpreter multiplies bf16 matrices by their bits."""
    from k5dist.model import nabla_triton as kernels

    kernels.SCRATCH_BYTES = 1  # one pair of (batch, head) at a time
    batch, heads, dim = shape
    blocks = 5
    query, key, value = make_qkv(batch, blocks, heads, dim, torch.float32)
    query = query * factor
    mask = make_mask(batch, blocks, heads)
    mask[..., 2, :] = False  # sees nothing
    words = pack_bits(mask)
    out, lse = nabla.reference_forward(query, key, value, words)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    expected = (out, lse.clamp(min=-99), *nabla.reference_backward(grad, query, key, value, out, lse, words))
    chosen = kernels.Variant(**variant)
    got_out, got_lse = kernels.forward(query, key, value, words, chosen)
    gradients = kernels.backward(grad, query, key, value, got_out, got_lse, words, chosen, chosen)
    names = ("out", "lse", "dq", "dk", "dv")
    got = (got_out, got_lse.clamp(min=-99), *gradients)
    unsafe = kernels.unsafe_pairs(query, key, kernels.LOG2E / math.sqrt(dim))
    return {"unsafe": bool(unsafe.all()), "errors": dict(zip(names, map(relative, got, expected), strict=True))}


def run_around(blocks: int) -> dict[str, bool]:
    from k5dist.model import nabla_blocks_triton as kernels

    heads, passes = 2, 3
    query = make_qkv(2, blocks, heads, 64, torch.float32)[0]
    means = query.transpose(1, 2).unflatten(2, (-1, BLOCK_TOKENS)).mean(3)
    scores = torch.randn(heads, blocks, blocks, generator=torch.Generator().manual_seed(blocks)) * 30
    window = pack_bits(torch.rand(blocks, blocks) < 0.1)
    words = torch.zeros(heads, blocks, window.shape[1], dtype=torch.int32)
    for rows in (slice(0, 2), slice(2, blocks)):  # in two chunks of rows
        kernels.keep(scores[:, rows].contiguous(), window, words, rows.start, 0.125, 0.7)
    found = {
        "means": torch.allclose(kernels.block_means(query), means, atol=1e-6),
        "map": torch.equal(words, pack_bits(nabla._kept_blocks(scores * 0.125, 0.7)) | window),
    }
    for name, transposed in (("rows", False), ("columns", True)):
        mask = unpack_bits(words, blocks)
        mask = mask.mT if transposed else mask
        lists, starts = kernels.block_lists(words, passes, transposed)
        edges = torch.arange(passes + 1) * math.ceil(blocks / passes)
        expected = torch.stack([mask[..., :edge].sum(-1) for edge in edges], -1)
        same = [lists[p, i, : row.sum()].tolist() == row.nonzero().flatten().tolist()
                for p, head in enumerate(mask) for i, row in enumerate(head)]  # fmt: skip
        found[name] = all(same) and torch.equal(starts.long(), expected)
    return found


def mend_interpreter() -> None:
    """Triton 3.6's interpreter reads loop bounds by int() of an array of one element, which numpy 2.4 refuses."""
    interpreter = importlib.import_module("triton.runtime.interpreter")

    class Either(type):
        def __instancecheck__(cls, value: Any) -> bool:
            return isinstance(value, int)

    class Integer(int, metaclass=Either):
        def __new__(cls, value: Any = 0, *args: Any) -> Any:
            return int(value.squeeze() if hasattr(value, "squeeze") else value, *args)

    vars(interpreter)["int"] = Integer


def main() -> None:
    mend_interpreter()
    found: dict[str, Any] = {name: run_attention(*case) for name, case in KERNEL_CASES.items()}
    for blocks in (5, 33):
        for name, good in run_around(blocks).items():
            found.setdefault(name, {})[str(blocks)] = good
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
