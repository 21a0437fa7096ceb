"""The whole precache on made-up clips: `python -m k5dist.benchmark precache --out FILE [--clips N] [--shape T H W]`.

Clips of one shape are encoded as H.264 and go the way that every clip goes: manifest, probe, decoding, VAE, shards. On
a GPU the VAE has the full size and random weights, without one it is the tiny flavour's; text encoders are always the
tiny ones. A second pass over the finished cache tells what a run without news costs.

What is counted: samples a second and the share of its time that the VAE's pool is at work, from the first beginning to
the last end, with decoding beside it. Then, on CPUs and with clips as small as can be, what the pipeline itself costs:
CPU seconds of all processes, of which those are no part that probing, decoding and encoding take by themselves. CPU
seconds, and as what many clips take more than a fifth of them: other work on the machine and starting processes do not
count.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import numpy as np

from k5dist import storage
from k5dist.compose import compose, to_run_config
from k5dist.config import RunConfig
from k5dist.console import say, show_table
from k5dist.hardware import local_facts
from k5dist.plan import RunPlan, make_plan

GPU_SHAPE, CPU_SHAPE, SMALL_SHAPE = (61, 512, 768), (17, 64, 96), (5, 16, 16)
SMALL_SHARD_MIB = 0.03125  # 64 such clips: about as many as a shard of real ones holds
DIFFERENT = 4  # clips that are encoded; the others are copies with other bytes at the end
FRAME_RATE = 24
WARM_CLIPS = 64


def make_clips(folder: Path, count: int, shape: tuple[int, int, int]) -> Path:
    """A manifest of `count` files of different content: MP4 players pass over a box named "free"."""
    from k5dist.benchmark.vae import make_frames
    from k5dist.precache.video import encode_mp4

    folder.mkdir(parents=True)
    frames = make_frames(shape).numpy()
    originals = []
    for number in range(min(DIFFERENT, count)):
        path = folder / f"original-{number}.mp4"
        encode_mp4(np.roll(frames, 7 * number, axis=2), path, frame_rate=FRAME_RATE)
        originals.append(path.read_bytes())
        path.unlink()
    rows = []
    for number in range(count):
        name = f"{number:06d}.mp4"
        box = (12).to_bytes(4, "big") + b"free" + number.to_bytes(4, "big")
        (folder / name).write_bytes(originals[number % len(originals)] + box)
        rows.append(json.dumps({"uri": name, "caption": f"noise that moves, the {number % 8}th of its kind"}))
    manifest = folder / "clips.jsonl"
    manifest.write_text("\n".join(rows) + "\n")
    return manifest


def make_checkpoint(folder: Path, config: RunConfig, full: bool) -> None:
    """The tiny flavour's; where `full` with a VAE of the real size and random weights."""
    from k5dist.model.tiny import build_tiny_checkpoint

    build_tiny_checkpoint(folder, task="t2v", architecture=config.to_mapping()["model"])
    if full:
        import torch
        from diffusers import AutoencoderKLHunyuanVideo

        torch.manual_seed(0)
        shutil.rmtree(folder / "vae")
        vae: Any = AutoencoderKLHunyuanVideo()
        vae.to(torch.bfloat16).save_pretrained(folder / "vae")


def plan_for(root: Path, manifest: Path, shape: tuple[int, int, int], overrides: list[str]) -> RunPlan:
    frames, height, width = shape
    config = to_run_config(
        compose(
            [
                *("+flavour=t2v-tiny", "stages=[plan,precache]", f"storage.root={root}", f"data.source={manifest}"),
                *(f"data.num_frames={frames}", f"data.resolution=[{height},{width}]", f"data.frame_rate={FRAME_RATE}"),
                *("cluster.gpus_per_node=null", "precache.shard_size_mib=256", "validation.prompts=[]"),
                *("validation.num_frames=17", "validation.resolution=[64,96]", *overrides),
            ]
        )
    )
    return make_plan(config, local_facts(config.cluster), "benchmark")


@contextlib.contextmanager
def _ray() -> Iterator[None]:
    """A Ray session of this machine, told no more than it needs."""
    import ray

    os.environ |= {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    cores = max(2, os.cpu_count() or 1)
    ray.init("local", num_cpus=cores, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    try:
        yield
    finally:
        ray.shutdown()


def measure(plan: RunPlan, count: int) -> dict[str, Any]:
    """One precache of all clips and one more that finds nothing to do; Ray must be initialised."""
    from k5dist.precache.pipeline import check_source, precache

    began = time.perf_counter()
    summary = precache(plan, check_source(plan))
    seconds = time.perf_counter() - began
    assert summary.total("encoded") == count, summary.rows()
    began = time.perf_counter()
    again = precache(plan, check_source(plan))
    assert again.total("cached_before") == count
    return {
        "clips": count,
        "shape": [plan.buckets[0].frames, plan.buckets[0].height, plan.buckets[0].width],
        "seconds": seconds,
        "again_seconds": time.perf_counter() - began,
        "vae_workers": summary.vae.workers,
        "vae_span_seconds": summary.vae.span,
        "vae_busy": summary.vae.share,
        "vae_seconds_a_sample": summary.vae.seconds / count,
        "samples_a_second": count / summary.vae.span,
        "span_less_vae_ms_a_sample": 1e3 * (summary.vae.span - summary.vae.seconds / summary.vae.workers) / count,
    }


def measure_overhead(root: Path, clips: int, overrides: list[str]) -> dict[str, float]:
    """CPU milliseconds a sample of everything, and of its parts alone; Ray must be initialised.

    Two precaches, one of a fifth of the clips: what the second takes more is the samples' and no start's. One before
    them has started Ray's workers and what they import.
    """
    _cpu_seconds_of(_small_plan(root / "warm", WARM_CLIPS, overrides), WARM_CLIPS)
    plans = [_small_plan(root / str(count), count, overrides) for count in (clips // 5, clips)]
    spent = [_cpu_seconds_of(plan, count) for plan, count in zip(plans, (clips // 5, clips), strict=True)]
    total = 1e3 * (spent[1] - spent[0]) / (clips - clips // 5)
    alone = _stages_alone(plans[1], min(clips, 1000))
    return {
        "total_cpu_ms": total,
        **alone,
        "all_but_vae_cpu_ms": total - alone["vae_cpu_ms"],
        "pipeline_cpu_ms": total - sum(alone.values()),
    }


def _small_plan(root: Path, clips: int, overrides: list[str]) -> RunPlan:
    manifest = make_clips(root / "clips", clips, SMALL_SHAPE)
    plan = plan_for(root, manifest, SMALL_SHAPE, [f"precache.shard_size_mib={SMALL_SHARD_MIB}", *overrides])
    make_checkpoint(Path(storage.normalise(plan.config.pretrained)), plan.config, full=False)
    return plan


def _cpu_seconds_of(plan: RunPlan, clips: int) -> float:
    from k5dist.precache.pipeline import check_source, precache

    with _CpuUsage() as usage:
        summary = precache(plan, check_source(plan))
    assert summary.total("encoded") == clips, summary.rows()
    return usage.seconds


class _CpuUsage:
    """CPU seconds of this process and of all below it while its `with` lasts, but for what looking at them takes.

    What ends in between keeps what it was last seen to have used.
    """

    _SECONDS = 0.5  # between looks

    def __init__(self) -> None:
        self.seconds = 0.0
        self._used: dict[tuple[int, float], float] = {}  # by process
        self._over = threading.Event()
        self._own = 0.0
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._look()
        self.seconds = -sum(self._used.values())
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self._look()
        self.seconds += sum(self._used.values()) - self._own

    def _watch(self) -> None:
        while not self._over.wait(self._SECONDS):
            self._look()
        self._own = time.thread_time()

    def _look(self) -> None:
        import psutil

        here, others = psutil.Process(), []
        with contextlib.suppress(psutil.Error):
            others = here.children(recursive=True)
        for process in [here, *others]:
            with contextlib.suppress(psutil.Error):
                times = process.cpu_times()
                self._used[process.pid, process.create_time()] = times.user + times.system


def _stages_alone(plan: RunPlan, count: int) -> dict[str, float]:
    """CPU milliseconds a sample of what is done to the clips themselves, in this process."""
    import torch

    from k5dist.precache import stages
    from k5dist.precache.pipeline import check_source

    torch.set_num_threads(1)
    rows = check_source(plan).rows.slice(0, count).drop_columns(["captions"]).to_pylist()
    rows = [row | {"error": "", "stage": "", "key": ""} for row in rows]
    datasets = {dataset.name: dataset for dataset in plan.config.datasets}
    facts = {"pretrained": plan.pretrained_identity, "first_frame": False}
    vae = stages.VaeStage(plan.pretrained, "cpu", False)
    vae(stages.decode_row(stages.probe_clip(rows[0], datasets=datasets, unit=plan.config.side_unit, facts=facts)[0]))
    took = []
    began = time.process_time()
    for work in (
        lambda row: stages.probe_clip(row, datasets=datasets, unit=plan.config.side_unit, facts=facts)[0],
        stages.decode_row,
        vae,
    ):
        rows = [work(row) for row in rows]
        took.append(time.process_time() - began)
        began = time.process_time()
    assert not any(row["error"] for row in rows)
    names = ("probe_cpu_ms", "decode_cpu_ms", "vae_cpu_ms")
    return {name: 1e3 * seconds / count for name, seconds in zip(names, took, strict=True)}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m k5dist.benchmark precache", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON file")
    parser.add_argument("--clips", type=int, help="default: 96 a GPU, 64 without one; 0: none")
    parser.add_argument("--small-clips", type=int, default=6000, help="for the pipeline's own part; 0: none")
    parser.add_argument("--shape", type=int, nargs=3, metavar=("T", "H", "W"))
    parser.add_argument("overrides", nargs="*", help="configuration, as of k5dist.launch: precache.vae_gpus=0.5")
    arguments = parser.parse_args(argv)
    gpus = local_facts(
        to_run_config(compose(["+flavour=t2v-tiny", "cluster.gpus_per_node=null"])).cluster
    ).gpus_per_node
    shape = tuple(arguments.shape or (GPU_SHAPE if gpus else CPU_SHAPE))
    if arguments.clips is None:
        arguments.clips = 96 * gpus or 64
    found: dict[str, Any] = {"gpus": gpus, "cores": os.cpu_count(), "overrides": arguments.overrides}
    with tempfile.TemporaryDirectory(prefix="k5dist-precache-") as scratch:
        if arguments.clips:
            found["clips"] = _measure_clips(Path(scratch) / "clips", arguments.clips, shape, arguments.overrides)
        if arguments.small_clips:
            say(f"the pipeline's own part: {arguments.small_clips} of {'×'.join(map(str, SMALL_SHAPE))}")
            with _ray():
                root, changes = Path(scratch) / "small", ["cluster.gpus_per_node=0", *arguments.overrides]
                found["overhead"] = measure_overhead(root, arguments.small_clips, changes)
            show_table("CPU a sample", [(name, f"{value:.2f} ms") for name, value in found["overhead"].items()])
    arguments.out.write_text(json.dumps(found, indent=1) + "\n")
    say(f"figures: {arguments.out}")


def _measure_clips(root: Path, count: int, shape: tuple[int, ...], overrides: list[str]) -> dict[str, Any]:
    say(f"clips: making {count} of {'×'.join(map(str, shape))}")
    frames, height, width = shape
    manifest = make_clips(root / "clips", count, (frames, height, width))
    plan = plan_for(root, manifest, (frames, height, width), overrides)
    make_checkpoint(Path(storage.normalise(plan.config.pretrained)), plan.config, plan.world.device == "cuda")
    with _ray():
        result = measure(plan, count)
    shutil.rmtree(root)
    show_table("clips", _rows(result))
    return result


def _rows(result: dict[str, Any]) -> list[tuple[str, str]]:
    span = f"{result['samples_a_second']:.2f} samples a second over {result['vae_span_seconds']:.1f} s"
    return [
        ("clips", f"{result['clips']} in {result['seconds']:.1f} s; nothing to do: {result['again_seconds']:.1f} s"),
        ("VAE", f"{result['vae_workers']} workers, busy {result['vae_busy']:.1%}: {span}"),
        (
            "a sample",
            f"VAE {1e3 * result['vae_seconds_a_sample']:.1f} ms, waits {result['span_less_vae_ms_a_sample']:.1f}",
        ),
    ]


if __name__ == "__main__":
    main()
