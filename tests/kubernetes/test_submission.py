"""Submit → follow → finished, failed or refused, by the official client over HTTP: each ends in one readable message,
and where it can come to nothing, nothing is left running."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from k5dist.cluster import manifests, trouble
from k5dist.cluster.kubernetes_api import Api
from k5dist.cluster.rayjob import Pace, run
from k5dist.config import ConfigError
from tests.kubernetes.api_server import NAMESPACE, Cluster, Script, role
from tests.kubernetes.plans import DEV, plan_of, rayjob_of
from tests.kubernetes.schemas import needs_crds

pytestmark = needs_crds
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


def test_a_job_is_submitted_followed_and_finishes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Cluster(finishes) as cluster:
        assert follow(cluster, tmp_path) == 0
        (made,) = cluster.created
    assert made["metadata"]["name"] == NAME
    shown = capsys.readouterr().out
    assert [line for line in shown.splitlines() if "train:" in line or line == "Done"] == [
        "train: 1/60", "train: 60/60", "Done",
    ]  # fmt: skip
    assert shown.index("status: Initializing") < shown.index("status: Running") < shown.index(f"RayJob {NAME} finished")
    assert list(cluster.pods) == [f"{NAME}-submitter"]


def test_a_log_that_breaks_off_goes_on_where_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Cluster(finishes) as cluster:
        cluster.breaks.add(f"{NAME}-submitter")
        assert follow(cluster, tmp_path) == 0
        assert not cluster.breaks
    shown = capsys.readouterr().out.splitlines()
    assert [line for line in shown if "train:" in line or line == "Done"] == ["train: 1/60", "train: 60/60", "Done"]


@pytest.mark.parametrize(
    ("script", "words"),
    [
        (fails("Job entrypoint command failed with exit code 1"), ["AppFailed", "exit code 1", "out of memory"]),
        (fails("", "DeadlineExceeded"), ["DeadlineExceeded"]),
    ],
)
def test_a_job_that_fails_says_why(
    script: Script, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Cluster(script) as cluster:
        assert follow(cluster, tmp_path) == 1
        assert list(cluster.pods) == [f"{NAME}-submitter"]
    shown = capsys.readouterr().out
    assert all(word in shown for word in [f"RayJob {NAME} failed", "the same command goes on", *words])


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


def test_queues_priorities_and_waiting_in_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def script(cluster: Cluster, job: dict[str, Any]) -> Iterator[None]:
        job["status"] = {"jobDeploymentStatus": "Suspended"}  # as Kueue leaves it until there is room
        yield
        yield
        yield from finishes(cluster, job)

    with Cluster(script) as cluster:
        assert follow(cluster, tmp_path, "kubernetes.queue=gpus", "kubernetes.queue_priority=high") == 0
        labels = cluster.created[0]["metadata"]["labels"]
    assert (labels["kueue.x-k8s.io/queue-name"], labels["kueue.x-k8s.io/priority-class"]) == ("gpus", "high")
    assert "waits in queue gpus" in capsys.readouterr().out


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


def test_a_server_that_stumbles_is_asked_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def script(cluster: Cluster, job: dict[str, Any]) -> Iterator[None]:
        for i, _ in enumerate(finishes(cluster, job)):
            cluster.failing = 2 if i in (0, 2) else cluster.failing
            yield

    with Cluster(script) as cluster:
        assert follow(cluster, tmp_path) == 0
    assert "503" in capsys.readouterr().out


def test_a_server_that_stays_away_leaves_the_job(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def script(cluster: Cluster, job: dict[str, Any]) -> Iterator[None]:
        cluster.failing = 1_000_000
        yield

    with Cluster(script) as cluster:
        assert follow(cluster, tmp_path) == 1
        assert NAME in cluster.rayjobs
    assert "may go on without this command" in capsys.readouterr().out


def test_a_run_that_is_on_its_way_is_not_begun_twice(tmp_path: Path) -> None:
    with Cluster(runs_on) as cluster:
        assert follow(cluster, tmp_path, "kubernetes.follow=false") == 0
        with pytest.raises(ConfigError, match="there already") as caught:
            follow(cluster, tmp_path)
        assert (caught.value.key, len(cluster.created)) == ("name", 1)
        assert NAME in cluster.rayjobs, "and the first goes on"


def test_one_that_has_ended_makes_way(tmp_path: Path) -> None:
    with Cluster(fails("exit code 1")) as cluster:
        assert follow(cluster, tmp_path) == 1
        cluster.script = finishes
        assert follow(cluster, tmp_path) == 0
        assert len(cluster.created) == 2


def test_a_suspended_one_is_made_and_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Cluster(finishes) as cluster:
        assert follow(cluster, tmp_path, "kubernetes.suspend=true") == 0
        assert cluster.rayjobs[NAME]["spec"]["suspend"] is True
        assert cluster.pods == {}
    assert "kubectl patch rayjob" in capsys.readouterr().out


def interrupt_when_it_runs(cluster: Cluster, job: dict[str, Any]) -> Iterator[None]:
    steps = runs_on(cluster, job)
    for _ in range(3):
        next(steps)
        yield
    threading.Timer(0, os.kill, (os.getpid(), signal.SIGINT)).start()
    yield from steps


@pytest.mark.parametrize("what", ["delete", "suspend", "leave"])
def test_ctrl_c(what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Cluster(interrupt_when_it_runs) as cluster:
        with pytest.raises(KeyboardInterrupt):
            follow(cluster, tmp_path, f"kubernetes.on_interrupt={what}")
        left, pods = dict(cluster.rayjobs), dict(cluster.pods)
    assert bool(left) == (what != "delete")
    assert bool(pods) == (what == "leave")
    assert f"RayJob {NAME}" in capsys.readouterr().out


def test_a_job_that_someone_deletes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def script(cluster: Cluster, job: dict[str, Any]) -> Iterator[None]:
        yield from (step for step, _ in zip(runs_on(cluster, job), range(2), strict=False))
        del cluster.rayjobs[NAME]
        yield

    with Cluster(script) as cluster:
        assert follow(cluster, tmp_path) == 130
    assert "was deleted" in capsys.readouterr().out


def test_the_role_of_submitters_is_what_the_client_asks(tmp_path: Path) -> None:
    with Cluster(finishes) as cluster:
        follow(cluster, tmp_path, "kubernetes.queue=gpus")
        with pytest.raises(ConfigError):
            follow(cluster, tmp_path, "kubernetes.queue=none")
        cluster.script = interrupt_when_it_runs
        for what in ("suspend", "delete"):
            with pytest.raises(KeyboardInterrupt):
                follow(cluster, tmp_path, f"kubernetes.on_interrupt={what}")
        # People also list their jobs.
        assert role() - cluster.asked == {("rayjobs", "list")}


def launch(cluster: Cluster, folder: Path, *overrides: str) -> subprocess.Popen[str]:
    typed = [*DEV, f"name={NAME}", f"kubernetes.kubeconfig={cluster.kubeconfig(folder)}", *overrides]
    command = [sys.executable, "-m", "k5dist.launch", *typed]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_the_whole_command(tmp_path: Path) -> None:
    with Cluster(finishes_at_once) as cluster:
        output, error = launch(cluster, tmp_path).communicate(timeout=60)
    assert error == ""
    assert f"submitted RayJob {NAMESPACE}/{NAME}" in output
    assert "train: 60/60" in output
    assert output.rstrip().endswith(f"RayJob {NAME} finished")


def test_the_whole_command_is_interrupted(tmp_path: Path) -> None:
    processes: list[subprocess.Popen[str]] = []
    running = threading.Event()

    def script(cluster: Cluster, job: dict[str, Any]) -> Iterator[None]:
        for i, _ in enumerate(runs_on(cluster, job)):
            if i == 1:
                running.set()
            yield

    with Cluster(script) as cluster:
        processes.append(launch(cluster, tmp_path))
        assert running.wait(60)
        processes[0].send_signal(signal.SIGINT)
        output, _ = processes[0].communicate(timeout=60)
        assert (cluster.rayjobs, cluster.pods) == ({}, {})
    assert processes[0].returncode == 130
    assert "the workers save a checkpoint" in output


def test_the_whole_command_is_refused(tmp_path: Path) -> None:
    with Cluster(finishes) as cluster:
        process = launch(cluster, tmp_path, "kubernetes.queue=none")
        _, error = process.communicate(timeout=60)
    assert process.returncode == 2
    assert error.startswith("Configuration error\n  key   kubernetes.queue")
