"""The workers of a training gang and the degrees by which they share the work."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from k5dist.config import ConfigError, RunConfig


@dataclass(frozen=True)
class ClusterFacts:
    """What the planner must know of the machines: GPUs a node (0: CPU workers) and their kind, and the bytes of Ray's
    object store on a node (0: not known)."""

    gpus_per_node: int
    gpu_name: str | None = None
    assumed: bool = False
    store_bytes: int = 0


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
    # Of Ray's object stores, all nodes'; 0: not known. No two machines say the same, and the world is what it is.
    store_bytes: int = field(default=0, compare=False)

    @property
    def size(self) -> int:
        return self.nodes * self.workers_per_node

    @property
    def data_parallel(self) -> int:
        return self.shard * self.replicate

    @property
    def weight_shards(self) -> int:
        """Workers over which FSDP2 shards the weights: those that share a clip's tokens hold different shards, too."""
        return self.shard * self.context


def make_world(config: RunConfig, facts: ClusterFacts) -> World:
    """Raises ConfigError where degrees and the number of workers do not fit together."""
    cluster, parallel = config.cluster, config.parallel
    device = "cuda" if facts.gpus_per_node else "cpu"
    workers = cluster.workers_per_node or facts.gpus_per_node or 2
    if facts.gpus_per_node and workers > facts.gpus_per_node:
        rule = f"a GPU holds one worker, and a node has {facts.gpus_per_node} GPUs"
        raise ConfigError("cluster.workers_per_node", workers, rule, f"cluster.workers_per_node={facts.gpus_per_node}")
    size = cluster.nodes * workers
    if size % parallel.context:
        rule = f"context parallelism makes groups of that many workers: it must divide the {size} workers of the world"
        fitting = math.gcd(size, config.model.num_heads)
        near = max(d for d in range(1, parallel.context) if fitting % d == 0)
        raise ConfigError("parallel.context", parallel.context, rule, f"parallel.context={near}")
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
    store = cluster.nodes * facts.store_bytes
    return World(cluster.nodes, workers, device, facts.gpu_name, shard, parallel.replicate, parallel.context, store)
