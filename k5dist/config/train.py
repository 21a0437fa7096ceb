"""How it is trained: steps, numbers, loss, optimiser."""

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
    first_frame_dropout: float

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
        if not 0 <= self.first_frame_dropout <= 1:
            rule, fix = "a probability, 0 ≤ p ≤ 1", "train.first_frame_dropout=0.2"
            raise ConfigError("train.first_frame_dropout", self.first_frame_dropout, rule, fix)
        if self.timestep_shift is not None:
            positive("train.timestep_shift", self.timestep_shift)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    kind: str
    lr: float
    betas: tuple[float, ...]
    eps: float
    weight_decay: float
    max_grad_norm: float
    schedule: str
    warmup_steps: int

    def __post_init__(self) -> None:
        one_of("optimizer.kind", self.kind, ("adamw", "adamw_bf16"))
        positive("optimizer.lr", self.lr)
        positive("optimizer.max_grad_norm", self.max_grad_norm)
        one_of("optimizer.schedule", self.schedule, ("constant", "cosine"))
        if len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas):
            raise ConfigError("optimizer.betas", self.betas, "two numbers, 0 ≤ β < 1", "optimizer.betas=[0.9,0.99]")
        if self.warmup_steps < 0:
            raise ConfigError("optimizer.warmup_steps", self.warmup_steps, "steps ≥ 0", "optimizer.warmup_steps=0")
