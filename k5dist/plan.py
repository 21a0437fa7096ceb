"""RunConfig + facts of the cluster → RunPlan: everything derived, in one JSON that a worker can be started from.

Two fingerprints keep work apart: the cache's (what is encoded, and how) and the run's (what is learned from it). Where,
how fast and on how many machines a run goes is in neither, so a changed learning rate keeps the cache and a changed
number of GPUs keeps the run.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from k5dist import estimate, memory, states, storage
from k5dist.config import ConfigError, RunConfig
from k5dist.datasets import DatasetConfig
from k5dist.estimate import GIB, Recompute
from k5dist.memory import Memory
from k5dist.pools import Flow, Pools, block_bytes, settle_flow, settle_pools
from k5dist.shapes import Bucket
from k5dist.world import ClusterFacts, World, make_world

SCHEMA_VERSION = 7  # of plan.json
ENCODING_VERSION = 2  # raise when equal settings give another cache
DEFAULT_BATCH = 8
_OFF = (None, False, "", "all")  # options of adapters that are not used


@dataclass(frozen=True)
class RunPlan:
    """The whole of what a worker reads. Immutable; `to_json` and `from_json` are inverse."""

    config: RunConfig
    world: World
    buckets: tuple[Bucket, ...]
    recompute: Recompute
    name: str
    pretrained: str
    pretrained_identity: str
    cache_fingerprint: str
    run_fingerprint: str
    features_id: str  # names what encodes CREPA's features, and how; empty where it is off
    cache_uri: str
    run_uri: str
    tracking_uri: str

    @property
    def accumulation(self) -> int:
        """Micro-batches (of one clip) that a worker sums up in a step."""
        return self.batch_size // self.world.data_parallel

    @property
    def batch_size(self) -> int:
        """Clips a step over all workers."""
        assert self.config.train.batch_size is not None, "a plan's batch is settled"
        return self.config.train.batch_size

    @property
    def pools(self) -> Pools:
        """The precache's workers."""
        return settle_pools(self.config.precache, self.world)

    @property
    def what_is_encoded(self) -> tuple[str, str, str]:
        """Equal for runs whose precaches do the same work."""
        return self.cache_fingerprint, self.features_id, repr(self.config.data)

    @property
    def sample_bytes(self) -> int:
        """Of the latents of a clip of the largest bucket, bf16."""
        largest, first_frame = memory.largest(self.buckets), self.config.flavour.task == "i2v"
        return estimate.sample_cache_bytes(self.config.model, largest, first_frame=first_frame, text_tokens=0)

    def rows_per_shard(self, row_bytes: int) -> int:
        return max(1, int(self.config.precache.shard_size_mib * 2**20 // row_bytes))

    @property
    def flow(self) -> Flow:
        """What of clips may be under way in object stores as large as the plan knows of."""
        shard_bytes = self.rows_per_shard(self.sample_bytes) * self.sample_bytes
        return settle_flow(self.world.store_bytes, block_bytes(self.buckets), shard_bytes, self.pools.vae.workers)

    @property
    def checkpoints_uri(self) -> str:
        return storage.join(self.run_uri, "checkpoints")

    @property
    def plan_uri(self) -> str:
        return storage.join(self.run_uri, "plan.json")

    def to_json(self) -> str:
        body = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        body |= {"config": self.config.to_mapping(), "world": dataclasses.asdict(self.world)}
        body["recompute"] = dataclasses.asdict(self.recompute)
        body["buckets"] = [dataclasses.asdict(bucket) for bucket in self.buckets]
        return json.dumps({"schema_version": SCHEMA_VERSION, **body}, indent=2)

    @classmethod
    def from_json(cls, text: str) -> RunPlan:
        body = json.loads(text)
        version = body.pop("schema_version")
        if version != SCHEMA_VERSION:
            rule = f"this release reads plans of schema version {SCHEMA_VERSION}"
            raise ConfigError("plan.json", version, rule, "plan the run again with this release")
        body["config"] = RunConfig.from_mapping(body["config"])
        body["world"] = World(**body["world"])
        body["recompute"] = Recompute(**body["recompute"])
        body["buckets"] = tuple(Bucket(**bucket) for bucket in body["buckets"])
        return cls(**body)


def make_plan(
    config: RunConfig,
    facts: ClusterFacts,
    pretrained_identity: str,
    encoder_identity: str | None = None,
    lora_identity: str = "",
) -> RunPlan:
    """Derive the plan.

    `pretrained_identity` stands for the checkpoint's content: a hub id, a digest, or the generator's
    version. `encoder_identity` does so for CREPA's vision encoder; its name where it is not given. `lora_identity` does
    so for the LoRA that adapters start from.

    Raises:
        ConfigError: where degrees, world size and batch do not fit together.
    """
    world = make_world(config, facts)
    if config.lora.base_dtype == "float8" and estimate.lacks_float8(world.gpu_name):
        rule = f"{world.gpu_name} has no float8 numbers (Ada, Hopper and later have)"
        raise ConfigError("lora.base_dtype", "float8", rule, "lora.base_dtype=int8")
    settle_pools(config.precache, world)  # refuses what the cluster cannot hold
    config = _with_batch(_with_absolute_sources(config, lora_identity), world.data_parallel)
    assert config.train.batch_size is not None
    if config.train.batch_size % world.data_parallel:
        degree = world.data_parallel
        rule = f"the global batch is split over {degree} data-parallel workers (shard × replicate)"
        near = max(degree, round(config.train.batch_size / degree) * degree)
        raise ConfigError("train.batch_size", config.train.batch_size, rule, f"train.batch_size={near}")
    buckets = tuple(dict.fromkeys(b for dataset in config.datasets for b in dataset.buckets(config.side_unit)))
    cache_fingerprint = _fingerprint(_cache_identity(config, pretrained_identity))
    features_id = _features_id(config, encoder_identity or config.crepa.encoder)
    identity = _run_identity(config, features_id, lora_identity)
    run_fingerprint = _fingerprint({"cache": cache_fingerprint, **identity})
    root = storage.normalise(config.storage.root)
    name = config.name or f"{config.flavour.name}-{run_fingerprint}"
    return RunPlan(
        config=config,
        world=world,
        buckets=buckets,
        recompute=memory.settle(config, world, buckets, memory.gpu_bytes(config, world)),
        name=name,
        pretrained=_checkpoint_uri(config, pretrained_identity),
        pretrained_identity=pretrained_identity,
        cache_fingerprint=cache_fingerprint,
        run_fingerprint=run_fingerprint,
        features_id=features_id,
        cache_uri=storage.join(root, "cache", cache_fingerprint),
        run_uri=storage.join(root, "runs", name),
        tracking_uri=config.tracking.uri or "",
    )


def _with_absolute_sources(config: RunConfig, lora_identity: str) -> RunConfig:
    """Workers have other working folders than the person who typed a relative path."""
    data = config.data
    source = data.source and storage.stable_name(data.source)
    named = {name: {**entry, "source": storage.stable_name(entry["source"])} for name, entry in data.datasets.items()}
    lora = config.lora
    is_place = lora.init_from is not None and not lora_identity.startswith("hub:")
    init_from = storage.stable_name(lora.init_from) if is_place and lora.init_from else lora.init_from
    return dataclasses.replace(
        config,
        data=dataclasses.replace(data, source=source, datasets=named),
        lora=dataclasses.replace(lora, init_from=init_from),
        validation=dataclasses.replace(
            config.validation, images=tuple(storage.stable_name(uri) for uri in config.validation.images)
        ),
    )


def _checkpoint_uri(config: RunConfig, identity: str) -> str:
    """The checkpoint's absolute place, or its hub id."""
    return config.pretrained if identity.startswith("hub:") else storage.normalise(config.pretrained)


def _with_batch(config: RunConfig, data_parallel: int) -> RunConfig:
    """Where no batch is asked for: the smallest multiple of the workers that is at least 8 (1, 2, 4, 8 GPUs agree)."""
    if config.train.batch_size is not None:
        return config
    batch = -(-DEFAULT_BATCH // data_parallel) * data_parallel
    return dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=batch))


def _cache_identity(config: RunConfig, pretrained_identity: str) -> dict[str, Any]:
    """What encodes, and how. Which clips, cuts and buckets: that is in the samples' own keys."""
    precache = config.precache
    return {
        "schema": ENCODING_VERSION,
        "pretrained": pretrained_identity,
        "first_frame": config.flavour.task == "i2v",
        "max_text_tokens": precache.max_text_tokens,
        "vae_enable_tiling": precache.vae_enable_tiling,
        "prompt_template": [precache.prompt_template, precache.prompt_template_start],
    }


def _features_id(config: RunConfig, encoder_identity: str) -> str:
    """Which store of the cache holds CREPA's features: another encoder, size or choice of frames has another."""
    if not config.crepa.enabled:
        return ""
    return _fingerprint({"schema": 1, "encoder": encoder_identity, "size": config.crepa.encoder_size})


def _run_identity(config: RunConfig, features_id: str, lora_identity: str) -> dict[str, Any]:
    everything = config.to_mapping()
    everything["lora"]["init_from"] = lora_identity  # what it is, not where it lies
    everything["lora"] = {key: value for key, value in everything["lora"].items() if value not in _OFF}
    if not isinstance(config.lora.targets, str):  # however they are written
        everything["lora"]["targets"] = config.lora.layers
    keys = ("model", "adapter", "lora", "train", "optimizer")
    # These change how fast a step is, not what it computes (but for rounding).
    speed = ("activation_checkpointing", "offload_gib", "stream_weights", "gpu_memory_gib", "compile", "attention")
    train = {key: value for key, value in everything["train"].items() if key not in speed}
    if not train["first_frame_dropout"]:
        del train["first_frame_dropout"]
    # What is off is not in it: a run keeps its fingerprint when a release brings another method.
    routes = config.tread.resolve(config.model.num_visual_blocks)
    methods: dict[str, Any] = {"tread": [dataclasses.astuple(route) for route in routes]} if routes else {}
    if config.crepa.enabled:
        numbers = {key: value for key, value in everything["crepa"].items() if key != "encoder"}
        methods["crepa"] = {**numbers, "features": features_id}
    identity = {key: everything[key] for key in keys} | methods
    identity |= {
        "train": train,
        "ema": _ema_identity(config),
        "negative": config.validation.negative_prompt if config.train.unconditional == "negative" else None,
        "datasets": [_dataset_identity(config, dataset) for dataset in config.datasets],
        "held_out": config.data.held_out,
        "latents": config.precache.latents,
        "task": config.flavour.task,
    }
    return identity | ({"rollout": everything["rollout"]} if config.rollout.enabled else {})


def _ema_identity(config: RunConfig) -> dict[str, Any] | None:
    """What the average is; where it lies and what is exported are no part of it."""
    ema = config.ema
    return {"decay": ema.decay, "after": ema.update_after, "every": ema.every} if ema.enabled else None


def _dataset_identity(config: RunConfig, dataset: DatasetConfig) -> dict[str, Any]:
    """A dataset's keys by what they come to, so that two spellings of one shape are one run."""
    identity = dataclasses.asdict(dataset)
    for name in ("own", "resolution", "resolution_type", "frame_interval", "caption_strategy"):
        del identity[name]
    buckets = [dataclasses.astuple(bucket) for bucket in dataset.buckets(config.side_unit)]
    return identity | {"buckets": buckets, "captions": dataset.captions_from}


def _fingerprint(identity: Mapping[str, Any]) -> str:
    """Ten hexadecimal digits of the SHA-256 of the canonical JSON."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:10]


@dataclass(frozen=True)
class Estimates:
    """What a run will cost, by arithmetic; assumptions about time are said in `notes`, doubts in `memory_note`."""

    parameters: int
    trainable: int
    memory: Memory
    memory_note: str | None
    gpu: str
    gpu_bytes: float
    step_flops: float
    step_seconds: float | None
    sample_cache_bytes: int
    rollout_forwards: float  # of every worker in a step, once the ramp is over
    rollout_flops: float  # of all workers; among `step_flops`
    notes: tuple[str, ...]


def estimates(plan: RunPlan) -> Estimates:
    """Costs of the plan's largest bucket."""
    config, world = plan.config, plan.world
    model, bucket = config.model, memory.largest(plan.buckets)
    density = estimate.ASSUMED_NABLA_DENSITY if model.is_sparse else 1.0
    flops = estimate.clip_flops(config, bucket.token_shape, density).training(config.adapter) * plan.batch_size
    gpu, rate, _ = estimate.gpu_facts(world.gpu_name)
    gpu_bytes = memory.gpu_bytes(config, world)
    needed = memory.predict(config, world, bucket, plan.recompute)
    rolled = config.rollout.forwards(plan.accumulation, world.data_parallel) if config.rollout.enabled else 0.0
    forward = estimate.forward_flops(model, bucket.tokens, density)
    rollout_flops = rolled * world.data_parallel * (forward.linear + forward.attention)
    flops += rollout_flops
    notes = [f"time: {estimate.ASSUMED_MFU:.0%} of the GPU's bf16 rate"] if world.device == "cuda" else []
    if model.is_sparse:
        notes.append(f"NABLA keeps {density:.0%} of the attention blocks")
    seconds = flops / (rate * estimate.ASSUMED_MFU * world.size) if world.device == "cuda" else None
    cache = estimate.sample_cache_bytes(
        model, bucket, first_frame=config.flavour.task == "i2v", text_tokens=config.precache.max_text_tokens
    )
    if config.crepa.enabled:
        cache += estimate.feature_cache_bytes(config.crepa, bucket)
    return Estimates(
        parameters=estimate.parameters(model),
        trainable=states.trainable_parameters(config),
        memory=needed,
        memory_note=_memory_note(needed.total, gpu_bytes) if world.device == "cuda" else None,
        gpu=gpu,
        gpu_bytes=gpu_bytes,
        step_flops=flops,
        step_seconds=seconds,
        sample_cache_bytes=cache,
        rollout_forwards=rolled,
        rollout_flops=rollout_flops,
        notes=tuple(notes),
    )


def _memory_note(needed: float, gpu_bytes: float) -> str | None:
    if needed > gpu_bytes:
        return "MORE MEMORY THAN THE GPU HAS: more shards or context parallelism, a smaller bucket"
    if needed > memory.usable(gpu_bytes):
        free = (gpu_bytes - memory.usable(gpu_bytes)) / GIB
        return f"less than {free:.1f} GiB of the GPU would stay free: it may run out of memory"
    return None
