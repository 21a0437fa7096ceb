"""What a user can get wrong is said in one block before anything is started: exit status 2, and no run begun."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from k5dist.launch import EXIT_CONFIG, compose, launch


def refused(capsys: pytest.CaptureFixture[str], root: Path, *overrides: str) -> str:
    """The error block of a launch that must be refused."""
    before = set(root.rglob("*")) if root.exists() else set()
    status = launch(compose(["+flavour=t2v-tiny", f"storage.root={root}", *overrides]))
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


@pytest.mark.parametrize(
    "overrides",
    [
        ["cluster=slurm"],
        ["cluster=kubernetes"],
        ["parallel.context=2"],
        ["model.attention_type=nabla", "model.attention_P=0.9", "data.resolution=[1024,1024]", "data.num_frames=121"],
    ],
)
def test_what_is_planned_but_does_not_run_yet(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, overrides: list[str]
) -> None:
    assert "this release" in refused(capsys, tmp_path / "root", *overrides)
