"""Sampling as the inference pipelines do it: the checkpoint's own Euler scheduler, classifier-free guidance.

Shape suffixes: T H W latent frames and sides, C 16 latent channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from k5dist.config import ModelConfig
from k5dist.model.forward import Text, predict_velocity
from k5dist.model.pretrained import component_folder


def load_scheduler(pretrained: str) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler.from_pretrained(str(component_folder(pretrained, "scheduler")))


@torch.no_grad()
def sample(
    transformer: nn.Module,
    model: ModelConfig,
    scheduler: Any,
    noise_THWC: Tensor,
    *,
    text: Text,
    negative: Text,
    guidance: float,
    steps: int,
    first_frame_1HWC: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Denoise one video: scaled latents [T, H, W, C], fp32, on the noise's device.

    With `first_frame_1HWC` (scaled latents of the conditioning image) frame 0 stays as given and only the frames after
    it are stepped.
    """
    device = noise_THWC.device
    latents = noise_THWC.float().clone()[None]
    free = 0
    if first_frame_1HWC is not None:
        latents[:, :1] = first_frame_1HWC.to(device)
        free = 1
    scheduler.set_timesteps(steps, device=device)
    text, negative = text.to(device, dtype), negative.to(device, dtype)
    for timestep in scheduler.timesteps:

        def velocity(condition: Text, timestep: Tensor = timestep) -> Tensor:
            time = timestep.reshape(1).to(device, torch.float32)
            return predict_velocity(transformer, model, latents.to(dtype), free > 0, time, condition).float()

        step = velocity(text)
        if guidance > 1:
            unconditional = velocity(negative)
            step = unconditional + guidance * (step - unconditional)
        latents[:, free:] = scheduler.step(step[:, free:], timestep, latents[:, free:], return_dict=False)[0]
    return latents[0]
