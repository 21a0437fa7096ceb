"""Timing how a checkpoint comes up: storage to sharded weights, and the host memory that it takes on the way."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from k5dist import storage
from k5dist.benchmark.settings import Benchmark
from k5dist.config import ModelConfig
from k5dist.estimate import GIB
from k5dist.model.dit import FP32_MODULES, VideoTransformer
from k5dist.model.pretrained import component_uri
from k5dist.model.transformer import build_transformer, materialise
from k5dist.model.weights import WEIGHTS_NAME
from k5dist.train.optimiser import trained_dtype
from k5dist.train.parallelise import compute_dtype, make_mesh, parallelise

_FILE_BYTES = 4 * GIB


def time_loading(benchmark: Benchmark, device: torch.device) -> dict[str, Any]:
    """Build, shard and fill the model from `plan.pretrained`, as a training worker does.

    Host memory is the growth of the process's largest resident size, the most of any worker; on a CPU the shard itself
    is part of it.
    """
    plan = benchmark.plan
    config = plan.config
    mesh = make_mesh(plan.world)
    cold = _drop_from_cache(plan.pretrained)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    dist.barrier()
    started = time.perf_counter()
    transformer = build_transformer(
        plan.pretrained,
        config.model,
        lora=config.lora if config.adapter == "lora" else None,
        dtype=compute_dtype(config.train),
        trained=trained_dtype(config.optimizer),
    )
    parallelise(transformer, mesh, config.train, plan.recompute)
    materialise(transformer, plan.pretrained, device=device, seed=config.train.seed)
    dist.barrier()
    seconds = time.perf_counter() - started
    growth = torch.tensor(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, device=device)
    dist.all_reduce(growth, dist.ReduceOp.MAX)
    locals_ = [p.to_local() if isinstance(p, DTensor) else p for p in transformer.parameters()]
    sizes = storage.sizes(component_uri(plan.pretrained, "transformer"))
    return {
        "seconds": seconds,
        "checkpoint_gib": sum(sizes.values()) / GIB,
        "shard_gib": sum(p.numel() * p.element_size() for p in locals_) / GIB,
        "host_growth_gib": int(growth) / 2**20,
        "cold": cold,
        "workers": dist.get_world_size(),
        "device": str(device),
    }


def _drop_from_cache(pretrained: str) -> bool:
    """Whether the files had to leave this machine's memory, so that reading them reads the disk."""
    uri = component_uri(pretrained, "transformer")
    if not storage.is_local(uri) or not hasattr(os, "posix_fadvise"):
        return False
    for path in Path(uri.removeprefix("file://")).iterdir():
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)
    return True


def write_checkpoint(model: ModelConfig, folder: Path) -> Path:
    """A diffusers folder of the architecture with made-up weights (bf16, and fp32 where diffusers keeps it)."""
    transformer = folder / "transformer"
    index = transformer / f"{WEIGHTS_NAME}.index.json"
    if index.exists():
        return folder
    transformer.mkdir(parents=True, exist_ok=True)
    (folder / "model_index.json").write_text("{}")
    (transformer / "config.json").write_text(json.dumps(dataclasses.asdict(model)))
    with torch.device("meta"):
        parameters = dict(VideoTransformer(model).named_parameters())
    weight_map: dict[str, str] = {}
    for number, group in enumerate(_files(parameters)):
        file = f"diffusion_pytorch_model-{number:05d}.safetensors"
        save_file({name: _made_up(name, parameters[name].shape) for name in group}, transformer / file)
        weight_map |= dict.fromkeys(group, file)
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))  # last: its presence says it is whole
    return folder


def _made_up(name: str, shape: torch.Size) -> torch.Tensor:
    """Cheap numbers: 19 billion random ones would take longer than what is to be timed."""
    dtype = torch.float32 if any(part in FP32_MODULES for part in name.split(".")) else torch.bfloat16
    pattern = torch.linspace(-0.03, 0.03, 1021)
    return pattern.repeat(-(-shape.numel() // 1021))[: shape.numel()].reshape(shape).to(dtype)


def _files(parameters: dict[str, torch.nn.Parameter]) -> Iterator[list[str]]:
    names: list[str] = []
    size = 0
    for name, parameter in parameters.items():
        names.append(name)
        size += 2 * parameter.numel()
        if size >= _FILE_BYTES:
            yield names
            names, size = [], 0
    if names:
        yield names
