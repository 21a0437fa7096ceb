"""What a user can get wrong is said in one block before anything is started: exit status 2, and no run begun."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from k5dist.compose import compose, to_run_config
from k5dist.fit import refuse_unfinished
from k5dist.launch import EXIT_CONFIG, launch
from k5dist.plan import ClusterFacts, RunPlan, make_plan


def refused(capsys: pytest.CaptureFixture[str], root: Path, *overrides: str, flavour: str = "+flavour=t2v-tiny") -> str:
    """The error block of a launch that must be refused."""
    before = set(root.rglob("*")) if root.exists() else set()
    status = launch(compose([flavour, f"storage.root={root}", *overrides]))
    error = capsys.readouterr().err
    assert status == EXIT_CONFIG, error
    assert error.startswith("Configuration error"), error
    assert [line.split()[0] for line in error.splitlines()[1:]] == ["key", "value", "rule", "fix"]
    assert (set(root.rglob("*")) if root.exists() else set()) == before, "nothing is begun"
    return error


def clips(folder: Path, *names: str, captions: bool = True) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"not looked at before the rules")
        if captions:
            (folder / name).with_suffix(".txt").write_text("a clip")
    return folder


def test_a_missing_checkpoint_folder(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    lite = ["+flavour=t2v-lite-sft-5s", "cluster.gpus_per_node=1", f"storage.root={tmp_path}", "data.source=x"]
    assert launch(compose([*lite, f"pretrained={tmp_path}/none"])) == EXIT_CONFIG
    assert "pretrained" in capsys.readouterr().err


def test_a_folder_that_is_no_checkpoint(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    lite = ["+flavour=t2v-lite-sft-5s", "cluster.gpus_per_node=1", f"storage.root={tmp_path}", "data.source=x"]
    assert launch(compose([*lite, f"pretrained={tmp_path}"])) == EXIT_CONFIG
    assert "model_index.json" in capsys.readouterr().err


def test_data_that_is_not_there(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "data.source" in refused(capsys, tmp_path / "root", f"data.source={tmp_path}/none")


def test_no_data_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "data.source" in refused(capsys, tmp_path / "root", "data.source=null")


def test_an_empty_dataset(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    assert "empty" in refused(capsys, tmp_path / "root", f"data.source={tmp_path}/data")


def test_a_captionless_dataset(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    data = clips(tmp_path / "data", "a.mp4", "b.mp4", captions=False)
    assert "caption" in refused(capsys, tmp_path / "root", f"data.source={data}")


def test_a_batch_that_no_bucket_can_fill(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    data = clips(tmp_path / "data", "a.mp4", "b.mp4", "c.mp4")
    assert "train.batch_size" in refused(capsys, tmp_path / "root", f"data.source={data}")


def test_an_unreachable_bucket(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("ENDPOINT_URL", "http://127.0.0.1:9"), ("ACCESS_KEY_ID", "k"), ("SECRET_ACCESS_KEY", "s")):
        monkeypatch.setenv(f"AWS_{name}", value)
    assert launch(compose(["+flavour=t2v-tiny", "storage.root=s3://none/root"])) == EXIT_CONFIG
    assert "storage.root" in capsys.readouterr().err


def test_an_unwritable_root(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    assert "storage.root" in refused(capsys, tmp_path / "file" / "root")


def test_a_folder_that_belongs_to_another_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    first = ["+flavour=t2v-tiny", f"storage.root={tmp_path}", "name=mine"]
    assert launch(compose([*first, "stages=[plan]"])) == 0
    assert "another name" in refused(capsys, tmp_path, "name=mine", "optimizer.lr=1e-3")


def test_planning_keeps_the_plan_of_a_run_under_way(tmp_path: Path) -> None:
    plan = ["+flavour=t2v-tiny", f"storage.root={tmp_path}", "name=mine", "stages=[plan]"]
    assert launch(compose(plan)) == 0
    stored = tmp_path / "runs" / "mine" / "plan.json"
    stored.write_text(stored.read_text().replace('"plan"', '"train"'))
    assert launch(compose(plan)) == 0
    assert '"train"' in stored.read_text()
    shutil.rmtree(tmp_path / "runs")


def test_a_single_run_has_nothing_to_overlap(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "single run" in refused(capsys, tmp_path / "root", "cluster.overlap=true")


def test_long_sparse_clips_on_a_cpu(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    large = ["data.resolution=[1024,1024]", "data.num_frames=61"]
    error = refused(capsys, tmp_path / "root", *large, flavour="+flavour=t2v-tiny-nabla")
    assert "65,536 tokens" in error
    assert "CPU" in error


def plan_of(*overrides: str, gpus: int) -> RunPlan:
    return make_plan(to_run_config(compose(list(overrides))), ClusterFacts(gpus, "NVIDIA H200"), "weights")


def test_sparse_and_shared_clips_run_on_gpus() -> None:
    refuse_unfinished(plan_of("+flavour=t2v-pro-sft-10s-hd", "parallel.context=2", gpus=2))
    refuse_unfinished(plan_of("+flavour=t2v-tiny-nabla", "parallel.context=2", gpus=0))


def gpus_here(monkeypatch: pytest.MonkeyPatch, count: int, name: str = "NVIDIA H200") -> None:
    monkeypatch.setattr("k5dist.hardware._local_gpus", lambda: (name, count))


def test_a_run_that_its_gpus_cannot_hold(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus_here(monkeypatch, 2)
    large = ["data.resolution=[768,1280]", f"data.source={clips(tmp_path / 'data', 'a.mp4')}"]
    error = refused(capsys, tmp_path / "root", *large, flavour="+flavour=t2v-pro-sft-10s-hd")
    assert "parallel.context=2" in error
    assert "140.4 (NVIDIA H200)" in error


def test_a_plan_for_gpus_of_no_known_kind_says_its_doubt(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus_here(monkeypatch, 0, "")
    overrides = ["+flavour=t2v-pro-sft-10s-hd", "cluster.gpus_per_node=2", "stages=[plan]", f"storage.root={tmp_path}"]
    assert launch(compose(overrides)) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "MORE MEMORY THAN THE GPU HAS" in shown
    assert "all 60 blocks from their inputs (auto)" in shown


def test_the_plan_shows_what_is_kept_and_what_it_takes(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus_here(monkeypatch, 2)
    overrides = ["+flavour=t2v-pro-sft-5s-hd", "data.resolution=[512,768]", "stages=[plan]", f"storage.root={tmp_path}"]
    assert launch(compose(overrides)) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert re.search(
        r"recompute matrix products kept in \d+, attention outputs kept in \d+ of 60 blocks \(auto\)", shown
    )
    assert re.search(r"memory a GPU about [\d.]+ of 140.4 GiB \(weights 20.4, gradients .*runtime", shown)
