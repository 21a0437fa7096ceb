"""Validation on gangs: the same losses and videos on any number of workers, the best checkpoint, and an early stop."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from k5dist import export, storage
from k5dist.config import ConfigError
from k5dist.plan import RunPlan
from k5dist.train.checkpoint import committed_steps, step_folder
from k5dist.train.history import FILE, LossHistory, is_complete
from k5dist.train.validate import probed_step, read_tensors
from tests.distributed.gangs import Result, assert_close, make_run, train

pytestmark = pytest.mark.timeout(300)

FP32 = 2e-5
# Three prompts on two groups, and held-out clips as uneven.
SETTINGS = ("stages=[train,validate]", "data.held_out=0.3", "validation.every=2", "validation.sampling_steps=1")
SETTINGS += ("validation.prompts=[a red car,clip 1,clip 2]", "checkpoint.keep=1", "optimizer.warmup_steps=0")
SETTINGS += ("validation.num_frames=5", "validation.timesteps=2", "train.batch_size=2")
# Soon worse than at the first validation.
DIVERGING = (*SETTINGS, "optimizer.lr=0.03", "train.steps=12", "validation.patience=2", "validation.compare=[base]")
DIVERGING += ("export.checkpoint=best",)
AVERAGED = (*SETTINGS, "adapter=full", "optimizer.lr=3e-3", "train.steps=4")
EMA = ("ema.enabled=true", "ema.decay=0.7")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("validation")


@pytest.fixture(scope="module")
def runs(root: Path, tiny_t2v: Path) -> list[tuple[RunPlan, Result]]:
    """Adapters on one worker and on two, and all weights."""
    plans = [make_run(root, tiny_t2v, f"on-{n}", *DIVERGING, workers=n) for n in (1, 2)]
    full = make_run(root, tiny_t2v, "full", *SETTINGS, "adapter=full", "train.steps=2", "validation.compare=[base]")
    return list(zip([*plans, full], train(*plans, full), strict=True))


def validations(result: Result) -> dict[int, float]:
    return {event["step"]: event["losses"]["loss"] for event in result.events("validation")}


def latents(plan: RunPlan, folder: str) -> dict[str, torch.Tensor]:
    path = Path(plan.run_uri) / "validation" / folder
    return {file.stem: read_tensors(str(file))["latents"] for file in sorted(path.glob("*.safetensors"))}


def test_two_groups_validate_three_prompts_as_one(runs: list[tuple[RunPlan, Result]]) -> None:
    (one, alone), (two, both), _ = runs
    assert_close(validations(both), validations(alone), 1e-3)  # the learning rate is far too high, by design
    assert validations(both)[0] == pytest.approx(validations(alone)[0], rel=FP32)
    for folder in ("base", step_folder(2)):
        ours, theirs = latents(two, folder), latents(one, folder)
        assert ours.keys() == theirs.keys()
        assert len(ours) == 3
        for name, video in ours.items():
            torch.testing.assert_close(video, theirs[name], rtol=0, atol=1e-2 if folder != "base" else 2e-3)
    (first, *_), videos = both.events("videos"), latents(two, step_folder(2))
    base = [read_tensors(f"{place}.safetensors")["latents"] for place in first["places"]["base"]]
    assert [Path(place).name for place in first["places"]["trained"]] == list(videos)
    for untrained, trained in zip(base, videos.values(), strict=True):
        assert (untrained - trained).abs().max() > 1e-2, "side by side, and different"


def test_the_base_is_sampled_once_and_without_what_is_trained(runs: list[tuple[RunPlan, Result]]) -> None:
    """All weights' base is sampled before the first step, the adapters' with them switched off: the same model."""
    (one, alone), _, (full, _) = runs
    ours, theirs = latents(one, "base"), latents(full, "base")
    assert ours.keys() == theirs.keys()
    for name, video in ours.items():
        torch.testing.assert_close(video, theirs[name], rtol=0, atol=2e-3)
    assert len({tuple(event["places"]["base"]) for event in alone.events("videos")}) == 1


def test_an_average_is_what_is_validated_and_raw_weights_only_beside_it(root: Path, tiny_t2v: Path) -> None:
    """Without `compare` losses and videos are the average's; with it the raw weights', the average's beside them."""
    plain = make_run(root, tiny_t2v, "plain", *AVERAGED)
    alone = make_run(root, tiny_t2v, "averaged", *AVERAGED, *EMA)
    beside = make_run(root, tiny_t2v, "beside", *AVERAGED, *EMA, "validation.compare=[ema]", workers=2)
    (raw, average), (both,) = train(plain, alone), train(beside)
    assert_close(both.losses, raw.losses, 1e-4)
    told = {event["step"]: event["losses"] for event in both.events("validation")}
    assert sorted(told) == [0, 2, 4]
    assert {step: losses["loss"] for step, losses in told.items()} == pytest.approx(validations(raw), rel=1e-4)
    averages = {step: losses["ema/loss"] for step, losses in told.items()}
    assert averages == pytest.approx(validations(average), rel=1e-4)
    assert averages[0] == told[0]["loss"], "before step 1 they are the same"
    assert abs(averages[4] / told[4]["loss"] - 1) > 2e-3, "and later not"
    shown = latents(beside, step_folder(4))
    assert len(shown) == 6
    for name, video in latents(plain, step_folder(4)).items():
        torch.testing.assert_close(shown[name], video, rtol=0, atol=5e-3)
        of_average = latents(alone, step_folder(4))[name]
        torch.testing.assert_close(shown[f"{name}-ema"], of_average, rtol=0, atol=5e-3)
        assert (of_average - video).abs().max() > 3e-2, "each is told from the other"
    places = both.events("videos")[-1]["places"]
    assert [Path(place).name for place in places["ema"]] == [f"{Path(place).name}-ema" for place in places["trained"]]


def test_an_early_stop_keeps_the_best_and_its_export(runs: list[tuple[RunPlan, Result]]) -> None:
    for plan, result in runs[:2]:
        losses = {step: loss for step, loss in validations(result).items() if step}
        best = min(losses, key=lambda step: losses[step])
        stopped = best + 4
        assert max(losses) == stopped < 12, losses
        assert result.events("patience") == [{"kind": "patience", "step": stopped, "best": best}]
        assert result.events("finished")[0]["step"] == stopped == probed_step(plan)
        assert committed_steps(plan.checkpoints_uri, plan.run_fingerprint) == [best, stopped]
        assert is_complete(plan, stopped, stopped)
    plan, _ = runs[0]
    report = export.export_run(plan)
    assert report.step == LossHistory.read(plan).best_step
    assert report.error <= report.tolerance < report.difference_to_base


def test_a_run_cut_off_in_a_validation_goes_on_as_if_it_had_not_been(
    root: Path, tiny_t2v: Path, runs: list[tuple[RunPlan, Result]]
) -> None:
    plan, undisturbed = runs[0]
    again = make_run(root, tiny_t2v, "again", *DIVERGING)
    best = LossHistory.read(plan).best_step
    assert best is not None
    shutil.copytree(Path(plan.checkpoints_uri) / step_folder(best), Path(again.checkpoints_uri) / step_folder(best))
    record = json.loads(Path(plan.run_uri, FILE).read_text())
    # What a longer life had measured is on record, but not the validation of the step that is gone on from.
    record["losses"].pop(str(best))
    storage.publish_bytes(storage.join(again.run_uri, FILE), json.dumps(record).encode())
    (resumed,) = train(again)
    assert resumed.events("resumed")[0]["step"] == best
    losses = validations(undisturbed)
    assert validations(resumed) == {step: losses[step] for step in losses if step >= best}
    assert LossHistory.read(again) == LossHistory.read(plan)
    assert committed_steps(again.checkpoints_uri, again.run_fingerprint) == [best, best + 4]


def test_what_was_not_kept_cannot_be_exported(root: Path, tiny_t2v: Path) -> None:
    plan = make_run(root, tiny_t2v, "none", *DIVERGING)
    with pytest.raises(ConfigError, match="no committed checkpoint"):
        export.export_run(plan)
