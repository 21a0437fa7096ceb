"""Where a step's time goes, from a profiler's trace: attention, linear layers, communication, the rest, idle."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from torch.autograd import DeviceType

Interval = tuple[float, float]

_KINDS = (
    # The compiler names what it fuses after every operator in it, those beside it too.
    ("other", r"^triton_(poi|red|per)_"),
    ("communication", r"nccl|gloo|c10d|all_gather|reduce_scatter|all_to_all|allreduce"),
    ("attention", r"flash|fmha|sdpa|scaled_dot_product|flex_attention|compute_dot_do_o|convert_dq|nabla"),
    # Of `k5dist.model.nabla_kernels_triton` and `nabla_blocks_triton`.
    ("attention", r"\b(forward|forward_online|dkdv|dq|_mean|_row_product|_keep|_row_list|_column_list)_kernel\b"),
    ("attention", r"text_attention|\btext_(forward|dq|dkdv)_kernel\b"),  # `k5dist.model.text_attention`'s
    ("linear", r"gemm|gemv|nvjet|cutlass|xmma|addmm|::mm|::bmm|fused_mm|splitk|scaled_mm"),
)
KINDS = ("attention", "linear", "other", "communication")


def kind_of(name: str) -> str:
    """Which kind of work a kernel (or, on a CPU, an operator) does, by its name."""
    lowered = name.lower()
    return next((kind for kind, pattern in _KINDS if re.search(pattern, lowered)), "other")


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """The same stretch of time as disjoint intervals, in order."""
    merged: list[Interval] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def length(intervals: Sequence[Interval]) -> float:
    return sum(end - start for start, end in intervals)


def shares_of(work: Sequence[tuple[str, Interval]], seconds: float) -> dict[str, float]:
    """Shares of `seconds` by kind.

    Communication counts where nothing else runs ("communication"); what hides behind other work is told apart
    ("communication_hidden", not part of the sum). `idle` is when the device does nothing at all.
    """
    by_kind: dict[str, list[Interval]] = {kind: [] for kind in KINDS}
    for name, interval in work:
        by_kind[kind_of(name)].append(interval)
    merged = {kind: union(intervals) for kind, intervals in by_kind.items()}
    computing = union(i for kind in ("attention", "linear", "other") for i in merged[kind])
    busy = length(union([*computing, *merged["communication"]]))
    exposed = busy - length(computing)
    shares = {kind: length(merged[kind]) / seconds for kind in ("attention", "linear", "other")}
    shares |= {"communication": exposed / seconds, "idle": max(0.0, 1 - busy / seconds)}
    return shares | {"communication_hidden": (length(merged["communication"]) - exposed) / seconds}


def longest_kernels(work: Iterable[tuple[str, Interval]], count: int = 40) -> list[dict[str, Any]]:
    """The kernels that took the most time: name, kind, number of calls and milliseconds of all of them together."""
    seconds: dict[str, list[float]] = {}
    for name, (start, end) in work:
        seconds.setdefault(name, []).append(end - start)
    longest = sorted(seconds.items(), key=lambda item: -sum(item[1]))[:count]
    return [
        {"name": name, "kind": kind_of(name), "calls": len(each), "ms": round(1e3 * sum(each), 3)}
        for name, each in longest
    ]


def device_work(profile: Any) -> list[tuple[str, Interval]]:
    """Kernels (name, start and end in seconds) of a finished `torch.profiler.profile`."""
    return [
        (event.name, (event.time_range.start * 1e-6, event.time_range.end * 1e-6))
        for event in profile.events()
        if event.device_type == DeviceType.CUDA and event.time_range.elapsed_us() > 0
    ]


def operator_shares(profile: Any, seconds: float) -> dict[str, float]:
    """The same on a CPU, from each operator's own time; threads overlap, so these are rough."""
    totals: dict[str, float] = dict.fromkeys(KINDS, 0.0)
    for average in profile.key_averages():
        totals[kind_of(average.key)] += average.self_cpu_time_total * 1e-6
    shares = {kind: total / seconds for kind, total in totals.items()}
    return shares | {"idle": max(0.0, 1 - sum(shares.values())), "communication_hidden": 0.0}
