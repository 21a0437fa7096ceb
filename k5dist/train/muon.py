"""Muon (Jordan et al. 2024; Liu et al., arXiv 2502.16982) for the blocks' matrices, AdamW for the rest, on shards.

The update of a matrix is the orthogonal factor of its momentum, times 0.2 √max(rows, columns): the root mean square of
AdamW's updates, so that AdamW's learning rate and decay serve both. Newton-Schulz needs the matrix whole. `torch.optim.
Muon` takes DTensors, but each product of it then gathers operands, and every worker multiplies whole matrices; here
each worker gathers and orthogonalises the matrices that are its own, in turns, by one all-to-all there and one back.
The arithmetic is that of one worker, to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.adamw import adamw

from k5dist.train.sharded import Group, ShardedOptimizer, local, shard_group

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic: the steepest slope at 0 that stays near 1
ITERATIONS = 5
MATCH_ADAMW = 0.2


class Muon(ShardedOptimizer):
    """Groups with `muon` hold matrices; the others are updated by torch's AdamW. `dtype` is what products are in."""

    def __init__(
        self,
        groups: Sequence[Group],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        *,
        momentum: float,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(groups, {"lr": lr, "eps": eps, "weight_decay": weight_decay, "muon": False})
        self.betas, self.momentum, self.dtype = betas, momentum, dtype

    def new_state(self, parameter: nn.Parameter, group: Group) -> dict[str, Tensor]:
        names = ("momentum",) if group["muon"] else ("exp_avg", "exp_avg_sq")
        return {name: torch.zeros_like(parameter) for name in names}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        step = self.next_step()
        matrices: list[tuple[nn.Parameter, Group, Tensor]] = []
        for parameter, group, state in self.weights():
            if group["muon"]:
                gradient, momentum = local(parameter.grad).float(), local(state["momentum"])  # type: ignore[arg-type]
                momentum.lerp_(gradient, 1 - self.momentum)
                matrices.append((parameter, group, momentum))
        self._update_matrices(matrices)
        for group in self.param_groups:
            if not group["muon"]:
                self._update_others(group, step)

    def _update_matrices(self, matrices: list[tuple[nn.Parameter, Group, Tensor]]) -> None:
        """In rounds of one matrix a worker."""
        if not matrices:
            return
        shards = shard_group(matrices[0][0])
        size = 1 if shards is None else dist.get_world_size(shards)
        for first in range(0, len(matrices), size):
            turn = matrices[first : first + size]
            nesterov = [local(p.grad).float().lerp(m, self.momentum) for p, _, m in turn]  # type: ignore[arg-type]
            shapes = [torch.Size(p.shape) for p, _, _ in turn]
            for (parameter, group, _), update in zip(turn, self._orthogonal(nesterov, shapes, shards), strict=True):
                own, rate = local(parameter), group["lr"]
                own.mul_(1 - rate * group["weight_decay"])
                own.sub_(update, alpha=rate * MATCH_ADAMW * math.sqrt(max(parameter.shape)))

    def _orthogonal(
        self, parts: list[Tensor], shapes: list[torch.Size], shards: dist.ProcessGroup | None
    ) -> list[Tensor]:
        """This worker's rows of the orthogonal factors; matrix i is worker i's to compute."""
        if shards is None or dist.get_world_size(shards) == 1:
            return [orthogonalise(part, self.dtype).float() for part in parts]
        size, rank = dist.get_world_size(shards), dist.get_rank(shards)
        sent = [part.numel() for part in parts] + [0] * (size - len(parts))
        mine = shapes[rank] if rank < len(shapes) else torch.Size((0, 1))
        received = [rows * mine[1] for rows in shard_rows(mine[0], size)]
        out = torch.cat([part.reshape(-1) for part in parts])
        whole = out.new_empty(sum(received))
        dist.all_to_all_single(whole, out, received, sent, group=shards)
        if whole.numel():
            whole = orthogonalise(whole.view(mine), self.dtype).float().reshape(-1)
        dist.all_to_all_single(out, whole.contiguous(), sent, received, group=shards)
        return [flat.view_as(part) for flat, part in zip(out.split(sent[: len(parts)]), parts, strict=True)]

    def _update_others(self, group: Group, step: int) -> None:
        parameters = [p for p in group["params"] if p.grad is not None and local(p).numel()]
        if not parameters:
            return
        weights = [local(parameter.detach()) for parameter in parameters]
        adamw(
            weights,
            [local(parameter.grad).float() for parameter in parameters],
            [local(self.state[parameter]["exp_avg"]) for parameter in parameters],
            [local(self.state[parameter]["exp_avg_sq"]) for parameter in parameters],
            [],
            [torch.tensor(float(step - 1), device=weights[0].device) for _ in parameters],
            foreach=False,
            fused=weights[0].is_cuda,
            amsgrad=False,
            beta1=self.betas[0],
            beta2=self.betas[1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def shard_rows(rows: int, size: int) -> list[int]:
    """How FSDP2 splits rows: as `torch.chunk`, the first workers full."""
    most = -(-rows // size)
    return [max(0, min(most, rows - most * rank)) for rank in range(size)]


def orthogonalise(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """U S' Vᵀ of a matrix U S Vᵀ with all of S' near 1: five steps of a quintic Newton-Schulz iteration."""
    a, b, c = COEFFICIENTS
    wide = matrix.shape[0] <= matrix.shape[1]
    x = (matrix if wide else matrix.T).to(dtype)
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide else x.T
