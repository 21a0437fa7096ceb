"""What the benchmarks of the training step share: their configuration, their gang of workers, their JSON."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from k5dist.benchmark.settings import Benchmark, BenchmarkSettings
from k5dist.compose import compose
from k5dist.config import RunConfig
from k5dist.console import say
from k5dist.plan import RunPlan


def configure(overrides: Sequence[str]) -> tuple[RunConfig, BenchmarkSettings]:
    plain: Any = OmegaConf.to_container(compose(list(overrides), "benchmark"), resolve=True)
    settings = BenchmarkSettings.from_mapping(plain.pop("benchmark"))
    return RunConfig.from_mapping({str(key): value for key, value in plain.items() if key != "hydra"}), settings


def store(
    command: str, overrides: Sequence[str], plan: RunPlan, settings: BenchmarkSettings, results: list[dict[str, Any]]
) -> None:
    out = Path(settings.out or f"k5dist-benchmark-{plan.config.flavour.name}.json")
    report = {"command": [f"python -m k5dist.benchmark {command}", *overrides], "config": plan.config.to_mapping()}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report | {"results": results}, indent=2) + "\n")
    say(f"figures: {out}")


def run_gang(benchmarks: Sequence[Benchmark]) -> list[dict[str, Any]] | None:
    """Time them one after another in one gang of workers: those before the first that failed; None where that was the
    first."""
    with tempfile.TemporaryDirectory() as folder:
        spec, result = Path(folder) / "benchmarks.json", Path(folder) / "result.json"
        spec.write_text(json.dumps([benchmark.to_mapping() for benchmark in benchmarks]))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(benchmarks[0].plan.world.size)]
        subprocess.run([*command, "-m", "k5dist.benchmark.train", str(spec), str(result)], check=False)
        return json.loads(result.read_text()) if result.exists() else None
