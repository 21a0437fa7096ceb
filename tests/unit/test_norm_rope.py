"""RMS norm and rotation in one: the operator against autograd, and its kernels interpreted and compiled for a GPU.

The interpreter is chosen where Triton is imported, so it runs in a process of its own (this file as a script).
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from k5dist.model.attention import Rope, _normed, rotate
from k5dist.model.norm_rope import norm_rope, reference_backward, reference_forward
from tests.unit.test_nabla import mend_interpreter
from tests.unit.test_text_attention import ROOT, relative

EPS = torch.finfo(torch.float32).eps
CASES = [(dim, heads, rope) for dim in (64, 128) for heads in (2, 11) for rope in (False, True)]
Inputs = tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]


def make_inputs(dim: int, heads: int, tokens: int = 37, dtype: torch.dtype = torch.float32) -> Inputs:
    """x with heads outermost, as a view; weight; a gradient; cosines and sines."""
    generator = torch.Generator().manual_seed(dim + heads)
    x = torch.randn(2, heads, tokens, dim, generator=generator).transpose(1, 2).to(dtype)
    weight = 1 + 0.3 * torch.randn(dim, generator=generator)
    grad = torch.randn(2, tokens, heads, dim, generator=generator).to(dtype)
    angles = 3 * torch.randn(tokens, dim // 2, generator=generator)
    return x, weight, grad, (angles.cos(), angles.sin())


@pytest.mark.parametrize(("dim", "heads", "turned"), CASES)
def test_the_operator_is_the_norm_and_the_rotation_that_attention_has(dim: int, heads: int, turned: bool) -> None:
    x, weight, grad, rope = make_inputs(dim, heads)
    norm = torch.nn.RMSNorm(dim)
    norm.weight.data.copy_(weight)
    leaf = x.clone().requires_grad_()
    normed = _normed(norm, leaf)
    if turned:  # in fp32 throughout: `rotate` rounds to bf16 as the model was trained
        cosine, sine = (table[:, None] for table in rope)
        first, second = normed.unflatten(-1, (-1, 2)).unbind(-1)
        normed = torch.stack([cosine * first - sine * second, sine * first + cosine * second], -1).flatten(-2)
    expected = (normed, *torch.autograd.grad(normed, (leaf, norm.weight), grad))
    ours = x.clone().requires_grad_()
    leaf_weight = weight.clone().requires_grad_()
    out = norm_rope(ours, leaf_weight, EPS, rope if turned else None)
    found = (out, *torch.autograd.grad(out, (ours, leaf_weight), grad))
    assert all(relative(got, wanted) < 2e-6 for got, wanted in zip(found, expected, strict=True))


def test_in_bf16_it_rounds_where_the_model_does() -> None:
    x, weight, _, rope = make_inputs(64, 2, dtype=torch.bfloat16)
    norm = torch.nn.RMSNorm(64)
    norm.weight.data.copy_(weight)
    assert torch.equal(norm_rope(x, weight, EPS, rope), rotate(_normed(norm, x), Rope(*rope)))


def test_the_compiler_traces_through_it() -> None:
    x, weight, grad, rope = make_inputs(64, 2)
    results = []
    for function in (norm_rope, torch.compile(norm_rope, fullgraph=True, backend="aot_eager")):
        leaf, leaf_weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
        results.append(torch.autograd.grad(function(leaf, leaf_weight, EPS, rope), (leaf, leaf_weight), grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    frozen = x.clone().requires_grad_()
    (dx,) = torch.autograd.grad(norm_rope(frozen, weight, EPS, rope), frozen, grad)
    assert torch.equal(dx, results[0][0])


# --- the kernels


def run_kernels(dim: int, heads: int, turned: bool) -> dict[str, float]:
    from k5dist.model import norm_rope_triton as kernels

    x, weight, grad, rope = make_inputs(dim, heads)
    tables = rope if turned else (None, None)
    found = [kernels.forward(x, weight, *tables, EPS), *kernels.backward(grad, x, weight, *tables, EPS, True)]
    expected = [reference_forward(x, weight, *tables, EPS), *reference_backward(grad, x, weight, *tables, EPS, True)]
    errors = {name: relative(a, b) for name, a, b in zip(("out", "dx", "dw"), found, expected, strict=True)}
    only, nothing = kernels.backward(grad, x, weight, *tables, EPS, False)
    return errors | {"frozen": relative(only, expected[1]) + nothing.numel()}


@pytest.fixture(scope="module")
def interpreted() -> dict[str, dict[str, float]]:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs triton, which has wheels for Linux only")
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, __file__], env=environment, capture_output=True, text=True, check=False, timeout=240
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_kernels_equal_the_reference(interpreted: dict[str, dict[str, float]], case: tuple[int, int, bool]) -> None:
    assert {name: error for name, error in interpreted[str(case)].items() if not error < 2e-6} == {}


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("way", ["forward", "backward", "backward of the weight"])
def test_the_kernels_fit_the_gpu(way: str, dim: int, tmp_path: Path) -> None:
    """Registers, nothing spilled: as ptxas, which comes with Triton, has it."""
    if importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET"):
        pytest.skip("needs triton's compiler")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from k5dist.model import norm_rope_triton as kernels

    kernel: Any = kernels.norm_rope_kernel if way == "forward" else kernels.norm_rope_backward_kernel
    constants: dict[str, Any] = {"D": dim, "T": kernels.TOKENS, "H": kernels.HEADS, "ROPE": True}
    constants |= {} if way == "forward" else {"WEIGHS": way != "backward"}
    kinds = {"eps": "fp32", "cosine": "*fp32", "sine": "*fp32", "dweight": "*fp32"} | dict.fromkeys(
        constants, "constexpr"
    )
    counts = ("tokens", "heads")
    signature, attributes = {}, {}
    for at, name in enumerate(kernel.arg_names):
        number = "stride" in name or name.startswith("grad_") or name in counts
        signature[name] = kinds.get(name, "i32" if number else "*bf16")
        if signature[name].startswith("*") or (number and name not in counts):
            attributes[(at,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, {(kernel.arg_names.index(n),): v for n, v in constants.items()}, attributes)
    done = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": kernels.WARPS})
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(done.asm["cubin"])
    tool = Path(triton.__path__[0]) / "backends/nvidia/bin/cuobjdump"
    usage = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    used = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    sys.stdout.write(f"{way} {dim}: {used} shared {done.metadata.shared}\n")
    assert used["REG"] <= 168 and used["LOCAL"] == 0 and used["STACK"] == 0, "three programs an SM and nothing spilled"
    assert "ld.global.v4" in done.asm["ptx"] or "ld.global.L1" in done.asm["ptx"], "16 bytes at once"


def main() -> None:
    mend_interpreter()
    sys.stdout.write(json.dumps({str(case): run_kernels(*case) for case in CASES}) + "\n")


if __name__ == "__main__":
    main()
