"""The optimiser of a run and its schedule. The learning rate is a function of the step, so nothing of it is saved."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from k5dist.config import OptimizerConfig
from k5dist.model.dit import FP32_MODULES
from k5dist.train.adafactor import Adafactor
from k5dist.train.adamw8bit import AdamW8bit
from k5dist.train.adaptive import Prodigy, ScheduleFreeAdamW
from k5dist.train.muon import Muon
from k5dist.train.sharded import ShardedOptimizer
from k5dist.train.stochastic import StochasticAdamW

SHARED = "shared"  # what an optimiser keeps for all weights together, beside their names


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Trainable parameters by name, the same names whatever the run's parallelism."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def trained_dtype(config: OptimizerConfig) -> torch.dtype:
    """The type that trained weights are stored in."""
    return torch.bfloat16 if config.kind == "adamw_bf16" else torch.float32


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Trainable weights by what they have in common: `lr_scale`, `weight_decay` and, for Muon, whether it is theirs.

    Weights may be on the meta device. Raises ConfigError for a rule of `optimizer.groups` that finds no weight, and
    where Muon would have no matrix: with adapters the plan knows all layers that may have one, and these are those.
    """
    parameters, rules = trainable_parameters(model), config.rules
    config.check_names(parameters)
    groups: dict[tuple[float, float, bool], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        scale, decay = 1.0, config.weight_decay
        if parameter.ndim < 2 and not config.decay_norms_and_biases:
            decay = 0.0
        at = config.rule_of(name)
        if at is not None:
            rule = rules[at]
            scale, decay = rule.lr_scale, decay if rule.weight_decay is None else rule.weight_decay
        muon = config.kind == "muon" and scale > 0 and is_muons(name, parameter)
        groups.setdefault((scale, decay, muon), []).append(parameter)
    return [
        {"params": members, "lr": config.lr * scale, "lr_scale": scale, "weight_decay": decay, "muon": muon}
        for (scale, decay, muon), members in groups.items()
    ]


def is_muons(name: str, parameter: Tensor) -> bool:
    """Matrices of the blocks' attention and feed-forward layers, adapters' among them. Embeddings, the output layer and
    modulations (stacks of vectors for shift, scale and gate) are AdamW's, as in Muon's own use."""
    parts = name.split(".")
    in_block = any(part.endswith("_transformer_blocks") for part in parts)
    return parameter.ndim == 2 and in_block and not set(FP32_MODULES) & set(parts)


def make_optimiser(
    model: nn.Module, config: OptimizerConfig, device: torch.device, dtype: torch.dtype = torch.float32
) -> torch.optim.Optimizer:
    """`dtype` is the type the model computes in."""
    groups = parameter_groups(model, config)
    betas = (config.betas[0], config.betas[1])
    options: dict[str, Any] = {"lr": config.lr, "betas": betas, "eps": config.eps, "weight_decay": config.weight_decay}
    prodigy = {"d0": config.prodigy_d0, "d_coef": config.prodigy_d_coef, "safeguard_warmup": config.warmup_steps > 0}
    kinds: dict[str, Callable[[], torch.optim.Optimizer]] = {
        "adamw": lambda: torch.optim.AdamW(groups, **options, fused=device.type == "cuda"),
        "adamw_bf16": lambda: StochasticAdamW(groups, **options),
        "adamw_8bit": lambda: AdamW8bit(groups, **options),
        "adamw_schedulefree": lambda: ScheduleFreeAdamW(groups, **options),
        "adafactor": lambda: Adafactor(groups, config.lr, config.weight_decay, config.adafactor_relative_lr),
        "prodigy": lambda: Prodigy(groups, **options, **prodigy),
        "muon": lambda: Muon(groups, **options, momentum=config.muon_momentum, dtype=dtype),
    }
    return kinds[config.kind]()


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
        group["lr"] = rate * group.get("lr_scale", 1.0)


def optimiser_tensors(model: nn.Module, optimiser: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
    """The optimiser's state by parameter name: tensors only, allocated if no step was taken yet."""
    parameters = trainable_parameters(model)
    shared: dict[str, dict[str, Tensor]] = {}
    if isinstance(optimiser, ShardedOptimizer):
        optimiser.allocate()
        shared = {SHARED: optimiser.shared}
    elif not optimiser.state:
        _allocate(optimiser, list(parameters.values()))
    return shared | {
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
    for group, rate in zip(optimiser.param_groups, rates, strict=True):
        group["lr"] = rate
    for state in optimiser.state.values():
        for value in state.values():
            if isinstance(value, Tensor):
                value.zero_()
