"""A moving average of the trained weights, and how a model is looked at with other weights than those it trains with.

The average is a DTensor a weight, sharded as the weight is and always fp32: a checkpoint holds all of it, whatever the
number of workers, and bf16 would lose nearly every update. After `update_after` steps it follows the weights by
ema ← d ema + (1 − d) w with d = decay^every, every `every` steps; until then it is the weights.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from k5dist.config import EmaConfig
from k5dist.train.optimiser import trainable_parameters
from k5dist.train.sharded import local


class Ema:
    """`tensors` by parameter name is what a checkpoint holds, and all there is: the rest is a function of the step."""

    def __init__(self, model: nn.Module, config: EmaConfig) -> None:
        self.config = config
        reshard(model)
        self._parameters = trainable_parameters(model)
        self.tensors = {name: self._copy(parameter) for name, parameter in self._parameters.items()}

    def _copy(self, parameter: Tensor) -> Tensor:
        """Weight and average never share memory. A DTensor moved to the host keeps its mesh, and DCP takes it."""
        copy = parameter.detach().to(torch.float32, copy=True)
        return copy.to("cpu") if self.config.device == "host" else copy

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Call it after optimiser step `step` (from 1 on)."""
        config = self.config
        since = step - config.update_after
        if since % config.every and since != 0:
            return
        share = 1.0 if since <= 0 else 1 - config.decay**config.every
        for name, parameter in self._parameters.items():
            average = local(self.tensors[name])
            weight = local(parameter.detach()).to(average.device, torch.float32)
            if share == 1.0:
                average.copy_(weight)
            else:
                average.lerp_(weight, share)

    def applied(self, model: nn.Module) -> contextlib.AbstractContextManager[None]:
        """The model with the average for its trained weights, which are back, to the bit, at the end."""
        return replaced(model, {self._parameters[name]: local(tensor) for name, tensor in self.tensors.items()})


@contextlib.contextmanager
def replaced(model: nn.Module, values: Mapping[nn.Parameter, Tensor]) -> Iterator[None]:
    """The model with `values` (this worker's parts) for its weights.

    The weights wait where the values lie: on the device in the room of gradients, which are not there between steps.
    """
    reshard(model)
    with torch.no_grad():
        kept = {p: local(p).to(value.device, copy=True) for p, value in values.items()}
        for parameter, value in values.items():
            local(parameter).copy_(value)
    try:
        yield
    finally:
        reshard(model)
        with torch.no_grad():
            for parameter, own in kept.items():
                local(parameter).copy_(own)


def reshard(model: nn.Module) -> None:
    """After a forward without backward FSDP2 keeps the root's weights gathered: they would outlive a change."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
