"""The MLflow run against a real SQLite store: what arrives, how it ends, what it hides, and that it never blocks."""

from __future__ import annotations

import json
import math
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml

from k5dist.tracking import run as tracking
from k5dist.tracking.parent import join_parent, named_parent
from k5dist.tracking.redact import is_secret_key, redact_text, redact_value
from k5dist.tracking.run import TrackedRun, TrackingUnreachable, check_tracking, default_tracking_uri
from k5dist.tracking.sink import MetricSink, SystemSampler, safe_key


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tracking root") / "runs"  # with a space in its path, as home folders have


@pytest.fixture(scope="module")
def uri(root: Path) -> str:
    """One store for all: a fresh SQLite store takes seconds to make its tables."""
    return default_tracking_uri(str(root))


@pytest.fixture
def workplace(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A current folder of its own, so that a store that writes where it should not is seen."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    assert not (tmp_path / "mlruns").exists()


def tracked(uri: str, root: Path, **changes: Any) -> TrackedRun:
    plain = {"experiment": "clips", "run_name": "first", "run_id": None, "tags": {"flavour": "t2v-tiny"}}
    return TrackedRun(uri=uri, artifact_root=str(root / "mlartifacts"), **{**plain, **changes})


def client(uri: str) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)


def artifact(root: Path, run: TrackedRun, path: str) -> Path:
    return root / "mlartifacts" / run.run_id / "artifacts" / path


def dead_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


def test_import_leaves_mlflow_out() -> None:
    code = "import sys, k5dist.tracking.run; sys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_metrics_arrive_complete_and_in_order(uri: str, root: Path, workplace: Path) -> None:
    with tracked(uri, root) as run:
        begun = time.monotonic()
        for step in range(700):
            run.log_metrics({"loss": 1 / (step + 1), "grad_norm@all": float(step)}, step)
        assert time.monotonic() - begun < 1, "queueing must not wait for the store"
        run.log_metrics({"odd/nan": math.nan, "odd/inf": math.inf, "odd/none": None}, 700)  # type: ignore[dict-item]
        run.flush()
        history = client(uri).get_metric_history(run.run_id, "loss")
        assert [(metric.step, metric.value) for metric in history] == [(step, 1 / (step + 1)) for step in range(700)]
        assert len(client(uri).get_metric_history(run.run_id, "grad_norm_all")) == 700
        values = client(uri).get_run(run.run_id).data.metrics
        assert math.isnan(values["odd/nan"])
        assert values["odd/inf"] > 1e308
        assert "odd/none" not in values
        assert f"--backend-store-uri 'sqlite:///{root}/mlflow.db'" in run.url
    ended = client(uri).get_run(run.run_id)
    assert ended.info.status == "FINISHED"
    assert ended.data.tags["flavour"] == "t2v-tiny"


def test_leaving_delivers_what_was_never_flushed(uri: str, root: Path, workplace: Path) -> None:
    with tracked(uri, root) as run:
        run.log_metrics({"loss": 0.5}, 1)
    assert client(uri).get_run(run.run_id).data.metrics == {"loss": 0.5}


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (KeyboardInterrupt(), "KILLED"),
        (SystemExit(130), "KILLED"),
        (SystemExit(0), "FINISHED"),
        (SystemExit(2), "FAILED"),
    ],
)
def test_exits(uri: str, root: Path, error: BaseException, status: str) -> None:
    run = tracked(uri, root)
    with pytest.raises(type(error)), run:
        raise error
    assert client(uri).get_run(run.run_id).info.status == status
    assert artifact(root, run, "traceback.txt").exists() == (status == "FAILED")


def test_failure_leaves_its_traceback_and_a_resume_clears_it(uri: str, root: Path, workplace: Path) -> None:
    run = tracked(uri, root)

    def train() -> None:
        with run:
            run.log_metrics({"loss": 1.0}, 1)
            raise RuntimeError("no space on https://me:hunter2@host/x\nsecond line")

    with pytest.raises(RuntimeError):
        train()
    ended = client(uri).get_run(run.run_id)
    assert ended.info.status == "FAILED"
    assert ended.data.tags["error"] == "RuntimeError: no space on https://***@host/x"
    assert ended.data.metrics == {"loss": 1.0}
    text = artifact(root, run, "traceback.txt").read_text()
    assert "in train\n    raise RuntimeError" in text
    assert "hunter2" not in text
    with tracked(uri, root, run_id=run.run_id) as again:
        assert client(uri).get_run(again.run_id).info.status == "RUNNING"
    ended = client(uri).get_run(run.run_id)
    assert (ended.info.status, "error" in ended.data.tags) == ("FINISHED", False)


def test_resume_continues_the_run(uri: str, root: Path, workplace: Path) -> None:
    with tracked(uri, root) as first:
        first.log_config("lr: 0.1\n", '{"world": 1}', {"lr": 0.1, "long": "x" * 9000})
        first.log_metrics({"loss": 2.0}, 1)
    with tracked(uri, root, run_id=first.run_id, tags={"attempt": "2"}) as second:
        second.log_config("lr: 0.2\n", '{"world": 2}', {"lr": 0.2, "long": "x" * 9000, "new": [1, 2]})
        second.log_metrics({"loss": 1.0}, 2)
    assert second.run_id == first.run_id
    data = client(uri).get_run(first.run_id).data
    assert data.params == {"lr": "0.1", "long": "x" * 6000, "new": "[1, 2]"}
    assert data.tags["attempt"] == "2"
    assert [metric.value for metric in client(uri).get_metric_history(first.run_id, "loss")] == [2.0, 1.0]
    assert artifact(root, first, "config.yaml").read_text() == "lr: 0.2\n"
    assert json.loads(artifact(root, first, "plan.json").read_text()) == {"world": 2}


def test_resume_of_an_unknown_run_starts_a_new_one(uri: str, root: Path) -> None:
    with tracked(uri, root, run_id="0" * 32) as run:
        assert run.run_id != "0" * 32
    client(uri).delete_run(run.run_id)
    with tracked(uri, root, run_id=run.run_id) as other:
        assert other.run_id != run.run_id


def test_runs_that_begin_at_once_find_one_parent(uri: str, root: Path, workplace: Path) -> None:
    client(uri).search_experiments()  # makes the tables of a fresh store
    arguments = {"uri": uri, "experiment": "clips", "artifact_root": str(root / "mlartifacts")}
    assert join_parent(**arguments, parent="an-id") == "an-id"
    with tracked(uri, root):
        named = named_parent("0123456789abcdef", "lr-sweep")
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda _: join_parent(**arguments, parent=named), range(4)))
    assert len(set(found)) == 1
    experiment = client(uri).get_experiment_by_name("clips")
    left = client(uri).search_runs([experiment.experiment_id], "tags.`k5dist.sweep` = '0123456789abcdef'")
    assert [(run.info.run_id, run.info.run_name, run.info.status) for run in left] == [
        (found[0], "lr-sweep", "FINISHED")
    ]
    assert join_parent(**arguments, parent=named) == found[0], "the same sweep again"


def test_secrets_stay_out(uri: str, root: Path, workplace: Path) -> None:
    config = {"storage": {"access_key": "AKIAHIDE", "uri": "postgresql://u:HIDE@db/x"}, "text": {"max_tokens": 256}}
    params = {"storage.secret_key": "HIDE", "hf_token": "HIDE", "max_tokens": 256, "argv": "a=1 +x.password=HIDE b=2"}
    with tracked(uri, root, tags={"db_password": "HIDE", "from": "https://HIDE@hub/x"}) as run:
        run.log_config(yaml.safe_dump(config), json.dumps(config), params)
    data = client(uri).get_run(run.run_id).data
    assert data.params == {
        "storage.secret_key": "***",
        "hf_token": "***",
        "max_tokens": "256",
        "argv": "a=1 +x.password=*** b=2",
    }
    assert (data.tags["db_password"], data.tags["from"]) == ("***", "https://***@hub/x")
    for name, parse in (("config.yaml", yaml.safe_load), ("plan.json", json.loads)):
        text = artifact(root, run, name).read_text()
        assert "HIDE" not in text
        assert parse(text)["text"] == {"max_tokens": 256}


def test_redaction_rules() -> None:
    secret = ("password", "db.passwd", "AWS_SECRET_ACCESS_KEY", "access_key_id", "apiKey", "hf_token", "authToken")
    assert all(is_secret_key(key) for key in secret)
    plain = ("tokenizer", "max_tokens", "token_count", "key", "monkey", "pass_through", "cache_key")
    assert not any(is_secret_key(key) for key in plain)
    assert redact_text("s3://bucket/a@b:c http://host:80/a@b") == "s3://bucket/a@b:c http://host:80/a@b"
    assert redact_text("http://me:p@ss@host/x?X-Amz-Signature=abc&y=1") == "http://***@host/x?X-Amz-Signature=***&y=1"
    assert redact_value("credentials", {"user": "a", "rounds": [1]}) == {"user": "***", "rounds": ["***"]}
    nothing = {"token": None, "secret": "", "eos_token": 7, "use_secret": True}
    assert redact_value("", nothing) == nothing


def test_artifacts(uri: str, root: Path, workplace: Path, caplog: pytest.LogCaptureFixture) -> None:
    clip = workplace / "out.bin"
    clip.write_bytes(b"film")
    with tracked(uri, root) as run:
        run.log_video(clip, step=10, name="a cat/1")
        run.log_artifact(clip, "samples")
        run.log_text("hello", "notes/hello.txt")
        assert not caplog.records
        run.log_artifact(workplace / "absent", "samples")
        assert "could not store" in caplog.text
    assert artifact(root, run, "videos/step-00000010/a_cat_1.mp4").read_bytes() == b"film"
    assert not artifact(root, run, "videos/step-00000010/a_cat_1.mp4").is_symlink()
    assert artifact(root, run, "samples/out.bin").read_bytes() == b"film"
    assert artifact(root, run, "notes/hello.txt").read_text() == "hello"


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_git(uri: str, root: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkout = workplace / "checkout"
    with tracked(uri, root) as run:
        run.log_git(workplace / "absent")
        assert "git.commit" not in client(uri).get_run(run.run_id).data.tags
        setup = "init -q -b main; -c user.name=a -c user.email=a@b commit -q --allow-empty -m one"
        checkout.mkdir()
        for command in setup.split("; "):
            subprocess.run(["git", *command.split()], cwd=checkout, check=True)
        (checkout / "new.txt").write_text("line\n" * 300_000)
        subprocess.run(["git", "add", "."], cwd=checkout, check=True)
        run.log_git(checkout)
        tags = client(uri).get_run(run.run_id).data.tags
        assert (len(tags["git.commit"]), tags["git.branch"], tags["git.dirty"]) == (40, "main", "true")
        diff = artifact(root, run, "git.diff")
        assert "+line" in diff.read_text()
        assert diff.stat().st_size == 1 << 20
        monkeypatch.setenv("PATH", str(workplace))
        run.log_git(checkout)  # no git to be found: nothing happens


def test_a_dead_server_neither_raises_nor_blocks(
    uri: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    sink = MetricSink(client(dead_address().replace("//", "//me:hunter2@")), "0" * 32, capacity=50, interval=0.05)
    begun = time.monotonic()
    for step in range(200):
        sink.put({"loss": 1.0}, step)
    assert time.monotonic() - begun < 0.5
    assert not sink.flush(0.5)
    assert [metric.step for metric in sink._pending] == list(range(150, 200)), "the newest are kept"
    sink.close(0.5)
    assert time.monotonic() - begun < 5
    assert caplog.text.count("cannot be delivered") == 1
    assert caplog.text.count("queue is full") == 1
    assert "50 metric values" in caplog.text
    assert "hunter2" not in caplog.text
    assert {record.name for record in caplog.records} == {"k5dist.tracking.sink"}, "no line for every retry"


def test_an_outage_is_made_up_for(uri: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with tracked(uri, root) as run:
        sink = MetricSink(client(dead_address()), run.run_id, interval=0.05)
        sink.put({"loss": 1.0, "acc": 0.0}, 1)
        assert not sink.flush(0.3)
        sink._client = client(uri)  # the server is back
        sink.put({"loss": 0.5}, 2)
        assert sink.flush(5)
        sink.close(1)
        assert [metric.value for metric in client(uri).get_metric_history(run.run_id, "loss")] == [1.0, 0.5]


def test_what_no_retry_mends_is_dropped(uri: str, root: Path, caplog: pytest.LogCaptureFixture) -> None:
    with tracked(uri, root) as run:
        pass
    client(uri).delete_run(run.run_id)
    sink = MetricSink(client(uri), run.run_id, interval=0.05)
    sink.put({"loss": 1.0}, 1)
    assert sink.flush(5)
    sink.close(1)
    assert "refused and dropped" in caplog.text


def test_system_metrics(uri: str, root: Path) -> None:
    with tracked(uri, root) as run:
        assert run._sampler is not None
        started = time.time() - 100
        sampler = SystemSampler(run._sink, uri, run.run_id, node="driver", started=started, seconds=1)
        time.sleep(1.4)
        sampler.stop()
        run.flush()
        metrics = client(uri).get_run(run.run_id).data.metrics
        assert metrics["system/driver/system_memory_usage_megabytes"] > 0
        (sample,) = client(uri).get_metric_history(run.run_id, "system/driver/cpu_utilization_percentage")
        assert sample.step == 101, "steps count from the start of the run"


def test_default_tracking_uri(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert default_tracking_uri("/data/runs/") == "sqlite:////data/runs/mlflow.db"
    assert default_tracking_uri("file:///data/runs") == "sqlite:////data/runs/mlflow.db"
    assert default_tracking_uri("runs") == f"sqlite:///{tmp_path}/runs/mlflow.db"
    monkeypatch.setenv("XDG_STATE_HOME", "/state")
    store = default_tracking_uri("s3://bucket/runs")
    assert store.startswith("sqlite:////state/k5dist/mlflow-")
    assert store == default_tracking_uri("s3://bucket/runs/") != default_tracking_uri("s3://other/runs")
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert default_tracking_uri("s3://bucket/runs").startswith("sqlite:////home/me/.local/state/k5dist/mlflow-")


def test_check_tracking(tmp_path: Path) -> None:
    check_tracking(default_tracking_uri(str(tmp_path / "new" / "runs")))
    assert (tmp_path / "new" / "runs").is_dir()
    (tmp_path / "file").write_text("")
    with pytest.raises(TrackingUnreachable, match="cannot be written"):
        check_tracking(default_tracking_uri(str(tmp_path / "file")))
    with pytest.raises(TrackingUnreachable, match="does not answer within 5 s") as caught:
        check_tracking(dead_address().replace("//", "//me:hunter2@"))
    assert "hunter2" not in str(caught.value)
    for wrong in ("sqlite://", "/data/mlflow.db", "htp://host", "file:///data"):
        with pytest.raises(TrackingUnreachable, match="sqlite:////absolute"):
            check_tracking(wrong)


def test_check_tracking_gives_up_on_a_silent_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "ANSWER_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        begun = time.monotonic()
        with pytest.raises(TrackingUnreachable):
            check_tracking(f"http://127.0.0.1:{silent.getsockname()[1]}")
        assert time.monotonic() - begun < 3


@pytest.mark.parametrize("name", ["a", "train/loss", "a b-c.d:e"])
def test_good_keys_are_kept(name: str) -> None:
    assert safe_key(name) == name


@pytest.mark.parametrize("name", ["", "/a", "a//b", "../a", ".", "a/", "β@!", "x" * 999])
def test_bad_keys_become_good_ones(name: str) -> None:
    from mlflow.entities import Metric
    from mlflow.utils.validation import _validate_metric

    metric = Metric(safe_key(name), 1.0, 0, 0)
    _validate_metric(metric.key, metric.value, metric.timestamp, metric.step)
    assert len(metric.key) <= 250
