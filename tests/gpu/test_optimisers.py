"""Optimisers and averages on real GPUs: compiled updates, NCCL's all-to-all, averages in the host's memory."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch

from k5dist import export
from k5dist.config import OPTIMIZERS
from k5dist.train.adamw8bit import _compiled_update, codebook, quantised_update
from tests.distributed.gangs import Result, assert_close, make_run, train
from tests.distributed.test_training import continued

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
gpu_run = functools.partial(make_run, gpu=True)
NEAR = {"adamw_bf16": 3e-2, "adamw_8bit": 5e-3}  # rounding by chance, by shard; codes that flip
FULL = ("adapter=full", "checkpoint.every=4", "checkpoint.keep=2")
AVERAGED = (*FULL, "optimizer.lr=3e-3", "ema.enabled=true", "ema.decay=0.5", "stages=[train,validate]")
AVERAGED += ("data.held_out=0.2", "validation.every=4", "validation.timesteps=2", "validation.prompts=[]")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gpu-optimisers")


def settings(kind: str) -> tuple[str, ...]:
    rate = {"prodigy": 1.0, "adafactor": 1e-2}.get(kind, 1e-3)
    precision = "bf16" if kind == "adamw_bf16" else "fp32"
    return (*FULL, f"optimizer.kind={kind}", f"optimizer.lr={rate}", f"train.precision={precision}")


def validation_losses(result: Result) -> dict[int, float]:
    return {event["step"]: event["losses"]["loss"] for event in result.events("validation")}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_every_optimiser_trains_and_goes_on(root: Path, tiny_t2v: Path, kind: str) -> None:
    plan = gpu_run(root, tiny_t2v, kind, *settings(kind))
    (undisturbed,) = train(plan)
    (resumed,) = train(continued(plan, gpu_run(root, tiny_t2v, f"{kind}-on", *settings(kind)), [4]))
    assert_close(resumed.losses, undisturbed.losses, 1e-5 if kind != "adamw_bf16" else 1e-3, [5, 6])
    assert len(set(undisturbed.losses.values())) == 6


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_two_gpus_update_as_one(root: Path, tiny_t2v: Path, kind: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    (one,) = train(gpu_run(root, tiny_t2v, f"{kind}-1", *settings(kind)))
    (two,) = train(gpu_run(root, tiny_t2v, f"{kind}-2", *settings(kind), workers=2))
    assert_close(two.losses, one.losses, NEAR.get(kind, 1e-3))


def test_an_average_on_the_host_is_the_one_on_the_device(root: Path, tiny_t2v: Path) -> None:
    workers = min(2, torch.cuda.device_count())
    plans = [
        gpu_run(root, tiny_t2v, f"ema-{device}", *AVERAGED, f"ema.device={device}", workers=workers)
        for device in ("device", "host")
    ]
    (device,), (host,) = (train(plan) for plan in plans)
    assert_close(validation_losses(host), validation_losses(device), 1e-5)
    on = gpu_run(root, tiny_t2v, "ema-host-on", *AVERAGED, "ema.device=host", workers=workers)
    (resumed,) = train(continued(plans[1], on, [4]))
    assert validation_losses(resumed)[6] == pytest.approx(validation_losses(host)[6], rel=1e-5)
    report = export.export_run(plans[1])
    assert report.weights == "ema"
    assert report.error <= report.tolerance < report.difference_to_base


@pytest.mark.parametrize("shape", [(4096, 16384), (32, 4096), (1792, 32), (7, 300)])
def test_the_compiled_8_bit_update_is_the_eager_one(shape: tuple[int, int]) -> None:
    rows, columns = shape
    device = torch.device("cuda")
    generator = torch.Generator(device).manual_seed(0)
    books = codebook(True, device), codebook(False, device)
    numbers = torch.tensor([0.1, 0.01, 0.999, 1e-3, 1.0, 1e-8], device=device)
    results = []
    start, gradient = (torch.randn(shape, generator=generator, device=device) for _ in range(2))
    for update in (quantised_update, _compiled_update):
        weight = start.clone()
        codes = (
            torch.zeros(shape, dtype=torch.uint8, device=device),
            torch.zeros(shape, dtype=torch.uint8, device=device),
        )
        blocks = -(-columns // 256)
        scales = torch.zeros(rows, blocks, device=device), torch.zeros(rows, blocks, device=device)
        for _ in range(3):
            update(weight, gradient, codes, scales, books, numbers)
        results.append((weight, codes))
    (eager, eager_codes), (compiled, compiled_codes) = results
    torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(compiled_codes, eager_codes, strict=True):
        assert int((ours.int() - theirs.int()).abs().max()) <= 1
        assert float((ours != theirs).float().mean()) < 1e-3
