"""CREPA: which block is aligned with which features, how strongly, and the rules on it (arXiv 2506.09229)."""

from __future__ import annotations

import dataclasses
import math

from k5dist.config.tread import Route
from k5dist.schema import ConfigError, positive

# Widths of the public DINOv2 encoders, by a part of their names; another one's is taken from its cache.
ENCODER_DIMS = {"small": 384, "base": 768, "large": 1024, "giant": 1536}
PATCH_PIXELS = 14  # DINOv2's
HEAD_DIM = 2048  # of the projection head's hidden layers, as in REPA


@dataclasses.dataclass(frozen=True)
class CrepaConfig:
    enabled: bool
    block_index: int
    weight: float
    adjacent_distance: int
    temporal_decay: float
    normalize_by_frames: bool
    encoder: str
    encoder_size: int

    def __post_init__(self) -> None:
        for name in ("weight", "temporal_decay"):
            positive(f"crepa.{name}", getattr(self, name))
        if self.adjacent_distance < 0:
            rule = "latent frames from one to its neighbours, 0 or more (0: each frame alone)"
            raise ConfigError("crepa.adjacent_distance", self.adjacent_distance, rule, "crepa.adjacent_distance=1")
        if self.encoder_size < PATCH_PIXELS:
            rule = f"the edge of a square of a frame's area in pixels, {PATCH_PIXELS} (a patch) or more"
            raise ConfigError("crepa.encoder_size", self.encoder_size, rule, "crepa.encoder_size=518")

    def check(self, num_blocks: int, routes: tuple[Route, ...]) -> None:
        """Raises ConfigError for a block that is not there, or whose tokens are not all there."""
        if not self.enabled:
            return
        key = "crepa.block_index"
        if not 0 <= self.block_index < num_blocks:
            rule = f"the model has {num_blocks} visual blocks, 0…{num_blocks - 1}"
            raise ConfigError(key, self.block_index, rule, f"{key}={min(8, num_blocks // 4)}")
        for route in routes:
            if route.first <= self.block_index <= route.last:
                rule = f"its block must compute every token, and lies in the TREAD route {route.first}…{route.last}"
                before = f"{key}={route.first - 1} or " if route.first else ""
                fix = f"{before}a route from {self.block_index + 1} on"
                raise ConfigError(key, self.block_index, rule, fix)

    @property
    def feature_dim(self) -> int:
        """Width of the encoder's features, assumed to be the largest where its name does not tell."""
        return next((dim for name, dim in ENCODER_DIMS.items() if name in self.encoder), ENCODER_DIMS["giant"])

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches of a frame: of its own aspect ratio, of about `encoder_size`² pixels."""
        stretch = math.sqrt(height / width)
        rows, columns = self.encoder_size * stretch / PATCH_PIXELS, self.encoder_size / stretch / PATCH_PIXELS
        return max(1, round(rows)), max(1, round(columns))
