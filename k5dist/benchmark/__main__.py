"""`python -m k5dist.benchmark train +flavour=… [benchmark.blocks=…] [benchmark.baseline=diffusers]`.

Every loop is timed by a torchrun gang of its own, so none inherits another's memory or caches. Figures are printed and
stored as JSON.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from k5dist.benchmark.settings import Benchmark, BenchmarkSettings, plan_benchmark
from k5dist.compose import compose
from k5dist.config import ConfigError, RunConfig
from k5dist.console import say, show_table

COMMANDS = ("train", "nabla")


def main(arguments: Sequence[str]) -> int:
    command, *rest = arguments or ("",)
    if command == "nabla":
        from k5dist.benchmark.nabla import main as time_kernels

        time_kernels(rest)
        return 0
    try:
        if command != "train":
            rule = f"one of {', '.join(COMMANDS)}"
            raise ConfigError("command", command, rule, "python -m k5dist.benchmark train +flavour=t2v-tiny")
        return train(rest)
    except ConfigError as error:
        sys.stderr.write(error.block() + "\n")
        return 2


def train(overrides: Sequence[str]) -> int:
    """Time our loop, and the baseline after it if one is asked for."""
    from k5dist.benchmark.density import with_density
    from k5dist.hardware import local_facts

    plain: Any = OmegaConf.to_container(compose(list(overrides), "benchmark"), resolve=True)
    settings = BenchmarkSettings.from_mapping(plain.pop("benchmark"))
    config = RunConfig.from_mapping({str(key): value for key, value in plain.items() if key != "hydra"})
    plan = with_density(plan_benchmark(config, settings, local_facts(config.cluster)), settings.density)
    loops = ["k5dist"] if settings.baseline == "none" else ["k5dist", settings.baseline]
    results = []
    for loop in loops:
        say(f"timing {loop}: {plan.buckets[0]} on {plan.world.size} × {plan.world.gpu_name or 'CPU'}")
        result = _gang(Benchmark(plan, settings, loop))
        if result is None:
            return 1
        results.append(result)
        show_table(loop, _rows(result))
    out = Path(settings.out or f"k5dist-benchmark-{config.flavour.name}.json")
    report = {"command": ["python -m k5dist.benchmark train", *overrides], "config": plan.config.to_mapping()}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report | {"results": results}, indent=2) + "\n")
    say(f"figures: {out}")
    return 0


def _gang(benchmark: Benchmark) -> dict[str, Any] | None:
    with tempfile.TemporaryDirectory() as folder:
        spec, result = Path(folder) / "benchmark.json", Path(folder) / "result.json"
        spec.write_text(benchmark.to_json())
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(benchmark.plan.world.size)]
        status = subprocess.run([*command, "-m", "k5dist.benchmark.train", str(spec), str(result)], check=False)
        return json.loads(result.read_text()) if status.returncode == 0 and result.exists() else None


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
