"""Where it runs and what keeps it: degrees, machines, storage, tracking."""

from __future__ import annotations

import dataclasses
import re

from k5dist.schema import ConfigError, one_of, positive

_SECRET_NAME = re.compile("KEY|SECRET|TOKEN|PASSW|CREDENTIAL|AUTH", re.IGNORECASE)


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
    submit: bool
    pass_env: tuple[str, ...]
    interface: str | None
    wait_seconds: int
    max_restarts: int
    overlap: bool
    dry_run: bool

    def __post_init__(self) -> None:
        one_of("cluster.kind", self.kind, ("local", "ray", "slurm", "kubernetes"))
        positive("cluster.nodes", self.nodes)
        if self.gpus_per_node is not None and self.gpus_per_node < 0:
            raise ConfigError("cluster.gpus_per_node", self.gpus_per_node, "GPUs ≥ 0", "cluster.gpus_per_node=8")
        if self.workers_per_node is not None:
            positive("cluster.workers_per_node", self.workers_per_node)
        positive("cluster.wait_seconds", self.wait_seconds)
        if self.dry_run and self.kind not in ("slurm", "kubernetes"):
            rule = "prints what slurm and kubernetes would be given; elsewhere the plan is what is printed"
            raise ConfigError("cluster.dry_run", True, rule, "stages=[plan]")
        if self.overlap and self.kind not in ("local", "ray"):
            rule = "overlaps a sweep's runs that one process takes one after another; a scheduler has them side by side"
            raise ConfigError("cluster.overlap", True, rule, "cluster.overlap=false")
        self._check_submission()
        if self.max_restarts < 0:
            raise ConfigError("cluster.max_restarts", self.max_restarts, "restarts ≥ 0", "cluster.max_restarts=3")

    def _check_submission(self) -> None:
        if self.submit and self.kind != "ray":
            rule = "the Jobs API is Ray's; slurm and kubernetes submit anyway"
            raise ConfigError("cluster.submit", True, rule, "cluster=ray cluster.submit=true")
        if self.submit and self.address is not None and not self.address.startswith(("http://", "https://")):
            rule = "jobs are submitted to the address of the cluster's dashboard"
            host = self.address.rpartition("://")[2].split(":")[0]
            fix = f"cluster.address=http://{host}:8265"
            raise ConfigError("cluster.address", self.address, rule, fix)
        for name in self.pass_env:
            if not re.fullmatch(r"[A-Za-z_]\w*", name):
                raise ConfigError("cluster.pass_env", name, "a variable's name, without its value", "[NCCL_DEBUG]")
            if is_secret_name(name):
                rule = "Ray stores and shows a job's environment: what looks like a credential does not go into it"
                raise ConfigError(
                    "cluster.pass_env", name, rule, "set it on the cluster's nodes, or use a profile there"
                )


def is_secret_name(name: str) -> bool:
    """Whether an environment variable looks like a credential."""
    return bool(_SECRET_NAME.search(name))


@dataclasses.dataclass(frozen=True)
class StorageConfig:
    root: str


@dataclasses.dataclass(frozen=True)
class TrackingConfig:
    uri: str | None
    experiment: str
    parent: str | None
