"""Why the pods of a RayJob do not start or do not go on: what Kubernetes says of them → the key and what to do."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from k5dist.config import ConfigError, KubernetesConfig

_IMAGE = ("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "RegistryUnavailable")
_CONFIG = ("CreateContainerConfigError", "CreateContainerError", "RunContainerError")


@dataclass(frozen=True)
class Trouble:
    """`waiting`: it may pass by itself, when other jobs end or nodes are added. All else needs a person."""

    error: ConfigError
    waiting: bool = False

    @property
    def line(self) -> str:
        return f"{self.error.key}: {self.error.rule}"


def find(
    kubernetes: KubernetesConfig, pods: Iterable[dict[str, Any]], warnings: Iterable[dict[str, Any]]
) -> Trouble | None:
    """The gravest trouble of these pods and of these events on their Ray cluster and RayJob, or None."""
    found = [*_of_events(kubernetes, warnings), *(trouble for pod in pods for trouble in _of_pod(kubernetes, pod))]
    return min(found, key=lambda trouble: trouble.waiting, default=None)


def _of_pod(kubernetes: KubernetesConfig, pod: dict[str, Any]) -> Iterator[Trouble]:
    name, status = pod["metadata"]["name"], pod.get("status", {})
    for condition in status.get("conditions") or []:
        if condition.get("type") == "PodScheduled" and condition.get("reason") == "Unschedulable":
            yield _unschedulable(kubernetes, name, condition.get("message", ""))
    containers = [*(status.get("initContainerStatuses") or []), *(status.get("containerStatuses") or [])]
    for container in containers:
        waiting = container.get("state", {}).get("waiting") or {}
        reason, message = waiting.get("reason"), waiting.get("message", "")
        if reason in _IMAGE:
            rule = f"pod {name} cannot get it ({reason}): {message}"
            fix = "push it, check its name and tag, set kubernetes.image_pull_secret; on kind: `kind load docker-image`"
            yield Trouble(ConfigError("kubernetes.image", kubernetes.image, rule, fix))
        elif reason in _CONFIG:
            yield _misconfigured(kubernetes, name, message)
        ended = container.get("lastState", {}).get("terminated") or container.get("state", {}).get("terminated") or {}
        if ended.get("reason") == "OOMKilled":
            key = "head_memory" if container["name"] == "ray-head" else "memory"
            rule = f"pod {name} took more and was killed"
            error = ConfigError(f"kubernetes.{key}", getattr(kubernetes, key), rule, "give it more, or ask for less")
            yield Trouble(error, waiting=key == "memory")  # a worker comes back, and the gang starts again
        elif reason == "CrashLoopBackOff":
            rule = f"pod {name} ends again and again, last with status {ended.get('exitCode')}"
            fix = f"kubectl logs --previous --namespace {kubernetes.namespace} {name}"
            yield Trouble(ConfigError("kubernetes.image", kubernetes.image, rule, fix))


def _unschedulable(kubernetes: KubernetesConfig, pod: str, message: str) -> Trouble:
    rule = f"no node takes pod {pod}: {message}"
    claim = re.search(r'persistentvolumeclaim "([^"]+)" not found', message)
    if claim:
        fix = f"`kubectl get pvc --namespace {kubernetes.namespace}` lists the claims"
        return Trouble(ConfigError("kubernetes.volumes", list(kubernetes.volumes), rule, fix))
    if kubernetes.gpu_resource in message:
        fix = "wait for GPUs, ask for fewer (cluster.nodes, cluster.gpus_per_node), or name the right nodes"
        return Trouble(ConfigError("cluster.gpus_per_node", None, rule, fix), waiting=True)
    if kubernetes.rdma_resource is not None and kubernetes.rdma_resource in message:
        fix = "`kubectl describe nodes` shows what their device plugin offers"
        return Trouble(ConfigError("kubernetes.rdma_resource", kubernetes.rdma_resource, rule, fix), waiting=True)
    if "taint" in message:
        fix = "kubernetes.tolerations=['<key>:NoSchedule']"
        return Trouble(ConfigError("kubernetes.tolerations", list(kubernetes.tolerations), rule, fix), waiting=True)
    if "affinity" in message or "selector" in message:
        fix = "`kubectl get nodes --show-labels` shows theirs"
        selector = dict(kubernetes.node_selector)
        return Trouble(ConfigError("kubernetes.node_selector", selector, rule, fix), waiting=True)
    fix = "ask for less (kubernetes.cpus, kubernetes.memory and their kin), or wait"
    return Trouble(ConfigError("kubernetes.cpus", kubernetes.cpus, rule, fix), waiting=True)


def _misconfigured(kubernetes: KubernetesConfig, pod: str, message: str) -> Trouble:
    rule = f"pod {pod} cannot start: {message}"
    missing = re.search(r'secret "([^"]+)" not found', message)
    if missing:
        names = ("s3_secret", "mlflow_secret", "huggingface_secret")
        key = next((name for name in names if getattr(kubernetes, name) == missing[1]), "s3_secret")
        where = f"--namespace {kubernetes.namespace}"
        fix = f"kubectl create secret generic {missing[1]} {where} …: docs/kubernetes.md, step 3"
        return Trouble(ConfigError(f"kubernetes.{key}", missing[1], rule, fix))
    fix = f"kubectl describe pod --namespace {kubernetes.namespace} {pod}"
    return Trouble(ConfigError("kubernetes.image", kubernetes.image, rule, fix))


def _of_events(kubernetes: KubernetesConfig, warnings: Iterable[dict[str, Any]]) -> Iterator[Trouble]:
    for event in warnings:
        reason, message = event.get("reason", ""), event.get("message", "")
        if reason.startswith("InvalidRay"):
            rule = f"KubeRay refused it: {message}"
            yield Trouble(ConfigError("cluster", "kubernetes", rule, "KubeRay 1.5 or newer takes it"))
        elif re.match("FailedToCreate.*Pod", reason) or reason == "FailedCreate":
            yield Trouble(_not_created(kubernetes, message))


def _not_created(kubernetes: KubernetesConfig, message: str) -> ConfigError:
    rule = f"Kubernetes refused a pod: {message}"
    if "exceeded quota" in message or "must specify" in message:
        fix = f"ask for less or wait; `kubectl describe quota --namespace {kubernetes.namespace}` shows what is used"
        return ConfigError("kubernetes.namespace", kubernetes.namespace, rule, fix)
    if "PodSecurity" in message:
        fix = "RDMA needs a namespace with pod-security.kubernetes.io/enforce=privileged: k8s/overlays/h100-8"
        return ConfigError("kubernetes.namespace", kubernetes.namespace, rule, fix)
    if "PriorityClass" in message:
        fix = "`kubectl get priorityclasses` lists them"
        return ConfigError("kubernetes.priority_class", kubernetes.priority_class, rule, fix)
    if re.search("service ?account", message, re.IGNORECASE):
        fix = "kubectl apply -k k8s/base makes k5dist-ray"
        return ConfigError("kubernetes.service_account", kubernetes.service_account, rule, fix)
    fix = f"`kubectl get events --namespace {kubernetes.namespace}` has the rest"
    return ConfigError("kubernetes.namespace", kubernetes.namespace, rule, fix)
