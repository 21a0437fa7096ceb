"""What `cluster=kubernetes` asks of Kubernetes. Machines and GPUs are those of `cluster.*`."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

from k5dist.config.cluster import is_secret_name
from k5dist.schema import ConfigError, one_of, positive

_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")  # RFC 1123: what names of namespaces look like
_NAME = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?")  # and of most other objects
_QUALIFIED = re.compile(r"([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")
_LABEL_VALUE = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?")
_QUANTITY = re.compile(r"[1-9]\d*(\.\d+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?|0\.\d+")
_IMAGE = re.compile(r"(?!.*//)[a-z0-9][\w.\-/:]*(@sha256:[0-9a-f]{64})?")
_TOLERATION = re.compile(r"(?P<key>[^=:]+)(=(?P<value>[^:]*))?:(?P<effect>NoSchedule|PreferNoSchedule|NoExecute)")
_VARIABLE = re.compile(r"[A-Za-z_]\w*")
_MANAGED = ("/tmp/ray", "/dev/shm", "/etc/k5dist")  # folders that the pods' own volumes take
_OF_NAMES = (
    "service_account", "image_pull_secret", "s3_secret", "mlflow_secret", "huggingface_secret", "queue",
    "queue_priority", "priority_class",
)  # fmt: skip
_OF_QUANTITIES = ("cpus", "memory", "shared_memory", "head_cpus", "head_memory")


@dataclasses.dataclass(frozen=True)
class Mount:
    """A persistent volume claim as a folder of every pod."""

    claim: str
    path: str
    read_only: bool

    def holds(self, place: str) -> bool:
        return place == self.path or place.startswith(self.path.rstrip("/") + "/")


@dataclasses.dataclass(frozen=True)
class Toleration:
    """A taint that the pods may stand on; without a value, any value."""

    key: str
    value: str | None
    effect: str


@dataclasses.dataclass(frozen=True)
class KubernetesConfig:
    context: str | None
    kubeconfig: str | None
    namespace: str
    image: str | None
    image_pull_policy: str
    image_pull_secret: str | None
    service_account: str
    cpus: str | int
    memory: str | int
    shared_memory: str | int
    head_cpus: str | int
    head_memory: str | int
    gpu_resource: str
    rdma_resource: str | None
    rdma_count: int
    node_selector: Mapping[str, str]
    tolerations: tuple[str, ...]
    volumes: tuple[str, ...]
    environment: Mapping[str, str | int | float]
    s3_secret: str | None
    mlflow_secret: str | None
    huggingface_secret: str | None
    queue: str | None
    queue_priority: str | None
    priority_class: str | None
    suspend: bool
    retries: int
    ttl_seconds: int
    deadline_seconds: int | None
    start_seconds: int
    stop_seconds: int
    follow: bool
    on_interrupt: str

    def __post_init__(self) -> None:
        self._check_names()
        for name in _OF_QUANTITIES:
            if not _QUANTITY.fullmatch(str(getattr(self, name))):
                rule = "a quantity of Kubernetes: a number with or without a unit such as m, Mi, Gi"
                raise ConfigError(f"kubernetes.{name}", getattr(self, name), rule, f"kubernetes.{name}=16Gi")
        one_of("kubernetes.image_pull_policy", self.image_pull_policy, ("IfNotPresent", "Always", "Never"))
        one_of("kubernetes.on_interrupt", self.on_interrupt, ("delete", "suspend", "leave"))
        for name in ("rdma_count", "start_seconds", "stop_seconds"):
            positive(f"kubernetes.{name}", getattr(self, name))
        if self.deadline_seconds is not None:
            positive("kubernetes.deadline_seconds", self.deadline_seconds)
        for name in ("retries", "ttl_seconds"):
            if getattr(self, name) < 0:
                raise ConfigError(f"kubernetes.{name}", getattr(self, name), "0 or more", f"kubernetes.{name}=0")
        if self.queue_priority is not None and self.queue is None:
            rule = "it orders jobs within Kueue's queues, and none is named"
            raise ConfigError("kubernetes.queue_priority", self.queue_priority, rule, "kubernetes.queue=<local queue>")
        if self.queue is not None and self.on_interrupt == "suspend":
            rule = "Kueue starts a suspended job of its queues again as soon as there is room"
            raise ConfigError("kubernetes.on_interrupt", "suspend", rule, "kubernetes.on_interrupt=delete")
        self._check_placement()
        self._check_environment()
        _ = self.mounts, self.taints  # parsed, so refused, here

    def _check_names(self) -> None:
        if not _LABEL.fullmatch(self.namespace):
            rule = "small letters, digits and dashes, at most 63"
            raise ConfigError("kubernetes.namespace", self.namespace, rule, "kubernetes.namespace=k5dist")
        for name in _OF_NAMES:
            value = getattr(self, name)
            if value is not None and not _NAME.fullmatch(value):
                rule = "the name of an object in the namespace: small letters, digits, dashes and dots"
                raise ConfigError(f"kubernetes.{name}", value, rule, f"kubernetes.{name}=k5dist-{name.split('_')[0]}")
        if self.image is not None and not _IMAGE.fullmatch(self.image):
            rule = "registry/name:tag or registry/name@sha256:…, without a scheme and in small letters"
            raise ConfigError(
                "kubernetes.image", self.image, rule, "kubernetes.image=registry.example.org/k5dist:0.1.0"
            )
        for name in ("gpu_resource", "rdma_resource"):
            value = getattr(self, name)
            if value is not None and (not _QUALIFIED.fullmatch(value) or "/" not in value):
                example = "nvidia.com/gpu" if name == "gpu_resource" else "rdma/rdma_shared_device_a"
                rule = "a resource that a device plugin offers, domain/name"
                raise ConfigError(f"kubernetes.{name}", value, rule, f"kubernetes.{name}={example}")

    def _check_placement(self) -> None:
        for key, value in self.node_selector.items():
            if not _QUALIFIED.fullmatch(key) or not _LABEL_VALUE.fullmatch(value):
                fix = "kubernetes.node_selector={nvidia.com/gpu.product:NVIDIA-H100-80GB-HBM3}"
                raise ConfigError(f"kubernetes.node_selector.{key}", value, "a label of nodes and its value", fix)

    def _check_environment(self) -> None:
        for name, value in self.environment.items():
            key = f"kubernetes.environment.{name}"
            if not _VARIABLE.fullmatch(name):
                raise ConfigError(key, value, "a variable's name", "kubernetes.environment={NCCL_IB_HCA:mlx5}")
            if is_secret_name(name):
                rule = "manifests are stored and shown, so they hold no secrets"
                raise ConfigError(key, "…", rule, "put it into the Secret of kubernetes.s3_secret or its kin")

    @property
    def mounts(self) -> tuple[Mount, ...]:
        """The entries of `volumes`, each `claim:/path` or `claim:/path:ro`."""
        found: list[Mount] = []
        for i, volume in enumerate(self.volumes):
            claim, _, rest = volume.partition(":")
            path, _, mode = rest.partition(":")
            if not _NAME.fullmatch(claim) or not path.startswith("/") or path == "/" or mode not in ("", "ro", "rw"):
                rule = "a persistent volume claim and where the pods see it, claim:/path or claim:/path:ro"
                raise ConfigError(f"kubernetes.volumes[{i}]", volume, rule, "kubernetes.volumes=[clips:/data:ro]")
            path = path.rstrip("/")
            taken = [*(mount.path for mount in found), *_MANAGED]
            if path in taken:
                rule = f"a folder of its own: {', '.join(taken)} are taken"
                raise ConfigError(f"kubernetes.volumes[{i}]", volume, rule, f"kubernetes.volumes=[{claim}:/data]")
            found.append(Mount(claim, path, mode == "ro"))
        return tuple(found)

    @property
    def taints(self) -> tuple[Toleration, ...]:
        """The entries of `tolerations`, as kubectl writes taints: `key:Effect` or `key=value:Effect`."""
        found = []
        for i, text in enumerate(self.tolerations):
            match = _TOLERATION.fullmatch(text)
            if (
                match is None
                or not _QUALIFIED.fullmatch(match["key"])
                or not _LABEL_VALUE.fullmatch(match["value"] or "")
            ):
                rule = "a taint as kubectl writes it, key:Effect or key=value:Effect (in quotes)"
                raise ConfigError(
                    f"kubernetes.tolerations[{i}]", text, rule, "kubernetes.tolerations=['nvidia.com/gpu:NoSchedule']"
                )
            found.append(Toleration(match["key"], match["value"], match["effect"]))
        return tuple(found)

    @property
    def secrets(self) -> tuple[str, ...]:
        """Names of the Secrets whose entries are environment variables of the pods."""
        named = (self.s3_secret, self.mlflow_secret, self.huggingface_secret)
        return tuple(dict.fromkeys(name for name in named if name is not None))
