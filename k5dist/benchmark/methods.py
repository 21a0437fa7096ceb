"""Costs of the training methods beside plain LoRA: `python -m k5dist.benchmark methods +flavour=… benchmark.blocks=6`.

Each is timed as a run would have it, on one clip of one shape, all in one gang. A method is a name and the overrides
that choose it; the table in docs/methods.md is made of these.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from k5dist.benchmark.density import with_density
from k5dist.benchmark.runner import configure, run_gang, store
from k5dist.benchmark.settings import Benchmark, plan_benchmark
from k5dist.config import ConfigError
from k5dist.console import say, show_table

PLAIN = "LoRA"
_FULL = ("adapter=full", "optimizer.lr=1e-5")
_ROLLOUT = ("rollout.probability=1", "rollout.start_step=0", "rollout.ramp_steps=1", "rollout.min_sigma=1e-3")
METHODS: dict[str, tuple[str, ...]] = {
    PLAIN: (),
    "LoRA, attention and FFN": ("lora.targets=attention+ffn",),
    "LoRA, dropout": ("lora.dropout=0.1",),
    "DoRA": ("lora.use_dora=true",),
    "LoRA, base in int8": ("lora.base_dtype=int8",),
    "LoRA, base in float8": ("lora.base_dtype=float8",),
    "TREAD, half of the tokens": ("tread.routes=[{selection_ratio:0.5,start_layer_idx:2,end_layer_idx:-2}]",),
    "CREPA": ("crepa.enabled=true", "crepa.block_index=1"),
    "rollout of one step, every clip": (*_ROLLOUT, "rollout.max_steps=1"),
    "EMA": ("ema.enabled=true",),
    "full recomputation": ("train.activation_checkpointing=full",),
    "attention kept": ("train.activation_checkpointing=attention",),
    "weights streamed": ("train.stream_weights=true",),
    "float8 linear layers": ("train.float8=true",),
    "full, adamw_bf16": (*_FULL, "optimizer.kind=adamw_bf16"),
    "full, adamw_bf16, EMA": (*_FULL, "optimizer.kind=adamw_bf16", "ema.enabled=true"),
    "full, adamw": (*_FULL, "optimizer.kind=adamw"),
    "full, adamw_8bit": (*_FULL, "optimizer.kind=adamw_8bit"),
    "full, adafactor": (*_FULL, "optimizer.kind=adafactor", "optimizer.lr=1e-2"),
    "full, adamw_schedulefree": (*_FULL, "optimizer.kind=adamw_schedulefree"),
    "full, prodigy": (*_FULL, "optimizer.kind=prodigy", "optimizer.lr=1"),
    "full, muon": (*_FULL, "optimizer.kind=muon"),
}


def time_methods(overrides: Sequence[str]) -> int:
    """Time all of `METHODS` that this device and flavour can, print them side by side and store their figures."""
    from k5dist.hardware import local_facts

    benchmarks: dict[str, Benchmark] = {}
    for name, words in METHODS.items():
        try:
            config, settings = configure([*overrides, *words])
            settings = dataclasses.replace(settings, profile=False)
            plan = plan_benchmark(config, settings, local_facts(config.cluster))
        except ConfigError as error:
            say(f"left out: {name}: {error.key}={error.value}: {error.rule}")
            continue
        benchmarks[name] = Benchmark(with_density(plan, settings.density), settings, "k5dist")
    plain = benchmarks[PLAIN]
    say(f"timing {len(benchmarks)} methods: {plain.bucket}, {plain.plan.config.model.num_visual_blocks} blocks")
    results = run_gang(list(benchmarks.values()))
    if results is None:
        return 1
    timed = [{"method": name, **result} for name, result in zip(benchmarks, results, strict=True)]
    show_table("methods", _rows(timed))
    store("methods", overrides, plain.plan, plain.settings, timed)
    return 0


def _rows(timed: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    plain = timed[0]["median_step_seconds"]
    rows = []
    for result in timed:
        seconds, memory = result["median_step_seconds"], result["memory"]
        gib, kept = memory["peak_gib"], result["recompute"]
        keeps = f"products kept in {kept['keep']} blocks, attention in {kept['attention']}"
        rows.append((result["method"], f"{seconds:.3f} s ({seconds / plain:.2f} ×), {gib:.1f} GiB, {keeps}"))
    return rows
