"""The share of blocks that NABLA keeps: set before a benchmark, and measured in it."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from k5dist.config import ConfigError
from k5dist.model.dit import VideoTransformer
from k5dist.model.forward import nabla_parameters
from k5dist.model.nabla import density as density_of
from k5dist.plan import RunPlan
from k5dist.shapes import PATCH
from k5dist.train.objective import Clip
from k5dist.train.step import TrainStep


def with_density(plan: RunPlan, density: float) -> RunPlan:
    """The plan with NABLA keeping about that share of the blocks.

    Random weights' maps are almost uniform: they keep P of what is not in the window.
    Raises ConfigError when the window alone keeps more.
    """
    model = plan.config.model
    if not model.is_sparse:
        return plan
    time, height, width = plan.buckets[0].latent_shape
    window = nabla_parameters(model, (time, height // PATCH, width // PATCH), torch.device("cpu")).window_NW
    share = float(density_of(window[None, None], window.shape[0]))
    if density < share:
        rule = f"the sliding-tile window alone keeps {share:.1%} of this clip's blocks"
        raise ConfigError("benchmark.density", density, rule, f"benchmark.density={min(1.0, share + 0.1):.2f}")
    model = dataclasses.replace(model, attention_P=(density - share) / (1 - share) if share < 1 else 0.0)
    return dataclasses.replace(plan, config=dataclasses.replace(plan.config, model=model))


class _MapRecorder(TorchDispatchMode):
    """Densities of the maps that are computed below it."""

    def __init__(self) -> None:
        super().__init__()
        self.densities: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.k5dist.nabla_map.default:
            self.densities.append(density_of(out, out.shape[-2]))
        return out


@torch.no_grad()
def measured_density(work: TrainStep, clip: Clip) -> float:
    """The mean share of blocks that the maps of one forward keep; the blocks run as they are written, not compiled."""
    transformer = work.transformer
    assert isinstance(transformer, VideoTransformer)
    compiled = [block.__dict__.pop("forward", None) for block in transformer.visual_transformer_blocks]
    text = clip.text.to(work.objective.device, work.objective.dtype)
    with _MapRecorder() as recorder:
        work.objective.training_loss(transformer, clip, text, 0)
    for block, forward in zip(transformer.visual_transformer_blocks, compiled, strict=True):
        if forward is not None:
            block.__dict__["forward"] = forward
    mean = torch.stack(recorder.densities).mean()
    dist.all_reduce(mean)  # each context-parallel worker sees its own heads
    return float(mean) / dist.get_world_size()
