"""Sweep and timing of NABLA's kernels alone: `python -m k5dist.benchmark.nabla --out FILE`.

Each variant of each kernel is first held against an fp64 reference on a few sampled blocks (a wrong or failing variant
is reported and skipped, never timed), then timed; so are the map and its parts and the block lists. What wins goes
into `k5dist.model.nabla_triton.DEFAULTS`. With TRITON_INTERPRET=1 and `--quick` it runs on a CPU, whose times mean
nothing.

TFLOP/s count kept pairs of 64-token blocks: 4 · 64 · 64 · D floating point operations forward, 2.5 times that backward
(shared out between dk/dv and dq as 4 to 3, the matrix products that each does).

Shape suffixes: B batch, S tokens, H heads, D head_dim, N blocks of 64 tokens, W = ceil(N / 32) words of a row's bits.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from k5dist.console import console, say
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

ERROR_LIMIT = 1e-2  # bf16's noise on these sums is 2e-3 to 3e-3
SAMPLES = 4  # blocks held against the reference, in as many heads
BACKWARD_SHARES = {"dkdv": 4 / 7, "dq": 3 / 7}  # of the counted backward, by products done
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "forward": [
        {"resident": 1, "ahead": True, "num_stages": 3, "passes": 1},
        {"resident": 1, "ahead": True, "num_stages": 3, "passes": 2},
        {"resident": 1, "ahead": True, "num_stages": 3, "passes": 3},
        {"resident": 1, "ahead": True, "num_stages": 3, "passes": 5},
        {"resident": 1, "ahead": True, "num_stages": 2, "passes": 2},
        {"resident": 0, "ahead": True, "num_stages": 2, "passes": 2},
        {"resident": 1, "num_stages": 3, "passes": 2},
        {"resident": 1, "num_stages": 2, "passes": 2},
        {"resident": 1, "num_stages": 2, "passes": 2, "max_registers": 168},
        {"resident": 0, "num_stages": 2, "passes": 1},
        {"resident": 1, "ahead": True, "num_stages": 2, "passes": 2, "tma": False},
    ],
    "dkdv": [
        {"resident": 1, "passes": 1},
        {"resident": 1, "passes": 2},
        {"resident": 1, "passes": 3},
        {"resident": 0, "passes": 1},
        {"resident": 0, "passes": 2},
        {"resident": 0, "passes": 1, "num_stages": 1},
        {"resident": 0, "passes": 1, "tma": False},
    ],
    "dq": [
        {"resident": 2, "num_stages": 3, "passes": 1},
        {"resident": 2, "num_stages": 3, "passes": 2},
        {"resident": 2, "num_stages": 3, "passes": 3},
        {"resident": 2, "passes": 2},
        {"resident": 1, "passes": 2},
        {"resident": 0, "passes": 1},
    ],
}


@dataclass(frozen=True)
class Problem:
    """One clip's attention: q, k RMS-normed as in the model, v and the output's gradient, and the kept blocks' bits."""

    query_BSHD: Tensor
    key_BSHD: Tensor
    value_BSHD: Tensor
    grad_BSHD: Tensor
    words_BHNW: Tensor

    @property
    def num_blocks(self) -> int:
        return self.words_BHNW.shape[2]

    def flops(self) -> float:
        """Forward."""
        kept = density(self.words_BHNW, self.num_blocks).item() * self.words_BHNW[..., 0].numel() * self.num_blocks
        return 4 * BLOCK_TOKENS**2 * self.query_BSHD.shape[-1] * kept


def make_mask(kind: str, heads: int, num_blocks: int, share: float, device: torch.device) -> Tensor:
    """bool [1, H, N, N] with about `share` kept: at random, or half of it around the diagonal and half at random."""
    near = torch.eye(num_blocks, dtype=torch.bool, device=device)
    if kind == "local":
        at = torch.arange(num_blocks, device=device)
        near |= (at[:, None] - at[None, :]).abs() <= max(1, round(share * num_blocks / 4))
        share = max(0.0, share - near.float().mean().item()) / (1 - near.float().mean().item())
    generator = torch.Generator(device).manual_seed(1)
    masks = [torch.rand(num_blocks, num_blocks, device=device, generator=generator) < share for _ in range(heads)]
    return (torch.stack(masks) | near)[None]


def make_problem(arguments: argparse.Namespace, device: torch.device) -> Problem:
    generator = torch.Generator(device).manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    shape = (1, arguments.tokens, arguments.heads, arguments.head_dim)
    q, k, v, grad = (torch.randn(shape, device=device, dtype=dtype, generator=generator) for _ in range(4))
    q, k = (torch.nn.functional.rms_norm(x, shape[-1:]) for x in (q, k))
    num_blocks = arguments.tokens // BLOCK_TOKENS
    return Problem(
        q, k, v, grad, pack_bits(make_mask(arguments.map, arguments.heads, num_blocks, arguments.density, device))
    )


def error(got: Tensor, expected: Tensor) -> float:
    return ((got.double() - expected).norm() / expected.norm()).item()


class Sampled:
    """The reference in fp64 for one query block and one key block in each of a few heads."""

    def __init__(self, problem: Problem) -> None:
        heads, last = problem.query_BSHD.shape[2], problem.num_blocks - 1
        self.problem = problem
        self.places = [(h * (heads - 1) // (SAMPLES - 1), h * last // (SAMPLES - 1)) for h in range(SAMPLES)]
        self.scale = 1 / math.sqrt(problem.query_BSHD.shape[-1])

    def _tokens(self, x_BSHD: Tensor, head: int, blocks: Tensor) -> Tensor:
        """The blocks' tokens of one head, fp64 [n, D]."""
        return x_BSHD[0, :, head].unflatten(0, (-1, BLOCK_TOKENS))[blocks].flatten(0, 1).double()

    def _seen(self, head: int, block: int, transposed: bool) -> Tensor:
        mask = unpack_bits(self.problem.words_BHNW[0, head], self.problem.num_blocks)
        return (mask[:, block] if transposed else mask[block]).nonzero().flatten()

    def forward(self, out_BSHD: Tensor, lse_BHS: Tensor) -> dict[str, float]:
        errors = {"out": 0.0, "lse": 0.0}
        for head, block in self.places:
            own = torch.tensor([block], device=out_BSHD.device)
            seen = self._seen(head, block, transposed=False)
            q = self._tokens(self.problem.query_BSHD, head, own)
            k, v = (self._tokens(x, head, seen) for x in (self.problem.key_BSHD, self.problem.value_BSHD))
            logits = q @ k.T * self.scale
            got = self._tokens(out_BSHD, head, own)
            got_lse = lse_BHS[0, head].unflatten(0, (-1, BLOCK_TOKENS))[block]
            found = error(got, logits.softmax(-1) @ v), error(got_lse, logits.logsumexp(-1) * math.log2(math.e))
            errors = {name: _worse(errors[name], new) for name, new in zip(errors, found, strict=True)}
        return errors

    def backward(self, out_BSHD: Tensor, lse_BHS: Tensor, grads: dict[str, Tensor]) -> dict[str, float]:
        """From the forward's own out and lse, which were held against the reference before."""
        errors = dict.fromkeys(grads, 0.0)
        for head, block in self.places:
            own = torch.tensor([block], device=out_BSHD.device)
            for transposed in (False, True):
                seen = self._seen(head, block, transposed)
                rows, columns = (seen, own) if transposed else (own, seen)
                problem = self.problem
                tensors = (problem.query_BSHD, problem.grad_BSHD, out_BSHD)
                q, grad, out = (self._tokens(x, head, rows) for x in tensors)
                k, v = (self._tokens(x, head, columns) for x in (problem.key_BSHD, problem.value_BSHD))
                lse = lse_BHS[0, head].unflatten(0, (-1, BLOCK_TOKENS))[rows].flatten().double()
                p = torch.exp2(q @ k.T * (self.scale * math.log2(math.e)) - lse[:, None])
                ds = p * (grad @ v.T - (grad * out).sum(-1, keepdim=True)) * self.scale
                expected = {"dk": ds.T @ q, "dv": p.T @ grad} if transposed else {"dq": ds @ k}
                for name in expected.keys() & grads.keys():
                    new = error(self._tokens(grads[name], head, own), expected[name])
                    errors[name] = _worse(errors[name], new)
        return errors


def _worse(a: float, b: float) -> float:
    return max(a, b) if math.isfinite(b) else math.inf


def milliseconds(work: Callable[[], object], device: torch.device, turns: int) -> float:
    """Median time of one call, after one more to warm up."""
    work()
    times = []
    for _ in range(turns):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            work()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        else:
            begin = time.perf_counter()
            work()
            times.append(1e3 * (time.perf_counter() - begin))
    return sorted(times)[len(times) // 2]


class Sweep:
    """Tries one thing after another and keeps what it found, on disk after each."""

    def __init__(self, problem: Problem, path: Path, facts: dict[str, Any], turns: int) -> None:
        self.problem, self.path, self.turns = problem, path, turns
        self.device = problem.query_BSHD.device
        self.found: dict[str, Any] = {**facts, "rows": []}

    def add(
        self, kernel: str, variant: dict[str, Any], work: Callable[[], Any], flops: float = 0.0,
        check: Callable[[Any], dict[str, float]] | None = None,
    ) -> None:  # fmt: skip
        row: dict[str, Any] = {"kernel": kernel, "variant": variant}
        begin = time.perf_counter()
        try:
            result = work()
            errors = check(result) if check else {}
            row["first_call_s"] = round(time.perf_counter() - begin, 2)
            row["errors"] = errors
            del result
            if any(not value < ERROR_LIMIT for value in errors.values()):
                row["failed"] = "wrong result"
            else:
                row["ms"] = milliseconds(work, self.device, self.turns)
                if flops:
                    row["tflops"] = flops / row["ms"] / 1e9
        except Exception as failure:  # one variant that does not fit this GPU must not end the sweep
            row["failed"] = f"{type(failure).__name__}: {failure}"[:300]
        self.found["rows"].append(row)
        self.path.write_text(json.dumps(self.found, indent=1))
        say(f"{kernel} {variant}: {row.get('failed') or format(row['ms'], '.3f') + ' ms'}")

    def show(self) -> None:
        table = Table(title=f"NABLA kernels on {self.found['device']}", title_justify="left", box=None)
        for name in ("kernel", "variant", "ms", "TFLOP/s", "errors"):
            table.add_column(name, overflow="fold")
        for row in self.found["rows"]:
            variant = " ".join(f"{k}={v}" for k, v in row["variant"].items())
            errors = row.get("failed") or " ".join(f"{k} {v:.1e}" for k, v in row["errors"].items())
            numbers = [format(row[k], ".3g") if k in row else "–" for k in ("ms", "tflops")]
            table.add_row(row["kernel"], variant, *numbers, errors)
        console.print(table)


def sweep_attention(sweep: Sweep, quick: bool) -> None:
    from k5dist.model.nabla_blocks_triton import row_products
    from k5dist.model.nabla_triton import Variant, backward, forward, launch_backward

    problem, reference = sweep.problem, Sampled(sweep.problem)
    inputs = (problem.query_BSHD, problem.key_BSHD, problem.value_BSHD)
    flops, words = problem.flops(), problem.words_BHNW
    variants = {name: several[:: 4 if quick else 1] for name, several in VARIANTS.items()}
    sweep.add("forward", {"default": True}, lambda: forward(*inputs, words), flops, lambda r: reference.forward(*r))
    for fields in variants["forward"]:
        variant = Variant(**fields)
        work = lambda v=variant: forward(*inputs, words, v)  # noqa: E731
        sweep.add("forward", asdict(variant), work, flops, lambda r: reference.forward(*r))
    out, lse = forward(*inputs, words)
    arguments = (problem.grad_BSHD, *inputs, out, lse, words)

    def check(names: tuple[str, ...]) -> Callable[[Any], dict[str, float]]:
        return lambda grads: reference.backward(out, lse, dict(zip(names, grads, strict=True)))

    sweep.add("backward", {"default": True}, lambda: backward(*arguments), 2.5 * flops, check(("dq", "dk", "dv")))
    statistics = (lse, row_products(out, problem.grad_BSHD))
    for kernel, names in (("dkdv", ("dk", "dv")), ("dq", ("dq",))):
        counted = 2.5 * flops * BACKWARD_SHARES[kernel]
        for fields in variants[kernel]:
            variant = Variant(**fields)
            work = lambda k=kernel, v=variant: launch_backward(k, v, *arguments[:4], statistics, words)  # noqa: E731
            sweep.add(kernel, asdict(variant), work, counted, check(names))


def sweep_local(sweep: Sweep, share: float) -> None:
    """The defaults once more where neighbours see each other, as a trained model's maps have it."""
    from k5dist.model.nabla_triton import backward, forward

    old = sweep.problem
    mask = make_mask("local", old.words_BHNW.shape[1], old.num_blocks, share, sweep.device)
    problem = replace(old, words_BHNW=pack_bits(mask))
    inputs = (problem.query_BSHD, problem.key_BSHD, problem.value_BSHD)
    flops, words = problem.flops(), problem.words_BHNW
    out, lse = forward(*inputs, words)
    sweep.add("forward", {"map": "local"}, lambda: forward(*inputs, words), flops)
    work = lambda: backward(problem.grad_BSHD, *inputs, out, lse, words)  # noqa: E731
    sweep.add("backward", {"map": "local"}, work, 2.5 * flops)


def sweep_rest(sweep: Sweep) -> None:
    """The map and its parts, lists, and the whole operator with autograd."""
    from k5dist.model.nabla_blocks_triton import block_lists, block_means, keep

    problem = sweep.problem
    num_blocks, device = problem.num_blocks, sweep.device
    window = pack_bits(sliding_tile_window((num_blocks, 1, 1), (11, 3, 3), device))
    parameters = NablaParameters(0.8, window)
    sweep.add("map", {}, lambda: nabla_map(problem.query_BSHD, problem.key_BSHD, parameters))
    sweep.add("map: means of q", {}, lambda: block_means(problem.query_BSHD))
    query, key = (block_means(x)[0, :4] for x in (problem.query_BSHD, problem.key_BSHD))
    sweep.add("map: scores, 4 heads", {}, lambda: query @ key.transpose(-2, -1))
    scores = (query @ key.transpose(-2, -1)).contiguous()
    words = problem.words_BHNW[0, : len(scores)].clone()
    sweep.add("map: rows, 4 heads", {}, lambda: keep(scores, window, words, 0, 0.1, 0.8))
    eight = problem.words_BHNW[0, :8]
    for transposed in (False, True):
        options = {"transposed": transposed, "passes": 2}
        sweep.add("lists, 8 heads", options, lambda o=options: block_lists(eight, **o))

    inputs = (problem.query_BSHD, problem.key_BSHD, problem.value_BSHD)

    def whole() -> None:
        query, key, value = (x.detach().requires_grad_() for x in inputs)
        nabla_attention(query, key, value, problem.words_BHNW).backward(problem.grad_BSHD)

    sweep.add("operator, forward and backward", {}, whole, 3.5 * problem.flops())


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m k5dist.benchmark.nabla", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON file, written anew after every row")
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=119_040)
    parser.add_argument("--head-dim", type=int, default=128, choices=(64, 128))
    parser.add_argument("--density", type=float, default=0.2)
    parser.add_argument("--map", choices=("random", "local"), default="random")
    parser.add_argument("--turns", type=int, default=3, help="timed calls of each, whose median counts")
    parser.add_argument("--quick", action="store_true", help="every fourth variant; on a CPU a tiny problem")
    arguments = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        if not arguments.quick:
            parser.error("without a GPU only --quick runs, under TRITON_INTERPRET=1, and its times mean nothing")
        arguments.heads, arguments.tokens, arguments.turns = 2, 4 * BLOCK_TOKENS, 1
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU (interpreter: times mean nothing)"
    facts = {**vars(arguments), "out": str(arguments.out), "device": name, "torch": torch.__version__}
    problem = make_problem(arguments, device)
    facts["kept"] = density(problem.words_BHNW, problem.num_blocks).item()
    sweep = Sweep(problem, arguments.out, facts, arguments.turns)
    sweep_attention(sweep, arguments.quick)
    if arguments.map != "local":
        sweep_local(sweep, arguments.density)
    sweep_rest(sweep)
    sweep.show()


if __name__ == "__main__":
    main()
