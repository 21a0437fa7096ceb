"""How clips and captions become a cache."""

from __future__ import annotations

import dataclasses

from k5dist.schema import ConfigError, one_of, positive


@dataclasses.dataclass(frozen=True)
class PrecacheConfig:
    shard_size_mib: float
    max_failure_ratio: float
    text_batch_size: int
    repair: bool
    vae_enable_patch_conv: bool
    vae_enable_tiling: bool
    offload_during_startup: bool
    vae_workers: int | None
    vae_gpus: float
    text_workers: int | None
    text_gpus: float
    decode_workers: int | None
    max_text_tokens: int
    prompt_template: str | None
    prompt_template_start: int | None
    latents: str

    def __post_init__(self) -> None:
        for name in ("shard_size_mib", "text_batch_size", "max_text_tokens"):
            positive(f"precache.{name}", getattr(self, name))
        for name in ("vae_workers", "text_workers", "decode_workers"):
            if getattr(self, name) is not None:
                positive(f"precache.{name}", getattr(self, name))
        for name in ("vae_gpus", "text_gpus"):
            if not 0 < getattr(self, name) <= 1:
                rule = "a worker's share of a GPU, 0 < share ≤ 1"
                raise ConfigError(f"precache.{name}", getattr(self, name), rule, f"precache.{name}=1")
        if not 0 <= self.max_failure_ratio <= 1:
            fix = "precache.max_failure_ratio=0.1"
            raise ConfigError("precache.max_failure_ratio", self.max_failure_ratio, "a share, 0 ≤ share ≤ 1", fix)
        one_of("precache.latents", self.latents, ("sample", "mode"))
        if (self.prompt_template is None) != (self.prompt_template_start is None):
            rule = "a template and the number of its tokens to cut off belong together"
            raise ConfigError("precache.prompt_template_start", self.prompt_template_start, rule, "set both or neither")
        if self.prompt_template is not None and "{}" not in self.prompt_template:
            rule = "the prompt goes where the template says {}"
            raise ConfigError("precache.prompt_template", self.prompt_template, rule, "put {} into the template")
