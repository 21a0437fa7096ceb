"""Whether a run fits its GPUs, and if not, the nearest settings that do, each found by planning it.

Refused is only what is known: on an assumed GPU the plan says its doubt, and the user decides.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from k5dist import estimate, memory
from k5dist.config import CHECKPOINTING, ConfigError, RunConfig
from k5dist.estimate import GIB
from k5dist.plan import RunPlan, make_plan
from k5dist.shapes import HD_RESOLUTIONS, SD_RESOLUTIONS, Bucket
from k5dist.world import ClusterFacts

Change = dict[str, Any]  # dotted keys and their new values

MAX_ALTERNATIVES = 3
MAX_NODES = 64
NODE_SIZES = (2, 4, 8)  # GPUs of usual machines
CLIP_LENGTHS = (121, 61, 49, 25, 17)  # 10, 5, 2.5, 2, 1 and 0.7 s at 24 frames a second
HOST_GIB = (16, 48)  # of the host's memory, at most, for what blocks keep; no more is taken than is needed
REFERENCE_NABLA_TOKENS = 16_384  # a head's boolean mask of S × S stays below 300 MB
SMALL_RESOLUTIONS = ((384, 640), (640, 384), (256, 384), (384, 256), (256, 256))  # below the presets; all take NABLA


def check(config: RunConfig, facts: ClusterFacts) -> None:
    """Raises ConfigError, with settings that fit, where training would need more memory than the GPUs have."""
    trains = "train" in config.stages or config.stages == ("plan",)
    if not trains or not facts.gpus_per_node or facts.assumed or not estimate.is_known_gpu(facts.gpu_name):
        return
    plan = make_plan(config, facts, "")
    needed, gpu, gpu_bytes = _needs(plan)
    if needed.total <= gpu_bytes:
        return
    state = (needed.weights + needed.gradients + needed.optimizer + needed.gathered) / GIB
    activations = (needed.total - needed.runtime) / GIB - state
    policy = config.train.activation_checkpointing
    rule = (
        f"{memory.largest(plan.buckets)} needs about {needed.total / GIB:.1f} GiB a GPU with activation_checkpointing="
        f"{policy}, of {gpu_bytes / GIB:.1f} ({gpu}): weights, gradients and optimiser {state:.1f}, activations"
        f" {activations:.1f}"
    )
    lighter = None if policy == "auto" else _lighter_policy(config, facts)  # auto has tried them all
    if lighter:
        key = "train.activation_checkpointing"
        raise ConfigError(key, policy, rule, f"{key}={lighter} or {key}=auto")
    found = alternatives(config, facts)
    if not found:
        fix = "GPUs with more memory, or a smaller data.resolution and data.num_frames"
        raise ConfigError("data.resolution", config.data.resolution, rule, fix)
    key = next(iter(found[0]))
    raise ConfigError(key, _value(config, facts, key), rule, " or ".join(words(change) for change in found))


def refuse_unfinished(plan: RunPlan) -> None:
    """Raises ConfigError for what this release plans but does not run, before anything starts: never done half."""
    config = plan.config
    tokens = max(bucket.tokens for bucket in plan.buckets)
    if config.model.is_sparse and plan.world.device == "cpu" and tokens > REFERENCE_NABLA_TOKENS:
        rule = f"on a CPU NABLA expands the block map to a mask, which {tokens:,} tokens would fill the memory with"
        fix = f"a bucket of at most {REFERENCE_NABLA_TOKENS:,} tokens (smaller sides, fewer frames), or a GPU"
        raise ConfigError("data.resolution", config.data.resolution, rule, fix)


def words(change: Change) -> str:
    """As one types it; nothing in it needs quotes."""
    return " ".join(f"{key}={_word(value)}" for key, value in change.items())


def _word(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def remedies(config: RunConfig, facts: ClusterFacts, excess: float) -> list[Change]:
    """For a run that was planned to fit and ran out of memory: up to three changes that fit if everything needs
    `excess` times what the plan predicts. They name what is recomputed: `auto` would fill the GPU again."""
    word = _lighter_policy(config, facts, excess)
    found: list[Change] = [{"train.activation_checkpointing": word}] if word else []
    full: Change = {} if config.train.activation_checkpointing == "full" else {"train.activation_checkpointing": "full"}
    others = alternatives(_changed(config, full), facts, excess)
    return [*found, *(change | full for change in others)][:MAX_ALTERNATIVES]


def alternatives(config: RunConfig, facts: ClusterFacts, excess: float = 1.0) -> list[Change]:
    """Up to three changes, one a kind, nearest first, each of which plans and fits."""
    if config.train.activation_checkpointing not in ("auto", "full"):
        base: Change = {"train.activation_checkpointing": "auto"}
        return [change | base for change in alternatives(_changed(config, base), facts, excess)]
    found: list[Change] = []
    for kind in (_more_context, _more_gpus, _lighter_training, _lighter_base, _smaller_clips, _more_host, _everything):
        if kind is _everything and found:
            break
        for tried in kind(config, facts):
            # More of the same keys than what was found already is no alternative to it.
            new = (change for change in tried if not any(other.keys() <= change.keys() for other in found))
            found += itertools.islice((change for change in new if fits(config, facts, change, excess)), 1)
    return found[:MAX_ALTERNATIVES]


def fits(config: RunConfig, facts: ClusterFacts, change: Change, excess: float = 1.0) -> bool:
    """Whether the changed run plans, and leaves the margin free even where it needs `excess` times its prediction."""
    try:
        changed = _changed(config, change)
        gpus = changed.cluster.gpus_per_node or facts.gpus_per_node
        plan = make_plan(changed, dataclasses.replace(facts, gpus_per_node=gpus), "")
    except ConfigError:  # degrees or batch that do not divide
        return False
    needed, _, gpu_bytes = _needs(plan)
    return needed.total * excess <= memory.usable(gpu_bytes)


def _needs(plan: RunPlan) -> tuple[memory.Memory, str, float]:
    gpu, _, _ = estimate.gpu_facts(plan.world.gpu_name)
    gpu_bytes = memory.gpu_bytes(plan.config, plan.world)
    bucket = memory.largest(plan.buckets)
    return memory.predict(plan.config, plan.world, bucket, plan.recompute), gpu, gpu_bytes


def _lighter_policy(config: RunConfig, facts: ClusterFacts, excess: float = 1.0) -> str | None:
    """Of the words below the present one, the first that fits."""
    below = CHECKPOINTING[CHECKPOINTING.index(config.train.activation_checkpointing) + 1 :]
    return next((word for word in below if fits(config, facts, {"train.activation_checkpointing": word}, excess)), None)


def _changed(config: RunConfig, change: Change) -> RunConfig:
    mapping = config.to_mapping()
    for key, value in change.items():
        *groups, name = key.split(".")
        node = mapping
        for group in groups:
            node = node[group]
        node[name] = value
    return RunConfig.from_mapping(mapping)


def _value(config: RunConfig, facts: ClusterFacts, key: str) -> Any:
    node: Any = config.to_mapping()
    for name in key.split("."):
        node = node[name]
    return facts.gpus_per_node if key == "cluster.gpus_per_node" and node is None else node


# The kinds of changes. Each gives lists of changes; of a list the first that fits is proposed.


def _degrees(config: RunConfig, gpus: Change) -> Iterator[Change]:
    """`gpus`, with the present degrees and then with clips shared by ever more workers; shards take what is left."""
    parallel, heads = config.parallel, config.model.num_heads
    free: Change = {} if parallel.shard is None else {"parallel.shard": None}
    contexts = [c for c in range(parallel.context + 1, heads + 1) if heads % c == 0]
    replicas: list[Change] = [{}, *([{"parallel.replicate": 1}] if parallel.replicate > 1 else [])]
    for replicate in replicas:
        for context in ({}, *({"parallel.context": c} for c in contexts)):
            change = gpus | replicate | context
            yield change | free if change else change


def _more_context(config: RunConfig, facts: ClusterFacts) -> Sequence[Iterable[Change]]:
    return [(change for change in _degrees(config, {}) if change)]


def _more_gpus(config: RunConfig, facts: ClusterFacts) -> Sequence[Iterable[Change]]:
    """The same on more GPUs of the same kind: those that lie idle, a larger machine, more machines."""
    return [(change for gpus in _gpu_counts(config, facts) for change in _degrees(config, gpus))]


def _gpu_counts(config: RunConfig, facts: ClusterFacts) -> list[Change]:
    """Fewest GPUs first: usual machines, and machines by powers of two."""
    cluster, here = config.cluster, facts.gpus_per_node
    workers = cluster.workers_per_node or here
    sizes = [here, *(size for size in NODE_SIZES if size > here)]
    nodes = [cluster.nodes * 2**n for n in range(MAX_NODES.bit_length()) if cluster.nodes * 2**n <= MAX_NODES]
    counts = sorted(((count, size) for count in nodes for size in sizes), key=lambda pair: (math.prod(pair), pair[0]))
    changes: list[Change] = []
    for count, size in counts:
        change: Change = {} if count == cluster.nodes else {"cluster.nodes": count}
        change |= {} if size == here else {"cluster.gpus_per_node": size}
        change |= {} if cluster.workers_per_node is None or size == workers else {"cluster.workers_per_node": size}
        changes += [change] if change else []
    return changes


def _lighter_training(config: RunConfig, facts: ClusterFacts) -> Sequence[Iterable[Change]]:
    """Weights, gradients and moments in bf16; an adapter instead of all weights."""
    if config.adapter != "full":
        return []
    kinds: list[Change] = (
        [{"optimizer.kind": "adamw_bf16"}] if config.optimizer.kind in ("adamw", "adamw_schedulefree") else []
    )
    return [_degrees(config, change) for change in (*kinds, {"adapter": "lora"})]


def _lighter_base(config: RunConfig, facts: ClusterFacts) -> Sequence[Iterable[Change]]:
    """An adapter's frozen weights in the host's memory, or in a byte each."""
    if config.adapter != "lora":
        return []
    streamed: Change = {} if config.train.stream_weights else {"train.stream_weights": True}
    rounded: Change = {} if config.lora.base_dtype else {"lora.base_dtype": "int8"}
    return [[change for change in (streamed, rounded, streamed | rounded) if change]]


def _smaller_clips(config: RunConfig, facts: ClusterFacts) -> Sequence[Iterable[Change]]:
    """The one with the most tokens of those that fit, on the GPUs as they are."""
    return [_shapes(config)]


def _more_host(config: RunConfig, facts: ClusterFacts) -> Sequence[Iterable[Change]]:
    """What the first blocks keep waits in the host's memory, of which the plan knows nothing; with an adapter its
    frozen weights, too. Results stay the same to the bit. For a machine's only GPU: several would lock that much each.
    """
    if not config.train.compile or facts.gpus_per_node > 1:
        return []
    sizes: list[Change] = [{"train.offload_gib": gib} for gib in HOST_GIB if gib > config.train.offload_gib]
    streams = config.adapter == "lora" and not config.train.stream_weights
    others: list[Change] = [{}, {"train.stream_weights": True}] if streams else [{}]
    return [[other | size for size in sizes] for other in others]


def _shapes(config: RunConfig) -> list[Change]:
    """Shorter or smaller clips, then both; most tokens first. A preset gives way to a preset or one small shape."""
    frames, resolutions = config.data.num_frames, config.resolutions
    area = max(height * width for height, width in resolutions)
    sizes = {f"{height}x{width}": (height, width) for height, width in (*SD_RESOLUTIONS, *SMALL_RESOLUTIONS)}
    if len(resolutions) > 1:
        sizes = {"sd": (512, 768)} | {name: sides for name, sides in sizes.items() if sides in SMALL_RESOLUTIONS}
    else:
        sizes |= {f"{height}x{width}": (height, width) for height, width in HD_RESOLUTIONS}
    turns = {_turn(*sides) for sides in resolutions}
    smaller = [(name, sides) for name, sides in sizes.items() if math.prod(sides) < area and (_turn(*sides) in turns)]
    changes: list[tuple[bool, int, Change]] = []
    for name, sides in [("", max(resolutions, key=math.prod)), *smaller]:
        for length in (frames, *(length for length in CLIP_LENGTHS if length < frames)):
            change: Change = {"data.resolution": name} if name else {}
            change |= {"data.num_frames": length} if length != frames else {}
            changes += [(len(change) > 1, -Bucket(length, *sides).tokens, change)] if change else []
    return [change for _, _, change in sorted(changes, key=lambda entry: entry[:2])]


def _turn(height: int, width: int) -> int:
    """Lying, square or standing."""
    return (height > width) - (height < width)


def _everything(config: RunConfig, facts: ClusterFacts) -> Sequence[Iterable[Change]]:
    """Where no one kind is enough: an adapter, or states in bf16, with other GPUs or smaller clips."""
    lighter: list[Change] = [{}]
    if config.adapter == "full":
        lighter = [{"optimizer.kind": "adamw_bf16"}, {"adapter": "lora"}]
    gpus = [_degrees(config, change | count) for change in lighter for count in _gpu_counts(config, facts)]
    clips = ((light | shape for shape in _shapes(config)) for light in lighter)
    return [(change for changes in gpus for change in changes), *clips]
