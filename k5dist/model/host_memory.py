"""Page-locked memory of the host, which a GPU copies from and to while it computes."""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 4 << 30  # bytes; page-locked memory comes in powers of two


class HostMemory:
    """Page-locked memory handed out from the start on after each `reset`, grown as needed up to `capacity` bytes."""

    def __init__(self, capacity: int, device: torch.device, chunk: int = CHUNK) -> None:
        self.capacity, self.chunk, self.pin = capacity, chunk, device.type == "cuda"
        self.chunks: list[Tensor] = []
        self.reset()

    def reset(self) -> None:
        self.at, self.used = 0, 0

    def take(self, like: Tensor) -> Tensor | None:
        """A tensor of `like`'s size, strides and type, or None where there is no room left."""
        size = like.numel() * like.element_size()
        while self.at < len(self.chunks) and self.used + size > len(self.chunks[self.at]):
            self.at, self.used = self.at + 1, 0
        if self.at == len(self.chunks):
            left = self.capacity - sum(map(len, self.chunks))
            length = min(self.chunk, 1 << left.bit_length() >> 1)  # the largest power of two that is left
            if length < size:
                return None
            self.chunks.append(torch.empty(length, dtype=torch.uint8, pin_memory=self.pin))
        piece = self.chunks[self.at][self.used : self.used + size]
        self.used += -(-size // 512) * 512
        return piece.view(like.dtype).as_strided(like.shape, like.stride())
