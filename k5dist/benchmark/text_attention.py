"""Timing of the attention to a text alone: `python -m k5dist.benchmark text_attention --out FILE [--quick]`.

Forward and backward of our kernels and of SDPA's FlashAttention, at texts of several lengths, and each backward kernel
of ours with other tiles and stages (`--sweep`). Errors are against fp32 on a head. On a CPU only `--quick` runs, on the
references; its times mean nothing.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from k5dist.benchmark.nabla import error, milliseconds
from k5dist.console import console, say
from k5dist.model.text_attention import text_attention

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
Tensors = list[Tensor]
TILES = [{"num_stages": s, "num_warps": w} for s in (1, 2, 3) for w in (4, 8)]
SWEPT = {"forward": (64, 128), "short": (64,), "whole": (64, 128), "dkdv": (64,), "dq": (64, 128)}  # queries of a tile


def make_inputs(arguments: argparse.Namespace, length: int, device: torch.device) -> Tensors:
    """q, k, v and the output's gradient; q and k RMS-normed, as in the model."""
    generator = torch.Generator(device).manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    sizes = (arguments.tokens, length, length, arguments.tokens)
    rest = (arguments.heads, arguments.head_dim)
    q, k, v, grad = (torch.randn(1, n, *rest, generator=generator, device=device, dtype=dtype) for n in sizes)
    return [F.rms_norm(q, rest[-1:]), F.rms_norm(k, rest[-1:]), v, grad]


def _sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    kernels = [SDPBackend.FLASH_ATTENTION] if query.is_cuda else [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
    with sdpa_kernel(kernels):
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def gradients_of(attend: Attend, inputs: Tensors) -> tuple[Callable[[], Tensors], Tensors]:
    """The backward as something to call again and again, and (out, dq, dk, dv)."""
    leaves = [x.detach().requires_grad_() for x in inputs[:3]]
    out = attend(*leaves)

    def backward() -> Tensors:
        return list(torch.autograd.grad(out, leaves, inputs[3], retain_graph=True))

    return backward, [out.detach(), *backward()]


def compare(inputs: Tensors, turns: int) -> list[dict[str, Any]]:
    device, length = inputs[0].device, inputs[1].shape[1]
    expected = gradients_of(sdpa_exact, [x[:, :, :1].float() for x in inputs])[1]
    rows = []
    for name, attend in (("ours", text_attention), ("flash", _sdpa)):
        backward, found = gradients_of(attend, inputs)
        errors = [error(got[:, :, :1], reference.double()) for got, reference in zip(found, expected, strict=True)]

        def forward(attend: Attend = attend) -> Tensor:
            with torch.no_grad():
                return attend(*inputs[:3])

        times = {"forward": milliseconds(forward, device, turns), "backward": milliseconds(backward, device, turns)}
        errors_by_name = dict(zip(("out", "dq", "dk", "dv"), errors, strict=True))
        rows.append({"length": length, "variant": name, "ms": times, "errors": errors_by_name})
    return rows


def sdpa_exact(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def sweep(inputs: Tensors, turns: int) -> list[dict[str, Any]]:
    """Each kernel this text takes, with other tiles; a variant that does not fit the GPU is reported."""
    from k5dist.model.text_attention_triton import DEFAULTS, backward, forward

    q, k, v, grad = inputs
    dim, length = q.shape[-1], k.shape[1]
    out, lse = forward(q, k, v)
    one = next((name for name in ("short", "whole") if length <= DEFAULTS[name, dim].keys), None)
    rows = []
    for name in ("forward", *((one,) if one else ("dkdv", "dq"))):
        for changes in ({"queries": queries, **tile} for queries in SWEPT[name] for tile in TILES):
            variant = replace(DEFAULTS[name, dim], **changes)
            row: dict[str, Any] = {"length": length, "kernel": name, "variant": asdict(variant)}
            if name == "forward":
                work: Callable[[], object] = lambda v_=variant: forward(q, k, v, v_)  # noqa: E731
            else:
                work = lambda n=name, v_=variant: backward(grad, q, k, v, out, lse, {n: v_})  # noqa: E731
            try:
                row["ms"] = milliseconds(work, q.device, turns)
            except Exception as failure:  # one that does not fit must not end the sweep
                row["failed"] = f"{type(failure).__name__}: {failure}"[:200]
            say(f"{length} {name} {changes}: {row.get('failed') or format(row['ms'], '.3f') + ' ms'}")
            rows.append(row)
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m k5dist.benchmark text_attention", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON file, written anew after every length")
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--head-dim", type=int, default=128, choices=(64, 128))
    parser.add_argument("--tokens", type=int, default=47_616)
    parser.add_argument("--lengths", type=int, nargs="+", default=[32, 77, 128, 200, 256])
    parser.add_argument("--turns", type=int, default=20, help="timed calls of each, whose median counts")
    parser.add_argument("--sweep", action="store_true", help="our kernels with other tiles, too (CUDA)")
    parser.add_argument("--quick", action="store_true", help="on a CPU a tiny problem")
    arguments = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        if not arguments.quick or arguments.sweep:
            parser.error("without a GPU only --quick runs, without --sweep, and its times mean nothing")
        arguments.heads, arguments.tokens, arguments.turns, arguments.lengths = 2, 200, 1, [7, 70]
    meaningful = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if meaningful else "CPU (references: times mean nothing)"
    facts = {**vars(arguments), "out": str(arguments.out), "device": name, "meaningful": meaningful}
    found: dict[str, Any] = {**facts, "torch": torch.__version__, "rows": [], "sweep": []}
    for length in arguments.lengths:
        inputs = make_inputs(arguments, length, device)
        found["rows"] += compare(inputs, arguments.turns)
        if arguments.sweep:
            found["sweep"] += sweep(inputs, arguments.turns)
        arguments.out.write_text(json.dumps(found, indent=1) + "\n")
    table = Table(title=f"Attention to a text on {name}", title_justify="left", box=None)
    for column in ("length", "variant", "forward ms", "backward ms", "errors"):
        table.add_column(column, overflow="fold")
    for row in found["rows"]:
        errors = " ".join(f"{k} {v:.1e}" for k, v in row["errors"].items())
        times = [f"{row['ms'][part]:.3f}" for part in ("forward", "backward")]
        table.add_row(str(row["length"]), row["variant"], *times, errors)
    console.print(table)


if __name__ == "__main__":
    main()
