"""Streamed weights: the same numbers to the bit, with two blocks' weights at most where the device is."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from k5dist.compose import compose, to_run_config
from k5dist.estimate import Recompute
from k5dist.model.dit import VideoTransformer
from k5dist.model.forward import predict_velocity
from k5dist.model.pretrained import component_uri
from k5dist.model.transformer import allocate, build_transformer, materialise
from k5dist.model.weight_stream import WeightStream
from k5dist.model.weights import load_weights
from k5dist.train.parallelise import set_recompute
from tests.unit.models import set_adapters
from tests.unit.test_rollout import random_clip

CPU = torch.device("cpu")
CONFIG = to_run_config(compose(["+flavour=t2v-tiny"]))


def lora_model(folder: Path, recompute: str, *, streamed: bool, **options: Any) -> VideoTransformer:
    lora = dataclasses.replace(CONFIG.lora, **options)
    transformer = build_transformer(str(folder), CONFIG.model, lora=lora, dtype=torch.float32)
    blocks = CONFIG.model.num_visual_blocks
    set_recompute(
        transformer, {"linear": Recompute(blocks, 0), "attention": Recompute(0, blocks)}.get(recompute, Recompute(0, 0))
    )
    if streamed:
        transformer.stream = WeightStream(transformer.visual_transformer_blocks, CPU)
    materialise(transformer, str(folder), device=CPU, seed=0)
    return transformer


def resident(transformer: VideoTransformer) -> int:
    """Visual blocks whose weights are where the device is."""
    blocks = transformer.visual_transformer_blocks
    return sum(
        any(not p.requires_grad and p.untyped_storage().size() > 0 for p in block.parameters()) for block in blocks
    )


def gradients(transformer: VideoTransformer, seen: list[int] | None = None) -> list[Tensor]:
    """Of two clips one after another, and the velocities without gradient between them."""
    clip, found = random_clip(), []
    if seen is not None:
        for block in transformer.visual_transformer_blocks:
            block.register_forward_hook(lambda *_: seen.append(resident(transformer)))
    for scale in (1.0, 0.5):
        latents = scale * clip.mean_THWC[None].float()
        arguments = (CONFIG.model, latents, False, torch.tensor([417.0]), clip.text)
        with torch.no_grad():
            found.append(predict_velocity(transformer, *arguments))
        velocity = predict_velocity(transformer, *arguments)
        trained = [p for p in transformer.parameters() if p.requires_grad]
        found += [velocity.detach(), *torch.autograd.grad(velocity.square().sum(), trained)]
    return found


@pytest.mark.parametrize("recompute", ["linear", "attention", "full"])
def test_results_are_the_same_to_the_bit(tiny_t2v: Path, recompute: str) -> None:
    plain, streamed = (lora_model(tiny_t2v, recompute, streamed=on) for on in (False, True))
    assert resident(streamed) == 0
    seen: list[int] = []
    for ours, expected in zip(gradients(streamed, seen), gradients(plain), strict=True):
        assert torch.equal(ours, expected)
    assert seen and max(seen) <= 2
    assert resident(plain) == CONFIG.model.num_visual_blocks > 2


@pytest.mark.parametrize(
    "options",
    [{"base_dtype": "int8", "dropout": 0.3}, {"use_dora": True}],
    ids=["int8", "dora"],
)
def test_adapters_of_every_kind_and_rounded_bases_are_streamed(tiny_t2v: Path, options: dict[str, Any]) -> None:
    plain, streamed = (lora_model(tiny_t2v, "full", streamed=on, **options) for on in (False, True))
    lengths = [(n, p) for n, p in plain.named_parameters() if "magnitude" in n]
    assert all(torch.equal(p, dict(streamed.named_parameters())[name]) for name, p in lengths)
    for transformer in (plain, streamed):
        set_adapters(transformer)
    for ours, expected in zip(gradients(streamed), gradients(plain), strict=True):
        assert torch.equal(ours, expected)
    size, exact = stored_bytes(streamed), stored_bytes(lora_model(tiny_t2v, "full", streamed=True))
    assert size < 0.5 * exact if "base_dtype" in options else size == exact


def stored_bytes(transformer: VideoTransformer) -> int:
    """Of the host's copies that are no fp32 modulation's."""
    assert transformer.stream is not None
    return sum(tensor.nbytes for block in transformer.stream.host for tensor in block[2:])


def test_weights_are_whole_again_after_a_step_changed_the_adapters(tiny_t2v: Path) -> None:
    streamed = lora_model(tiny_t2v, "full", streamed=True)
    assert streamed.stream is not None
    before = [[tensor.clone() for tensor in block] for block in streamed.stream.host]
    first = gradients(streamed)
    with torch.no_grad():
        for parameter in streamed.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01)
    assert not torch.equal(gradients(streamed)[0], first[0])
    for block, kept in zip(streamed.stream.host, before, strict=True):
        assert all(torch.equal(now, then) for now, then in zip(block, kept, strict=True))


def test_what_is_trained_stays(tiny_t2v: Path) -> None:
    with torch.device("meta"):
        transformer = build_transformer(str(tiny_t2v), CONFIG.model, lora=CONFIG.lora, dtype=torch.float32)
    transformer.stream = WeightStream(transformer.visual_transformer_blocks, CPU)
    stream = allocate(transformer, CPU)
    assert stream is not None and stream is transformer.stream
    load_weights(transformer, component_uri(str(tiny_t2v), "transformer"))
    assert not any(parameter.requires_grad for parameter in stream.parameters)
    outside = [p for name, p in transformer.named_parameters() if "visual_transformer_blocks" not in name]
    assert stream.parameters.isdisjoint(outside)
