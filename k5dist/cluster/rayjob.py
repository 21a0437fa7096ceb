"""A RayJob from its submission to its end: made, followed, shown, and taken away again where it can come to nothing."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from typing import Any

from k5dist.cluster import trouble
from k5dist.cluster.kubernetes_api import Api, Exists, Unreachable
from k5dist.cluster.podlog import LogTail
from k5dist.cluster.trouble import Trouble
from k5dist.config import ConfigError, KubernetesConfig
from k5dist.console import say

_STOPPED = 130  # as Ctrl-C ends a command
_TO_DELETE = 120  # seconds beyond those for saving
_LOG_SECONDS = 10


@dataclass(frozen=True)
class Pace:
    """Seconds between looks, until a trouble that a person must mend is believed, until a silent server is left."""

    poll: float = 2.0
    patience: float = 45.0
    unreachable: float = 300.0


class Hopeless(Exception):
    """The RayJob cannot come to anything as it is; `error` says why, and what to do."""

    def __init__(self, error: ConfigError) -> None:
        super().__init__(str(error))
        self.error = error


class Vanished(Exception):
    """Somebody else has deleted the RayJob."""


def run(api: Api, rayjob: dict[str, Any], kubernetes: KubernetesConfig, pace: Pace | None = None) -> int:
    """Submit and follow; returns the exit status.

    Raises:
        ConfigError: what was refused, or cannot start; nothing of it is left.
        KeyboardInterrupt: after the RayJob was deleted or suspended, as `kubernetes.on_interrupt` says.
    """
    pace = pace or Pace()
    api.check(kubernetes.queue)
    made = _create(api, rayjob, kubernetes, pace)
    name, uid = made["metadata"]["name"], made["metadata"]["uid"]
    try:
        _announce(api, name, kubernetes)
        if kubernetes.suspend or not kubernetes.follow:
            return 0
        return _Follower(api, made, kubernetes, pace).follow()
    except Hopeless as hopeless:
        _remove(api, name, uid, kubernetes, pace)
        raise hopeless.error from None
    except Vanished:
        say(f"RayJob {name} was deleted; the same command goes on from the newest checkpoint")
        return _STOPPED
    except (ConfigError, Unreachable) as error:  # no more looking at it: it is none the worse for that
        say(f"RayJob {name} may go on without this command: see the lines above")
        if isinstance(error, ConfigError):
            raise
        say(str(error))
        return 1
    except KeyboardInterrupt:
        _interrupted(api, name, uid, kubernetes, pace)
        raise


def _announce(api: Api, name: str, kubernetes: KubernetesConfig) -> None:
    where = f"--namespace {kubernetes.namespace}"
    say(f"submitted RayJob {kubernetes.namespace}/{name} to {api.address}")
    say(f"look: kubectl get rayjob {name} {where}   log: kubectl logs {where} --follow job/{name}")
    say(f"stop and keep: kubectl delete rayjob {name} {where} (the workers save a checkpoint)")
    if kubernetes.suspend:
        patch = """--type merge --patch '{"spec": {"suspend": false}}'"""
        say(f"it waits: kubectl patch rayjob {name} {where} {patch}")


def _create(api: Api, rayjob: dict[str, Any], kubernetes: KubernetesConfig, pace: Pace) -> dict[str, Any]:
    """The RayJob as the server made it. One of that name that has ended, or is suspended, makes way."""
    name = rayjob["metadata"]["name"]
    try:
        try:
            return api.create(rayjob)
        except Exists:
            before = api.get(name)
            if before is not None:
                _make_way(api, before, kubernetes, pace)
            return api.create(rayjob)
    except Exists as error:
        raise _taken(name, "another was made just now") from error
    except Unreachable as error:
        fix = "see whether it was made: kubectl get rayjobs; then try again"
        raise ConfigError("cluster", "kubernetes", str(error), fix) from error


def _make_way(api: Api, before: dict[str, Any], kubernetes: KubernetesConfig, pace: Pace) -> None:
    name, status = before["metadata"]["name"], before.get("status", {}).get("jobDeploymentStatus", "")
    leaving = "deletionTimestamp" in before["metadata"]
    # In a queue Kueue suspends a job and starts it again: it is not ours to replace.
    waiting = status == "Suspended" and kubernetes.queue is None
    if not leaving and not waiting and status not in ("Complete", "Failed"):
        raise _taken(name, f"its status is {status or 'new'}")
    say(f"RayJob {name} of an earlier submission ({'deleted' if leaving else status}) makes way")
    _remove(api, name, before["metadata"]["uid"], kubernetes, pace)


def _taken(name: str, why: str) -> ConfigError:
    rule = f"a RayJob of this run is there already ({why}), and a run's folder belongs to one"
    return ConfigError("name", name, rule, f"kubectl delete rayjob {name} (it saves a checkpoint), or another name=")


def _remove(api: Api, name: str, uid: str, kubernetes: KubernetesConfig, pace: Pace) -> None:
    """Delete it and wait until it is gone, with its pods."""
    deadline = time.monotonic() + kubernetes.stop_seconds + _TO_DELETE
    while time.monotonic() < deadline:
        with contextlib.suppress(Unreachable):
            found = api.get(name)
            if found is None or found["metadata"]["uid"] != uid:
                return
            if "deletionTimestamp" not in found["metadata"]:
                api.delete(name, uid)
                continue
        time.sleep(pace.poll)
    say(f"RayJob {name} is not gone yet: kubectl get rayjob {name} --namespace {kubernetes.namespace}")


def _interrupted(api: Api, name: str, uid: str, kubernetes: KubernetesConfig, pace: Pace) -> None:
    if kubernetes.on_interrupt == "leave":
        say(f"RayJob {name} goes on without this command")
        return
    if kubernetes.on_interrupt == "suspend":
        try:
            api.suspend(name)
        except Unreachable as error:
            patch = """--type merge --patch '{"spec": {"suspend": true}}'"""
            where = f"--namespace {kubernetes.namespace}"
            say(f"RayJob {name} goes on ({error}); suspend it: kubectl patch rayjob {name} {where} {patch}")
            return
        say(f"RayJob {name} is suspended: the workers save a checkpoint and their pods go")
        return
    say(f"deleting RayJob {name}: the workers save a checkpoint first (Ctrl-C again: do not wait for it)")
    _remove(api, name, uid, kubernetes, pace)


class _Follower:
    def __init__(self, api: Api, made: dict[str, Any], kubernetes: KubernetesConfig, pace: Pace) -> None:
        self.api, self.kubernetes, self.pace = api, kubernetes, pace
        self.name, self.uid = made["metadata"]["name"], made["metadata"]["uid"]
        groups = made["spec"]["rayClusterSpec"]["workerGroupSpecs"]
        self.num_pods = 1 + sum(group["replicas"] for group in groups)
        self.log = LogTail(api, f"job-name={self.name}", pace.poll)
        self._said: set[str] = set()
        self._trouble: tuple[Trouble, float] | None = None  # and since when
        self._starting = time.monotonic()
        self._answered = time.monotonic()

    def follow(self) -> int:
        try:
            while True:
                status = self._look()
                if status is not None:
                    return status
                time.sleep(self.pace.poll)
        finally:
            self.log.stop()

    def _look(self) -> int | None:
        """One look; the exit status once the job has ended."""
        try:
            job = self.api.get(self.name)
            if job is None or job["metadata"]["uid"] != self.uid or "deletionTimestamp" in job["metadata"]:
                raise Vanished(self.name)
            status = job.get("status", {})
            deployment = status.get("jobDeploymentStatus", "")
            self._say_once(f"status: {deployment or 'new'}" + self._queued(deployment))
            if deployment in ("Complete", "Failed"):
                return self._ended(status)
            if deployment in ("Suspended", "Suspending"):
                self._starting, self._trouble = time.monotonic(), None
            else:
                self._check_pods(status)
            self._answered = time.monotonic()
        except Unreachable as error:
            self._say_once(f"{error}; trying again")
            if time.monotonic() - self._answered > self.pace.unreachable:
                raise
        return None

    def _queued(self, deployment: str) -> str:
        if deployment != "Suspended" or self.kubernetes.queue is None:
            return ""
        look = f"kubectl get workloads --namespace {self.kubernetes.namespace}"
        return f": it waits in queue {self.kubernetes.queue} ({look} says for what)"

    def _check_pods(self, status: dict[str, Any]) -> None:
        """Show the log once there is one; raise Hopeless for what will not get better."""
        cluster = status.get("rayClusterName", "")
        running = status.get("jobDeploymentStatus") == "Running"
        if running:
            self.log.start()
        pods = self.api.pods(f"ray.io/cluster={cluster}") if cluster else []
        now = time.monotonic()
        warnings: list[dict[str, Any]] = []
        if len(pods) < self.num_pods:  # events stay when what they tell of is long past
            warnings = self.api.warnings(cluster) if cluster else []
            # An earlier RayJob had this name, too.
            of_job = self.api.warnings(self.name)
            warnings += [event for event in of_job if event.get("involvedObject", {}).get("uid") == self.uid]
        elif all(pod.get("status", {}).get("phase") == "Running" for pod in pods):
            self._starting = now
        if running:
            pods += self.api.pods(f"job-name={self.name}")
        found = trouble.find(self.kubernetes, pods, warnings)
        if found is None:
            self._trouble = None
        elif self._trouble is None or self._trouble[0].error.key != found.error.key:
            self._trouble = (found, now)
            self._say_once(f"waiting: {found.line}" if found.waiting else found.line)
        elif not found.waiting and now - self._trouble[1] > self.pace.patience:
            raise Hopeless(found.error)
        if now - self._starting > self.kubernetes.start_seconds:
            raise Hopeless(self._not_started(found, running))

    def _not_started(self, found: Trouble | None, running: bool) -> ConfigError:
        if found is not None:
            error = found.error
            rule = f"{error.rule} (for more than kubernetes.start_seconds={self.kubernetes.start_seconds})"
            return ConfigError(error.key, error.value, rule, error.fix)
        what = "not all of its pods run" if running else "KubeRay has not started its pods"
        fix = f"kubectl describe rayjob {self.name} --namespace {self.kubernetes.namespace}; is the operator running?"
        return ConfigError("kubernetes.start_seconds", self.kubernetes.start_seconds, what, fix)

    def _ended(self, status: dict[str, Any]) -> int:
        self.log.finish(_LOG_SECONDS)
        job, reason = status.get("jobStatus", ""), status.get("reason", "")
        message = str(status.get("message") or "").strip()
        if status["jobDeploymentStatus"] == "Complete" and job == "SUCCEEDED":
            say(f"RayJob {self.name} finished")
            return 0
        if job == "STOPPED":
            say(f"RayJob {self.name} was stopped; the same command goes on from the newest checkpoint")
            return _STOPPED
        what = f"RayJob {self.name} failed ({reason or job or 'no reason given'})"
        say(f"{what}: {message}" if message else what)
        if not self.log.lines:
            say(f"its log: kubectl logs --namespace {self.kubernetes.namespace} job/{self.name}")
        say("mend what it says; the same command goes on from what the run's folder holds")
        return 1

    def _say_once(self, line: str) -> None:
        if line not in self._said:
            self._said.add(line)
            say(line)
