"""One MLflow run, kept by the driver process: configuration, code state, metrics, artifacts and how it ended.

Only the driver speaks to MLflow; workers send it plain dicts, so that a tracking server sees one client a run. Every
call goes through an explicit client: MLflow's global tracking URI and active run are left alone. Once the run has
begun, tracking never ends training: what cannot be delivered is a warning.
"""

from __future__ import annotations

import hashlib
import http.client
import logging
import os
import re
import shlex
import subprocess
import tempfile
import time
import traceback
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import urlsplit

from k5dist.storage import is_local, normalise
from k5dist.tracking.redact import redact_json, redact_text, redact_uris, redact_value, redact_yaml
from k5dist.tracking.sink import SYSTEM_SECONDS, MetricSink, SystemSampler, safe_key

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

MAX_PARAM_CHARS = 6000
MAX_PARAMS_A_BATCH = 100
MAX_TAG_CHARS = 5000  # 8000 in newer releases
MAX_DIFF_BYTES = 1 << 20
ANSWER_SECONDS = 5
FLUSH_SECONDS = 10.0
CLOSE_SECONDS = 30.0
KILLED_CODES = (130, 143)  # 128 + SIGINT, 128 + SIGTERM

log = logging.getLogger(__name__)


class TrackingUnreachable(Exception):
    """The tracking store cannot be used; the message says which, why and what to do."""


def default_tracking_uri(root: str) -> str:
    """A SQLite store beside the runs; for a root in object storage, which SQLite cannot use, in the user's state."""
    if is_local(root):
        folder, name = Path(normalise(root)), "mlflow.db"
    else:
        folder = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state").absolute() / "k5dist"
        # One store a root: an experiment keeps its artifacts in one place.
        name = f"mlflow-{hashlib.sha256(normalise(root).encode()).hexdigest()[:8]}.db"
    return f"sqlite:///{folder}/{name}"


def check_tracking(uri: str) -> None:
    """Raises TrackingUnreachable where `uri` is no store that can be used now. Makes the folder of a SQLite store."""
    scheme = uri.split(":", 1)[0].split("+", 1)[0]
    if scheme in ("http", "https"):
        _check_server(uri)
    elif scheme == "sqlite":
        _check_sqlite(uri)
    elif scheme not in ("postgresql", "mysql", "mssql", "databricks"):
        fix = "write sqlite:////absolute/path/mlflow.db or http(s)://host:port"
        raise TrackingUnreachable(f"tracking URI {redact_uris(uri)!r} is of no kind that MLflow stores runs in: {fix}")


def _check_server(uri: str) -> None:
    parts = urlsplit(uri)
    address = parts._replace(netloc=parts.netloc.rpartition("@")[2], path=parts.path.rstrip("/") + "/health").geturl()
    try:
        with urllib.request.urlopen(address, timeout=ANSWER_SECONDS):
            return
    except urllib.error.HTTPError as error:
        if error.code < 500:  # it answers; a proxy may well keep /health to itself
            return
        reason: object = f"status {error.code}"
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
    fix = "start the server, mend the URI or leave it out to use a local SQLite store"
    message = f"tracking server {redact_uris(uri)} does not answer within {ANSWER_SECONDS} s ({reason}): {fix}"
    raise TrackingUnreachable(message)


def _check_sqlite(uri: str) -> None:
    path = uri.partition(":///")[2].partition("?")[0]
    if not path or path == ":memory:":
        raise TrackingUnreachable(f"tracking URI {uri!r} names no file: write sqlite:////absolute/path/mlflow.db")
    file = Path(path)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=file.parent):  # SQLite writes a journal beside its file
            pass
        if file.exists():
            with file.open("r+b"):
                pass
    except OSError as error:
        fix = "choose a folder that can be written"
        raise TrackingUnreachable(f"tracking store {uri} cannot be written ({error}): {fix}") from error


def make_client(uri: str) -> MlflowClient:
    """MLflow's client, with MLflow itself told to be quiet; importing it takes seconds, so that happens only here."""
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    os.environ["DO_NOT_TRACK"] = "true"
    defaults = {
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        # MLflow tries each request for four minutes. Metrics are tried again anyway, the rest must not hold an exit.
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    }
    if endpoint := os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"):
        defaults["MLFLOW_S3_ENDPOINT_URL"] = endpoint
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    # After the import, which sets levels of its own: the first start would print 60 lines of table migrations.
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return MlflowClient(tracking_uri=uri)


class TrackedRun:
    """The MLflow run of this process, from `__enter__` (made, or continued under `run_id`) to its end status.

    `artifact_root` is where a newly made experiment keeps its artifacts; a tracking server decides that by itself.
    """

    def __init__(
        self,
        *,
        uri: str,
        experiment: str,
        run_name: str,
        artifact_root: str,
        run_id: str | None,
        tags: Mapping[str, str],
    ) -> None:
        self.uri = uri
        self.run_id = run_id or ""
        self._experiment, self._run_name, self._artifact_root = experiment, run_name, artifact_root
        self._tags = _clean_tags(tags)
        self._sampler: SystemSampler | None = None

    def __enter__(self) -> Self:
        check_tracking(self.uri)
        self._client = make_client(self.uri)
        run = self._continued() or self._started()
        self.run_id, self._experiment_id = run.info.run_id, run.info.experiment_id
        self._sink = MetricSink(self._client, self.run_id)
        self._attempt("sample system metrics", lambda: self._start_sampler(run))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._sampler is not None:
            self._sampler.stop()
        self._sink.close(CLOSE_SECONDS)
        status = _end_status(error)
        if error is not None and status == "FAILED":
            text = redact_text("".join(traceback.format_exception(error)))
            head = redact_text(f"{type(error).__name__}: {error}".splitlines()[0])
            self.log_text(text, "traceback.txt")
            self._attempt("set the error tag", lambda: self._set_tags({"error": head}))
        self._attempt(f"end the run as {status}", lambda: self._client.set_terminated(self.run_id, status))

    @property
    def url(self) -> str:
        """Where a person looks at this run: its page, or for a database the command that serves it."""
        if self.uri.startswith(("http://", "https://")):
            return f"{redact_uris(self.uri).rstrip('/')}/#/experiments/{self._experiment_id}/runs/{self.run_id}"
        return f"mlflow server --backend-store-uri {shlex.quote(redact_uris(self.uri))} --host 127.0.0.1"

    def log_config(self, resolved_yaml: str, plan_json: str, params: Mapping[str, Any]) -> None:
        """Stores what the run was told to do. Raises, unlike the rest: a store that takes nothing shows at the start.

        Parameters that the run has already keep their first value, MLflow never changes one; the artifacts are the
        newest.
        """
        from mlflow.entities import Param

        self._client.log_text(self.run_id, redact_yaml(resolved_yaml), "config.yaml")
        self._client.log_text(self.run_id, redact_json(plan_json), "plan.json")
        texts = {safe_key(key): str(redact_value(key, value))[:MAX_PARAM_CHARS] for key, value in params.items()}
        present = self._client.get_run(self.run_id).data.params
        if changed := sorted(key for key, text in texts.items() if present.get(key, text) != text):
            log.info("parameters changed since the run began (config.yaml has the new ones): %s", ", ".join(changed))
        fresh = [Param(key, text) for key, text in texts.items() if key not in present]
        for start in range(0, len(fresh), MAX_PARAMS_A_BATCH):
            self._client.log_batch(self.run_id, params=fresh[start : start + MAX_PARAMS_A_BATCH], synchronous=True)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Replaces tags of these names; never raises."""
        self._attempt("set tags", lambda: self._set_tags(tags))

    def log_git(self, folder: Path) -> None:
        """Stores commit, branch, whether files differ from it, and the difference; nothing outside a checkout."""
        commit = _git(folder, "rev-parse", "HEAD").strip()
        if not commit:
            return
        tags = {
            "git.commit": commit,
            "mlflow.source.git.commit": commit,  # the column of MLflow's own run table
            "git.branch": _git(folder, "rev-parse", "--abbrev-ref", "HEAD").strip(),
            "git.dirty": str(bool(_git(folder, "status", "--porcelain").strip())).lower(),
        }
        self._attempt("set the git tags", lambda: self._set_tags(tags))
        diff = redact_uris(_git(folder, "diff", "--no-ext-diff", "--no-color", "HEAD"))
        if diff:
            cut = diff.encode()[:MAX_DIFF_BYTES].decode(errors="ignore")
            self.log_text(cut, "git.diff")

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Queues metrics and returns at once; never raises, whatever the store does."""
        self._sink.put(metrics, step)

    def logged_steps(self, metric: str) -> set[int]:
        """Steps at which the store holds a value of `metric`; none where it does not answer."""
        steps: set[int] = set()

        def ask() -> None:
            steps.update(point.step for point in self._client.get_metric_history(self.run_id, metric))

        self._attempt(f"read the history of {metric}", ask)
        return steps

    def log_artifact(self, local: Path, folder: str) -> None:
        """Uploads a file (or a folder with all in it) into the artifact folder `folder`; `""` is the top."""
        self._attempt(f"store {local}", lambda: self._client.log_artifact(self.run_id, str(local), folder or None))

    def log_text(self, text: str, path: str) -> None:
        """Stores `text` as the artifact `path`."""
        self._attempt(f"store {path}", lambda: self._client.log_text(self.run_id, text, path))

    def log_video(self, local: Path, *, step: int, name: str) -> None:
        """Stores a clip as `videos/step-<8 digits>/<name>.mp4`, where a review finds all of one step together."""
        with tempfile.TemporaryDirectory() as folder:
            # An artifact takes the name of its file; a link renames without a copy.
            link = Path(folder) / (re.sub(r"[^\w\-.]", "_", name) + ".mp4")
            link.symlink_to(local.absolute())
            self.log_artifact(link, f"videos/step-{step:08d}")

    def flush(self) -> None:
        """Waits until the metrics so far are in the store, at most 10 s; a server that is away costs no more."""
        self._sink.flush(FLUSH_SECONDS)

    def _continued(self) -> Run | None:
        """The run of an earlier process, running again; None where this store has no such run (any more)."""
        from mlflow.exceptions import MlflowException

        if not self.run_id:
            return None
        try:
            run = self._client.get_run(self.run_id)
        except MlflowException as error:
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise
            run = None
        if run is None or run.info.lifecycle_stage != "active":
            log.warning("run %s is not in %s: a new one begins", self.run_id, redact_uris(self.uri))
            return None
        self._client.update_run(self.run_id, status="RUNNING")
        if "error" in run.data.tags:  # of the end before this one
            self._client.delete_tag(self.run_id, "error")
        self._set_tags(self._tags)
        return run

    def _started(self) -> Run:
        return self._client.create_run(self._open_experiment(), tags=self._tags, run_name=self._run_name)

    def _open_experiment(self) -> str:
        from mlflow.exceptions import MlflowException

        name = self._experiment
        if found := self._client.get_experiment_by_name(name):
            if found.lifecycle_stage != "active":
                fix = f"restore it (mlflow experiments restore -x {found.experiment_id}) or choose another name"
                raise ValueError(f"MLflow experiment {name!r} was deleted: {fix}")
            return found.experiment_id
        location = None if self.uri.startswith(("http://", "https://")) else self._artifact_root
        try:
            return self._client.create_experiment(name, artifact_location=location)
        except MlflowException:
            if found := self._client.get_experiment_by_name(name):  # another run was quicker
                return found.experiment_id
            raise

    def _start_sampler(self, run: Run) -> None:
        started = (run.info.start_time or time.time() * 1000) / 1000
        self._sampler = SystemSampler(
            self._sink, self.uri, self.run_id, node="driver", started=started, seconds=SYSTEM_SECONDS
        )

    def _set_tags(self, tags: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        entities = [RunTag(key, text) for key, text in _clean_tags(tags).items()]
        self._client.log_batch(self.run_id, tags=entities, synchronous=True)

    def _attempt(self, what: str, action: Callable[[], object]) -> None:
        """Tracking is an onlooker: from here on its failures are told and survived."""
        try:
            action()
        except Exception as error:
            log.warning("MLflow: could not %s: %s", what, redact_text(str(error)))


def _clean_tags(tags: Mapping[str, str]) -> dict[str, str]:
    return {safe_key(key): str(redact_value(key, text))[:MAX_TAG_CHARS] for key, text in tags.items()}


def _end_status(error: BaseException | None) -> str:
    code = error.code if isinstance(error, SystemExit) else None
    if error is None or (isinstance(error, SystemExit) and code in (None, 0)):
        return "FINISHED"
    return "KILLED" if isinstance(error, KeyboardInterrupt) or code in KILLED_CODES else "FAILED"


def _git(folder: Path, *arguments: str) -> str:
    """What git says, or nothing where there is no git, no checkout or no commit."""
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.decode(errors="replace")
