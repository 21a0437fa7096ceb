"""The main job on this machine: Ray, torchrun with two workers, FSDP2, MLflow; once whole, and through mishaps."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import psutil
import pytest
import safetensors.torch
from mlflow import MlflowClient

from k5dist import storage
from k5dist.cache import layout
from k5dist.cache.shards import ShardStore
from k5dist.plan import RunPlan
from k5dist.precache.video import decode_clip, probe
from k5dist.train.checkpoint import committed_steps
from k5dist.train.history import LossHistory
from tests.cluster import job as jobs
from tests.cluster.job import SHORT, Job

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("main-job")


@pytest.fixture(scope="module")
def finished(root: Path) -> Job:
    """The undisturbed run that the others are compared with."""
    job = jobs.run(root, *SHORT, "name=whole")
    assert job.process.returncode == 0, job.output
    return job


def plan_of(root: Path, name: str) -> RunPlan:
    return RunPlan.from_json((root / "runs" / name / "plan.json").read_text())


def sample_store(plan: RunPlan) -> ShardStore:
    return layout.samples(plan.cache_uri)


def test_every_stage_leaves_its_artifact(finished: Job, root: Path) -> None:
    plan, run = plan_of(root, "whole"), root / "runs" / "whole"
    table = sample_store(plan).index()
    assert table.num_rows == 14
    assert {len(t) for t in table.column("tensors").to_pylist()} == {2}
    history = LossHistory.read(plan)
    assert sorted(history.losses) == [6, 12]
    # The newest two, and the best of those validated.
    assert committed_steps(plan.checkpoints_uri, plan.run_fingerprint) == sorted({8, 12, history.best_step or 12})
    lora = safetensors.torch.load_file(run / "export" / "pytorch_lora_weights.safetensors")
    assert any(key.endswith("lora_B.weight") and value.abs().sum() > 0 for key, value in lora.items())
    assert json.loads((run / "export" / "export.json").read_text())["error"] < 1e-3
    for step in ("step-00000006", "step-00000012"):
        with (run / "validation" / step / "00.mp4").open("rb") as file:
            assert (probe(file).width, probe(file).height) == (96, 64)
            assert len(decode_clip(file, start=0, end=None, num_frames=17, frame_rate=12, height=64, width=96)) == 17
        with (run / "validation" / step / "00-side.mp4").open("rb") as file:
            assert (probe(file).width, probe(file).height) == (192, 64), "the base beside the trained model"
    assert len(list((run / "validation" / "base").glob("*.mp4"))) == 1


def test_the_mlflow_run_tells_the_whole_story(finished: Job, root: Path) -> None:
    run = jobs.the_run(root, "whole")
    client = MlflowClient(f"sqlite:///{root}/mlflow.db")
    assert run.info.status == "FINISHED"
    assert sorted(jobs.losses(root, run.info.run_id)) == list(range(1, 13))
    metrics = set(run.data.metrics)
    assert {
        "grad_norm",
        "lr",
        "tokens_per_second",
        "data_wait_share",
        "memory_gib",
        "validation/loss",
        "validation/best_loss",
        "validation/motion",
        "validation/flicker",
        "validation/base/motion",
        "export/error",
    } <= metrics
    assert [m.step for m in client.get_metric_history(run.info.run_id, "validation/loss")] == [0, 6, 12]
    assert run.data.params["train.steps"] == "12"
    # Nine captions over fourteen clips, the empty prompt and the negative one; the validation prompt is a caption.
    assert run.data.metrics["precache/captions_encoded"] == 11
    top = {artifact.path for artifact in client.list_artifacts(run.info.run_id)}
    assert {"config.yaml", "plan.json", "videos", "export", "logs", "export.json"} <= top
    videos = {a.path for a in client.list_artifacts(run.info.run_id, "videos")}
    assert videos == {"videos/step-00000006", "videos/step-00000012"}
    shown = [a.path.rsplit("/", 1)[-1] for a in client.list_artifacts(run.info.run_id, "videos/step-00000012")]
    assert shown == ["00-side.mp4", "00.mp4"]
    held_out = {m.step: m.value for m in client.get_metric_history(run.info.run_id, "validation/loss") if m.step}
    assert run.data.tags["best_step"] == str(min(held_out, key=lambda step: held_out[step]))


def test_again_nothing_is_encoded_or_trained(finished: Job, root: Path) -> None:
    files = storage.find(str(root / "cache"))
    before = {name: info["mtime"] for name, info in files.items() if name.endswith(".safetensors")}
    job = jobs.run(root, *SHORT, "name=whole")
    assert job.process.returncode == 0, job.output
    assert "clips: all 14 are in the cache, nothing to encode" in job.output
    assert "captions: all" in job.output
    assert "nothing to train" in job.output
    after = storage.find(str(root / "cache"))
    assert {name: info["mtime"] for name, info in after.items() if name.endswith(".safetensors")} == before


def test_killed_at_any_moment_the_same_command_finishes_it(finished: Job, root: Path) -> None:
    command = (*SHORT, "name=killed", "stages=[plan,precache,train]")
    job = jobs.start(root, *command)
    jobs.wait_for_file(job, root / "runs" / "killed" / "checkpoints" / "step-00000004" / "COMMITTED")
    jobs.kill_all(job, str(root / "runs" / "killed"))
    again = jobs.run(root, *command)
    assert again.process.returncode == 0, again.output
    assert "resumed from the checkpoint of step" in again.output
    killed, whole = jobs.the_run(root, "killed"), jobs.the_run(root, "whole")
    assert killed.info.status == "FINISHED"
    assert jobs.losses(root, killed.info.run_id) == jobs.losses(root, whole.info.run_id)


def test_a_killed_worker_is_replaced_and_the_losses_are_the_same(finished: Job, root: Path) -> None:
    job = jobs.start(root, *SHORT, "name=worker-lost", "stages=[plan,precache,train]")
    job.wait_for(jobs.trained_to(5))
    workers = [p for p in psutil.process_iter(["cmdline"]) if _is_worker(p, root / "runs" / "worker-lost")]
    assert len(workers) == 2
    workers[1].kill()
    assert job.wait() == 0, job.output
    assert "restart 1 from the newest checkpoint" in job.output
    lost, whole = jobs.the_run(root, "worker-lost"), jobs.the_run(root, "whole")
    assert jobs.losses(root, lost.info.run_id) == jobs.losses(root, whole.info.run_id)


def _is_worker(process: psutil.Process, run: Path) -> bool:
    command = process.info["cmdline"] or []
    return f"{run}/plan.json" in command and "torch.distributed.run" not in command


def test_a_killed_driver_takes_its_workers_with_it(finished: Job, root: Path) -> None:
    job = jobs.start(root, *SHORT, "name=orphans", "stages=[plan,precache,train]", "train.steps=100000")
    job.wait_for(jobs.trained_to(1))
    job.signal(signal.SIGKILL)
    jobs.wait_until_nothing_runs(str(root / "runs" / "orphans"), seconds=20)


def test_ctrl_c_leaves_a_checkpoint_and_nothing_running(finished: Job, root: Path) -> None:
    endless = ("stages=[plan,precache,train]", "checkpoint.every=1000000", "train.steps=100000")
    job = jobs.start(root, *SHORT, "name=interrupted", *endless)
    job.wait_for(jobs.trained_to(1))
    job.signal(signal.SIGINT)
    assert job.wait() == 130, job.output
    plan = plan_of(root, "interrupted")
    (step,) = committed_steps(plan.checkpoints_uri, plan.run_fingerprint)
    assert 1 <= step < 100_000
    assert jobs.the_run(root, "interrupted").info.status == "KILLED"
    jobs.wait_until_nothing_runs(str(root / "runs" / "interrupted"), seconds=10)


def test_a_failed_run_is_marked_with_its_traceback(finished: Job, root: Path) -> None:
    job = jobs.run(root, *SHORT, "name=failed", "stages=[plan,precache,train]", "optimizer.lr=1e30")
    assert job.process.returncode == 1, job.output
    run = jobs.the_run(root, "failed")
    assert run.info.status == "FAILED"
    client = MlflowClient(f"sqlite:///{root}/mlflow.db")
    text = Path(client.download_artifacts(run.info.run_id, "traceback.txt", str(root))).read_text()
    assert "FloatingPointError" in text
    jobs.wait_until_nothing_runs(str(root / "runs" / "failed"), seconds=10)
