"""A plan as a RayJob: the Ray cluster it asks KubeRay for, and the same command as anywhere on the cluster's head.

The head pod holds Ray's head and the driver, the worker pods hold the GPUs, one pod a machine. Nothing here speaks to a
cluster and nothing in a manifest is secret: Secrets are named, and the pods read them.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from k5dist.cluster.record import RAYJOB, RAYJOB_NAMESPACE
from k5dist.cluster.session import WAIT_NODES_VARIABLE
from k5dist.config import ConfigError, KubernetesConfig
from k5dist.plan import RunPlan

Manifest = dict[str, Any]

ARGUMENTS_FILE = "/etc/k5dist/arguments.json"
ENTRYPOINT = f"python -m k5dist.launch @{ARGUMENTS_FILE}"
ARGUMENTS_ANNOTATION = "k5dist/arguments"
QUEUE_LABEL, QUEUE_PRIORITY_LABEL = "kueue.x-k8s.io/queue-name", "kueue.x-k8s.io/priority-class"
USER = 1000  # of the image
_NAME_LENGTH = 47  # KubeRay's limit: it appends to the name
_LABEL_LENGTH = 63
# Overrides that say how to submit, not what to run.
_OF_THE_SUBMISSION = (
    "name=", "cluster=", "cluster.kind=", "cluster.dry_run=", "kubernetes.context=", "kubernetes.kubeconfig=",
)  # fmt: skip
_BEYOND_SAVING = 60  # seconds a pod has to end in, once the workers have saved


def rayjob(plan: RunPlan, overrides: Sequence[str]) -> Manifest:
    """The RayJob of this plan. `overrides` are those of the command.

    Raises:
        ConfigError: for what pods could not see or Kubernetes could not run.
    """
    _check(plan)
    kubernetes = plan.config.kubernetes
    labels = _labels(plan)
    if kubernetes.queue is not None:
        labels[QUEUE_LABEL] = kubernetes.queue
    if kubernetes.queue_priority is not None:
        labels[QUEUE_PRIORITY_LABEL] = kubernetes.queue_priority
    spec: Manifest = {
        "entrypoint": ENTRYPOINT,
        "submissionMode": "K8sJobMode",  # the submitter's log is the driver's
        "backoffLimit": kubernetes.retries,
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": kubernetes.ttl_seconds,
        "suspend": kubernetes.suspend,
        "submitterPodTemplate": _submitter(plan),
        "rayClusterSpec": _cluster_spec(plan, arguments(plan, overrides)),
    }
    if kubernetes.deadline_seconds is not None:
        spec["activeDeadlineSeconds"] = kubernetes.deadline_seconds
    metadata = {
        "name": object_name(plan.name),
        "namespace": kubernetes.namespace,
        "labels": labels,
        "annotations": {"k5dist/run-fingerprint": plan.run_fingerprint, "k5dist/run": plan.run_uri},
    }
    return {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": metadata, "spec": spec}


def raycluster(plan: RunPlan, name: str) -> Manifest:
    """A Ray cluster of the same pods that stays, for jobs that are submitted to it one after another."""
    _check(plan)
    namespace = plan.config.kubernetes.namespace
    metadata = {"name": name, "namespace": namespace, "labels": _labels(plan)}
    spec = {"suspend": plan.config.kubernetes.suspend, **_cluster_spec(plan, None)}
    return {"apiVersion": "ray.io/v1", "kind": "RayCluster", "metadata": metadata, "spec": spec}


def to_yaml(*manifests: Manifest) -> str:
    return yaml.safe_dump_all(manifests, sort_keys=False, allow_unicode=True, width=1_000)


def arguments(plan: RunPlan, overrides: Sequence[str]) -> list[str]:
    """What the driver on the cluster gets: the command's own overrides, and what the plan has settled."""
    kept = [override for override in overrides if not override.lstrip("+").startswith(_OF_THE_SUBMISSION)]
    return [*kept, f"name={plan.name}", f"train.batch_size={plan.batch_size}", "cluster=ray", "cluster.address=auto"]


def object_name(name: str) -> str:
    """`name` as KubeRay takes it: a DNS label of at most 47 characters. What had to be changed gets a digest."""
    plain = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    plain = plain if plain[:1].isalpha() else f"k5-{plain}".strip("-")
    if plain == name and len(plain) <= _NAME_LENGTH:
        return plain
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    return f"{plain[: _NAME_LENGTH - 9].rstrip('-')}-{digest}"


def _labels(plan: RunPlan) -> dict[str, str]:
    run = re.sub(r"[^\w.-]", "_", plan.name)[:_LABEL_LENGTH].strip("-_.")
    return {**_component("ray"), **({"k5dist/run": run} if run else {})}


def _component(name: str) -> dict[str, str]:
    """The labels that network policies and disruption budgets of `k8s/` select by."""
    part = "app.kubernetes.io"
    return {f"{part}/name": "k5dist", f"{part}/part-of": "k5dist", f"{part}/component": name}


def _cluster_spec(plan: RunPlan, given: Sequence[str] | None) -> Manifest:
    world = plan.world
    gpus = (plan.config.cluster.gpus_per_node or world.workers_per_node) if world.device == "cuda" else 0
    # The driver takes no core that Ray would count, and no precache worker comes to the head.
    head_params = {"dashboard-host": "0.0.0.0", "num-cpus": "0", "num-gpus": "0"}
    return {
        "rayVersion": importlib.metadata.version("ray"),
        "authOptions": {"mode": "token"},  # KubeRay makes the token and gives it to the pods
        "headGroupSpec": {"rayStartParams": head_params, "template": _head(plan, given)},
        "workerGroupSpecs": [
            {
                "groupName": "workers",
                "replicas": world.nodes,
                "minReplicas": world.nodes,
                "maxReplicas": world.nodes,
                "rayStartParams": {"num-gpus": str(gpus)},
                "template": _worker(plan, gpus),
            }
        ],
    }


def _head(plan: RunPlan, given: Sequence[str] | None) -> Manifest:
    kubernetes = plan.config.kubernetes
    ports = (("gcs-server", 6379), ("dashboard", 8265), ("client", 10001))
    environment = {
        WAIT_NODES_VARIABLE: plan.world.nodes + 1,  # precache sizes itself by the nodes it finds
        "RAY_JOB_STOP_WAIT_TIME_S": kubernetes.stop_seconds,
    }
    if given is not None:
        environment |= {RAYJOB: object_name(plan.name), RAYJOB_NAMESPACE: kubernetes.namespace}
    container = {
        **_container(kubernetes, "ray-head", "head", environment),
        "resources": _resources({"cpu": str(kubernetes.head_cpus), "memory": str(kubernetes.head_memory)}),
        "ports": [{"name": name, "containerPort": port} for name, port in ports],
    }
    template = _pod(plan, container)
    if given is not None:
        # By a file, since a command line would pass two shells and Ray's own quoting on its way to the driver.
        template["metadata"]["annotations"][ARGUMENTS_ANNOTATION] = json.dumps(given, ensure_ascii=False)
        folder, _, file = ARGUMENTS_FILE.rpartition("/")
        source = {"fieldRef": {"fieldPath": f"metadata.annotations['{ARGUMENTS_ANNOTATION}']"}}
        template["spec"]["volumes"].append(
            {"name": "arguments", "downwardAPI": {"items": [{"path": file, **source}]}},
        )
        container["volumeMounts"].append({"name": "arguments", "mountPath": folder, "readOnly": True})
    return template


def _worker(plan: RunPlan, gpus: int) -> Manifest:
    kubernetes = plan.config.kubernetes
    resources = {"cpu": str(kubernetes.cpus), "memory": str(kubernetes.memory)}
    if gpus:
        resources[kubernetes.gpu_resource] = str(gpus)
    container = _container(kubernetes, "ray-worker", "worker", {})
    if kubernetes.rdma_resource is not None:
        resources[kubernetes.rdma_resource] = str(kubernetes.rdma_count)
        container["securityContext"]["capabilities"]["add"] = ["IPC_LOCK"]  # RDMA pins the memory it sends from
    template = _pod(plan, {**container, "resources": _resources(resources)})
    spec = template["spec"]
    if kubernetes.node_selector:
        spec["nodeSelector"] = dict(kubernetes.node_selector)
    if kubernetes.taints:
        spec["tolerations"] = [
            {
                "key": taint.key,
                "operator": "Exists" if taint.value is None else "Equal",
                **({} if taint.value is None else {"value": taint.value}),
                "effect": taint.effect,
            }
            for taint in kubernetes.taints
        ]
    return template


def _submitter(plan: RunPlan) -> Manifest:
    """The pod that hands the entrypoint to Ray and shows its log. KubeRay fills in its command."""
    kubernetes = plan.config.kubernetes
    container = _container(kubernetes, "ray-job-submitter", None, {})
    for key in ("volumeMounts", "envFrom"):
        container.pop(key, None)
    container["resources"] = _resources({"cpu": "500m", "memory": "1Gi"})
    template = _pod(plan, container)
    template["spec"] |= {"restartPolicy": "Never", "volumes": []}
    template["metadata"]["labels"] |= _component("submitter")
    return template


def _container(
    kubernetes: KubernetesConfig, name: str, role: str | None, environment: Mapping[str, object]
) -> dict[str, Any]:
    variables = {"PYTHONUNBUFFERED": 1, **environment, **kubernetes.environment}
    mounts: list[Manifest] = [{"name": "shared-memory", "mountPath": "/dev/shm"}]
    for i, mount in enumerate(kubernetes.mounts):
        mounts.append({"name": f"volume-{i}", "mountPath": mount.path, "readOnly": mount.read_only})
    container: dict[str, Any] = {
        "name": name,
        "image": kubernetes.image,
        "imagePullPolicy": kubernetes.image_pull_policy,
        "env": [{"name": key, "value": str(value)} for key, value in variables.items()],
        "volumeMounts": mounts,
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
    }
    if kubernetes.secrets:
        container["envFrom"] = [{"secretRef": {"name": secret}} for secret in kubernetes.secrets]
    if role is not None:
        command = ["python", "-m", "k5dist.cluster.drain", role, str(kubernetes.stop_seconds)]
        container["lifecycle"] = {"preStop": {"exec": {"command": command}}}
    return container


def _pod(plan: RunPlan, container: Manifest) -> Manifest:
    kubernetes = plan.config.kubernetes
    memory = {"medium": "Memory", "sizeLimit": str(kubernetes.shared_memory)}
    volumes: list[Manifest] = [{"name": "shared-memory", "emptyDir": memory}]
    for i, mount in enumerate(kubernetes.mounts):
        claim = {"claimName": mount.claim, "readOnly": mount.read_only}
        volumes.append({"name": f"volume-{i}", "persistentVolumeClaim": claim})
    spec: Manifest = {
        "serviceAccountName": kubernetes.service_account,
        "automountServiceAccountToken": False,  # nothing in the pods speaks to Kubernetes
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": kubernetes.stop_seconds + _BEYOND_SAVING,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "runAsGroup": USER,
            "fsGroup": USER,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [container],
        "volumes": volumes,
    }
    if kubernetes.image_pull_secret is not None:
        spec["imagePullSecrets"] = [{"name": kubernetes.image_pull_secret}]
    if kubernetes.priority_class is not None:
        spec["priorityClassName"] = kubernetes.priority_class
    # A gang that loses a pod starts again from its newest checkpoint: autoscalers shall not move it about.
    kept = {"cluster-autoscaler.kubernetes.io/safe-to-evict": "false", "karpenter.sh/do-not-disrupt": "true"}
    return {"metadata": {"labels": _labels(plan), "annotations": kept}, "spec": spec}


def _resources(wanted: dict[str, str]) -> Manifest:
    return {"requests": dict(wanted), "limits": dict(wanted)}


def _check(plan: RunPlan) -> None:
    """What only matters once pods run it; what is wrong on its own the configuration has refused."""
    config, kubernetes = plan.config, plan.config.kubernetes
    if kubernetes.image is None:
        fix = "build k8s/Dockerfile, push it, and set kubernetes.image=<registry>/k5dist:<tag>"
        raise ConfigError("kubernetes.image", None, "pods run an image of the project, and none is named", fix)
    if config.resume == "never":
        rule = "a RayJob may start more than once (suspended, evicted, retried), and each time it would begin anew"
        raise ConfigError("resume", "never", rule, "another name=, and resume=auto")
    places = {"storage.root": config.storage.root, "validation.clip_model": config.validation.clip_model}
    places |= {dataset.key("source"): dataset.source for dataset in config.datasets}
    if not plan.pretrained_identity.startswith(("hub:", "generated:")):
        places["pretrained"] = config.pretrained
    for key, place in places.items():
        if place is not None and not _is_seen(kubernetes, place, is_hub_id=key == "validation.clip_model"):
            mounted = ", ".join(mount.path for mount in kubernetes.mounts) or "none"
            rule = f"the pods see buckets and what kubernetes.volumes mounts ({mounted}), not this machine's folders"
            raise ConfigError(key, place, rule, f"{key}=s3://bucket/… or a folder below one of kubernetes.volumes")
    if config.tracking.uri is None and "://" in config.storage.root:
        rule = "with the root in a bucket the runs would be kept in the head pod, and go with it"
        raise ConfigError("tracking.uri", None, rule, "tracking.uri=http://mlflow:5000, the server of k8s/")


def _is_seen(kubernetes: KubernetesConfig, place: str, *, is_hub_id: bool) -> bool:
    if "://" in place:
        return not place.startswith("file:")
    if is_hub_id and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", place):
        return True
    return any(mount.holds(place) for mount in kubernetes.mounts)
