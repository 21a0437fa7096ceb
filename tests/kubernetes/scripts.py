"""What becomes of a RayJob in the stand-in: one step for each look at it. And a submission as the launcher makes it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from k5dist.cluster import manifests
from k5dist.cluster.kubernetes_api import Api
from k5dist.cluster.rayjob import Pace, run
from k5dist.config import ConfigError
from tests.kubernetes.api_server import Cluster, Script
from tests.kubernetes.plans import DEV, plan_of

QUICK = Pace(poll=0.01, patience=0.05, unreachable=0.3)
NAME = "t2v-tiny-of-a-test"


def finishes(cluster: Cluster, job: dict[str, Any]) -> Iterator[None]:
    """What KubeRay does with a job that goes well."""
    job["status"] = {"jobDeploymentStatus": "Initializing"}
    yield
    cluster.ray_pods(job)
    yield
    for pod in cluster.pods.values():
        pod["status"]["phase"] = "Running"
    yield
    submitter = start_driver(cluster, job)
    cluster.log(submitter["metadata"]["name"], "train: 1/60", "train: 60/60")
    yield
    cluster.log(submitter["metadata"]["name"], "Done")
    submitter["status"]["phase"] = "Succeeded"
    end_pods(cluster)
    job["status"] |= {"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}
    yield


def finishes_at_once(cluster: Cluster, job: dict[str, Any]) -> Iterator[None]:
    """For the whole command, which takes its time between two looks."""
    cluster.ray_pods(job, phase="Running")
    submitter = start_driver(cluster, job)
    cluster.log(submitter["metadata"]["name"], "train: 60/60")
    yield
    submitter["status"]["phase"] = "Succeeded"
    end_pods(cluster)
    job["status"] |= {"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}
    yield


def start_driver(cluster: Cluster, job: dict[str, Any]) -> dict[str, Any]:
    job["status"] |= {"jobDeploymentStatus": "Running", "jobStatus": "RUNNING"}
    name = job["metadata"]["name"]
    return cluster.pod(job, f"{name}-submitter", {"job-name": name}, phase="Running")


def end_pods(cluster: Cluster) -> None:
    """KubeRay takes the Ray cluster down; the submitter's pod stays for its log."""
    for pod in [pod for pod in cluster.pods if not pod.endswith("-submitter")]:
        cluster.end(pod)


def fails(message: str, reason: str = "AppFailed") -> Script:
    def script(cluster: Cluster, job: dict[str, Any]) -> Iterator[None]:
        job["status"] = {"jobDeploymentStatus": "Initializing"}
        cluster.ray_pods(job, phase="Running")
        yield
        submitter = start_driver(cluster, job)
        cluster.log(submitter["metadata"]["name"], "TrainingFailed: rank 1: out of memory")
        yield
        submitter["status"]["phase"] = "Failed"
        end_pods(cluster)
        failed = {"jobDeploymentStatus": "Failed", "jobStatus": "FAILED", "reason": reason, "message": message}
        job["status"] |= failed
        yield

    return script


def stays(**status: Any) -> Script:
    """The pods are made, and stay in a state."""

    def script(cluster: Cluster, job: dict[str, Any]) -> Iterator[None]:
        job["status"] = {"jobDeploymentStatus": "Initializing"}
        cluster.ray_pods(job, **status)
        while True:
            yield

    return script


def refuses_pods(message: str) -> Script:
    def script(cluster: Cluster, job: dict[str, Any]) -> Iterator[None]:
        job["status"] = {"jobDeploymentStatus": "Initializing", "rayClusterName": f"{NAME}-abcde"}
        cluster.warn(
            f"{NAME}-abcde", "of the Ray cluster", "FailedToCreateHeadPod", f"Failed to create head Pod: {message}"
        )
        while True:
            yield

    return script


def runs_on(cluster: Cluster, job: dict[str, Any]) -> Iterator[None]:
    job["status"] = {"jobDeploymentStatus": "Initializing"}
    cluster.ray_pods(job, phase="Running")
    yield
    submitter = start_driver(cluster, job)
    cluster.log(submitter["metadata"]["name"], "train: 1/60")
    while True:
        yield


def waiting(reason: str, message: str) -> dict[str, Any]:
    state = {"waiting": {"reason": reason, "message": message}}
    return {"containerStatuses": [{"name": "ray-head", "state": state}]}


def unschedulable(message: str) -> dict[str, Any]:
    return {"conditions": [{"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message}]}


def follow(cluster: Cluster, folder: Path, *overrides: str) -> int:
    typed = [*DEV, f"name={NAME}", f"kubernetes.kubeconfig={cluster.kubeconfig(folder)}", *overrides]
    plan = plan_of(*typed)
    return run(Api(plan.config.kubernetes), manifests.rayjob(plan, typed), plan.config.kubernetes, QUICK)


def refused(cluster: Cluster, folder: Path, *overrides: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        follow(cluster, folder, *overrides)
    assert cluster.rayjobs == {}
    assert cluster.pods == {}, "nothing is left running"
    lines = caught.value.block().splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["key", "value", "rule", "fix"]
    return caught.value
