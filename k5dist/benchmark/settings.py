"""What is timed: a run's configuration cut down to one bucket of made-up clips, and how often."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from k5dist.config import ConfigError, RunConfig
from k5dist.plan import RunPlan, make_plan
from k5dist.schema import build, one_of, positive
from k5dist.shapes import Bucket
from k5dist.world import ClusterFacts, make_world

# What `methods` times: a name and the overrides that choose the method.
PLAIN = "lora"
_FULL = ("adapter=full", "optimizer.lr=1e-5")
_ROLLOUT = ("rollout.probability=1", "rollout.start_step=0", "rollout.ramp_steps=1", "rollout.min_sigma=1e-3")
METHODS: dict[str, tuple[str, ...]] = {
    PLAIN: (),
    "lora_ffn": ("lora.targets=attention+ffn",),
    "lora_dropout": ("lora.dropout=0.1",),
    "dora": ("lora.use_dora=true",),
    "base_int8": ("lora.base_dtype=int8",),
    "base_float8": ("lora.base_dtype=float8",),
    "tread_half": ("tread.routes=[{selection_ratio:0.5,start_layer_idx:2,end_layer_idx:-2}]",),
    "crepa": ("crepa.enabled=true", "crepa.block_index=1"),
    "rollout_one_step": (*_ROLLOUT, "rollout.max_steps=1"),
    "ema": ("ema.enabled=true",),
    "recompute_full": ("train.activation_checkpointing=full",),
    "recompute_attention": ("train.activation_checkpointing=attention",),
    "stream_weights": ("train.stream_weights=true",),
    "float8": ("train.float8=true",),
    "full_adamw_bf16": (*_FULL, "optimizer.kind=adamw_bf16"),
    "full_adamw_bf16_ema": (*_FULL, "optimizer.kind=adamw_bf16", "ema.enabled=true"),
    "full_adamw": (*_FULL, "optimizer.kind=adamw"),
    "full_adamw_8bit": (*_FULL, "optimizer.kind=adamw_8bit"),
    "full_adafactor": (*_FULL, "optimizer.kind=adafactor", "optimizer.lr=1e-2"),
    "full_adamw_schedulefree": (*_FULL, "optimizer.kind=adamw_schedulefree"),
    "full_prodigy": (*_FULL, "optimizer.kind=prodigy", "optimizer.lr=1"),
    "full_muon": (*_FULL, "optimizer.kind=muon"),
}


@dataclass(frozen=True)
class BenchmarkSettings:
    """`conf/benchmark.yaml` says what the keys mean."""

    blocks: int | None
    steps: int
    warmup: int
    text_tokens: int
    density: float
    baseline: str
    profile: bool
    methods: tuple[str, ...] | None
    checkpoint: str | None
    out: str | None

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> BenchmarkSettings:
        return build(cls, mapping, "benchmark.")

    def __post_init__(self) -> None:
        for name in ("steps", "warmup", "text_tokens"):
            positive(f"benchmark.{name}", getattr(self, name))
        if self.blocks is not None:
            positive("benchmark.blocks", self.blocks)
        if not 0 < self.density <= 1:
            rule = "a share of the blocks, 0 < share ≤ 1"
            raise ConfigError("benchmark.density", self.density, rule, "benchmark.density=0.2")
        for name in self.methods or ():
            one_of("benchmark.methods", name, METHODS)
        one_of("benchmark.baseline", self.baseline, ("none", "diffusers"))


@dataclass(frozen=True)
class Benchmark:
    """The whole of what a benchmark's worker reads."""

    plan: RunPlan
    settings: BenchmarkSettings
    loop: str  # k5dist, diffusers or load

    def to_mapping(self) -> dict[str, Any]:
        body = {"plan": json.loads(self.plan.to_json()), "settings": dataclasses.asdict(self.settings)}
        return body | {"loop": self.loop}

    @classmethod
    def from_mapping(cls, body: Mapping[str, Any]) -> Benchmark:
        plan = RunPlan.from_json(json.dumps(body["plan"]))
        return cls(plan, BenchmarkSettings.from_mapping(body["settings"]), body["loop"])

    @property
    def bucket(self) -> Bucket:
        return self.plan.buckets[0]


def plan_benchmark(config: RunConfig, settings: BenchmarkSettings, facts: ClusterFacts) -> RunPlan:
    """The run's own plan for one bucket (the validation videos' resolution), one clip a data-parallel group."""
    if settings.baseline == "diffusers" and config.parallel.context > 1:
        rule = "diffusers has no context parallelism for this model"
        raise ConfigError("benchmark.baseline", settings.baseline, rule, "parallel.context=1")
    model = config.model
    if settings.blocks is not None:
        model = dataclasses.replace(model, num_visual_blocks=settings.blocks)
    batch = make_world(config, facts).data_parallel
    train = dataclasses.replace(config.train, batch_size=batch, caption_dropout=0.0)
    shape = {"resolution": config.validation_shape[1:], "resolution_type": "pixel", "bucket_strategy": "aspect_ratio"}
    data = dataclasses.replace(config.data, source=None, datasets={}, **shape)
    return make_plan(dataclasses.replace(config, model=model, train=train, data=data), facts, "hub:benchmark")
