"""Where a run is handed to a scheduler instead of running here: which kinds of cluster, and how."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence

from k5dist import estimate
from k5dist.config import ClusterConfig, ConfigError, KubernetesConfig, RunConfig
from k5dist.console import say
from k5dist.plan import ClusterFacts, RunPlan

_GPU_LABEL = "nvidia.com/gpu.product"


def is_submitted(cluster: ClusterConfig) -> bool:
    """Whether the command only submits the run, which then runs elsewhere by the same command."""
    return cluster.kind in ("slurm", "kubernetes") or cluster.submit


def is_elsewhere(config: RunConfig) -> bool:
    """Whether the run's machines see other folders and have other credentials: storage is checked there, not here."""
    return config.cluster.kind == "kubernetes" and config.stages != ("plan",)


def facts_elsewhere(config: RunConfig) -> ClusterFacts:
    """The GPUs of machines that are not this one: as many as configured, of the kind that the node selector names."""
    gpus = config.cluster.gpus_per_node
    if gpus is None:
        if not config.flavour.generated:
            rule = "the pods' GPUs are not this machine's: say how many each has"
            raise ConfigError("cluster.gpus_per_node", None, rule, "cluster.gpus_per_node=8")
        gpus = 0
    name = selected_gpu(config)
    return ClusterFacts(gpus, name, assumed=name is None)


def selected_gpu(config: RunConfig) -> str | None:
    """The kind of GPU that the node selector names: the head pod, where the driver plans, has none to look at."""
    name = config.kubernetes.node_selector.get(_GPU_LABEL, "").replace("-", " ")
    return name if estimate.is_known_gpu(name) else None


def submit(plan: RunPlan, overrides: Sequence[str]) -> int:
    """Hand the same command to the scheduler; returns the exit status. With `cluster.dry_run` only print what it gets.

    Raises:
        ConfigError: where the scheduler refuses it; nothing of it is left there.
    """
    kind = plan.config.cluster.kind
    if kind == "slurm":
        from k5dist.cluster import slurm

        return slurm.submit_run(plan, overrides)
    if kind == "kubernetes":
        return _to_kubernetes(plan, overrides, plan.config.kubernetes)
    from k5dist.cluster import jobs

    return jobs.follow(jobs.submit([plan]))


def submit_each(plans: Sequence[RunPlan], overrides: Sequence[Sequence[str]], parent: str) -> int:
    """A sweep's runs as RayJobs side by side, none of them followed: the cluster's queue puts them in order. `parent`
    is what their `tracking.parent` says. Returns 2 where one was refused, else 0."""
    refused = 0
    for plan, typed in zip(plans, overrides, strict=True):
        if plan.config.cluster.dry_run:
            sys.stdout.write("---\n")
        try:
            alone = dataclasses.replace(plan.config.kubernetes, follow=False)
            _to_kubernetes(plan, [*typed, f"name={plan.name}", f"tracking.parent={parent}"], alone)
        except ConfigError as error:  # a quota, or one that is there already: the others have their turn
            refused += 1
            say(f"not submitted: {plan.name}: {error.rule}: {error.fix}")
    if refused:
        say(f"{refused} of {len(plans)} runs were not submitted; the same command submits those that are not there")
    return 2 if refused else 0


def _to_kubernetes(plan: RunPlan, overrides: Sequence[str], kubernetes: KubernetesConfig) -> int:
    from k5dist.cluster import manifests

    rayjob = manifests.rayjob(plan, overrides)
    if plan.config.cluster.dry_run:
        sys.stdout.write(manifests.to_yaml(rayjob))
        return 0
    from k5dist.cluster.kubernetes_api import Api
    from k5dist.cluster.rayjob import run

    return run(Api(kubernetes), rayjob, kubernetes)
