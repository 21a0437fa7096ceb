"""What is looked at and kept on the way: validation, checkpoints."""

from __future__ import annotations

import dataclasses

from k5dist.schema import ConfigError, one_of, positive
from k5dist.shapes import check_num_frames, check_sides, parse_resolution

RECOMMENDED_GUIDANCE = (2.0, 6.0)
COMPARED = ("base", "ema")  # from left to right beside the trained model: before it, after it


@dataclasses.dataclass(frozen=True)
class ValidationConfig:
    prompts: tuple[str, ...]
    images: tuple[str, ...]
    negative_prompt: str
    every: int
    guidance: float
    num_frames: int | None
    resolution: tuple[int, ...] | None
    sampling_steps: int
    timesteps: int
    seeds: tuple[int, ...]
    compare: tuple[str, ...]
    clip_model: str | None
    patience: int | None

    def __post_init__(self) -> None:
        if self.num_frames is not None:
            check_num_frames("validation.num_frames", self.num_frames)
        if self.resolution is not None:
            ((height, width),) = parse_resolution("validation.resolution", self.resolution)
            check_sides("validation.resolution", height, width)
        if self.every < 0:
            raise ConfigError("validation.every", self.every, "steps ≥ 0 (0: at the end only)", "validation.every=100")
        if self.guidance < 1:
            rule = "classifier-free guidance ≥ 1 (1: none; 2…6 looks right)"
            raise ConfigError("validation.guidance", self.guidance, rule, "validation.guidance=5.0")
        positive("validation.sampling_steps", self.sampling_steps)
        positive("validation.timesteps", self.timesteps)
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            rule = "one or more seeds, each once: every prompt gives a video for each"
            raise ConfigError("validation.seeds", list(self.seeds), rule, "validation.seeds=[0]")
        for variant in self.compare:
            one_of("validation.compare", variant, COMPARED)
        if self.patience is not None:
            positive("validation.patience", self.patience)


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    every: int
    keep: int
    keep_best: bool

    def __post_init__(self) -> None:
        positive("checkpoint.every", self.every)
        positive("checkpoint.keep", self.keep)
