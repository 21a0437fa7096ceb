"""How it is trained: steps, numbers, loss."""

from __future__ import annotations

import dataclasses
import math

from k5dist.schema import ConfigError, one_of, positive

CHECKPOINTING = ("auto", "linear", "attention", "full")  # from `linear` on, each needs less memory than the one before
MAX_MODE_SCALE = 2 / (math.pi - 2)  # SD3, section 3.1


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    steps: int
    batch_size: int | None
    seed: int
    precision: str
    activation_checkpointing: str
    offload_gib: float
    stream_weights: bool
    gpu_memory_gib: float | None
    compile: bool
    float8: bool
    attention: str
    timestep_mean: float
    timestep_std: float
    timestep_shift: float | str | None
    caption_dropout: float
    timestep_sampling: str
    timestep_mode_scale: float
    timestep_beta: tuple[float, ...]
    timestep_shift_reference: tuple[int, ...] | None
    timestep_stratified: bool
    unconditional: str
    loss: str
    huber_c: float
    loss_weighting: str
    min_snr_gamma: float
    mask_background: float
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
        if self.attention != "auto" and self.precision != "bf16":
            rule = "FlashAttention takes bf16"
            raise ConfigError("train.attention", self.attention, rule, "train.precision=bf16 or train.attention=auto")
        one_of("train.activation_checkpointing", self.activation_checkpointing, CHECKPOINTING)
        if self.offload_gib < 0 or (self.offload_gib and not self.compile):
            rule = "GiB of the host's memory a worker, 0 or more; only what compiled blocks keep can be moved there"
            raise ConfigError("train.offload_gib", self.offload_gib, rule, "train.offload_gib=64 train.compile=true")
        if self.gpu_memory_gib is not None and not 4 <= self.gpu_memory_gib < math.inf:
            rule = "GiB of GPU memory, 4 or more (CUDA takes one, and two stay free)"
            raise ConfigError("train.gpu_memory_gib", self.gpu_memory_gib, rule, "train.gpu_memory_gib=24 or null")
        if not 0 <= self.caption_dropout <= 1:
            rule = "a probability, 0 ≤ p ≤ 1"
            raise ConfigError("train.caption_dropout", self.caption_dropout, rule, "train.caption_dropout=0.1")
        if not 0 <= self.first_frame_dropout <= 1:
            rule, fix = "a probability, 0 ≤ p ≤ 1", "train.first_frame_dropout=0.2"
            raise ConfigError("train.first_frame_dropout", self.first_frame_dropout, rule, fix)
        self._check_timesteps()
        one_of("train.unconditional", self.unconditional, ("empty", "negative"))
        one_of("train.loss", self.loss, ("mse", "huber"))
        one_of("train.loss_weighting", self.loss_weighting, ("none", "min_snr", "cosmap"))
        positive("train.huber_c", self.huber_c)
        positive("train.min_snr_gamma", self.min_snr_gamma)
        if not 0 <= self.mask_background <= 1:
            rule = "what counts of the loss outside of masks, 0 ≤ share ≤ 1"
            raise ConfigError("train.mask_background", self.mask_background, rule, "train.mask_background=0.1")

    def _check_timesteps(self) -> None:
        one_of("train.timestep_sampling", self.timestep_sampling, ("logit_normal", "uniform", "mode", "beta"))
        if isinstance(self.timestep_shift, str):
            one_of("train.timestep_shift", self.timestep_shift, ("resolution",))
        elif self.timestep_shift is not None:
            positive("train.timestep_shift", self.timestep_shift)
        if not -1 <= self.timestep_mode_scale <= MAX_MODE_SCALE:
            rule = f"−1 ≤ scale ≤ 2 / (π − 2) = {MAX_MODE_SCALE:.4f}: beyond, the levels would not ascend"
            raise ConfigError(
                "train.timestep_mode_scale", self.timestep_mode_scale, rule, "train.timestep_mode_scale=1.29"
            )
        if len(self.timestep_beta) != 2 or not all(0 < x < math.inf for x in self.timestep_beta):
            rule = "the two parameters of a beta distribution, greater than 0"
            raise ConfigError("train.timestep_beta", self.timestep_beta, rule, "train.timestep_beta=[1.5,1.0]")
        reference = self.timestep_shift_reference
        if reference is not None and (len(reference) != 3 or min(reference) < 1):
            rule = "[frames, height, width] of clips at which the checkpoint's shift holds"
            raise ConfigError(
                "train.timestep_shift_reference", reference, rule, "train.timestep_shift_reference=[121,512,768]"
            )
