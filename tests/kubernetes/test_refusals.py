"""What keeps a RayJob from being made or from starting: one readable message, and nothing left running."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from k5dist.cluster import trouble
from k5dist.cluster.kubernetes_api import Api
from k5dist.cluster.rayjob import run
from k5dist.config import ConfigError
from tests.kubernetes.api_server import Cluster, Script
from tests.kubernetes.plans import DEV, plan_of, rayjob_of
from tests.kubernetes.schemas import needs_crds
from tests.kubernetes.scripts import (
    NAME,
    QUICK,
    end_pods,
    finishes,
    follow,
    refused,
    refuses_pods,
    start_driver,
    stays,
    unschedulable,
    waiting,
)

pytestmark = needs_crds


@pytest.mark.parametrize(
    ("script", "key", "words"),
    [
        (stays(**waiting("ImagePullBackOff", "manifest unknown")), "kubernetes.image", "manifest unknown"),
        (stays(**waiting("InvalidImageName", "bad")), "kubernetes.image", "InvalidImageName"),
        (
            stays(**waiting("CreateContainerConfigError", 'secret "k5dist-s3" not found')),
            "kubernetes.s3_secret",
            "k5dist-s3",
        ),
        (stays(**waiting("CrashLoopBackOff", "back-off")), "kubernetes.image", "again and again"),
        (
            stays(containerStatuses=[{"name": "ray-head", "state": {"terminated": {"reason": "OOMKilled"}}}]),
            "kubernetes.head_memory",
            "was killed",
        ),
        (
            stays(**unschedulable('persistentvolumeclaim "k5dist-runs" not found')),
            "kubernetes.volumes",
            "k5dist-runs",
        ),
        (refuses_pods('pods "x" is forbidden: exceeded quota: gpus'), "kubernetes.namespace", "exceeded quota"),
        (refuses_pods('violates PodSecurity "restricted:latest"'), "kubernetes.namespace", "PodSecurity"),
        (refuses_pods("no PriorityClass with name x was found"), "kubernetes.priority_class", "PriorityClass"),
        (refuses_pods("error looking up service account k5dist/x"), "kubernetes.service_account", "k5dist/x"),
    ],
)
def test_pods_that_cannot_start_end_it(
    script: Script, key: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Cluster(script) as cluster:
        error = refused(cluster, tmp_path, "kubernetes.s3_secret=k5dist-s3")
    assert error.key == key
    assert words in error.rule
    assert words in capsys.readouterr().out, "it is said at once, before it is believed"


def test_pods_that_no_node_takes_wait_for_a_while(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = "0/3 nodes are available: 3 Insufficient nvidia.com/gpu."
    with Cluster(stays(**unschedulable(message))) as cluster:
        error = refused(cluster, tmp_path, "kubernetes.start_seconds=1")
    assert error.key == "cluster.gpus_per_node"
    assert message in error.rule
    assert "start_seconds=1" in error.rule
    assert "waiting: " in capsys.readouterr().out


def test_workers_that_a_quota_refuses_while_the_head_runs(tmp_path: Path) -> None:
    def script(cluster: Cluster, job: dict[str, Any]) -> Iterator[None]:
        job["status"] = {"jobDeploymentStatus": "Initializing", "rayClusterName": f"{NAME}-abcde"}
        cluster.pod(job, f"{NAME}-abcde-head", {"ray.io/cluster": f"{NAME}-abcde"}, phase="Running")
        cluster.warn(f"{NAME}-abcde", "of the Ray cluster", "FailedToCreateWorkerPod", "exceeded quota: gpus")
        while True:
            yield

    with Cluster(script) as cluster:
        assert "exceeded quota" in refused(cluster, tmp_path).rule


def test_an_operator_that_does_nothing_is_noticed(tmp_path: Path) -> None:
    def nothing(cluster: Cluster, job: dict[str, Any]) -> Iterator[None]:
        while True:
            yield

    with Cluster(nothing) as cluster:
        error = refused(cluster, tmp_path, "kubernetes.start_seconds=1")
    assert "is the operator running" in error.fix


@pytest.mark.parametrize(
    ("message", "key"),
    [
        ("3 Insufficient nvidia.com/gpu.", "cluster.gpus_per_node"),
        ("3 Insufficient rdma/x.", "kubernetes.rdma_resource"),
        ("3 node(s) didn't match Pod's node affinity/selector.", "kubernetes.node_selector"),
        ("3 node(s) had untolerated taint {gpu: }.", "kubernetes.tolerations"),
        ("3 Insufficient cpu.", "kubernetes.cpus"),
    ],
)
def test_which_key_a_schedulers_words_mean(message: str, key: str) -> None:
    kubernetes = plan_of(*DEV, "kubernetes.rdma_resource=rdma/x").config.kubernetes
    pod = {"metadata": {"name": "x"}, "status": unschedulable(f"0/3 nodes are available: {message}")}
    found = trouble.find(kubernetes, [pod], [])
    assert found is not None
    assert (found.error.key, found.waiting) == (key, True)


def test_the_gravest_trouble_comes_first() -> None:
    kubernetes = plan_of(*DEV).config.kubernetes
    waits = {"metadata": {"name": "a"}, "status": unschedulable("3 Insufficient cpu.")}
    stands = {"metadata": {"name": "b"}, "status": waiting("ImagePullBackOff", "denied")}
    for pods in ([waits, stands], [stands, waits]):
        found = trouble.find(kubernetes, pods, [])
        assert found is not None
        assert found.error.key == "kubernetes.image"
    assert trouble.find(kubernetes, [{"metadata": {"name": "c"}, "status": {"phase": "Running"}}], []) is None


def test_an_image_that_comes_after_all_is_waited_for(tmp_path: Path) -> None:
    def script(cluster: Cluster, job: dict[str, Any]) -> Iterator[None]:
        job["status"] = {"jobDeploymentStatus": "Initializing"}
        cluster.ray_pods(job, **waiting("ErrImagePull", "registry busy"))
        yield
        for pod in cluster.pods.values():
            pod["status"] = {"phase": "Running"}
        yield
        end_pods(cluster)
        job["status"] |= {"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}
        yield

    with Cluster(script) as cluster:
        assert follow(cluster, tmp_path) == 0


def test_what_is_past_does_not_end_a_job_that_runs(tmp_path: Path) -> None:
    """A pod that was refused once, and a submitter's pod that Kubernetes had to start again."""

    def script(cluster: Cluster, job: dict[str, Any]) -> Iterator[None]:
        cluster.ray_pods(job, phase="Running")
        cluster.warn(f"{NAME}-abcde", "of the Ray cluster", "FailedToCreateHeadPod", "exceeded quota: gpus")
        start_driver(cluster, job)["status"]["phase"] = "Failed"
        cluster.pod(job, f"{NAME}-submitter-again", {"job-name": NAME}, phase="Running")
        until = time.monotonic() + 1.2
        while time.monotonic() < until:
            yield
        cluster.pods[f"{NAME}-submitter-again"]["status"]["phase"] = "Succeeded"
        job["status"] |= {"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}
        yield

    with Cluster(script) as cluster:
        assert follow(cluster, tmp_path, "kubernetes.start_seconds=1") == 0


def test_a_queue_that_does_not_exist(tmp_path: Path) -> None:
    with Cluster(finishes) as cluster:
        error = refused(cluster, tmp_path, "kubernetes.queue=gups")
        assert (error.key, "there: gpus" in error.rule) == ("kubernetes.queue", True)
        del cluster.groups["kueue.x-k8s.io"]
        assert "Kueue" in refused(cluster, tmp_path, "kubernetes.queue=gpus").rule
        assert cluster.created == []


def test_a_cluster_without_kuberay(tmp_path: Path) -> None:
    with Cluster(finishes) as cluster:
        del cluster.groups["ray.io"]
        assert "KubeRay's operator" in refused(cluster, tmp_path).rule


def test_a_namespace_that_is_not_there(tmp_path: Path) -> None:
    with Cluster(finishes) as cluster:
        cluster.rights |= {("rayjobs", "create")}
        error = refused(cluster, tmp_path, "kubernetes.namespace=elsewhere")
    assert (error.key, error.value) == ("kubernetes.namespace", "elsewhere")
    assert "kubectl create namespace elsewhere" in error.fix


def test_a_quota_that_is_used_up(tmp_path: Path) -> None:
    with Cluster(finishes) as cluster:
        cluster.quota = 0
        error = refused(cluster, tmp_path)
    assert (error.key, "exceeded quota" in error.rule) == ("kubernetes.namespace", True)
    assert "describe quota" in error.fix


def test_someone_without_rights(tmp_path: Path) -> None:
    with Cluster(finishes) as cluster:
        cluster.rights = set()
        error = refused(cluster, tmp_path)
    assert "cannot create" in error.rule
    assert "k5dist-submitter" in error.fix


def test_a_login_that_is_not_known(tmp_path: Path) -> None:
    with Cluster(finishes) as cluster:
        file = cluster.kubeconfig(tmp_path, token="of someone else")
        (tmp_path / "other").mkdir()
        other = file.rename(tmp_path / "other" / "kubeconfig")
        error = refused(cluster, tmp_path, f"kubernetes.kubeconfig={other}")
    assert error.key == "kubernetes.context"


def test_what_kuberay_does_not_know_is_refused(tmp_path: Path) -> None:
    with Cluster(finishes) as cluster:
        kubernetes = plan_of(*DEV, f"kubernetes.kubeconfig={cluster.kubeconfig(tmp_path)}").config.kubernetes
        rayjob = rayjob_of(*DEV)
        rayjob["spec"]["entrypont"] = "x"
        with pytest.raises(ConfigError, match="entrypont") as caught:
            run(Api(kubernetes), rayjob, kubernetes, QUICK)
        assert cluster.created == []
    assert "KubeRay" in caught.value.fix


def test_a_wrong_address(tmp_path: Path) -> None:
    with Cluster(finishes) as cluster:
        file = cluster.kubeconfig(tmp_path)
    with socket.socket() as closed:  # bound and not listening
        closed.bind(("127.0.0.1", 0))
        file.write_text(file.read_text().replace(cluster.address, f"http://127.0.0.1:{closed.getsockname()[1]}"))
        kubernetes = plan_of(*DEV, f"kubernetes.kubeconfig={file}").config.kubernetes
        with pytest.raises(ConfigError, match=r"does not answer .*refused") as caught:
            run(Api(kubernetes), rayjob_of(*DEV), kubernetes, QUICK)
    assert caught.value.key == "kubernetes.context"
    assert "object at 0x" not in caught.value.rule


@pytest.mark.parametrize(
    ("override", "key"),
    [("kubernetes.kubeconfig=/none", "kubernetes.kubeconfig"), ("kubernetes.context=nowhere", "kubernetes.context")],
)
def test_a_kubeconfig_that_does_not_help(override: str, key: str, tmp_path: Path) -> None:
    with Cluster(finishes) as cluster:
        file = cluster.kubeconfig(tmp_path)
    kubernetes = plan_of(*DEV, f"kubernetes.kubeconfig={file}", override).config.kubernetes
    with pytest.raises(ConfigError) as caught:
        Api(kubernetes)
    assert caught.value.key == key
