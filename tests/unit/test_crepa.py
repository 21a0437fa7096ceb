"""CREPA: the published formula against a plain reference, features by their encoder, what is refused, what it costs."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from k5dist.compose import compose, to_run_config
from k5dist.config import ConfigError, CrepaConfig, RunConfig
from k5dist.estimate import clip_flops, crepa_parameters, feature_cache_bytes
from k5dist.model.crepa import CrepaHead
from k5dist.model.dit import VideoTransformer
from k5dist.model.forward import predict, predict_velocity
from k5dist.model.tokens import flatten
from k5dist.model.transformer import build_transformer, materialise
from k5dist.model.vision import VisionEncoder
from k5dist.plan import ClusterFacts, estimates, make_plan
from tests.unit.models import CPU, model_config, our_model, random, random_frames, random_text
from tests.unit.test_objective import objective, random_clip


def configured(*overrides: str, flavour: str = "t2v-tiny") -> RunConfig:
    return to_run_config(compose([f"+flavour={flavour}", "crepa.enabled=true", *overrides]))


def head_of(crepa: CrepaConfig, width: int = 6) -> CrepaHead:
    torch.manual_seed(0)
    return CrepaHead(crepa, 64, width)


def published(head: CrepaHead, x_THWM: Tensor, features: Tensor, distance: int, decay: float, mean: bool) -> Tensor:
    """L_align of arXiv 2506.09229 by loops over frames, neighbours and patches."""
    frames, height, width, _ = x_THWM.shape
    y = F.interpolate(features.permute(0, 3, 1, 2), size=(height, width), mode="bilinear").permute(0, 2, 3, 1)
    projected = head.third(F.silu(head.second(F.silu(head.first(x_THWM)))))
    total = torch.zeros(())
    for f in range(frames):
        for k in [f] if not distance else [f, f - distance, f + distance]:
            if 0 <= k < frames:
                similarity = F.cosine_similarity(y[k], projected[f], dim=-1).mean()
                total = total + math.exp(-abs(k - f) / decay) * similarity
    return -total / (frames if mean else 1)


@pytest.mark.parametrize("blocked", [False, True])
@pytest.mark.parametrize(
    ("frames", "distance", "decay", "mean"),
    [(9, 1, 1.0, True), (6, 2, 3.0, False), (1, 1, 1.0, True), (5, 0, 1.0, True)],
)
def test_the_alignment_is_the_published_formula(
    frames: int, distance: int, decay: float, mean: bool, blocked: bool
) -> None:
    settings = [f"crepa.adjacent_distance={distance}", f"crepa.temporal_decay={decay}"]
    head = head_of(configured(*settings, f"crepa.normalize_by_frames={str(mean).lower()}").crepa)
    sides = (8, 16) if blocked else (3, 5)
    x, features = random(1, frames, *sides, 64), random(frames, 4, 7, 6, seed=2)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    ours = -head(flatten(inputs[0], blocked), features, (frames, *sides), blocked, None)
    expected = published(head, inputs[1][0], features, distance, decay, mean)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    weights = [
        torch.autograd.grad(loss, [x, *head.parameters()]) for loss, x in zip((ours, expected), inputs, strict=True)
    ]
    for one, other in zip(*weights, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def aligned_model(folder: Path, crepa: CrepaConfig, width: int) -> VideoTransformer:
    transformer = build_transformer(
        str(folder), model_config(folder), lora=None, dtype=torch.float32, crepa=crepa, feature_dim=width
    )
    materialise(transformer, str(folder), device=CPU, seed=0)
    return transformer


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_the_model_aligns_the_output_of_its_block(tiny_t2v: Path, tiny_nabla: Path, kind: str) -> None:
    folder = tiny_t2v if kind == "dense" else tiny_nabla
    crepa, model = configured("crepa.block_index=2").crepa, model_config(folder)
    transformer = aligned_model(folder, crepa, 6)
    latents = random(1, 5, 16, 32, 16)
    features, seen = random(5, 4, 7, 6, seed=4), []
    hook = transformer.visual_transformer_blocks[2].register_forward_hook(lambda module, args, out: seen.append(out))
    time, text = torch.tensor([500.0]), random_text(4)
    velocity, alignment = predict(transformer, model, latents, False, time, text, None, features)
    hook.remove()
    assert transformer.crepa_head is not None and alignment is not None
    expected = transformer.crepa_head(seen[0], features, (5, 8, 16), model.is_sparse, None)
    assert torch.equal(alignment, expected)
    assert torch.equal(velocity, predict_velocity(our_model(folder), model, latents, False, time, text)), (
        "nothing else changes"
    )


def test_the_loss_is_both_and_validation_is_the_score_alone(tiny_t2v: Path) -> None:
    plain, transformer = objective(tiny_t2v), aligned_model(tiny_t2v, configured().crepa, 6)
    clip = dataclasses.replace(random_clip(), features_ThwD=random(5, 3, 4, 6, seed=1))
    seen = []
    assert transformer.crepa_head is not None
    hook = transformer.crepa_head.register_forward_hook(lambda module, args, out: seen.append(out))
    both = dataclasses.replace(plain, crepa_weight=0.5)
    loss, score = (each.training_loss(transformer, clip, clip.text, 0) for each in (both, plain))
    torch.testing.assert_close(loss, score - 0.5 * seen[0])
    assert both.validation_loss(transformer, clip, clip.text, 0, 4) == plain.validation_loss(
        transformer, clip, clip.text, 0, 4
    )
    assert len(seen) == 1
    hook.remove()


# Features


def test_features_are_the_encoders_of_every_fourth_frame_in_its_own_shape(tiny_t2v: Path) -> None:
    crepa = configured(f"crepa.encoder={tiny_t2v}/dinov2").crepa
    encoder, frames = VisionEncoder(crepa, "cpu"), random_frames(17)
    features = encoder.encode(frames)
    assert features.shape == (5, 3, 5, 32), "64 × 96 pixels as 3 × 5 patches of 14"
    alone = encoder.encode(frames[8:9])
    torch.testing.assert_close(features[2:3], alone, rtol=1e-4, atol=1e-5)
    left = frames.copy()
    left[8, :, :16] = 0
    moved = (encoder.encode(left) - features).norm(dim=-1)
    assert moved[[0, 1, 3, 4]].max() == 0
    assert moved[2].max() > 0


@pytest.mark.parametrize(("sides", "grid"), [((512, 768), (30, 45)), ((1408, 640), (55, 25)), ((512, 512), (37, 37))])
def test_the_grid_keeps_the_aspect_ratio(sides: tuple[int, int], grid: tuple[int, int]) -> None:
    assert configured("crepa.encoder_size=518").crepa.grid(*sides) == grid


# Rules, identities, costs


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["crepa.block_index=4"], "crepa.block_index"),
        (["crepa.block_index=-1"], "crepa.block_index"),
        (["crepa.weight=0"], "crepa.weight"),
        (["crepa.temporal_decay=0"], "crepa.temporal_decay"),
        (["crepa.adjacent_distance=-1"], "crepa.adjacent_distance"),
        (["crepa.encoder_size=5"], "crepa.encoder_size"),
        (["tread.routes=[{selection_ratio:0.5,start_layer_idx:1,end_layer_idx:2}]"], "crepa.block_index"),
    ],
)
def test_what_cannot_be_aligned(overrides: list[str], key: str) -> None:
    with pytest.raises(ConfigError) as error:
        configured(*overrides)
    assert error.value.key == key


def test_a_block_beside_a_route_is_aligned() -> None:
    configured("tread.routes=[{selection_ratio:0.5,start_layer_idx:2,end_layer_idx:3}]")


def test_another_encoder_is_another_store_in_the_same_cache() -> None:
    small, other = configured("crepa.encoder=facebook/dinov2-small"), configured("crepa.encoder=facebook/dinov2-base")
    larger = configured("crepa.encoder=facebook/dinov2-small", "crepa.encoder_size=224")
    off = to_run_config(compose(["+flavour=t2v-tiny"]))
    plans = [make_plan(config, ClusterFacts(0), "weights") for config in (small, other, larger, off)]
    assert len({plan.cache_fingerprint for plan in plans}) == 1
    assert len({plan.features_id for plan in plans}) == len({plan.run_fingerprint for plan in plans}) == 4
    assert plans[3].features_id == ""


def test_the_plan_counts_head_and_features() -> None:
    more = ("cluster.gpus_per_node=1", "data.resolution=[512,768]")
    on = configured(*more, flavour="t2v-lite-sft-5s")
    off = to_run_config(compose(["+flavour=t2v-lite-sft-5s", *more]))
    plans = [make_plan(each, ClusterFacts(1, "NVIDIA H200"), "weights") for each in (on, off)]
    head = CrepaHead(on.crepa, on.model.model_dim, 1536)
    assert crepa_parameters(on) == sum(parameter.numel() for parameter in head.parameters())
    costs = [estimates(plan) for plan in plans]
    assert costs[0].trainable - costs[1].trainable == crepa_parameters(on)
    features = feature_cache_bytes(on.crepa, plans[0].buckets[0])
    assert features == 2 * 31 * 30 * 45 * 1536
    assert costs[0].sample_cache_bytes - costs[1].sample_cache_bytes == features
    shape = plans[0].buckets[0].token_shape
    assert 1 < clip_flops(on, shape).training("lora") / clip_flops(off, shape).training("lora") < 1.03


def test_features_repeat_to_the_bit(tiny_t2v: Path) -> None:
    crepa = configured(f"crepa.encoder={tiny_t2v}/dinov2").crepa
    one, two = (VisionEncoder(crepa, "cpu").encode(random_frames(5)) for _ in range(2))
    assert np.array_equal(one.numpy(), two.numpy())
