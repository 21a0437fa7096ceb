"""Adapters on a GPU: compiled blocks against fp32 on the plain path, rounded bases in less memory, exports."""

from __future__ import annotations

import dataclasses
import functools
import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from k5dist import export
from k5dist.config import ExportConfig, LoraConfig
from k5dist.estimate import Recompute
from k5dist.model.dit import VideoTransformer
from k5dist.model.forward import Text, predict_velocity
from k5dist.model.lora import dropout_key
from k5dist.model.quantised import check_device, quantised_layers
from k5dist.model.transformer import adapt
from k5dist.model.weight_stream import WeightStream
from k5dist.plan import RunPlan
from k5dist.train.parallelise import compile_blocks, set_recompute
from tests.distributed.gangs import assert_close, make_run, train
from tests.gpu.test_model import GPU, inputs, model_config, weights
from tests.unit.models import lora_config, set_adapters

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
gpu_run = functools.partial(make_run, gpu=True)
MODEL = model_config("t2v-lite-sft-5s", attention_type="regular", num_visual_blocks=4)
SHAPE = (5, 32, 48)
FP32, BF16 = 1e-4, 3e-2
OPTIONS: dict[str, dict[str, Any]] = {
    "dropout": {"dropout": 0.3},
    "dora": {"use_dora": True, "dropout": 0.3},
    "int8": {"base_dtype": "int8"},
    "float8": {"base_dtype": "float8"},
    "float8-dora": {"base_dtype": "float8", "use_dora": True, "use_rslora": True, "dropout": 0.3},
}


def needs(lora: LoraConfig) -> None:
    if lora.base_dtype == "float8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs a GPU with float8 numbers")


def adapted(lora: LoraConfig, dtype: torch.dtype) -> VideoTransformer:
    """Moved adapters on the same weights; all in `dtype` but what is fp32 always, as FSDP2 gathers them."""
    torch.manual_seed(0)
    transformer = VideoTransformer(MODEL)
    transformer.load_state_dict(weights(MODEL))
    adapt(transformer, lora, dtype, dtype)
    set_adapters(transformer, size=0.05)
    return transformer.to(GPU).train()


def pair(lora: LoraConfig) -> tuple[VideoTransformer, VideoTransformer]:
    """The bf16 model, and the fp32 one with just its weights on the plain path."""
    ours, exact = adapted(lora, torch.bfloat16), adapted(dataclasses.replace(lora, base_dtype=None), torch.float32)
    layers, theirs = quantised_layers(ours), dict(ours.named_parameters())
    with torch.no_grad():
        for name, parameter in exact.named_parameters():
            path = name.removesuffix(".weight")
            parameter.copy_(layers[path].weight if path in layers else theirs[name])
    return ours, exact


def gradients(transformer: VideoTransformer, latents: Tensor, time: Tensor, text: Text, clip: int) -> list[Tensor]:
    """Velocity and the adapters' gradients, fp32."""
    key = dropout_key(transformer)
    if key is not None:
        key.set(clip, GPU)
    velocity = predict_velocity(transformer, MODEL, latents, False, time, text).float()
    trained = [p for p in transformer.parameters() if p.requires_grad]
    return [velocity.detach(), *(g.float() for g in torch.autograd.grad(velocity.square().mean(), trained))]


def relative(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """Of all tensors together: single small ones are mostly rounding."""
    a, b = (torch.cat([tensor.flatten() for tensor in tensors]) for tensors in (ours, theirs))
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize(
    "recompute", [Recompute(4, 0), Recompute(0, 4), Recompute(0, 0)], ids=["linear", "attention", "full"]
)
@pytest.mark.parametrize("name", OPTIONS)
def test_compiled_blocks_agree_with_fp32_and_are_one_graph(name: str, recompute: Recompute) -> None:
    lora = lora_config(16, 16.0, "attention+ffn", **OPTIONS[name])
    needs(lora)
    ours, exact = pair(lora)
    check_device(ours, GPU)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("inductor")
    set_recompute(ours, recompute)
    compile_blocks(ours, backend=counter)
    counts, velocities = [], []
    for clip in (1, 2):
        latents, text, time = inputs(MODEL, SHAPE, 20 + clip)
        found = gradients(ours, latents.bfloat16(), time, text.to(GPU, torch.bfloat16), clip)
        expected = gradients(exact, latents, time, text, clip)
        errors = {"velocity": relative(found[:1], expected[:1]), "gradients": relative(found[1:], expected[1:])}
        assert errors["velocity"] < BF16 and errors["gradients"] < 2 * BF16, errors
        counts.append(counter.frame_count)
        velocities.append(found[0])
    # One for the first block, whose input asks for no gradient, one for all others.
    assert counts[0] == counts[1] <= 2, counts
    if lora.dropout:
        latents, text, time = inputs(MODEL, SHAPE, 22)
        other = gradients(ours, latents.bfloat16(), time, text.to(GPU, torch.bfloat16), 3)
        assert relative(other[:1], velocities[1:]) > 1e-3, "another key drops something else"
        assert counter.frame_count == counts[0]


@pytest.mark.parametrize("name", ["int8", "float8"])
def test_a_rounded_base_takes_a_byte_a_weight_and_is_never_whole(name: str) -> None:
    """At the peak of a backward, too, no more than the largest layer's weight stands beside the bytes."""
    lora = lora_config(16, 16.0, "attention", **OPTIONS[name])
    needs(lora)
    peaks, sizes = [], []
    for kind in (None, None, lora.base_dtype):  # the first makes what the libraries keep
        gc.collect()
        before = torch.cuda.memory_allocated()
        transformer = adapted(dataclasses.replace(lora, base_dtype=kind), torch.bfloat16)
        set_recompute(transformer, Recompute(0, 0))
        latents, text, time = inputs(MODEL, (1, 16, 16), 20)
        arguments = (latents.bfloat16(), time, text.to(GPU, torch.bfloat16), 1)
        gradients(transformer, *arguments)
        torch.cuda.reset_peak_memory_stats()
        gradients(transformer, *arguments)
        peaks.append(torch.cuda.max_memory_allocated() - before)
        sizes.append(sum(p.nbytes for p in transformer.parameters()))
        del transformer
    peaks, sizes = peaks[1:], sizes[1:]
    linear = 4 * (8 * MODEL.model_dim**2 + 2 * MODEL.model_dim * MODEL.ff_dim)
    linear += 4 * MODEL.model_dim**2 + 2 * MODEL.model_dim * MODEL.ff_dim
    assert abs((sizes[0] - sizes[1]) - linear) < 0.02 * linear
    largest = MODEL.model_dim * MODEL.ff_dim
    # Uncompiled, fp32 stands on the way from bytes to bf16.
    assert peaks[1] < peaks[0] - linear + 3 * 4 * largest, (peaks, linear)


def test_streamed_bytes_give_the_same_to_the_bit() -> None:
    lora = lora_config(16, 16.0, "attention", **OPTIONS["int8"])
    latents, text, time = inputs(MODEL, SHAPE, 20)
    results = []
    for streamed in (False, True):
        transformer = adapted(lora, torch.bfloat16)
        set_recompute(transformer, Recompute(0, 0))
        if streamed:
            filled = {name: parameter.detach().cpu() for name, parameter in transformer.named_parameters()}
            transformer.stream = WeightStream(transformer.visual_transformer_blocks, GPU)
            transformer.stream.allocate()
            with torch.no_grad():
                for name, parameter in transformer.named_parameters():
                    parameter.copy_(filled[name])
            transformer.stream.start()
        arguments = (latents.bfloat16(), time, text.to(GPU, torch.bfloat16), 1)
        results.append([gradients(transformer, *arguments) for _ in range(2)])
    for plain, moved in zip(*results, strict=True):
        off = relative(moved, plain)
        assert off < 1e-3, off  # cuDNN's attention sums gradients in no fixed order


# The real worker


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gpu-lora")


def settings(name: str) -> list[str]:
    return [f"lora.{key}={str(value).lower()}" for key, value in OPTIONS[name].items()]


def with_merge(plan: RunPlan) -> RunPlan:
    merging = ExportConfig(checkpoint="last", merge=True)
    return dataclasses.replace(plan, config=dataclasses.replace(plan.config, export=merging))


@pytest.mark.parametrize("name", OPTIONS)
def test_a_run_compiled_is_the_run_eager_and_its_export_is_proved(root: Path, tiny_t2v: Path, name: str) -> None:
    needs(lora_config(16, 16.0, "attention", **OPTIONS[name]))
    bf16 = ["train.precision=bf16", *settings(name)]
    (eager,) = train(gpu_run(root, tiny_t2v, f"{name}-eager", *bf16))
    plan = gpu_run(root, tiny_t2v, f"{name}-compiled", *bf16, "train.compile=true")
    (compiled,) = train(plan)
    assert_close(compiled.losses, eager.losses, BF16)
    report = export.export_run(with_merge(plan))
    assert report.error <= report.tolerance
    assert report.merged_error is not None and report.merged_error <= report.tolerance


@pytest.mark.parametrize("name", ["dora", "int8"])
def test_two_gpus_give_the_losses_of_one(root: Path, tiny_t2v: Path, name: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    plans = [gpu_run(root, tiny_t2v, f"{name}-{n}", *settings(name), workers=n) for n in (1, 2)]
    (one,), (two,) = (train(plan) for plan in plans)
    assert_close(two.losses, one.losses, FP32)
    assert_close(two.norms, one.norms, 10 * FP32)
