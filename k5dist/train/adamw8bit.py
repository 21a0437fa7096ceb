"""AdamW whose moments are 8-bit codes with a scale a block (Dettmers et al., arXiv 2110.02861), for FSDP2's shards.

torchao's AdamW8bit cuts its blocks through a worker's flattened part: what is quantised, and where blocks begin, hangs
on the number of shards, so that a checkpoint of it is refused by another number of workers ("Make sure start and end
align with block boundary"), and results differ between them. Here a block never leaves a row, and rows are what FSDP2
shards by: codes and scales are plain DTensors, the same on any number of workers.

Shape suffixes: R rows, C columns, B blocks of a row.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from k5dist.train.sharded import Group, ShardedOptimizer, local, sharded_like

BLOCK = 256
LEAST = 4096  # weights with fewer numbers keep fp32 moments, as in bitsandbytes and torchao
MOMENTS = ("exp_avg", "exp_avg_sq")


class AdamW8bit(ShardedOptimizer):
    """Weights and gradients are fp32; vectors and small matrices keep fp32 moments."""

    def __init__(
        self, groups: Sequence[Group], lr: float, betas: tuple[float, float], eps: float, weight_decay: float
    ) -> None:
        super().__init__(groups, {"lr": lr, "eps": eps, "weight_decay": weight_decay})
        self.betas = betas

    def new_state(self, parameter: nn.Parameter, group: Group) -> dict[str, Tensor]:
        if parameter.ndim != 2 or parameter.numel() < LEAST:
            return {name: torch.zeros_like(parameter) for name in MOMENTS}
        own, columns = local(parameter), parameter.shape[1]
        blocks = -(-columns // BLOCK)
        state: dict[str, Tensor] = {}
        for name in MOMENTS:
            state[name] = sharded_like(parameter, torch.zeros_like(own, dtype=torch.uint8), columns)
            state[f"{name}_scale"] = sharded_like(parameter, own.new_zeros(len(own), blocks), blocks)
        return state

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        step, (beta1, beta2) = self.next_step(), self.betas
        for parameter, group, state in self.weights():
            own, gradient = local(parameter), local(parameter.grad)  # type: ignore[arg-type]
            if not own.numel():
                continue
            rate = group["lr"]
            values = [1 - beta1, 1 - beta2, 1 - rate * group["weight_decay"]]
            values += [rate / (1 - beta1**step), (1 - beta2**step) ** -0.5, group["eps"]]
            numbers = torch.tensor(values, dtype=torch.float32)
            if own.is_cuda:
                numbers = numbers.pin_memory().to(own.device, non_blocking=True)
            mean, square = (local(state[name]) for name in MOMENTS)
            if mean.dtype != torch.uint8:
                adamw(own, gradient, mean, square, numbers)
                continue
            scales = (local(state[f"{name}_scale"]) for name in MOMENTS)
            books = codebook(True, own.device), codebook(False, own.device)
            update = _compiled_update if own.is_cuda else quantised_update
            update(own, gradient, (mean, square), tuple(scales), books, numbers)


def adamw(weight: Tensor, gradient: Tensor, mean: Tensor, square: Tensor, numbers: Tensor) -> None:
    """AdamW (arXiv 1711.05101, algorithm 2) in fp32, in place.

    `numbers`: 1 − β1, 1 − β2, 1 − lr·decay, lr / (1 − β1^t), (1 − β2^t)^−½, ε.
    """
    mean.lerp_(gradient, numbers[0])
    square.lerp_(gradient * gradient, numbers[1])
    weight.mul_(numbers[2]).sub_(numbers[3] * mean / (square.sqrt() * numbers[4] + numbers[5]))


def quantised_update(
    weight_RC: Tensor,
    gradient_RC: Tensor,
    codes_RC: tuple[Tensor, Tensor],
    scales_RB: tuple[Tensor, ...],
    books: tuple[Tensor, Tensor],
    numbers: Tensor,
) -> None:
    """One step in place, of the mean and the mean square: their new values are used before they are rounded again."""
    mean, square = (dequantise(*moment) for moment in zip(codes_RC, scales_RB, books, strict=True))
    mean = torch.lerp(mean, gradient_RC, numbers[0])
    square = torch.lerp(square, gradient_RC * gradient_RC, numbers[1])
    change = numbers[3] * mean / (square.sqrt() * numbers[4] + numbers[5])
    weight_RC.copy_(weight_RC * numbers[2] - change)
    for old, scale, new, book in zip(codes_RC, scales_RB, (mean, square), books, strict=True):
        found, largest = quantise(new, book)
        old.copy_(found)
        scale.copy_(largest)


# One kernel or two for all sizes; eagerly the update would pass some thirty times over the weights.
_compiled_update = torch.compile(quantised_update, dynamic=True, fullgraph=True)


def quantise(x_RC: Tensor, book: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [R, C] of the nearest entries, uint8, and each block's largest magnitude [R, B], fp32."""
    rows, columns = x_RC.shape
    padded = F.pad(x_RC, (0, -columns % BLOCK)).view(rows, -1, BLOCK)
    scale_RB = padded.abs().amax(-1)
    unit = padded / scale_RB.clamp(min=1e-30)[..., None]
    codes = torch.bucketize(unit, (book[1:] + book[:-1]) / 2).to(torch.uint8)
    return codes.view(rows, -1)[:, :columns], scale_RB


def dequantise(codes_RC: Tensor, scale_RB: Tensor, book: Tensor) -> Tensor:
    return book[codes_RC.int()] * scale_RB.repeat_interleave(BLOCK, 1)[:, : codes_RC.shape[1]]


@functools.cache
def codebook(signed: bool, device: torch.device) -> Tensor:
    """The dynamic map of 8 bits, ascending: for each power of ten from 10⁻⁶ to 1 twice as many evenly spaced fractions
    of 0.1…1 as for the one below it, with 0 and 1; signed or, with twice as many fractions, not."""
    values = [torch.tensor([0.0, 1.0], dtype=torch.float64)]
    for power in range(7):
        edges = torch.linspace(0.1, 1, (1 if signed else 2) * 2**power + 1, dtype=torch.float64)
        fractions = (edges[1:] + edges[:-1]) / 2 * 10.0 ** (power - 6)
        values += [fractions, -fractions] if signed else [fractions]
    return torch.cat(values).sort().values.float().to(device)
