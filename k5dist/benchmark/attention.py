"""Timing of dense self-attention alone: `python -m k5dist.benchmark attention --out FILE [--quick]`.

Forward and backward of the default (cuDNN's kernels), PyTorch's FlashAttention and, where its package is installed,
FlashAttention 4, at the models' heads and head sizes. TFLOP/s count the backward as 2.5 times the forward. Errors are
against fp32 on a head of the first tokens. On a CPU only `--quick` runs, and its times mean nothing.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from k5dist.benchmark.nabla import error, milliseconds
from k5dist.benchmark.text_attention import Attend, Tensors, gradients_of, make_inputs, sdpa_exact
from k5dist.console import console, say
from k5dist.model.attention import dense_attention, flash_attention
from k5dist.model.flash4 import flash4_attention, interface

HEADS = {128: 32, 64: 28}  # Pro's and Lite's
EXACT_TOKENS = 4096  # of the problem on which errors are measured


def variants(device: torch.device) -> dict[str, Attend]:
    found: dict[str, Attend] = {"default": dense_attention, "flash": flash_attention}
    try:
        interface()
    except ImportError as missing:
        say(f"flash-attn-4 is not timed: {missing}")
        return found
    return found | {"flash4": flash4_attention} if device.type == "cuda" else found


def errors(attend: Attend, inputs: Tensors) -> dict[str, float]:
    short = [x[:, :EXACT_TOKENS, :1].contiguous() for x in inputs]
    expected = gradients_of(sdpa_exact, [x.float() for x in short])[1]
    found = gradients_of(attend, short)[1]
    pairs = zip(("out", "dq", "dk", "dv"), found, expected, strict=True)
    return {name: error(got, reference.double()) for name, got, reference in pairs}


def time_variant(attend: Attend, inputs: Tensors, turns: int) -> dict[str, Any]:
    device = inputs[0].device
    backward, _ = gradients_of(attend, inputs)

    def forward() -> Tensor:
        with torch.no_grad():
            return attend(*inputs[:3])

    ms = {"forward": milliseconds(forward, device, turns), "backward": milliseconds(backward, device, turns)}
    _, tokens, heads, dim = inputs[0].shape
    flops = {"forward": 4 * tokens**2 * heads * dim, "backward": 10 * tokens**2 * heads * dim}
    rates = {part: flops[part] / ms[part] * 1e-9 for part in ms}
    return {"head_dim": dim, "ms": ms, "tflops": rates, "errors": errors(attend, inputs)}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m k5dist.benchmark attention", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON file")
    parser.add_argument("--head-dims", type=int, nargs="+", default=[128, 64], choices=sorted(HEADS))
    parser.add_argument("--tokens", type=int, default=47_616)
    parser.add_argument("--turns", type=int, default=10, help="timed calls of each, whose median counts")
    parser.add_argument("--quick", action="store_true", help="on a CPU a tiny problem")
    arguments = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        if not arguments.quick:
            parser.error("without a GPU only --quick runs, and its times mean nothing")
        arguments.tokens, arguments.turns = 200, 1
    meaningful = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if meaningful else "CPU (times mean nothing)"
    facts = {**vars(arguments), "out": str(arguments.out), "device": name, "meaningful": meaningful}
    found: dict[str, Any] = {**facts, "torch": torch.__version__, "rows": []}
    table = Table(title=f"Dense attention, {arguments.tokens:,} tokens, on {name}", title_justify="left", box=None)
    for column in ("head_dim", "variant", "forward ms", "TFLOP/s", "backward ms", "TFLOP/s", "errors"):
        table.add_column(column, overflow="fold")
    for dim in arguments.head_dims:
        shape = argparse.Namespace(tokens=arguments.tokens, heads=HEADS[dim], head_dim=dim)
        inputs = make_inputs(shape, arguments.tokens, device)
        for variant, attend in variants(device).items():
            row = {"variant": variant, **time_variant(attend, inputs, arguments.turns)}
            found["rows"].append(row)
            arguments.out.write_text(json.dumps(found, indent=1) + "\n")
            texts = [
                f"{row[kind][part]:.{digits}f}" for part in row["ms"] for kind, digits in (("ms", 2), ("tflops", 0))
            ]
            table.add_row(str(dim), variant, *texts, " ".join(f"{k} {v:.1e}" for k, v in row["errors"].items()))
    console.print(table)


if __name__ == "__main__":
    main()
