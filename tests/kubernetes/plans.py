"""Plans for Kubernetes, as `k5dist.launch` would make them on a machine that sees nothing of the cluster's."""

from __future__ import annotations

from typing import Any

from k5dist.cluster import manifests
from k5dist.compose import compose, to_run_config
from k5dist.launch import plan_run
from k5dist.plan import RunPlan

COMMON = ("cluster=kubernetes", "kubernetes.image=registry.example.org/k5dist:0.1.0")
DEV = (
    "+flavour=t2v-tiny", *COMMON, "storage.root=/runs/k5dist", "kubernetes.volumes=[k5dist-runs:/runs]",
    "kubernetes.cpus=2", "kubernetes.memory=4Gi", "kubernetes.head_cpus=1", "kubernetes.head_memory=3Gi",
)  # fmt: skip


def plan_of(*overrides: str) -> RunPlan:
    return plan_run(to_run_config(compose(list(overrides))))


def rayjob_of(*overrides: str) -> dict[str, Any]:
    return manifests.rayjob(plan_of(*overrides), list(overrides))
