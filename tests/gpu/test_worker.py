"""The real worker on real GPUs: NCCL, compiled blocks, bf16, and exports proved on the device that trained them."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch

from k5dist import export
from k5dist.train.checkpoint import committed_steps
from tests.distributed.gangs import assert_close, make_run, train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
gpu_run = functools.partial(make_run, gpu=True)
FP32 = 1e-4  # TF32 is off; kernels sum in other orders on other shards
BF16 = 3e-2


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gpu")


def needs_two_gpus() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")


def test_two_gpus_give_the_losses_of_one(root: Path, tiny_t2v: Path) -> None:
    needs_two_gpus()
    for adapter in ("lora", "full"):
        plans = [gpu_run(root, tiny_t2v, f"{adapter}-{n}", f"adapter={adapter}", workers=n) for n in (1, 2)]
        (one,), (two,) = (train(plan) for plan in plans)
        assert_close(two.losses, one.losses, FP32)
        assert_close(two.norms, one.norms, 10 * FP32)


def test_replicas_give_the_losses_of_one(root: Path, tiny_t2v: Path) -> None:
    needs_two_gpus()
    (one,) = train(gpu_run(root, tiny_t2v, "hsdp-1", "adapter=full"))
    (two,) = train(gpu_run(root, tiny_t2v, "hsdp-2", "adapter=full", "parallel.replicate=2", workers=2))
    assert_close(two.losses, one.losses, FP32)


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_bf16_compiled_and_eager_agree_with_fp32(root: Path, tiny_t2v: Path, adapter: str) -> None:
    bf16 = [f"adapter={adapter}", "train.precision=bf16"]
    (exact,) = train(gpu_run(root, tiny_t2v, f"exact-{adapter}", f"adapter={adapter}"))
    (eager,) = train(gpu_run(root, tiny_t2v, f"eager-{adapter}", *bf16))
    (compiled,) = train(gpu_run(root, tiny_t2v, f"compiled-{adapter}", *bf16, "train.compile=true"))
    assert_close(eager.losses, exact.losses, BF16)
    assert_close(compiled.losses, exact.losses, BF16)
    assert {"mfu", "memory_gib"} <= compiled.events("step")[0]["metrics"].keys()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_exports_give_what_the_trained_model_gives(root: Path, tiny_t2v: Path, adapter: str, precision: str) -> None:
    settings = [f"adapter={adapter}", f"train.precision={precision}"]
    plan = gpu_run(root, tiny_t2v, f"export-{adapter}-{precision}", *settings)
    train(plan)
    report = export.export_run(plan)
    assert report.error <= report.tolerance
    assert report.difference_to_base > 2 * report.error


def test_image_to_video_trains_and_exports(root: Path, tiny_i2v: Path) -> None:
    plan = gpu_run(root, tiny_i2v, "i2v", "train.precision=bf16", "train.compile=true")
    train(plan)
    assert export.export_run(plan).error <= export.TOLERANCE["bf16"]


def test_nabla_trains_compiled(root: Path, tiny_nabla: Path) -> None:
    nabla = ["model.attention_type=nabla", "model.attention_P=0.6", "model.attention_wT=3", "model.attention_wW=1"]
    nabla += [
        "model.attention_wH=1",
        "model.attention_add_sta=true",
        "data.resolution=[128,128]",
        "train.compile=true",
        "train.precision=bf16",
    ]
    (result,) = train(gpu_run(root / "nabla", tiny_nabla, "nabla", *nabla))
    assert len(result.losses) == 6


def test_saved_on_two_gpus_goes_on_on_one(root: Path, tiny_t2v: Path) -> None:
    needs_two_gpus()
    (whole,) = train(gpu_run(root, tiny_t2v, "whole", "adapter=full"))
    first = gpu_run(root, tiny_t2v, "moved", "adapter=full", "checkpoint.every=2", workers=2)
    train(first)
    (Path(first.checkpoints_uri) / "step-00000006" / "COMMITTED").unlink()
    (Path(first.run_uri) / "probe.safetensors").unlink()
    second = gpu_run(root, tiny_t2v, "moved", "adapter=full", "checkpoint.every=2")
    assert committed_steps(second.checkpoints_uri, second.run_fingerprint)[-1] == 4
    (result,) = train(second)
    assert sorted(result.losses) == [5, 6]
    assert_close(result.losses, {step: whole.losses[step] for step in (5, 6)}, FP32)
