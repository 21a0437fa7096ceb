"""What optimisers over FSDP2's shards share: local views, states sharded like their weights, sums over all shards.

Updates run on local tensors, because DTensor's operators are slow one by one, refuse what Adafactor does in place, and
would gather a matrix for each product. What hangs on a whole matrix or on all weights is summed over the shards by a
few all-reduces a step. Every state is a DTensor of the weight's own sharding or a plain tensor that all workers hold
alike, so a checkpoint goes on on any number of workers.

Shape suffixes: R rows and C columns of a weight, N weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

Group = dict[str, Any]


def local(tensor: Tensor) -> Tensor:
    """This worker's part."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shard_group(parameter: Tensor) -> dist.ProcessGroup | None:
    """The workers that together hold the weight once: FSDP2's mesh is (shards,) or (replicate, shards)."""
    if not isinstance(parameter, DTensor):
        return None
    mesh = parameter.device_mesh
    return mesh.get_group(mesh.ndim - 1)


def sharded_like(parameter: Tensor, part: Tensor, columns: int | None = None) -> Tensor:
    """`part`, which belongs to this worker's rows of `parameter`, as a tensor sharded by those rows.

    Its shape is [R] or, with `columns`, [R, columns].
    """
    if not isinstance(parameter, DTensor):
        return part
    rows = parameter.shape[0]
    shape = (rows,) if columns is None else (rows, columns)
    stride = (1,) if columns is None else (columns, 1)
    return DTensor.from_local(
        part, parameter.device_mesh, parameter.placements, run_check=False, shape=torch.Size(shape), stride=stride
    )


class ShardedOptimizer(torch.optim.Optimizer):
    """An optimiser whose whole state is made by `allocate`: by weight, and `shared` by all of them."""

    def __init__(self, groups: Sequence[Group], defaults: Group) -> None:
        super().__init__(groups, defaults)
        self.shared: dict[str, Tensor] = {}

    def new_state(self, parameter: nn.Parameter, group: Group) -> dict[str, Tensor]:
        raise NotImplementedError

    def new_shared(self) -> dict[str, Tensor]:
        """On the CPU in float64: one number each."""
        return {"step": torch.zeros((), dtype=torch.float64)}

    @torch.no_grad()
    def allocate(self) -> None:
        """Make the state of an optimiser that has taken no step yet."""
        if self.shared:
            return
        self.shared = self.new_shared()
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter] = self.new_state(parameter, group)

    def weights(self) -> Iterator[tuple[nn.Parameter, Group, dict[str, Tensor]]]:
        """Weights that have a gradient, in the same order on all workers."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    yield parameter, group, self.state[parameter]

    def total(self, values: Tensor) -> Tensor:
        """The sum of each value over all shards, in place."""
        group = shard_group(self.param_groups[0]["params"][0])
        if group is not None:
            dist.all_reduce(values, group=group)
        return values

    def next_step(self) -> int:
        self.allocate()
        self.shared["step"] += 1
        return int(self.shared["step"])

    def average(self) -> dict[nn.Parameter, Tensor] | None:
        """The weights to validate and export (local parts), where they are not those that are trained."""
        return None
