"""Timing the training step: random weights, made-up clips, and the very `TrainStep` that a run uses.

`torchrun … -m k5dist.benchmark.train <benchmarks.json> <result.json>` is a worker; `python -m k5dist.benchmark train`
writes the first, a list, and reads the second.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import math
import platform
import resource
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from k5dist import memory
from k5dist.benchmark.baseline import build_baseline
from k5dist.benchmark.density import measured_density
from k5dist.benchmark.load import time_loading
from k5dist.benchmark.settings import Benchmark
from k5dist.benchmark.shares import device_work, longest_kernels, operator_shares, shares_of
from k5dist.cache.keys import seed_of
from k5dist.config import RunConfig, TreadConfig
from k5dist.console import say
from k5dist.estimate import GIB, clip_flops, gpu_facts
from k5dist.model.dit import VideoTransformer
from k5dist.model.forward import Text
from k5dist.model.quantised import quantised_layers
from k5dist.model.transformer import adapt, add_head, allocate
from k5dist.model.weights import fill_shard, is_adapter
from k5dist.train.ema import Ema
from k5dist.train.feed import Step, pinned
from k5dist.train.objective import Clip, Objective
from k5dist.train.optimiser import make_optimiser, trained_dtype
from k5dist.train.parallelise import compute_dtype, make_mesh, parallelise
from k5dist.train.step import TrainStep
from k5dist.train.worker import start_process_group


def main(spec_path: str, result_path: str) -> int:
    benchmarks = [Benchmark.from_mapping(body) for body in json.loads(Path(spec_path).read_text())]
    device = start_process_group(benchmarks[0].plan)
    results = []
    for number, benchmark in enumerate(benchmarks, 1):
        results.append(_alone(benchmark, device))
        if dist.get_rank() == 0:
            Path(result_path).write_text(json.dumps(results))  # each time: what fails later takes nothing with it
        if dist.get_rank() == 0 and len(benchmarks) > 1:
            peak, seconds = results[-1]["memory"]["peak_gib"], results[-1]["median_step_seconds"]
            say(f"{number} of {len(benchmarks)}: {seconds:.3f} s a step, {peak:.2f} GiB")
    dist.barrier()
    dist.destroy_process_group()
    return 0


def _alone(benchmark: Benchmark, device: torch.device) -> dict[str, Any]:
    """With graphs and memory as if it were the only one (compiled kernels stay on disk)."""
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return time_loading(benchmark, device) if benchmark.loop == "load" else measure(benchmark, device)


def measure(benchmark: Benchmark, device: torch.device) -> dict[str, Any]:
    """Time one loop on all workers; rank 0's own figures (its peak memory is the workers' largest)."""
    plan, settings = benchmark.plan, benchmark.settings
    config = plan.config
    transformer = build(benchmark, device)
    objective = make_objective(config, device, ours=benchmark.loop == "k5dist")
    optimiser = make_optimiser(transformer, config.optimizer, device, objective.dtype)
    work = TrainStep(plan, transformer, optimiser, objective, None)
    average = Ema(transformer, config.ema) if config.ema.enabled else None
    clip = make_clip(benchmark)
    losses, norms, seconds = [], [], []
    for number in range(1, settings.warmup + settings.steps + 1):
        if number == settings.warmup + 1 and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        loss, norm = work.update(make_step(clip, plan.batch_size, number), number)
        if average is not None:
            average.update(number)
            _wait(device)
        seconds.append(time.perf_counter() - started)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            # Nothing that is timed after it would mean anything: a GPU that multiplies NaNs draws less power.
            raise FloatingPointError(f"step {number}: the loss is {loss}, the gradient's norm {norm}")
        losses.append(loss)
        norms.append(norm)
    peak = peak_memory(device)
    kept = measured_density(work, clip) if config.model.is_sparse and benchmark.loop == "k5dist" else 1.0
    shares, kernels = profile_step(work, clip, len(losses) + 1, device) if settings.profile else (None, None)
    return {
        "loop": benchmark.loop,
        "first_step_seconds": seconds[0],
        "step_seconds": seconds[settings.warmup :],
        "losses": losses,
        "gradient_norms": norms,
        "shares": shares,
        "kernels": kernels,
        "memory": peak | {"predicted_gib": predicted(benchmark)},
        "recompute": dataclasses.asdict(plan.recompute) if benchmark.loop == "k5dist" else "everything",
        **speed(benchmark, statistics.median(seconds[settings.warmup :]), kept, device),
        "environment": environment(device),
    }


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def build(benchmark: Benchmark, device: torch.device) -> nn.Module:
    """The loop's model, sharded, with random weights."""
    plan = benchmark.plan
    config, dtype = plan.config, compute_dtype(plan.config.train)
    mesh = make_mesh(plan.world)
    if benchmark.loop == "diffusers":
        transformer: nn.Module = build_baseline(config, mesh, dtype)
    else:
        lora = config.lora if config.adapter == "lora" else None
        with torch.device("meta"):
            transformer = VideoTransformer(config.model)
        trained = trained_dtype(config.optimizer)
        adapt(transformer, lora, dtype, trained)
        add_head(transformer, config.model, config.crepa, config.crepa.feature_dim, trained)
        parallelise(transformer, mesh, config.train, plan.recompute)
    stream = allocate(transformer, device)
    randomise(transformer, device)
    if stream is not None:
        stream.start()
    return transformer.train()


@torch.no_grad()
def randomise(transformer: nn.Module, device: torch.device) -> None:
    """Weights of a usual size: matrices N(0, 0.02²), norms 1, biases and an adapter's second factor 0.

    Drawn whole and cut, so that every number of shards has the same ones.
    """
    quantised = quantised_layers(transformer)
    for path, layer in quantised.items():
        generator = torch.Generator(device).manual_seed(seed_of(path))
        whole = torch.empty(layer.out_features, layer.in_features, device=device)
        whole.normal_(0.0, 0.02, generator=generator)
        layer.fill(lambda first, count, whole=whole: whole[first : first + count], fill_shard)
    for at, (name, parameter) in enumerate(transformer.named_parameters()):
        if name.rpartition(".")[0] in quantised and not name.endswith(".bias"):
            continue
        if (parameter.ndim == 1 and "norm" in name and name.endswith("weight")) or ".lora_magnitude_vector." in name:
            parameter.fill_(1.0)
        elif parameter.ndim == 1 or (is_adapter(name) and ".lora_B." in name):
            parameter.zero_()
        else:
            generator = torch.Generator(device).manual_seed(at)
            whole = torch.empty(parameter.shape, device=device).normal_(0.0, 0.02, generator=generator)
            fill_shard(parameter, lambda first, count, whole=whole: whole[first : first + count])


def make_objective(config: RunConfig, device: torch.device, *, ours: bool = True) -> Objective:
    """The checkpoint is not asked: its shift and scaling factor change no time. The stock model has no routes."""
    return Objective(
        model=config.model,
        train=config.train,
        first_frame=config.flavour.task == "i2v",
        shift=5.0,
        scaling_factor=1.0,
        draw=True,
        device=device,
        dtype=compute_dtype(config.train),
        crepa_weight=config.crepa.weight if config.crepa.enabled and ours else 0.0,
        routes=config.tread.resolve(config.model.num_visual_blocks) if ours else (),
    )


def make_clip(benchmark: Benchmark) -> Clip:
    """A clip of noise, another one for each data-parallel group."""
    config = benchmark.plan.config
    group = dist.get_rank() // benchmark.plan.world.context
    generator = torch.Generator().manual_seed(group)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).bfloat16()

    shape = (*benchmark.bucket.latent_shape, config.model.in_visual_dim)
    length = benchmark.settings.text_tokens
    tensors = {"qwen": noise(1, length, config.model.in_text_dim), "clip": noise(1, config.model.in_text_dim2)}
    tensors |= {"mean": noise(*shape), "logvar": noise(*shape) - 4}
    if config.crepa.enabled:
        grid = config.crepa.grid(benchmark.bucket.height, benchmark.bucket.width)
        tensors["features"] = noise(shape[0], *grid, config.crepa.feature_dim)
    tensors = pinned(tensors, benchmark.plan.world.device == "cuda")
    text, mean, logvar = Text(tensors["qwen"], tensors["clip"]), tensors["mean"], tensors["logvar"]
    first = (mean[:1], logvar[:1]) if config.flavour.task == "i2v" else (None, None)
    return Clip(f"clip-{group}", mean, logvar, *first, text, features_ThwD=tensors.get("features"))


def make_step(clip: Clip, num_real: int, number: int) -> Step:
    """Step `number` sees the clip in an epoch of its own: with other noise at another σ. Where clips are ever rolled
    out, this one is."""
    clips = [(clip, 1.0)]
    return Step(epoch=number, batch=0, last_of_epoch=False, clips=clips, num_real=num_real, waited=0.0, draws=[0.0])


def peak_memory(device: torch.device) -> dict[str, float]:
    if device.type != "cuda":
        return {"peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}
    retries = torch.cuda.memory_stats()["num_alloc_retries"]  # times that memory lay waste and was gathered: slow
    peaks = torch.tensor([torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()], device=device)
    dist.all_reduce(peaks, dist.ReduceOp.MAX)
    return {"peak_gib": int(peaks[0]) / GIB, "peak_reserved_gib": int(peaks[1]) / GIB, "retries": retries}


def predicted(benchmark: Benchmark) -> dict[str, float]:
    """The plan's estimate by parts, to be held against `peak_gib`: `allocated` is the sum without CUDA's own share."""
    plan = benchmark.plan
    parts = memory.predict(plan.config, plan.world, benchmark.bucket, plan.recompute)
    shown = {name: value / GIB for name, value in dataclasses.asdict(parts).items()}
    return shown | {"allocated": parts.allocated / GIB}


def profile_step(
    work: TrainStep, clip: Clip, number: int, device: torch.device
) -> tuple[dict[str, float], list[dict[str, Any]] | None]:
    """One more step's shares of time and, on a GPU, its longest kernels."""
    activity = ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU
    with profile(activities=[activity]) as trace:
        started = time.perf_counter()
        work.update(make_step(clip, work.plan.batch_size, number), number)
        seconds = time.perf_counter() - started
    if device.type == "cuda":
        kernels = device_work(trace)
        return shares_of(kernels, seconds), longest_kernels(kernels)
    return operator_shares(trace, seconds), None


def speed(benchmark: Benchmark, seconds: float, density: float, device: torch.device) -> dict[str, Any]:
    """Tokens and model FLOPs a GPU and second. FLOPs count kept blocks only, and no recomputation."""
    plan, bucket = benchmark.plan, benchmark.bucket
    if benchmark.loop != "k5dist":
        plan = dataclasses.replace(plan, config=dataclasses.replace(plan.config, tread=TreadConfig(())))
    flops = clip_flops(plan.config, bucket.token_shape, density, benchmark.settings.text_tokens)
    each = flops.training(plan.config.adapter) / plan.world.context
    figures = {
        "median_step_seconds": seconds,
        "tokens": bucket.tokens,
        "tokens_per_second_per_gpu": bucket.tokens / plan.world.context / seconds,
        "model_flops_per_gpu": each,
        "density": density,
        "mfu": None,
    }
    if device.type == "cuda":
        _, rate, _ = gpu_facts(torch.cuda.get_device_name())
        figures["mfu"] = each / (seconds * rate)
    return figures


def environment(device: torch.device) -> dict[str, Any]:
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine(),
        "workers": dist.get_world_size(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if cuda else None,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        "python": platform.python_version(),
        "meaningful": cuda,
    }


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
