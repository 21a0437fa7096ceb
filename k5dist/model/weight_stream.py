"""Frozen weights of the visual blocks in the host's memory: each block's come to the GPU just before it computes.

For GPUs that do not hold the model. While a block computes, the next one's weights (in a backward, those of the one
before) are copied on a stream of their own, so at most two blocks' weights are on the GPU. What is trained, and what
stands outside of the visual blocks, is not touched. Every worker keeps a copy of its own; FSDP2 shards the rest.

A weight's storage on the GPU is given back and allocated anew, as FSDP2 does it, so that views of it, which autograd
may have kept, see the weights again when they are there. What moves is exact: results are the same to the bit.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from k5dist.model.host_memory import CHUNK, HostMemory


class WeightStream:
    """Of `blocks`, which compute in order. Weights are the host's until `start`, and filled there."""

    def __init__(self, blocks: Iterable[nn.Module], device: torch.device) -> None:
        self.blocks, self.device = list(blocks), device
        self.weights = [_frozen(block) for block in self.blocks]
        self.host: list[list[Tensor]] = []
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.there: dict[int, Any] = {}  # blocks on the GPU, or on their way: the event at the end of their copies
        self.current: int | None = None

    @property
    def parameters(self) -> set[nn.Parameter]:
        return {parameter for block in self.weights for parameter in block}

    def allocate(self) -> None:
        """Make room on the host, in place: weights are plain host tensors from here to `start`."""
        memory = HostMemory(2 * sum(p.numel() * p.element_size() + 512 for p in self.parameters) + CHUNK, self.device)
        for block in self.blocks:
            for module in block.modules():
                for name, parameter in module.named_parameters(recurse=False):
                    if not parameter.requires_grad:
                        taken = memory.take(parameter)
                        assert taken is not None
                        module.register_parameter(name, nn.Parameter(taken, requires_grad=False))
        self.weights = [_frozen(block) for block in self.blocks]
        self.host = [[parameter.data for parameter in block] for block in self.weights]

    def start(self) -> None:
        """Weights are on the GPU only while they are needed from here on."""
        for number, block in enumerate(self.blocks):
            for parameter in self.weights[number]:
                parameter.data = torch.empty_like(parameter, device=self.device)
                parameter.untyped_storage().resize_(0)
            block.register_forward_pre_hook(self._forward_hook(number))
            block.register_forward_hook(self._backward_hook(number))
            # A block's modulation is computed before the block is called.
            block.get_submodule("visual_modulation").register_forward_pre_hook(self._forward_hook(number))

    def _forward_hook(self, number: int) -> Any:
        return lambda *_: self.enter(number, number + 1)

    def _backward_hook(self, number: int) -> Any:
        def hook(module: nn.Module, inputs: Any, out: Tensor) -> None:
            if out.requires_grad:
                out.register_hook(lambda _: self.enter(number, number - 1))

        return hook

    def enter(self, number: int, following: int) -> None:
        """Block `number` computes now and needs its weights, `following` next."""
        for other in [other for other in self.there if other not in (number, following)]:
            del self.there[other]
            for parameter in self.weights[other]:
                parameter.untyped_storage().resize_(0)
        self._fetch(number)
        if self.there[number] is not None:
            torch.cuda.current_stream(self.device).wait_event(self.there[number])
        if 0 <= following < len(self.blocks):
            self._fetch(following)

    @torch.no_grad()
    def _fetch(self, number: int) -> None:
        if number in self.there:
            return
        for parameter, source in zip(self.weights[number], self.host[number], strict=True):
            parameter.untyped_storage().resize_(source.numel() * source.element_size())
        if self.stream is None:
            self._copy(number)
            self.there[number] = None
            return
        # The room may be what a kernel still reads that was launched before.
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            self._copy(number)
            self.there[number] = self.stream.record_event()

    def _copy(self, number: int) -> None:
        for parameter, source in zip(self.weights[number], self.host[number], strict=True):
            # Not a change that autograd must know of: these are the weights that it saved.
            with torch.autograd._unsafe_preserve_version_counter(parameter):
                parameter.copy_(source, non_blocking=True)


def _frozen(block: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in block.parameters() if not parameter.requires_grad]
