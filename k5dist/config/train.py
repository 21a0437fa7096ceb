"""How it is trained: steps, numbers, loss."""

from __future__ import annotations

import dataclasses

from k5dist.schema import ConfigError, one_of, positive

CHECKPOINTING = ("auto", "linear", "attention", "full")  # from `linear` on, each needs less memory than the one before


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    steps: int
    batch_size: int | None
    seed: int
    precision: str
    activation_checkpointing: str
    offload_gib: float
    compile: bool
    float8: bool
    attention: str
    timestep_mean: float
    timestep_std: float
    timestep_shift: float | None
    caption_dropout: float

    def __post_init__(self) -> None:
        positive("train.steps", self.steps)
        if self.batch_size is not None:
            positive("train.batch_size", self.batch_size)
        positive("train.timestep_std", self.timestep_std)
        one_of("train.precision", self.precision, ("bf16", "fp32"))
        if self.float8 and self.precision != "bf16":
            rule = "float8 products belong to a bf16 model"
            raise ConfigError("train.float8", True, rule, "train.precision=bf16 or train.float8=false")
        one_of("train.attention", self.attention, ("auto", "flash3", "flash4"))
        one_of("train.activation_checkpointing", self.activation_checkpointing, CHECKPOINTING)
        if self.offload_gib < 0 or (self.offload_gib and not self.compile):
            rule = "GiB of the host's memory a worker, 0 or more; only what compiled blocks keep can be moved there"
            raise ConfigError("train.offload_gib", self.offload_gib, rule, "train.offload_gib=64 train.compile=true")
        if not 0 <= self.caption_dropout <= 1:
            rule = "a probability, 0 ≤ p ≤ 1"
            raise ConfigError("train.caption_dropout", self.caption_dropout, rule, "train.caption_dropout=0.1")
        if self.timestep_shift is not None:
            positive("train.timestep_shift", self.timestep_shift)
