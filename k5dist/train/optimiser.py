"""AdamW and its schedule. The learning rate is a function of the step, so nothing of a schedule is ever saved."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from k5dist.config import OptimizerConfig
from k5dist.train.stochastic import StochasticAdamW


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Trainable parameters by name, the same names whatever the run's parallelism."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def trained_dtype(config: OptimizerConfig) -> torch.dtype:
    """The type that trained weights are stored in."""
    return torch.bfloat16 if config.kind == "adamw_bf16" else torch.float32


def make_optimiser(model: nn.Module, config: OptimizerConfig, device: torch.device) -> torch.optim.Optimizer:
    betas = (config.betas[0], config.betas[1])
    parameters = list(trainable_parameters(model).values())
    options: dict[str, Any] = {"lr": config.lr, "betas": betas, "eps": config.eps, "weight_decay": config.weight_decay}
    if config.kind == "adamw_bf16":
        return StochasticAdamW(parameters, **options)
    return torch.optim.AdamW(parameters, **options, fused=device.type == "cuda")


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """The rate of the update that makes step `step` (from 1 on): linear warm-up, then constant or cosine to zero."""
    if step <= config.warmup_steps:
        return config.lr * step / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    progress = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    return config.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def set_learning_rate(optimiser: torch.optim.Optimizer, rate: float) -> None:
    for group in optimiser.param_groups:
        group["lr"] = rate


def optimiser_tensors(model: nn.Module, optimiser: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
    """The optimiser's state by parameter name: tensors only, allocated if no step was taken yet."""
    parameters = trainable_parameters(model)
    if not optimiser.state:
        _allocate(optimiser, list(parameters.values()))
    return {
        name: {key: value for key, value in optimiser.state[parameter].items() if isinstance(value, Tensor)}
        for name, parameter in parameters.items()
    }


def _allocate(optimiser: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> None:
    """One step with zero gradients at rate zero makes every state tensor and moves no weight."""
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    rates = [group["lr"] for group in optimiser.param_groups]
    set_learning_rate(optimiser, 0.0)
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    set_learning_rate(optimiser, rates[0])
    for state in optimiser.state.values():
        for value in state.values():
            if isinstance(value, Tensor):
                value.zero_()
