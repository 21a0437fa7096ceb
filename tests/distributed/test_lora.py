"""Adapters of every kind over shards and shared clips: two workers train as one, the export is the trained model."""

import dataclasses
from pathlib import Path

import pytest
import safetensors.torch
import torch
from PIL import Image

from k5dist import export
from k5dist.cache import layout
from k5dist.config import ExportConfig
from k5dist.plan import RunPlan
from k5dist.precache.images import encode_images
from tests.distributed.gangs import SCALE, Result, assert_close, make_run, train
from tests.distributed.test_training import continued
from tests.unit.models import random_frames

pytestmark = pytest.mark.timeout(300)

FP32, BF16 = 3e-5, 5e-3
SHORT = ("train.steps=4", "train.batch_size=2", "checkpoint.every=2", "checkpoint.keep=2", "lora.rank=4")
SHORT += ("data.resolution=[48,80]",)  # 75 tokens: of two workers' runs one is short
DORA = (*SHORT, "lora.dropout=0.2", "lora.use_dora=true", "lora.use_rslora=true", "lora.targets=attention+ffn")
INT8 = (*SHORT, "lora.base_dtype=int8", "lora.dropout=0.2", "lora.targets=attention")
FLOAT8 = (*SHORT, "lora.base_dtype=float8", "lora.use_dora=true", "train.precision=bf16", "lora.targets=attention")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lora")


@pytest.fixture(scope="module")
def dora(root: Path, tiny_t2v: Path) -> list[tuple[RunPlan, Result]]:
    """On one worker, on two with shards, on two that share clips."""
    plans = [
        make_run(root, tiny_t2v, f"dora-{i}", *DORA, *more, workers=workers)
        for i, (workers, more) in enumerate([(1, ()), (2, ()), (2, ("parallel.context=2",))])
    ]
    return list(zip(plans, [*train(*plans[:2]), *train(plans[2])], strict=True))


def test_dora_with_dropout_over_shards_and_shared_clips(dora: list[tuple[RunPlan, Result]]) -> None:
    (_, one), *others = dora
    assert sorted(one.losses) == [1, 2, 3, 4]
    for _, result in others:
        assert_close(result.losses, one.losses, FP32)
        assert_close(result.norms, one.norms, FP32)


def test_dropout_goes_on_to_the_bit_after_a_stop(
    root: Path, tiny_t2v: Path, dora: list[tuple[RunPlan, Result]]
) -> None:
    plan, undisturbed = dora[0]
    (resumed,) = train(continued(plan, make_run(root, tiny_t2v, "on", *DORA), [2]))
    assert resumed.losses == {step: undisturbed.losses[step] for step in (3, 4)}
    assert resumed.norms == {step: undisturbed.norms[step] for step in (3, 4)}


def test_rounded_bases_over_shards_and_their_exports(root: Path, tiny_t2v: Path) -> None:
    int8 = [make_run(root, tiny_t2v, f"int8-{n}", *INT8, workers=n) for n in (1, 2)]
    float8 = [make_run(root, tiny_t2v, f"float8-{n}", *FLOAT8, workers=n) for n in (1, 2)]
    (one, two), (one_half, two_halves) = train(*int8), train(*float8)
    assert_close(two.losses, one.losses, FP32)
    assert_close(two.norms, one.norms, FP32)
    assert_close(two_halves.losses, one_half.losses, BF16)
    (streamed,) = train(make_run(root, tiny_t2v, "streamed", *INT8, "train.stream_weights=true", workers=2))
    assert streamed.losses == two.losses, "each worker's copy in the host's memory is the shards', to the bit"
    assert streamed.norms == two.norms
    for plan in (int8[1], float8[1]):
        report = export.export_run(with_merge(plan))
        assert report.error <= report.tolerance < report.difference_to_base
        assert report.merged_error is not None and report.merged_error <= report.tolerance


def with_merge(plan: RunPlan) -> RunPlan:
    merging = ExportConfig(checkpoint="last", merge=True)
    return dataclasses.replace(plan, config=dataclasses.replace(plan.config, export=merging))


def test_dora_is_exported_and_taken_up_again(root: Path, tiny_t2v: Path, dora: list[tuple[RunPlan, Result]]) -> None:
    plan, trained = dora[1]
    report = export.export_run(plan)
    assert report.error <= report.tolerance < report.difference_to_base
    assert report.merged_error is None
    merged = export.export_run(with_merge(plan))
    assert merged.merged_error is not None and merged.merged_error <= merged.tolerance
    assert set(merged.files) >= {export.LORA_FILE, "transformer/config.json"}
    base = safetensors.torch.load_file(tiny_t2v / "transformer" / "diffusion_pytorch_model.safetensors")
    whole = safetensors.torch.load_file(Path(merged.uri) / "transformer" / "diffusion_pytorch_model.safetensors")
    moved = {name for name in base if not torch.equal(base[name], whole[name])}
    assert base.keys() == whole.keys()
    assert moved == {f"{name.partition('.lora_')[0]}.weight" for name in exported_names(merged.uri)}
    again = make_run(root, tiny_t2v, "again", *DORA, f"lora.init_from={report.uri}", "train.steps=1", workers=2)
    (result,) = train(again)
    assert abs(result.losses[1] - trained.losses[1]) > 1e-4, "it starts where the other ended"


def exported_names(uri: str) -> set[str]:
    names = safetensors.torch.load_file(Path(uri) / export.LORA_FILE)
    return {name.removeprefix("transformer.") for name in names}


def test_first_frames_are_dropped_and_given_on_two_workers_as_on_one(root: Path, tiny_i2v: Path) -> None:
    """One run for both tasks; its videos begin with pictures."""
    Image.fromarray(random_frames(1)[0]).save(root / "a.png")
    settings = [
        "data.resolution=[48,80]",
        "train.first_frame_dropout=0.5",
        "lora.dropout=0.1",
        "train.steps=2",  # in the second, one worker's clip keeps its first frame and the other's does not
        "train.batch_size=2",
        "stages=[train,validate]",
    ]
    settings += [f"validation.images=[{root}/a.png]", "validation.sampling_steps=2", "validation.every=0"]
    plans = [make_run(root, tiny_i2v, f"frames-{n}", *settings, workers=n) for n in (1, 2)]
    for plan in plans:
        assert encode_images(plan, "cpu") == 1
    one, two = train(*plans)
    assert_close(two.losses, one.losses, FP32)
    assert_close(two.norms, one.norms, FP32)
    latents = [
        safetensors.torch.load_file(Path(plan.run_uri) / "validation" / "step-00000002" / "00.safetensors")["latents"]
        for plan in plans
    ]
    torch.testing.assert_close(latents[0], latents[1], rtol=0, atol=1e-3)
    picture = safetensors.torch.load_file(layout.image_uri(plans[0].run_uri, 0))["mean"] * SCALE
    torch.testing.assert_close(latents[0][:1], picture, rtol=0, atol=1e-6)
