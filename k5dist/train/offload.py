"""What the first blocks keep for their backward, moved to the host's memory until it is needed there.

A clip's forward copies a block's kept tensors to page-locked memory while the next block computes; its backward brings
the block before back while a block computes. The blocks at the end keep theirs on the GPU: their backward comes first.
Copies run on a stream of their own, in order, and only streams wait for one another, never the host.

What moves is exact, so results are the same to the bit. What does not fit `capacity` stays on the GPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from k5dist.model.host_memory import HostMemory

SMALLEST = 16 << 20  # bytes; what is smaller is not worth a copy


@dataclass
class Kept:
    """One tensor that a block keeps, in the host's memory, and on the device while it is needed there."""

    host: Tensor
    device: Tensor | None = None


@dataclass
class _Block:
    kept: list[Kept] = field(default_factory=list)
    recalled: bool = False
    leaving: list[Tensor] = field(default_factory=list)  # on the device until their copies are done
    copied: Any = None  # event: the last copy in either direction is done


class Offload:
    """Offloads what `num_blocks` blocks keep; each block's forward runs inside `block(number, …)`, in order."""

    def __init__(self, num_blocks: int, capacity: int, device: torch.device, smallest: int = SMALLEST) -> None:
        if device.type == "cuda" and device.index is None:  # as the tensors' own devices say it
            device = torch.device("cuda", torch.cuda.current_device())
        self.num_blocks, self.smallest, self.device = num_blocks, smallest, device
        self.memory = HostMemory(capacity, device)
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.blocks = [_Block() for _ in range(num_blocks)]

    @contextlib.contextmanager
    def block(self, number: int, stay: set[int]) -> Iterator[None]:
        """What is saved inside moves, but for tensors whose address is in `stay` (weights, what all blocks share)."""
        if number > self.num_blocks:
            yield
            return
        if number == 0:
            self.memory.reset()
            self.blocks = [_Block() for _ in self.blocks]
        if number >= 2:
            self._release(number - 2)
        if number == self.num_blocks:  # the first to stay: it keeps its own, and calls the others back
            with saved_tensors_hooks(lambda tensor: tensor, lambda tensor: self._recall(number - 1, tensor)):
                yield
            return
        with saved_tensors_hooks(lambda kept: self._pack(number, kept, stay), lambda kept: self._unpack(number, kept)):
            yield
        self._start_copies(number)

    def finish_forward(self) -> None:
        """After the last block of a forward: lets go of what has been copied."""
        for number in range(max(0, self.num_blocks - 2), self.num_blocks):
            self._release(number)

    def _pack(self, number: int, tensor: Tensor, stay: set[int]) -> Tensor | Kept:
        size = tensor.numel() * tensor.element_size()
        if size < self.smallest or tensor.device != self.device or tensor.data_ptr() in stay or not _is_dense(tensor):
            return tensor
        host = self.memory.take(tensor)
        if host is None:
            return tensor
        block = self.blocks[number]
        block.leaving.append(tensor.detach())
        block.kept.append(Kept(host))
        return block.kept[-1]

    def _start_copies(self, number: int) -> None:
        block = self.blocks[number]
        with self._beside():
            for kept, tensor in zip(block.kept, block.leaving, strict=True):
                kept.host.copy_(tensor, non_blocking=True)
            block.copied = self._event()

    def _release(self, number: int) -> None:
        block = self.blocks[number]
        if block.leaving:
            self._wait(block.copied)
            block.leaving.clear()

    def _recall(self, number: int, tensor: Any = None) -> Any:
        """Begins to bring back what block `number` keeps, while the caller's backward computes; returns `tensor`."""
        if number >= 0 and not self.blocks[number].recalled:
            self._release(number)
            self.blocks[number].recalled = True
            self._fetch(number, self.blocks[number].kept)
        return tensor

    def _fetch(self, number: int, several: list[Kept]) -> None:
        for kept in several:
            host = kept.host
            kept.device = torch.empty_strided(host.shape, host.stride(), dtype=host.dtype, device=self.device)
        with self._beside():
            for kept in several:
                assert kept.device is not None
                kept.device.copy_(kept.host, non_blocking=True)
            self.blocks[number].copied = self._event()

    def _unpack(self, number: int, kept: Tensor | Kept) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        self._recall(number)
        if kept.device is None:  # asked for a second time
            self._fetch(number, [kept])
        self._wait(self.blocks[number].copied)
        self._recall(number - 1)
        tensor, kept.device = kept.device, None
        assert tensor is not None
        return tensor

    def _beside(self) -> Any:
        """Copies start when what was launched before is done."""
        if self.stream is None:
            return contextlib.nullcontext()
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        return torch.cuda.stream(self.stream)

    def _event(self) -> Any:
        return torch.cuda.current_stream(self.device).record_event() if self.stream is not None else None

    def _wait(self, event: Any) -> None:
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)


def _is_dense(tensor: Tensor) -> bool:
    """Whether its elements fill a stretch of memory, in whatever order: then one copy moves it as it lies."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True
