"""What a submission asks of a Kubernetes API server, by the official client, and what the server's refusals mean."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from k5dist.config import ConfigError, KubernetesConfig

_GROUP, _VERSION, _PLURAL = "ray.io", "v1", "rayjobs"
_QUEUE_GROUP = "kueue.x-k8s.io"
_TIMEOUT = (10.0, 30.0)  # seconds to connect, and to be answered
_LOG_TIMEOUT = (10.0, 300.0)  # between two lines of a log
_NOT_FOUND, _CONFLICT = 404, 409


class Unreachable(Exception):
    """The API server did not answer, or not well: it may do so later."""


class Exists(Exception):
    """An object of that name is there already."""


class Api:
    """One namespace of one cluster. Objects are plain dicts, as the server writes them.

    Raises (all methods):
        ConfigError: where the server refuses; Unreachable: where it does not answer.
    """

    def __init__(self, kubernetes: KubernetesConfig) -> None:
        try:
            from kubernetes import client
        except ImportError as error:
            rule = "submitting to Kubernetes needs its Python client"
            raise ConfigError("cluster", "kubernetes", rule, "pip install -e '.[kubernetes]' in the clone") from error
        self.kubernetes, self.namespace = kubernetes, kubernetes.namespace
        configuration = _configuration(kubernetes)
        configuration.retries = 1
        self.address = configuration.host
        self._client = client.ApiClient(configuration)
        self._core, self._apis = client.CoreV1Api(self._client), client.ApisApi(self._client)
        self._objects = client.CustomObjectsApi(self._client)

    def check(self, queue: str | None) -> None:
        """Raises ConfigError where the server, KubeRay or Kueue's queue is not there."""
        try:
            answer = self._json(self._apis.get_api_versions)
        except Unreachable as error:
            fix = "`kubectl cluster-info` shows the address; set kubernetes.context or kubernetes.kubeconfig"
            raise ConfigError("kubernetes.context", self.kubernetes.context, str(error), fix) from error
        groups = {group["name"]: group["preferredVersion"]["version"] for group in answer.get("groups", [])}
        if _GROUP not in groups:
            raise self._no_kuberay()
        if queue is None:
            return
        if _QUEUE_GROUP not in groups:
            rule = "Kueue holds the queues, and this cluster does not have it"
            raise ConfigError("kubernetes.queue", queue, rule, "kubernetes.queue=null, or install Kueue")
        place = (_QUEUE_GROUP, groups[_QUEUE_GROUP], self.namespace, "localqueues")
        if self._find(self._objects.get_namespaced_custom_object, *place, queue) is None:
            found = self._json(self._objects.list_namespaced_custom_object, *place)
            names = ", ".join(item["metadata"]["name"] for item in found["items"]) or "none"
            rule = f"no such local queue in namespace {self.namespace} (there: {names})"
            raise ConfigError("kubernetes.queue", queue, rule, "name one of these, or kubernetes.queue=null")

    def create(self, rayjob: dict[str, Any]) -> dict[str, Any]:
        """Raises Exists, too, where one of that name is there."""
        create = self._objects.create_namespaced_custom_object
        return self._json(create, _GROUP, _VERSION, self.namespace, _PLURAL, rayjob)

    def get(self, name: str) -> dict[str, Any] | None:
        return self._find(self._objects.get_namespaced_custom_object, _GROUP, _VERSION, self.namespace, _PLURAL, name)

    def delete(self, name: str, uid: str) -> None:
        """Delete it and, before it, what it has made. One that has gone, or is another by now, is left alone."""
        options = {"propagationPolicy": "Foreground", "preconditions": {"uid": uid}}
        delete = self._objects.delete_namespaced_custom_object
        try:
            self._find(delete, _GROUP, _VERSION, self.namespace, _PLURAL, name, body=options)
        except Exists:  # the server's word for a precondition that does not hold
            return

    def suspend(self, name: str) -> None:
        patch = self._objects.patch_namespaced_custom_object
        self._find(patch, _GROUP, _VERSION, self.namespace, _PLURAL, name, {"spec": {"suspend": True}})

    def pods(self, selector: str) -> list[dict[str, Any]]:
        return self._json(self._core.list_namespaced_pod, self.namespace, label_selector=selector)["items"]

    def warnings(self, name: str) -> list[dict[str, Any]]:
        """Events of type Warning on the object of that name."""
        selector = f"involvedObject.name={name},type=Warning"
        return self._json(self._core.list_namespaced_event, self.namespace, field_selector=selector)["items"]

    def log(self, pod: str) -> Iterator[str]:
        """The pod's log, line by line as it comes; ends with the pod's container, or with the connection."""
        from urllib3.exceptions import HTTPError

        read = self._core.read_namespaced_pod_log
        response = self._call(read, pod, self.namespace, follow=True, _request_timeout=_LOG_TIMEOUT)
        pending = b""
        try:
            for piece in response.stream(amt=None, decode_content=True):
                *lines, pending = (pending + piece).split(b"\n")
                yield from (line.decode(errors="replace") for line in lines)
        except (HTTPError, OSError) as error:
            raise self._silent(error) from error
        finally:
            response.release_conn()
        if pending:
            yield pending.decode(errors="replace")

    def _find(self, call: Any, *arguments: Any, **options: Any) -> dict[str, Any] | None:
        try:
            return self._json(call, *arguments, **options)
        except _Missing:
            return None

    def _json(self, call: Any, *arguments: Any, **options: Any) -> Any:
        return json.loads(self._call(call, *arguments, **options).data)

    def _call(self, call: Any, *arguments: Any, **options: Any) -> Any:
        from kubernetes.client.exceptions import ApiException
        from urllib3.exceptions import HTTPError

        try:
            return call(*arguments, **{"_request_timeout": _TIMEOUT, "_preload_content": False, **options})
        except ApiException as error:
            raise self._meaning(error) from error
        except (HTTPError, OSError) as error:
            raise self._silent(error) from error

    def _silent(self, error: BaseException) -> Unreachable:
        return Unreachable(f"the API server {self.address} does not answer ({_reason(error)})")

    def _meaning(self, error: Any) -> Exception:
        """The error that says what to do about the server's answer."""
        said = _message(error.body) or str(error.reason)
        if error.status == _CONFLICT:
            return Exists(said)
        if error.status == _NOT_FOUND and not re.search(r'namespaces? "[^"]+" not found', said):
            where = f"namespace {self.namespace} of {self.address}"
            return _Missing("cluster", "kubernetes", f"not found in {where}: {said}", "see docs/kubernetes.md")
        if error.status == 401:
            fix = "log in again; `kubectl auth whoami` shows who you are to it"
            return ConfigError("kubernetes.context", self.kubernetes.context, f"it does not know you: {said}", fix)
        if error.status == 403 and "exceeded quota" in said:
            rule = "its quota is used up"
            fix = f"ask for less or wait; `kubectl describe quota --namespace {self.namespace}` shows what is used"
        elif error.status == 403:
            rule, fix = "you may not do that there", "have the role k5dist-submitter of k8s/base bound to you there"
        elif error.status == _NOT_FOUND:
            rule = "no such namespace"
            fix = f"kubectl apply -k k8s/overlays/…, kubectl create namespace {self.namespace}, or name another"
        elif error.status in (400, 422):
            rule, fix = f"{self.address} refused the RayJob", "KubeRay 1.5 or newer takes it; see docs/kubernetes.md"
            return ConfigError("cluster", "kubernetes", f"{rule}: {said}", fix)
        else:
            return Unreachable(f"the API server {self.address} answers {error.status}: {said}")
        return ConfigError("kubernetes.namespace", self.namespace, f"{rule}: {said}", fix)

    def _no_kuberay(self) -> ConfigError:
        rule = f"KubeRay's operator makes RayJobs run, and {self.address} does not have it"
        return ConfigError("cluster", "kubernetes", rule, "install it: docs/kubernetes.md, step 1")


class _Missing(ConfigError):
    """The object is not there."""


def _configuration(kubernetes: KubernetesConfig) -> Any:
    """Address and credentials: the kubeconfig's, or within a cluster the pod's own."""
    from kubernetes import client, config

    configuration = client.Configuration()
    try:
        try:
            config.load_kube_config(kubernetes.kubeconfig, kubernetes.context, configuration, persist_config=False)
        except config.ConfigException:
            if kubernetes.kubeconfig is not None or kubernetes.context is not None:
                raise
            config.load_incluster_config(configuration)
    except (config.ConfigException, OSError, ValueError) as error:
        key = "kubernetes.context" if kubernetes.context is not None else "kubernetes.kubeconfig"
        fix = "`kubectl config get-contexts` lists what there is; KUBECONFIG or kubernetes.kubeconfig names the file"
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            key, getattr(kubernetes, key.split(".")[1]), f"no usable kubeconfig: {reason}", fix
        ) from error
    return configuration


def _message(body: Any) -> str:
    text = body.decode(errors="replace") if isinstance(body, bytes) else str(body or "")
    try:
        return str(json.loads(text).get("message", ""))
    except (ValueError, AttributeError):
        return text.strip().splitlines()[0][:200] if text.strip() else ""


def _reason(error: BaseException) -> str:
    """The innermost cause in few words: urllib3 wraps it in the addresses of its objects."""
    cause = getattr(error, "reason", None) or error
    return re.sub(r"<[^>]*>:? ?|\(?host='[^']*', port=\d+\)?:? ?", "", str(cause)).strip() or type(cause).__name__
