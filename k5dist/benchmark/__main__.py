"""`python -m k5dist.benchmark train +flavour=… [benchmark.blocks=…] [benchmark.baseline=diffusers]`.

Every loop is timed by a torchrun gang of its own, so none inherits another's memory or caches. Figures are printed and
stored as JSON. `methods` times every training method beside plain LoRA, `load` a checkpoint's way into the shards; the
others need no run's configuration.
"""

from __future__ import annotations

import dataclasses
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from k5dist.benchmark.methods import time_methods
from k5dist.benchmark.runner import configure, run_gang, store
from k5dist.benchmark.settings import Benchmark, plan_benchmark
from k5dist.config import ConfigError
from k5dist.console import say, show_table

STANDALONE = (
    "nabla",
    "attention",
    "text_attention",
    "vae",
    "text",
    "scale",
    "precache",
    "launch",
)  # these configure no run
COMMANDS = ("train", "methods", "load", *STANDALONE)


def main(arguments: Sequence[str]) -> int:
    command, *rest = arguments or ("",)
    if command in STANDALONE:
        importlib.import_module(f"k5dist.benchmark.{command}").main(rest)
        return 0
    try:
        if command not in COMMANDS:
            rule = f"one of {', '.join(COMMANDS)}"
            raise ConfigError("command", command, rule, "python -m k5dist.benchmark train +flavour=t2v-tiny")
        return {"train": train, "methods": time_methods, "load": load}[command](rest)
    except ConfigError as error:
        sys.stderr.write(error.block() + "\n")
        return 2


def train(overrides: Sequence[str]) -> int:
    """Time our loop, and the baseline after it if one is asked for."""
    from k5dist.benchmark.density import with_density
    from k5dist.hardware import local_facts

    config, settings = configure(overrides)
    plan = with_density(plan_benchmark(config, settings, local_facts(config.cluster)), settings.density)
    loops = ["k5dist"] if settings.baseline == "none" else ["k5dist", settings.baseline]
    results = []
    for loop in loops:
        say(f"timing {loop}: {plan.buckets[0]} on {plan.world.size} × {plan.world.gpu_name or 'CPU'}")
        timed = run_gang([Benchmark(plan, settings, loop)])
        if timed is None:
            return 1
        results += timed
        show_table(loop, _rows(timed[0]))
    store("train", overrides, plan, settings, results)
    return 0


def load(overrides: Sequence[str]) -> int:
    """Time a checkpoint's way from storage into the shards of all workers."""
    from k5dist.benchmark.load import write_checkpoint
    from k5dist.hardware import local_facts

    config, settings = configure(overrides)
    plan = plan_benchmark(config, settings, local_facts(config.cluster))
    if settings.checkpoint is not None:
        folder = write_checkpoint(plan.config.model, Path(settings.checkpoint))
        plan = dataclasses.replace(plan, pretrained=str(folder))
    timed = run_gang([Benchmark(plan, settings, "load")])
    if timed is None:
        return 1
    (result,) = timed
    shard, growth = result["shard_gib"], result["host_growth_gib"]
    rows = [("checkpoint", f"{plan.pretrained}: {result['checkpoint_gib']:.2f} GiB")]
    rows.append(
        ("time", f"{result['seconds']:.1f} s ({result['checkpoint_gib'] / result['seconds']:.2f} GiB a second)")
    )
    rows.append(("host memory", f"{growth:.2f} GiB at most, for a shard of {shard:.2f}"))
    show_table("load", rows)
    store("load", overrides, plan, settings, [result])
    return 0


def _rows(result: dict[str, Any]) -> list[tuple[str, str]]:
    memory, kept = result["memory"], result["density"]
    mfu = "not defined on a CPU" if result["mfu"] is None else f"{result['mfu']:.1%} of the data sheet's bf16 rate"
    rows = [
        ("step", f"{result['median_step_seconds']:.3f} s (first {result['first_step_seconds']:.1f} s)"),
        ("tokens", f"{result['tokens']:,} a clip, {result['tokens_per_second_per_gpu']:,.0f} a second and GPU"),
        ("MFU", mfu if kept == 1 else f"{mfu}, counted on the {kept:.1%} of blocks that NABLA kept"),
        ("peak memory", f"{memory['peak_gib']:.2f} GiB, predicted {memory['predicted_gib']['allocated']:.2f}"),
    ]
    if result["shares"] is not None:
        shown = {kind.replace("_", " "): share for kind, share in result["shares"].items() if share >= 0.001}
        rows.append(("time", ", ".join(f"{kind} {share:.0%}" for kind, share in shown.items())))
    if not result["environment"]["meaningful"]:
        rows.append(("note", "a CPU's figures say nothing about a GPU's: this run only shows that it works"))
    return rows


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
