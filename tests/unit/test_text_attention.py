"""Attention to a text on CPU: the operator against fp64, and its Triton kernels in Triton's interpreter, and compiled.

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
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from k5dist.benchmark.__main__ import main as time_kernels
from k5dist.benchmark.shares import kind_of
from k5dist.model import attention as attention_module
from k5dist.model.attention import Attention
from k5dist.model.recompute import keep_attention, keep_linear
from k5dist.model.text_attention import reference_backward, reference_forward, text_attention
from tests.unit.test_nabla import mend_interpreter

ROOT = Path(__file__).parents[2]
Triple = tuple[Tensor, Tensor, Tensor]
NAMES = ("out", "dq", "dk", "dv")
LENGTHS = (1, 7, 64, 77, 130, 256, 300)
CASES = [(dim, length) for dim in (64, 128) for length in LENGTHS]
SMEM, REGISTERS = 227 << 10, 255


def make_qkv(length: int, dim: int, dtype: torch.dtype = torch.float64, tokens: int = 150, batch: int = 2) -> Triple:
    """No two laid out alike: queries with heads outermost, keys and values as views into one tensor."""
    generator = torch.Generator().manual_seed(length)
    query = torch.randn(batch, 2, tokens, dim, generator=generator, dtype=torch.float64).transpose(1, 2)
    key, value = torch.randn(batch, length, 2, 2, dim, generator=generator, dtype=torch.float64).unbind(2)
    return (3 * query).to(dtype), key.to(dtype), value.to(dtype)


def exact(qkv: Triple, grad: Tensor) -> list[Tensor]:
    """(out, dq, dk, dv) by PyTorch's attention and autograd in fp64."""
    inputs = [x.detach().double().requires_grad_() for x in qkv]
    q, k, v = (x.transpose(1, 2) for x in inputs)
    out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad.double())]


def relative(got: Tensor, expected: Tensor) -> float:
    return ((got.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-9)).item()


def random_grad(query: Tensor) -> Tensor:
    return torch.randn(query.shape, generator=torch.Generator().manual_seed(1)).to(query.dtype)


# --- the operator


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_attention_and_its_gradients_are_those_of_sdpa(length: int, dtype: torch.dtype, bound: float) -> None:
    inputs = [x.requires_grad_() for x in make_qkv(length, 64, dtype)]
    query, key, value = inputs
    out = text_attention(query, key, value)
    grad = random_grad(query)
    found = (out, *torch.autograd.grad(out, inputs, grad))
    for name, got, expected in zip(NAMES, found, exact((query, key, value), grad), strict=True):
        if length > 1 or name not in ("dq", "dk"):  # one key: its probability is 1 whatever the logits
            assert relative(got, expected) < bound, name


def test_shapes_that_do_not_belong_together_are_refused() -> None:
    query, key, value = make_qkv(7, 64)
    with pytest.raises(ValueError, match="do not belong"):
        text_attention(query, key[:, :, :1], value)
    with pytest.raises(ValueError, match="7 keys, 6 values"):
        text_attention(query, key, value[:, :6])


def test_the_operators_keep_torchs_rules() -> None:
    query, key, value = make_qkv(7, 64, torch.float32, tokens=9)
    leaves = tuple(x.clone().requires_grad_() for x in (query, key, value))
    torch.library.opcheck(torch.ops.k5dist.text_attention.default, leaves)
    out, lse = torch.ops.k5dist.text_attention(query, key, value)
    backward = torch.ops.k5dist.text_attention_backward.default
    torch.library.opcheck(backward, (torch.ones_like(out), query, key, value, out, lse))


def test_cross_attention_is_the_operator_in_one_graph_for_every_length(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    module, x = Attention(128, 64), torch.randn(1, 40, 128)
    texts = [torch.randn(1, length, 128) for length in (9, 5, 64, 77, 130)]
    stock = [module(x, text=text) for text in texts]
    monkeypatch.setattr(attention_module, "has_kernel", lambda _: True)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, backend=counter, fullgraph=True)  # type: ignore[arg-type]
    with torch._dynamo.config.patch(automatic_dynamic_shapes=False):
        for text, expected in zip(texts, stock, strict=True):
            torch._dynamo.maybe_mark_dynamic(text, 1)
            out = compiled(x, text=text)
            torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)
            weights = list(module.parameters())
            grads = (torch.autograd.grad(each.sum(), weights) for each in (out, expected))
            for got, reference in zip(*grads, strict=True):
                torch.testing.assert_close(got, reference, rtol=1e-3, atol=1e-3)
    assert counter.frame_count == 1
    assert "k5dist.text_attention" in str(counter.graphs[0].graph)


def test_no_policy_keeps_it() -> None:
    query, key, value = make_qkv(7, 64)
    for policy in (keep_attention, keep_linear):
        assert policy(None, torch.ops.k5dist.text_attention.default, query, key, value).name == "PREFER_RECOMPUTE"


# --- the kernels


@pytest.fixture(scope="module")
def interpreted() -> dict[str, dict[str, float]]:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs triton, which has wheels for Linux only")
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(("dim", "length"), CASES)
def test_the_kernels_equal_fp64(interpreted: dict[str, dict[str, float]], dim: int, length: int) -> None:
    errors = interpreted[f"{dim}x{length}"]
    assert {name: error for name, error in errors.items() if not error < 1e-5} == {}


def run_kernels(dim: int, length: int) -> dict[str, float]:
    """In fp32: the interpreter multiplies bf16 matrices by their bits."""
    from k5dist.model import text_attention_triton as kernels

    kernels.PROGRAMS = 8  # so that two runs share three blocks of queries
    qkv = make_qkv(length, dim, torch.float32)
    grad = random_grad(qkv[0])
    out, lse = kernels.forward(*qkv)
    found = (out, *kernels.backward(grad, *qkv, out, lse))
    expected = exact(qkv, grad)
    errors = {"lse": relative(lse, reference_forward(*(x.double() for x in qkv))[1])}
    for name, got, reference in zip(NAMES, found, expected, strict=True):
        one_key = length == 1 and name in ("dq", "dk")  # nothing to choose from: no gradient but rounding's
        errors[name] = got.abs().max().item() * 1e-1 if one_key else relative(got, reference)
    same = kernels.backward(grad.sum().expand_as(grad), *qkv, out, lse)  # a gradient without strides
    again = reference_backward(grad.sum().expand_as(grad), *qkv, out, lse)
    errors["expanded"] = relative(same[2], again[2])
    return errors


def compiled_kernel(kernel: Any, dim: int, variant: Any, constants: dict[str, Any]) -> Any:
    """For sm_90a, with arguments as a launch would find them: aligned but for those it must not look at."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    options = variant.options()
    constants = {"D": dim, "M": options.pop("M"), "N": options.pop("N"), **constants}
    signature, attributes = {}, {}
    for at, name in enumerate(kernel.arg_names):
        fp32 = name in ("lse", "delta") or (name in ("dk", "dv") and "dkdv" in kernel.__name__)
        if name in constants:
            signature[name] = "constexpr"
        elif name.startswith("scale"):
            signature[name] = "fp32"
        elif name.startswith("stride") or name in ("tokens", "length", "num_runs"):
            signature[name] = "i32"
        else:
            signature[name] = "*fp32" if fp32 else "*bf16"
        if signature[name].startswith("*") or name.startswith("stride"):
            attributes[(at,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, {(kernel.arg_names.index(n),): v for n, v in constants.items()}, attributes)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("name", ["forward", "short", "whole", "dkdv", "dq"])
def test_the_kernels_fit_the_gpu(name: str, dim: int, tmp_path: Path) -> None:
    """Registers, shared memory, nothing spilled: as ptxas, which comes with Triton, has it."""
    if importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET"):
        pytest.skip("needs triton's compiler")
    import triton

    from k5dist.model import text_attention_triton as kernels

    backward = {"WHOLE": name != "dkdv"} if name in ("short", "whole", "dkdv") else {}
    kernel = {"forward": kernels.text_forward_kernel, "dq": kernels.text_dq_kernel}.get(name, kernels.text_dkdv_kernel)
    done = compiled_kernel(kernel, dim, kernels.DEFAULTS[name, dim], backward)
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(done.asm["cubin"])
    tool = Path(triton.__path__[0]) / "backends/nvidia/bin/cuobjdump"
    usage = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    counts = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    sys.stdout.write(f"{name} {dim}: {counts} shared {done.metadata.shared}\n")
    assert counts["REG"] <= REGISTERS and counts["LOCAL"] == 0 and counts["STACK"] == 0
    assert done.metadata.shared <= SMEM
    assert "wgmma" in done.asm["ptx"]
    assert kind_of(done.metadata.name) == "attention"


def test_the_benchmark_runs_on_a_cpu(tmp_path: Path) -> None:
    out = tmp_path / "text.json"
    assert time_kernels(["text_attention", "--quick", "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert not found["meaningful"]
    assert [(row["length"], row["variant"]) for row in found["rows"]] == [
        *[(7, "ours"), (7, "flash"), (70, "ours"), (70, "flash")]
    ]
    assert all(value < 1e-4 for row in found["rows"] for value in row["errors"].values())


def main() -> None:
    mend_interpreter()
    sys.stdout.write(json.dumps({f"{dim}x{length}": run_kernels(dim, length) for dim, length in CASES}) + "\n")


if __name__ == "__main__":
    main()
