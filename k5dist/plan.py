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

from k5dist import estimate, storage
from k5dist.config import ConfigError, RunConfig
from k5dist.estimate import Bucket

SCHEMA_VERSION = 1
DEFAULT_BATCH = 8


@dataclass(frozen=True)
class ClusterFacts:
    """What the planner must know of the machines: GPUs a node (0: CPU workers) and their kind."""

    gpus_per_node: int
    gpu_name: str | None = None
    assumed: bool = False


@dataclass(frozen=True)
class World:
    """Workers of the training gang and how they share the work: shard × replicate × context = size."""

    nodes: int
    workers_per_node: int
    device: str
    gpu_name: str | None
    shard: int
    replicate: int
    context: int

    @property
    def size(self) -> int:
        return self.nodes * self.workers_per_node

    @property
    def data_parallel(self) -> int:
        return self.shard * self.replicate


@dataclass(frozen=True)
class RunPlan:
    """The whole of what a worker reads. Immutable; `to_json` and `from_json` are inverse."""

    config: RunConfig
    world: World
    buckets: tuple[Bucket, ...]
    name: str
    pretrained: str
    pretrained_identity: str
    cache_fingerprint: str
    run_fingerprint: str
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
    def checkpoints_uri(self) -> str:
        return storage.join(self.run_uri, "checkpoints")

    @property
    def plan_uri(self) -> str:
        return storage.join(self.run_uri, "plan.json")

    def to_json(self) -> str:
        body = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        body |= {"config": self.config.to_mapping(), "world": dataclasses.asdict(self.world)}
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
        body["buckets"] = tuple(Bucket(**bucket) for bucket in body["buckets"])
        return cls(**body)


def make_plan(config: RunConfig, facts: ClusterFacts, pretrained_identity: str) -> RunPlan:
    """Derive the plan.

    `pretrained_identity` stands for the checkpoint's content: a hub id, a digest, or the generator's
    version.

    Raises:
        ConfigError: where degrees, world size and batch do not fit together.
    """
    world = _world(config, facts)
    config = _with_batch(_with_absolute_source(config), world.data_parallel)
    assert config.train.batch_size is not None
    if config.train.batch_size % world.data_parallel:
        degree = world.data_parallel
        rule = f"the global batch is split over {degree} data-parallel workers (shard × replicate)"
        near = max(degree, round(config.train.batch_size / degree) * degree)
        raise ConfigError("train.batch_size", config.train.batch_size, rule, f"train.batch_size={near}")
    buckets = tuple(Bucket(config.data.num_frames, h, w) for h, w in config.resolutions)
    cache_fingerprint = _fingerprint(_cache_identity(config, pretrained_identity))
    run_fingerprint = _fingerprint({"cache": cache_fingerprint, **_run_identity(config)})
    root = storage.normalise(config.storage.root)
    name = config.name or f"{config.flavour.name}-{run_fingerprint}"
    return RunPlan(
        config=config,
        world=world,
        buckets=buckets,
        name=name,
        pretrained=_checkpoint_uri(config, pretrained_identity),
        pretrained_identity=pretrained_identity,
        cache_fingerprint=cache_fingerprint,
        run_fingerprint=run_fingerprint,
        cache_uri=storage.join(root, "cache", cache_fingerprint),
        run_uri=storage.join(root, "runs", name),
        tracking_uri=config.tracking.uri or "",
    )


def _world(config: RunConfig, facts: ClusterFacts) -> World:
    cluster, parallel = config.cluster, config.parallel
    device = "cuda" if facts.gpus_per_node else "cpu"
    workers = cluster.workers_per_node or facts.gpus_per_node or 2
    if facts.gpus_per_node and workers > facts.gpus_per_node:
        rule = f"a GPU holds one worker, and a node has {facts.gpus_per_node} GPUs"
        raise ConfigError("cluster.workers_per_node", workers, rule, f"cluster.workers_per_node={facts.gpus_per_node}")
    size = cluster.nodes * workers
    rest = parallel.replicate * parallel.context
    shard = parallel.shard or max(1, size // rest)
    if shard * rest != size:
        key, value = ("parallel.shard", shard) if parallel.shard else ("parallel", f"replicate × context = {rest}")
        rule = (
            f"shard × replicate × context = {shard} × {parallel.replicate} × {parallel.context} = {shard * rest} "
            f"must equal the world: {cluster.nodes} nodes × {workers} workers = {size}"
        )
        fix = f"parallel.shard={size // rest}" if size % rest == 0 else "lower parallel.replicate or parallel.context"
        raise ConfigError(key, value, rule, fix)
    return World(cluster.nodes, workers, device, facts.gpu_name, shard, parallel.replicate, parallel.context)


def _with_absolute_source(config: RunConfig) -> RunConfig:
    """Workers have other working folders than the person who typed a relative path."""
    if config.data.source is None:
        return config
    source = storage.stable_name(config.data.source)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, source=source))


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
    precache = config.precache
    return {
        "schema": SCHEMA_VERSION,
        "pretrained": pretrained_identity,
        "source": config.data.source and storage.stable_name(config.data.source),
        "resolutions": config.resolutions,
        "num_frames": config.data.num_frames,
        "frame_rate": config.data.frame_rate,
        "first_frame": config.flavour.task == "i2v",
        "max_text_tokens": precache.max_text_tokens,
        "prompt_template": [precache.prompt_template, precache.prompt_template_start],
    }


def _run_identity(config: RunConfig) -> dict[str, Any]:
    everything = config.to_mapping()
    keys = ("model", "adapter", "lora", "train", "optimizer")
    # These change how fast a step is, not what it computes (but for rounding).
    train = {k: v for k, v in everything["train"].items() if k not in ("activation_checkpointing", "compile")}
    return {key: everything[key] for key in keys} | {
        "train": train,
        "held_out": config.data.held_out,
        "latents": config.precache.latents,
        "task": config.flavour.task,
    }


def _fingerprint(identity: Mapping[str, Any]) -> str:
    """Ten hexadecimal digits of the SHA-256 of the canonical JSON."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:10]


@dataclass(frozen=True)
class Estimates:
    """What a run will cost, by arithmetic; assumptions are said in `notes`."""

    parameters: int
    trainable: int
    memory: estimate.Memory
    gpu: str
    gpu_bytes: float
    step_flops: float
    step_seconds: float | None
    sample_cache_bytes: int
    notes: tuple[str, ...]


def estimates(plan: RunPlan) -> Estimates:
    """Costs of the plan's largest bucket."""
    config, world = plan.config, plan.world
    model, bucket = config.model, max(plan.buckets, key=lambda b: b.tokens)
    total = estimate.parameters(model)
    full = config.adapter == "full"
    trainable = total if full else estimate.lora_parameters(model, config.lora.rank, config.lora.targets)
    density = estimate.ASSUMED_NABLA_DENSITY if model.is_sparse else 1.0
    flops = estimate.forward_flops(model, bucket.tokens, density).training(config.adapter) * plan.batch_size
    gpu, rate, gpu_bytes = estimate.gpu_facts(world.gpu_name)
    memory = estimate.training_memory(
        model,
        trainable=trainable,
        full=full,
        bf16=config.train.precision == "bf16",
        shards=world.shard * world.context,
        tokens=bucket.tokens // world.context,
        checkpointing=config.train.activation_checkpointing,
    )
    notes = [f"time: {estimate.ASSUMED_MFU:.0%} of the GPU's bf16 rate"] if world.device == "cuda" else []
    if model.is_sparse:
        notes.append(f"NABLA keeps {density:.0%} of the attention blocks")
    if world.device == "cuda" and memory.total > gpu_bytes:
        notes.append("MORE MEMORY THAN THE GPU HAS: more shards or context parallelism, a smaller bucket")
    seconds = flops / (rate * estimate.ASSUMED_MFU * world.size) if world.device == "cuda" else None
    cache = estimate.sample_cache_bytes(
        model, bucket, first_frame=config.flavour.task == "i2v", text_tokens=config.precache.max_text_tokens
    )
    return Estimates(total, trainable, memory, gpu, gpu_bytes, flops, seconds, cache, tuple(notes))
