"""A stand-in for a cluster: an API server on loopback that speaks HTTP, and a small operator behind it.

It enforces what makes submissions fail: a login, the rights of the role in k8s/base/access.yaml, namespaces, quotas,
KubeRay's schemas, names that are taken. What becomes of a RayJob a test writes as a generator, a step for each look
that the client takes at it, so nothing here waits for a time.
"""

from __future__ import annotations

import copy
import json
import threading
import uuid
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlparse

import yaml

from tests.kubernetes.schemas import problems

NAMESPACE, TOKEN = "k5dist", "a-login-of-the-tests"
ACCESS = Path(__file__).parents[2] / "k8s" / "base" / "access.yaml"
Script = Callable[["Cluster", dict[str, Any]], Iterator[None]]
_VERBS = {"POST": "create", "PATCH": "patch", "DELETE": "delete", "GET": "get"}


def role() -> set[tuple[str, str]]:
    """(resource, verb) of the submitter's role."""
    (found,) = [document for document in yaml.safe_load_all(ACCESS.read_text()) if document["kind"] == "Role"]
    return {(r, verb) for rule in found["rules"] for r in rule["resources"] for verb in rule["verbs"]}


class Refused(Exception):
    def __init__(self, code: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.code, self.reason = code, reason


class Cluster:
    """State, and the rules of the server; a context manager."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.rights = role()
        self.asked: set[tuple[str, str]] = set()
        self.groups = {"ray.io": "v1", "kueue.x-k8s.io": "v1beta1"}
        self.queues: list[str] = ["gpus"]
        self.quota: int | None = None  # RayJobs
        self.rayjobs: dict[str, dict[str, Any]] = {}
        self.pods: dict[str, dict[str, Any]] = {}
        self.events: list[dict[str, Any]] = []
        self.logs: dict[str, list[str]] = {}
        self.breaks: set[str] = set()  # pods whose log breaks off once, after its first line
        self.failing = 0  # requests that get 503
        self.created: list[dict[str, Any]] = []
        self.changed = threading.Condition()
        self._steps: dict[str, Iterator[None]] = {}
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    def __enter__(self) -> Cluster:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def kubeconfig(self, folder: Path, token: str = TOKEN) -> Path:
        entry = {"cluster": {"server": self.address}, "name": "tests"}
        user = {"name": "me", "user": {"token": token}}
        context = {"name": "tests", "context": {"cluster": "tests", "user": "me"}}
        body = {"apiVersion": "v1", "kind": "Config", "clusters": [entry], "users": [user], "contexts": [context]}
        file = folder / "kubeconfig"
        file.write_text(yaml.safe_dump({**body, "current-context": "tests"}))
        return file

    # What scripts do.

    def pod(self, job: dict[str, Any], name: str, labels: dict[str, str], **status: Any) -> dict[str, Any]:
        metadata = {
            "name": name,
            "uid": uuid.uuid4().hex,
            "labels": labels,
            "creationTimestamp": f"2026-{len(self.pods)}",
        }
        self.pods[name] = {
            "metadata": metadata,
            "status": {"phase": "Pending", **status},
            "owner": job["metadata"]["uid"],
        }
        return self.pods[name]

    def ray_pods(self, job: dict[str, Any], **status: Any) -> None:
        """Head and workers of the job's Ray cluster, as many as it asks for."""
        cluster = f"{job['metadata']['name']}-abcde"
        job["status"]["rayClusterName"] = cluster
        labels = {"ray.io/cluster": cluster}
        self.pod(job, f"{cluster}-head", labels, **status)
        for i in range(job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["replicas"]):
            self.pod(job, f"{cluster}-workers-{i}", labels, **status)

    def warn(self, name: str, uid: str, reason: str, message: str) -> None:
        event = {"type": "Warning", "reason": reason, "message": message}
        self.events.append({**event, "involvedObject": {"name": name, "uid": uid}})

    def log(self, pod: str, *lines: str) -> None:
        with self.changed:
            self.logs.setdefault(pod, []).extend(lines)
            self.changed.notify_all()

    # What the server does.

    def authorise(self, token: str, resource: str, verb: str) -> None:
        if token != f"Bearer {TOKEN}":
            raise Refused(401, "Unauthorized", "Unauthorized")
        if (resource, verb) not in self.rights:
            message = (
                f'{resource} is forbidden: User "me" cannot {verb} resource "{resource}" in namespace "{NAMESPACE}"'
            )
            raise Refused(403, "Forbidden", message)
        self.asked.add((resource, verb))

    def create(self, namespace: str, body: dict[str, Any]) -> dict[str, Any]:
        if namespace != NAMESPACE:
            raise Refused(404, "NotFound", f'namespaces "{namespace}" not found')
        name = body["metadata"]["name"]
        if found := problems(body):
            raise Refused(422, "Invalid", f'RayJob.ray.io "{name}" is invalid: {found[0]}')
        if self.quota is not None and len(self.rayjobs) >= self.quota:
            said = f"requested: count/rayjobs.ray.io=1, used: {self.quota}, limited: {self.quota}"
            raise Refused(403, "Forbidden", f'rayjobs.ray.io "{name}" is forbidden: exceeded quota: jobs, {said}')
        if name in self.rayjobs:
            raise Refused(409, "AlreadyExists", f'rayjobs.ray.io "{name}" already exists')
        job = copy.deepcopy(body)
        job["metadata"]["uid"] = uuid.uuid4().hex
        job["status"] = {}
        self.rayjobs[name] = job
        self.created.append(copy.deepcopy(job))
        self._steps[job["metadata"]["uid"]] = self.script(self, job)
        return job

    def get(self, name: str) -> dict[str, Any]:
        job = self._known(name)
        answer = copy.deepcopy(job)
        if "deletionTimestamp" in job["metadata"]:  # foreground: what it owns goes first, then it does
            owned = [pod for pod, body in self.pods.items() if body["owner"] == job["metadata"]["uid"]]
            if not owned:
                del self.rayjobs[name]
            for pod in owned:
                self.end(pod)
        else:
            next(self._steps[job["metadata"]["uid"]], None)
        return answer

    def end(self, pod: str) -> None:
        with self.changed:
            del self.pods[pod]
            self.changed.notify_all()

    def delete(self, name: str, options: dict[str, Any]) -> dict[str, Any]:
        job = self._known(name)
        wanted = options.get("preconditions", {}).get("uid")
        if wanted and wanted != job["metadata"]["uid"]:
            raise Refused(409, "Conflict", "Precondition failed: UID in precondition")
        assert options.get("propagationPolicy") == "Foreground"
        job["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
        return job

    def patch(self, name: str, body: dict[str, Any]) -> dict[str, Any]:
        job = self._known(name)
        job["spec"] |= body["spec"]
        if found := problems({key: value for key, value in job.items() if key != "status"}):
            raise Refused(422, "Invalid", found[0])
        if job["spec"]["suspend"]:
            job["status"]["jobDeploymentStatus"] = "Suspended"
            for pod in [pod for pod, state in self.pods.items() if state["owner"] == job["metadata"]["uid"]]:
                self.end(pod)
        return job

    def _known(self, name: str) -> dict[str, Any]:
        if name not in self.rayjobs:
            raise Refused(404, "NotFound", f'rayjobs.ray.io "{name}" not found')
        return self.rayjobs[name]


def _handler(cluster: Cluster) -> type[BaseHTTPRequestHandler]:
    class Handler(_Handler):
        pass

    Handler.cluster = cluster
    return Handler


class _Handler(BaseHTTPRequestHandler):
    cluster: Cluster
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # an answer in two writes would wait for the client's delayed acknowledgement

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self._serve()

    do_POST = do_PATCH = do_DELETE = do_GET

    def _serve(self) -> None:
        url = urlparse(self.path)
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        length = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(length)) if length else {}
        try:
            if self.cluster.failing:
                self.cluster.failing -= 1
                raise Refused(503, "ServiceUnavailable", "the server is currently unable to handle the request")
            parts = url.path.strip("/").split("/")
            if parts[-1] == "log":
                self._log(parts[-2])
                return
            with self.cluster.changed:
                answer = self._answer(parts, query, body)
                self.cluster.changed.notify_all()  # a script may have ended a pod whose log is read
            self._send(200, answer)
        except Refused as refused:
            status = {"apiVersion": "v1", "kind": "Status", "status": "Failure", "reason": refused.reason}
            self._send(refused.code, {**status, "message": str(refused), "code": refused.code})

    def _answer(self, parts: list[str], query: dict[str, str], body: dict[str, Any]) -> dict[str, Any]:
        cluster, token = self.cluster, self.headers.get("Authorization", "")
        if parts == ["apis"]:
            if token != f"Bearer {TOKEN}":
                raise Refused(401, "Unauthorized", "Unauthorized")
            groups = [{"name": n, "preferredVersion": {"version": v}} for n, v in cluster.groups.items()]
            return {"kind": "APIGroupList", "groups": groups}
        at = parts.index("namespaces")
        namespace, resource, name = parts[at + 1], parts[at + 2], parts[at + 3] if len(parts) > at + 3 else None
        verb = "list" if self.command == "GET" and name is None else _VERBS[self.command]
        cluster.authorise(token, resource, verb)
        if resource == "rayjobs" and parts[1:3] == ["ray.io", "v1"]:
            return self._rayjobs(namespace, verb, name or "", body)
        if resource == "localqueues" and cluster.groups.get(parts[1]) == parts[2]:
            if verb == "list":
                return {"items": [{"metadata": {"name": queue}} for queue in cluster.queues]}
            if name not in cluster.queues:
                raise Refused(404, "NotFound", f'localqueues.kueue.x-k8s.io "{name}" not found')
            return {"metadata": {"name": name}}
        if resource == "pods":
            key, _, value = query["labelSelector"].partition("=")
            return {"items": [pod for pod in cluster.pods.values() if pod["metadata"]["labels"].get(key) == value]}
        if resource == "events":
            wanted = dict(term.split("=") for term in query["fieldSelector"].split(","))
            named = [e for e in cluster.events if e["involvedObject"]["name"] == wanted["involvedObject.name"]]
            return {"items": [event for event in named if event["type"] == wanted["type"]]}
        raise Refused(404, "NotFound", "the server could not find the requested resource")

    def _rayjobs(self, namespace: str, verb: str, name: str, body: dict[str, Any]) -> dict[str, Any]:
        if verb == "create":
            return self.cluster.create(namespace, body)
        if verb == "delete":
            return self.cluster.delete(name, body)
        return self.cluster.patch(name, body) if verb == "patch" else self.cluster.get(name)

    def _send(self, code: int, answer: dict[str, Any]) -> None:
        data = json.dumps(answer).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _log(self, pod: str) -> None:
        """The pod's lines as they come, until it has ended; broken off where a test wants that."""
        cluster = self.cluster
        cluster.authorise(self.headers.get("Authorization", ""), "pods/log", "get")
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        sent = 0
        while True:
            with cluster.changed:
                while len(cluster.logs.get(pod, [])) <= sent and not _ended(cluster, pod):
                    if not cluster.changed.wait(20):
                        return
                fresh = cluster.logs.get(pod, [])[sent:]
                ended = _ended(cluster, pod)
            for line in fresh:
                data = (line + "\n").encode()
                self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
                sent += 1
                if pod in cluster.breaks:
                    cluster.breaks.remove(pod)
                    self.close_connection = True
                    return  # without the last chunk: the connection is lost
            if ended:
                self.wfile.write(b"0\r\n\r\n")
                return


def _ended(cluster: Cluster, pod: str) -> bool:
    return pod not in cluster.pods or cluster.pods[pod]["status"]["phase"] in ("Succeeded", "Failed")
