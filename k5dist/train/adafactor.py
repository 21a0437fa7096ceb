"""Adafactor (Shazeer and Stern, arXiv 1804.04235) as `torch.optim.Adafactor` has it, for FSDP2's shards.

A matrix's second moment is kept as the means of its rows and of its columns. Torch's own refuses DTensors ("in-place
operations that require placement changes", torch 2.13): a column's mean, a matrix's root mean square and that of its
update are sums over all shards. Here they are summed in two all-reduces for all weights together, and no number is
waited for.

    R = lerp(R, mean_C G², t^−0.8), C = lerp(C, mean_R G², t^−0.8), V = R Cᵀ / mean(R), U = G / √V
    W ← (1 − lr·decay) W − α / max(1, RMS(U)) U, with α = max(10⁻³, RMS(W)) · min(lr, t^−½), or lr where not relative
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from k5dist.train.sharded import Group, ShardedOptimizer, local, sharded_like

EPS1 = torch.finfo(torch.float32).eps  # torch's
EPS2 = 1e-3
DECAY = -0.8


class Adafactor(ShardedOptimizer):
    def __init__(self, groups: Sequence[Group], lr: float, weight_decay: float, relative: bool) -> None:
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay})
        self.relative = relative

    def new_state(self, parameter: nn.Parameter, group: Group) -> dict[str, Tensor]:
        own = local(parameter)
        if parameter.ndim != 2:
            return {"variance": torch.zeros_like(parameter)}
        return {
            "row": sharded_like(parameter, own.new_zeros(own.shape[0])),
            "column": own.new_zeros(parameter.shape[1]),
        }

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        step = self.next_step()
        weights = list(self.weights())
        new = float(step) ** DECAY
        sums = self._first_sums(weights, new)
        for (parameter, _, state), (columns, rows, _) in zip(weights, sums, strict=True):
            if parameter.ndim == 2:
                state["column"].lerp_(columns / parameter.shape[0], new)
                rows.div_(parameter.shape[0])  # in `sums`
        squares = [
            _update(p, state, rows).square().sum() for (p, _, state), (_, rows, _) in zip(weights, sums, strict=True)
        ]
        self.total(updates := torch.stack(squares))
        for (parameter, group, state), (_, rows, weight), update in zip(weights, sums, updates, strict=True):
            rms = (update / parameter.numel()).sqrt()
            rate = group["lr"]
            if self.relative:
                alpha = (weight / parameter.numel()).sqrt().clamp(min=EPS2) * min(rate, 1 / math.sqrt(step))
            else:
                alpha = rate
            own = local(parameter)
            own.mul_(1 - group["lr"] * group["weight_decay"])
            own.sub_(_update(parameter, state, rows) * (alpha / rms.clamp(min=1.0)))

    def _first_sums(
        self, weights: list[tuple[nn.Parameter, Group, dict[str, Tensor]]], new: float
    ) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Of each weight: its gradient's squares by columns, its rows' moments, its own squares; over all shards."""
        parts: list[Tensor] = []
        for parameter, _, state in weights:
            assert parameter.grad is not None
            square = local(parameter.grad).float().square()
            if parameter.ndim == 2:
                row = local(state["row"])
                row.lerp_(square.mean(1), new)
                parts += [square.sum(0), row.sum()[None]]
            else:
                local(state["variance"]).lerp_(square, new)
            parts.append(local(parameter).float().square().sum()[None])
        flat = self.total(torch.cat(parts))
        split = iter(flat.split([len(part) for part in parts]))
        nothing = flat.new_zeros(1)
        return [
            (next(split), next(split), next(split)) if parameter.ndim == 2 else (nothing, nothing, next(split))
            for parameter, _, _ in weights
        ]


def _update(parameter: nn.Parameter, state: dict[str, Tensor], row_mean: Tensor) -> Tensor:
    """U of this worker's part. Computed twice: kept, it would take a weight's memory for all of them."""
    assert parameter.grad is not None
    gradient = local(parameter.grad).float()
    if parameter.ndim == 2:
        variance = local(state["row"])[:, None] * state["column"][None] / row_mean.clamp(min=EPS1)
    else:
        variance = local(state["variance"])
    return gradient * variance.clamp(min=EPS1**2).rsqrt()
