"""What `cluster=kubernetes` renders, held against Kubernetes' OpenAPI and KubeRay's CRDs."""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from k5dist.cluster import manifests
from k5dist.compose import compose, expand_files, flavours, normalise_arguments, to_run_config
from k5dist.config import ConfigError
from k5dist.launch import plan_run
from tests.kubernetes.plans import COMMON, DEV, plan_of, rayjob_of
from tests.kubernetes.schemas import CEL_FIELDS, RAY_KINDS, fields_with_rules, needs_crds, problems, structural

S3 = ("storage.root=s3://bucket/k5dist", "tracking.uri=http://mlflow:5000", "kubernetes.s3_secret=k5dist-s3")
VARIANTS = {
    "dev": ("cluster.gpus_per_node=0", "kubernetes.volumes=[k5dist-runs:/runs]", "storage.root=/runs/k5dist"),
    "h100-8": (
        *S3, "cluster.nodes=4", "cluster.gpus_per_node=8", "train.batch_size=32",
        "kubernetes.node_selector={nvidia.com/gpu.product:NVIDIA-H100-80GB-HBM3}",
        "kubernetes.tolerations=['nvidia.com/gpu:NoSchedule','team=video:NoExecute']",
        "kubernetes.rdma_resource=rdma/rdma_shared_device_a",
        "kubernetes.environment={NCCL_IB_HCA:mlx5,NCCL_DEBUG:INFO}",
        "kubernetes.queue=gpus", "kubernetes.queue_priority=high", "kubernetes.priority_class=training",
        "kubernetes.mlflow_secret=k5dist-mlflow", "kubernetes.huggingface_secret=k5dist-hf",
        "kubernetes.image_pull_secret=registry", "kubernetes.deadline_seconds=86400", "kubernetes.retries=2",
        "kubernetes.volumes=[clips:/data:ro,models:/models]", "kubernetes.suspend=true",
    ),
}  # fmt: skip


def shown(rayjob: dict[str, Any], group: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Pod specification and container of the head or the workers."""
    cluster = rayjob["spec"]["rayClusterSpec"]
    part = cluster["headGroupSpec"] if group == "head" else cluster["workerGroupSpecs"][0]
    spec = part["template"]["spec"]
    return spec, spec["containers"][0]


def sourced(flavour: str) -> list[str]:
    """What a flavour needs besides: data, and a checkpoint where it names none."""
    wanted = [] if "tiny" in flavour else ["data.source=s3://bucket/clips"]
    wanted += [] if "tiny" in flavour else ["parallel.context=4"]  # the longest clips of HD need it on 80 GiB
    return wanted + (["pretrained=s3://bucket/checkpoint"] if "i2v" in flavour and "pretrain" in flavour else [])


@needs_crds
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("flavour", flavours())
def test_every_flavour_renders_what_kuberay_takes(flavour: str, variant: str) -> None:
    nodes = [] if "tiny" in flavour else ["cluster.nodes=4", "cluster.gpus_per_node=8"]
    plan = plan_of(f"+flavour={flavour}", *COMMON, *sourced(flavour), *VARIANTS[variant], *nodes)
    rayjob = manifests.rayjob(plan, [f"+flavour={flavour}"])
    assert problems(rayjob) == []
    assert problems(manifests.raycluster(plan, "k5dist")) == []
    assert list(yaml.safe_load_all(manifests.to_yaml(rayjob))) == [rayjob]
    for pod in [*pods_of(rayjob)]:
        assert problems({"apiVersion": "v1", "kind": "Pod", **pod}) == []


def pods_of(rayjob: dict[str, Any]) -> list[dict[str, Any]]:
    cluster = rayjob["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [*(group["template"] for group in groups), rayjob["spec"]["submitterPodTemplate"]]


@needs_crds
def test_no_field_is_written_that_only_a_rule_could_check() -> None:
    for kind in RAY_KINDS:
        for path in fields_with_rules(structural(kind)):
            assert set(path.split(".")) & set(CEL_FIELDS), f"{path} has CEL rules, which `problems` does not evaluate"
    for variant in VARIANTS.values():
        text = manifests.to_yaml(rayjob_of("+flavour=t2v-tiny", *COMMON, *variant))
        assert not [field for field in CEL_FIELDS if f"{field}:" in text]


@needs_crds
@pytest.mark.parametrize(
    ("path", "value", "complaint"),
    [
        ("spec.entrypont", "python", "'entrypont' was unexpected"),
        ("spec.suspend", "yes", "'yes' is not of type 'boolean'"),
        ("spec.rayClusterSpec.workerGroupSpecs.0.replicas", "2", "'2' is not of type 'integer'"),
        ("spec.rayClusterSpec.workerGroupSpecs.0.template", None, "'template' is a required property"),
        ("spec.rayClusterSpec.headGroupSpec.template.spec.containers", None, "'containers' is a required property"),
        ("spec.rayClusterSpec.authOptions.mode", "tokens", "'tokens' is not one of"),
        ("spec.rayClusterSpec.headGroupSpec.template.spec.containers.0.imagePullPolice", "Always", "was unexpected"),
        ("spec.submitterPodTemplate.spec.volumes.0.emptyDir.sizeLimit", [], "is not valid under any"),
        ("metadata.labls", {}, "'labls' was unexpected"),
        ("metadata.labels.number", 1, "1 is not of type 'string'"),
        ("apiVersion", "ray.io/v2", "'ray.io/v1' was expected"),
        ("spec", None, "'spec' is a required property"),
    ],
)
def test_the_checker_catches(path: str, value: object, complaint: str) -> None:
    rayjob = copy.deepcopy(rayjob_of(*DEV))
    rayjob["spec"]["submitterPodTemplate"]["spec"]["volumes"] = [{"name": "x", "emptyDir": {}}]
    assert problems(rayjob) == []
    *parents, last = [int(word) if word.isdigit() else word for word in path.split(".")]
    node: Any = rayjob
    for parent in parents:
        node = node[parent]
    if value is None:
        del node[last]
    else:
        node[last] = value
    assert any(complaint in problem for problem in problems(rayjob)), problems(rayjob)


def test_core_kinds_are_checked_as_strictly() -> None:
    assert problems({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "a"}, "dta": {}})
    assert problems({"apiVersion": "v1", "kind": "Secrt", "metadata": {"name": "a"}})


@pytest.mark.parametrize("variant", VARIANTS)
def test_pods_keep_to_the_restricted_profile(variant: str) -> None:
    rayjob = rayjob_of("+flavour=t2v-tiny", *COMMON, *VARIANTS[variant])
    for pod in pods_of(rayjob):
        spec = pod["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert spec["automountServiceAccountToken"] is False
        assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys()
        names = {volume["name"] for volume in spec["volumes"]}
        for container in spec["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"]["drop"] == ["ALL"]
            assert {mount["name"] for mount in container.get("volumeMounts", [])} <= names
            variables = [variable["name"] for variable in container["env"]]
            assert len(variables) == len(set(variables))
            # Only RDMA asks for more.
            added = container["securityContext"]["capabilities"].get("add")
            assert added == (["IPC_LOCK"] if container["name"] == "ray-worker" and variant == "h100-8" else None)


def test_a_rayjob_asks_for_what_the_plan_says() -> None:
    rayjob = rayjob_of("+flavour=t2v-tiny", *COMMON, *VARIANTS["h100-8"])
    (workers,) = rayjob["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert (workers["replicas"], workers["minReplicas"], workers["maxReplicas"]) == (4, 4, 4)
    spec, container = shown(rayjob, "workers")
    wanted = {"cpu": "8", "memory": "64Gi", "nvidia.com/gpu": "8", "rdma/rdma_shared_device_a": "1"}
    assert container["resources"] == {"requests": wanted, "limits": wanted}
    assert spec["nodeSelector"] == {"nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3"}
    assert {"key": "team", "operator": "Equal", "value": "video", "effect": "NoExecute"} in spec["tolerations"]
    assert {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"} in spec["tolerations"]
    assert {"name": "NCCL_IB_HCA", "value": "mlx5"} in container["env"]
    shared = next(volume for volume in spec["volumes"] if volume["name"] == "shared-memory")
    assert shared["emptyDir"] == {"medium": "Memory", "sizeLimit": "16Gi"}
    assert {"name": "shared-memory", "mountPath": "/dev/shm"} in container["volumeMounts"]
    assert {"name": "volume-0", "mountPath": "/data", "readOnly": True} in container["volumeMounts"]
    _, head = shown(rayjob, "head")
    assert "nvidia.com/gpu" not in head["resources"]["limits"]
    assert {"name": "K5DIST_WAIT_NODES", "value": "5"} in head["env"]
    labels = rayjob["metadata"]["labels"]
    assert labels[manifests.QUEUE_LABEL] == "gpus"
    assert labels[manifests.QUEUE_PRIORITY_LABEL] == "high"
    assert (rayjob["spec"]["suspend"], rayjob["spec"]["backoffLimit"]) == (True, 2)
    assert spec["priorityClassName"] == "training"


def test_secrets_are_named_and_never_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-to-be-seen")
    monkeypatch.setenv("HF_TOKEN", "not-to-be-seen")
    rayjob = rayjob_of("+flavour=t2v-tiny", *COMMON, *VARIANTS["h100-8"])
    assert "not-to-be-seen" not in manifests.to_yaml(rayjob)
    for group in ("head", "workers"):
        _, container = shown(rayjob, group)
        named = [source["secretRef"]["name"] for source in container["envFrom"]]
        assert named == ["k5dist-s3", "k5dist-mlflow", "k5dist-hf"]
    assert "envFrom" not in rayjob["spec"]["submitterPodTemplate"]["spec"]["containers"][0]


def test_what_is_typed_reaches_the_driver_unchanged(tmp_path: Path) -> None:
    typed = ["""validation.prompts=["it's $HOME `a` \\"!\\"", "two  spaces ü"]""", "optimizer.lr=1e-3"]
    rayjob = rayjob_of(*DEV, *typed, "kubernetes.context=mine")
    head = rayjob["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]
    file = tmp_path / "arguments.json"
    file.write_text(head["metadata"]["annotations"][manifests.ARGUMENTS_ANNOTATION])
    # No shell, and not Ray's own quoting either, can do anything to the entrypoint.
    assert re.fullmatch(r"[\w@./ -]+", rayjob["spec"]["entrypoint"])
    given = rayjob["spec"]["entrypoint"].replace(manifests.ARGUMENTS_FILE, str(file)).split()[3:]
    config = to_run_config(compose(normalise_arguments(expand_files(given))))
    assert config.validation.prompts == ("""it's $HOME `a` "!\"""", "two  spaces ü")
    assert (config.cluster.kind, config.cluster.address) == ("ray", "auto")
    plan = plan_of(*DEV, *typed)
    assert (config.name, config.train.batch_size) == (plan.name, plan.batch_size)
    assert "kubernetes.context=mine" not in expand_files(given)


@pytest.mark.parametrize("text", ["{}", '["a", 1]', "[", None])
def test_arguments_of_a_file_that_holds_none(text: str | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "a.json").write_text(text)
    with pytest.raises(ConfigError, match="JSON list"):
        expand_files([f"@{tmp_path}/a.json"])


def test_names_are_what_kuberay_takes() -> None:
    assert manifests.object_name("t2v-tiny-6168ae6f63") == "t2v-tiny-6168ae6f63"
    names = ["My_Run", "my-run-", "2fast", "x" * 60, "x" * 61, "…", "a.b"]
    rendered = [manifests.object_name(name) for name in names]
    assert len(set(rendered)) == len(names)
    for name in rendered:
        assert re.fullmatch(r"[a-z]([-a-z0-9]{0,45}[a-z0-9])?", name), name


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("kubernetes.namespace=K5", "kubernetes.namespace"),
        ("kubernetes.image='https://registry/x'", "kubernetes.image"),
        ("kubernetes.image_pull_policy=Sometimes", "kubernetes.image_pull_policy"),
        ("kubernetes.service_account=a_b", "kubernetes.service_account"),
        ("kubernetes.memory=64GB", "kubernetes.memory"),
        ("kubernetes.cpus=-1", "kubernetes.cpus"),
        ("kubernetes.gpu_resource=gpu", "kubernetes.gpu_resource"),
        ("kubernetes.rdma_resource=rdma//x", "kubernetes.rdma_resource"),
        ("kubernetes.rdma_count=0", "kubernetes.rdma_count"),
        ("kubernetes.volumes=[clips]", "kubernetes.volumes[0]"),
        ("kubernetes.volumes=[a:/data,b:/data]", "kubernetes.volumes[1]"),
        ("kubernetes.volumes=[a:/dev/shm]", "kubernetes.volumes[0]"),
        ("kubernetes.tolerations=[gpu]", "kubernetes.tolerations[0]"),
        ("kubernetes.node_selector={a b:c}", "kubernetes.node_selector.a b"),
        ("kubernetes.environment={HF_TOKEN:x}", "kubernetes.environment.HF_TOKEN"),
        ("kubernetes.environment={1A:x}", "kubernetes.environment.1A"),
        ("kubernetes.queue_priority=high", "kubernetes.queue_priority"),
        ("kubernetes.on_interrupt=ask", "kubernetes.on_interrupt"),
        ("kubernetes.ttl_seconds=-1", "kubernetes.ttl_seconds"),
        ("kubernetes.deadline_seconds=0", "kubernetes.deadline_seconds"),
        ("kubernetes.stop_seconds=0", "kubernetes.stop_seconds"),
    ],
)
def test_what_kubernetes_could_not_take_is_refused_before(override: str, key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        to_run_config(compose([*DEV, override]))
    assert caught.value.key == key


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["kubernetes.image=null"], "kubernetes.image"),
        (["storage.root=k5dist-data"], "storage.root"),
        (["storage.root=/elsewhere"], "storage.root"),
        (["data.source=clips"], "data.source"),
        (["data.source=/runs2/clips"], "data.source"),
        (["storage.root=s3://bucket/root"], "tracking.uri"),
        (["resume=never"], "resume"),
        (["+flavour=t2v-lite-sft-5s", "data.source=s3://b/c"], "cluster.gpus_per_node"),
        (["+flavour=t2v-lite-sft-5s", "data.source=s3://b/c", "cluster.gpus_per_node=1", "pretrained=x"], "pretrained"),
    ],
)
def test_what_pods_could_not_see_is_refused_before(overrides: list[str], key: str) -> None:
    flavour = [override for override in overrides if override.startswith("+flavour")]
    typed = [*DEV, *overrides] if not flavour else [*DEV[1:], *overrides]
    with pytest.raises(ConfigError) as caught:
        rayjob_of(*typed)
    assert caught.value.key == key


def test_the_plan_goes_by_the_nodes_that_are_asked_for() -> None:
    asked = ["+flavour=t2v-pro-sft-10s-hd", *COMMON, *S3, "data.source=s3://b/c", "cluster.gpus_per_node=2"]
    selector = "kubernetes.node_selector={nvidia.com/gpu.product:NVIDIA-H100-80GB-HBM3}"
    with pytest.raises(ConfigError, match="needs about"):
        plan_of(*asked, selector)
    assert plan_of(*asked).world.size == 2  # which GPUs is not known, so the plan only says its doubt


def test_the_driver_plans_for_the_gpus_that_the_launcher_did() -> None:
    """The head pod shows no GPU, and what is kept of the blocks hangs on the kind."""
    asked = ["+flavour=t2v-lite-sft-5s", *COMMON, *S3, "data.source=s3://b/c", "cluster.gpus_per_node=2"]
    asked += ["kubernetes.node_selector={nvidia.com/gpu.product:NVIDIA-L40S}", "data.resolution=[512,512]"]
    plan = plan_of(*asked)
    inside = plan_run(to_run_config(compose(manifests.arguments(plan, asked))))
    assert inside.world == plan.world
    assert plan.world.gpu_name == "NVIDIA L40S"
    assert inside.recompute == plan.recompute
    assert inside.run_fingerprint == plan.run_fingerprint


def test_a_dry_run_prints_the_manifest_alone(tmp_path: Path) -> None:
    typed = [*DEV, "cluster.dry_run=true"]
    command = [sys.executable, "-m", "k5dist.launch", *typed]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True)
    (rayjob,) = yaml.safe_load_all(done.stdout)
    assert rayjob == rayjob_of(*DEV)
    assert "Plan of" in done.stderr
    assert not any(tmp_path.iterdir()), "nothing is written here: the pods see another machine's folders"
    given = json.loads(
        rayjob["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["metadata"]["annotations"]["k5dist/arguments"]
    )
    assert given[0] == "+flavour=t2v-tiny"
    assert os.sep not in given[0]
