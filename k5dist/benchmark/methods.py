"""Costs of the training methods beside plain LoRA: `python -m k5dist.benchmark methods +flavour=… benchmark.blocks=6`.

Each is timed as a run would have it, on one clip of one shape, all in one gang. A method is a name and the overrides
that choose it (`benchmark.methods` picks some); the table in docs/methods.md is made of these.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from k5dist import memory
from k5dist.benchmark.runner import configure, run_gang, store
from k5dist.benchmark.settings import METHODS, PLAIN, Benchmark, plan_benchmark
from k5dist.config import ConfigError
from k5dist.console import say, show_table
from k5dist.estimate import GIB


def time_methods(overrides: Sequence[str]) -> int:
    """Time those of `METHODS` that this device and flavour can, print them side by side and store their figures."""
    from k5dist.benchmark.density import with_density
    from k5dist.hardware import local_facts

    _, settings = configure(overrides)
    names = (
        METHODS if settings.methods is None else [name for name in METHODS if name in settings.methods or name == PLAIN]
    )
    benchmarks: dict[str, Benchmark] = {}
    for name in names:
        try:
            config, settings = configure([*overrides, *METHODS[name]])
            plan = plan_benchmark(config, settings, local_facts(config.cluster))
        except ConfigError as error:
            if name == PLAIN:
                raise
            say(f"left out: {name}: {error.key}={error.value}: {error.rule}")
            continue
        needed = memory.predict(plan.config, plan.world, plan.buckets[0], plan.recompute).total
        if plan.world.device == "cuda" and needed > memory.gpu_bytes(plan.config, plan.world):
            say(f"left out: {name}: it needs about {needed / GIB:.0f} GiB a GPU")
            continue
        settings = dataclasses.replace(settings, profile=False)
        benchmarks[name] = Benchmark(with_density(plan, settings.density), settings, "k5dist")
    plain = benchmarks[PLAIN]
    say(f"timing {len(benchmarks)} methods: {plain.bucket}, {plain.plan.config.model.num_visual_blocks} blocks")
    results = run_gang(list(benchmarks.values()))
    if results is None:
        return 1
    timed = [{"method": name, **result} for name, result in zip(benchmarks, results, strict=False)]
    show_table("methods", _rows(timed))
    store("methods", overrides, plain.plan, plain.settings, timed)
    if len(results) < len(benchmarks):
        say(f"failed: {list(benchmarks)[len(results)]}, and what comes after it was not timed: see above")
    return int(len(results) < len(benchmarks))


def _rows(timed: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    plain = timed[0]["median_step_seconds"]
    rows = []
    for result in timed:
        seconds, memory = result["median_step_seconds"], result["memory"]
        gib, kept = memory["peak_gib"], result["recompute"]
        keeps = f"products kept in {kept['keep']} blocks, attention in {kept['attention']}"
        rows.append((result["method"], f"{seconds:.3f} s ({seconds / plain:.2f} ×), {gib:.1f} GiB, {keeps}"))
    return rows
