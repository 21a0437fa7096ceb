"""Where it runs and what keeps it: degrees, machines, storage, tracking."""

from __future__ import annotations

import dataclasses

from k5dist.schema import ConfigError, one_of, positive


@dataclasses.dataclass(frozen=True)
class ParallelConfig:
    shard: int | None
    replicate: int
    context: int

    def __post_init__(self) -> None:
        for name in ("shard", "replicate", "context"):
            if getattr(self, name) is not None:
                positive(f"parallel.{name}", getattr(self, name))


@dataclasses.dataclass(frozen=True)
class ClusterConfig:
    kind: str
    nodes: int
    gpus_per_node: int | None
    workers_per_node: int | None
    address: str | None
    max_restarts: int
    dry_run: bool

    def __post_init__(self) -> None:
        one_of("cluster.kind", self.kind, ("local", "ray", "slurm", "kubernetes"))
        positive("cluster.nodes", self.nodes)
        if self.gpus_per_node is not None and self.gpus_per_node < 0:
            raise ConfigError("cluster.gpus_per_node", self.gpus_per_node, "GPUs ≥ 0", "cluster.gpus_per_node=8")
        if self.workers_per_node is not None:
            positive("cluster.workers_per_node", self.workers_per_node)
        if self.max_restarts < 0:
            raise ConfigError("cluster.max_restarts", self.max_restarts, "restarts ≥ 0", "cluster.max_restarts=3")


@dataclasses.dataclass(frozen=True)
class StorageConfig:
    root: str


@dataclasses.dataclass(frozen=True)
class TrackingConfig:
    uri: str | None
    experiment: str
