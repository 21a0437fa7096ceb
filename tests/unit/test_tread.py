"""TREAD: routed tokens against a plain loop over the blocks, what is drawn, what is refused, what it costs."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from k5dist import memory
from k5dist.cache.keys import seed_of
from k5dist.compose import compose, to_run_config
from k5dist.config import ConfigError, ModelConfig, Route, RunConfig
from k5dist.estimate import clip_flops, forward_flops
from k5dist.model.dit import VideoTransformer
from k5dist.model.forward import nabla_parameters, predict_velocity, rope_scale_factor
from k5dist.model.nabla import NablaParameters, pack_bits, sliding_tile_window, unpack_bits
from k5dist.model.tokens import flatten, unflatten, unpatchify
from k5dist.model.tread import Routing, draw_kept, window_between
from k5dist.plan import ClusterFacts, make_plan
from k5dist.train.parallelise import compile_blocks
from tests.unit.models import CPU, model_config, our_model, random, random_text, relative
from tests.unit.test_objective import objective, random_clip

SEED = 7


def configured(*routes: str, flavour: str = "t2v-tiny", more: tuple[str, ...] = ()) -> RunConfig:
    return to_run_config(compose([f"+flavour={flavour}", f"tread.routes=[{','.join(routes)}]", *more]))


def route(ratio: float, first: int, last: int) -> str:
    return f"{{selection_ratio:{ratio},start_layer_idx:{first},end_layer_idx:{last}}}"


# The model


def plain_velocity(
    transformer: VideoTransformer, model: ModelConfig, latents: Tensor, time: Tensor, text: Any, routing: Routing
) -> Tensor:
    """The published method as a loop, on boolean masks over the tokens where they stand."""
    hidden = torch.cat([latents, torch.zeros_like(latents), torch.zeros_like(latents[..., :1])], -1)
    if routing.first_frame:
        hidden[:, 0, ..., -1] = 1
    context = transformer.text_embeddings(text.qwen_1LD)
    embedded = transformer.time_embeddings(time) + transformer.pooled_text_embeddings(text.clip_1D)
    rope = transformer.text_rope_embeddings(context.shape[1])
    for block in transformer.text_transformer_blocks:
        context = block(context, block.text_modulation(embedded), rope)  # type: ignore[operator]
    x = transformer.visual_embeddings(hidden)
    shape = x.shape[1:4]
    sides = (latents.shape[2] * 8, latents.shape[3] * 8)
    angles = transformer.visual_rope_embeddings(shape, rope_scale_factor(*sides))[None]
    x, angles = flatten(x, model.is_sparse), flatten(angles, model.is_sparse)[0]
    whole = nabla_parameters(model, tuple(shape), CPU) if model.is_sparse else None
    unit = 64 if model.is_sparse else 1
    fixed = math.prod(shape[1:]) // unit if routing.first_frame else 0
    kept = torch.ones(x.shape[1], dtype=torch.bool)
    before = x
    for number, block in enumerate(transformer.visual_transformer_blocks):
        for at, each in enumerate(routing.routes):
            if number == each.first:
                units = draw_kept(each, seed_of(routing.seed, at), x.shape[1] // unit, fixed)
                kept = torch.isin(torch.arange(x.shape[1]) // unit, units)
                before = x
        sparsity = whole
        if whole is not None:
            blocks = kept.view(-1, unit)[:, 0]
            wide = sliding_tile_window(
                (shape[0], shape[1] // 8, shape[2] // 8),
                (model.attention_wT or 0, model.attention_wH or 0, model.attention_wW or 0),
                CPU,
            )
            sparsity = NablaParameters(whole.probability, pack_bits(wide[blocks][:, blocks]))
        own = type(rope)(angles[kept].cos(), angles[kept].sin())
        out = block(x[:, kept], context, block.visual_modulation(embedded), own, sparsity, int(kept.sum()))  # type: ignore[operator]
        x = torch.where(kept[None, :, None], x.masked_scatter(kept[None, :, None].expand_as(x), out), before)
        if any(number == each.last for each in routing.routes):
            kept = torch.ones_like(kept)
    return unpatchify(unflatten(transformer.out_layer(x, embedded), shape, model.is_sparse))


@pytest.mark.parametrize("kind", ["dense", "sparse", "first frame"])
def test_routed_tokens_are_the_published_method(tiny_t2v: Path, tiny_nabla: Path, kind: str) -> None:
    folder = tiny_nabla if kind == "sparse" else tiny_t2v
    transformer, model = our_model(folder), model_config(folder)
    assert isinstance(transformer, VideoTransformer)
    latents = random(1, 5, 16, 32, 16) if kind == "sparse" else random(1, 5, 8, 12, 16)
    routing = Routing((Route(0, 1, 0.4), Route(2, 2, 0.5)), SEED, kind == "first frame")
    time, text, direction = torch.tensor([500.0]), random_text(4), random(*latents.shape, seed=3)
    inputs = [latents.clone().requires_grad_() for _ in range(2)]
    ours = predict_velocity(transformer, model, inputs[0], routing.first_frame, time, text, routing)
    plain = plain_velocity(transformer, model, inputs[1], time, text, routing)
    torch.testing.assert_close(ours, plain, rtol=0, atol=1e-6)
    (ours * direction).sum().backward()
    grads = {name: parameter.grad for name, parameter in transformer.named_parameters()}
    transformer.zero_grad()
    (plain * direction).sum().backward()
    assert inputs[0].grad is not None and inputs[1].grad is not None
    assert relative(inputs[0].grad, inputs[1].grad) < 1e-5
    for name, parameter in transformer.named_parameters():
        grad = grads[name]
        assert parameter.grad is not None and grad is not None, name
        assert relative(grad, parameter.grad) < (1e-3 if name.endswith("to_key.bias") else 1e-5), name
    whole = predict_velocity(transformer, model, latents, routing.first_frame, time, text)
    assert relative(ours.detach(), whole) > 1e-3, "it does leave tokens out"


@pytest.mark.parametrize("recompute", ["linear", "attention", "full"])
def test_recomputation_changes_nothing(tiny_nabla: Path, recompute: str) -> None:
    transformer, model = our_model(tiny_nabla), model_config(tiny_nabla)
    routing = Routing((Route(1, 2, 0.5),), SEED, False)
    grads = []
    for policy in ("none", recompute):
        for block in transformer.visual_transformer_blocks:  # type: ignore[union-attr]
            block.recompute = policy  # type: ignore[assignment]
        transformer.zero_grad()
        latents = random(1, 5, 16, 16, 16)
        predict_velocity(
            transformer, model, latents, False, torch.tensor([500.0]), random_text(4), routing
        ).square().sum().backward()
        grads.append([parameter.grad for parameter in transformer.parameters()])
    for one, other in zip(*grads, strict=True):
        assert one is not None and other is not None and torch.equal(one, other)


def test_a_route_is_one_graph_whatever_is_drawn(tiny_nabla: Path) -> None:
    plain, compiled, model = our_model(tiny_nabla), our_model(tiny_nabla), model_config(tiny_nabla)
    assert isinstance(compiled, VideoTransformer)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compile_blocks(compiled, backend=counter)
    latents, time = random(1, 5, 16, 16, 16), torch.tensor([500.0])
    counts = []
    for seed in range(3):
        routing = Routing((Route(1, 2, 0.5),), seed, False)
        ours = predict_velocity(compiled, model, latents, False, time, random_text(4 + seed), routing)
        expected = predict_velocity(plain, model, latents, False, time, random_text(4 + seed), routing)
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
        ours.sum().backward()
        counts.append(counter.frame_count)
    assert counts[1] == counts[2], "no new graph for another draw and another caption"


# What is drawn


def test_the_draw_keeps_its_share_and_the_first_units() -> None:
    kept = draw_kept(Route(0, 1, 0.3), 1, 1000, 100)
    assert len(kept) == 1000 - int(900 * 0.3)
    assert torch.equal(kept, kept.unique()), "ascending, once each"
    assert torch.equal(kept[:100], torch.arange(100))
    assert torch.equal(draw_kept(Route(0, 1, 0.3), 1, 1000, 100), kept)
    assert not torch.equal(draw_kept(Route(0, 1, 0.3), 2, 1000, 100), kept)


def test_every_free_unit_is_dropped_as_often_as_any() -> None:
    counts = torch.zeros(20)
    for seed in range(2000):
        counts[draw_kept(Route(0, 0, 0.5), seed, 20, 4)] += 1
    assert (counts[:4] == 2000).all()
    assert ((counts[4:] - 1000).abs() < 120).all(), "5 standard deviations are 112"


def test_kept_blocks_see_each_other_as_they_did() -> None:
    wide = sliding_tile_window((5, 3, 4), (3, 1, 3), CPU)
    blocks = draw_kept(Route(0, 0, 0.5), 3, 60, 0)
    window = window_between(NablaParameters(0.8, pack_bits(wide)), blocks).window_NW
    assert torch.equal(unpack_bits(window, 30), wide[blocks][:, blocks])
    where = torch.stack(torch.meshgrid(*(torch.arange(n) for n in (5, 3, 4)), indexing="ij"), -1).view(-1, 3)[blocks]
    apart = (where[:, None] - where[None]).abs()
    assert torch.equal(unpack_bits(window, 30), (apart <= torch.tensor([1, 0, 1])).all(-1))


def test_training_is_routed_by_seed_epoch_and_clip_and_validation_is_not(tiny_t2v: Path) -> None:
    transformer = our_model(tiny_t2v).eval()
    plain = objective(tiny_t2v)
    routed = dataclasses.replace(plain, routes=(Route(1, 2, 0.5),))
    seen: list[Any] = []
    hook = transformer.register_forward_hook(
        lambda module, args, kwargs, output: seen.append(kwargs.get("routing")), with_kwargs=True
    )
    clips = [random_clip(seed) for seed in (0, 1)]
    for epoch, clip in ((0, clips[0]), (0, clips[0]), (1, clips[0]), (0, clips[1])):
        routed.training_loss(transformer, clip, clip.text, epoch)
    assert seen[0] == seen[1]
    assert len({routing.seed for routing in seen}) == 3
    loss = routed.validation_loss(transformer, clips[0], clips[0].text, 1, 4)
    assert seen[-1] is None
    assert loss == plain.validation_loss(transformer, clips[0], clips[0].text, 1, 4)
    hook.remove()


# Rules and costs


@pytest.mark.parametrize(
    ("routes", "key"),
    [
        ([route(0.0, 0, -1)], "selection_ratio"),
        ([route(1.0, 0, -1)], "selection_ratio"),
        ([route(0.5, 4, -1)], "start_layer_idx"),
        ([route(0.5, 0, -5)], "end_layer_idx"),
        ([route(0.5, 2, 1)], "end_layer_idx"),
        ([route(0.5, 0, 1), route(0.5, 1, 3)], "tread.routes"),
        (["{selection_ratio:0.5,start_layer_idx:1}"], "end_layer_idx"),
        (["{selection_ratio:0.5,start_layer_idx:1,end_layer_idx:2,ratio:1}"], "ratio"),
    ],
)
def test_routes_that_cannot_be(routes: list[str], key: str) -> None:
    with pytest.raises(ConfigError) as error:
        configured(*routes)
    assert key in error.value.key


def test_negative_blocks_count_from_the_end_and_any_order_will_do() -> None:
    config = configured(route(0.3, -1, -1), route(0.5, 0, -3))
    assert config.tread.resolve(4) == (Route(0, 1, 0.5), Route(3, 3, 0.3))


def fingerprint(config: RunConfig) -> str:
    return make_plan(config, ClusterFacts(0), "weights").run_fingerprint


def test_routes_are_part_of_what_is_learnt_by_what_they_come_to() -> None:
    off, on = configured(), configured(route(0.5, 1, 2))
    assert fingerprint(configured(route(0.5, -3, -2))) == fingerprint(on) != fingerprint(off)
    assert fingerprint(configured(route(0.4, 1, 2))) != fingerprint(on)


def test_operations_and_memory_follow_the_kept_tokens() -> None:
    lite = ("cluster.gpus_per_node=1", "data.resolution=[512,768]")
    off, on = (configured(*r, flavour="t2v-lite-sft-5s", more=lite) for r in ((), (route(0.5, 2, -2),)))
    plans = [make_plan(each, ClusterFacts(1, "NVIDIA H200"), "weights") for each in (off, on)]
    shape = plans[0].buckets[0].token_shape
    tokens, kept = math.prod(shape), math.prod(shape) - math.prod(shape) // 2
    all_of, some = forward_flops(off.model, tokens), forward_flops(off.model, kept)
    expected = (3 * all_of.attention + 29 * some.attention) / 32
    assert clip_flops(on, shape).attention == pytest.approx(expected, rel=1e-3)
    assert clip_flops(on, shape).training("lora") < 0.55 * clip_flops(off, shape).training("lora")
    full = dataclasses.replace(plans[0].recompute, keep=0, attention=0, offload=0)
    off_gib, on_gib = (memory.predict(p.config, p.world, p.buckets[0], full) for p in plans)
    assert on_gib.kept < 0.6 * off_gib.kept
    assert on_gib.total < off_gib.total


def test_the_first_frame_is_never_counted_as_dropped() -> None:
    config = configured(route(0.5, 0, -1), flavour="i2v-tiny")
    assert config.tread.tokens_of_blocks(config.model, (5, 4, 6), first_frame=True) == (120 - 48,) * 4
