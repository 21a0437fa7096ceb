"""The objective: what is noised, how, and what the loss counts; the optimiser's schedule."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import Kandinsky5I2VPipeline
from PIL import Image
from torch import Tensor, nn

from k5dist.cache.keys import seed_of, unit_interval
from k5dist.compose import compose, to_run_config
from k5dist.config import OptimizerConfig, TrainConfig
from k5dist.model.encoders import VideoAutoencoder
from k5dist.train.objective import Clip, Objective
from k5dist.train.optimiser import learning_rate, make_optimiser, optimiser_tensors
from tests.unit.models import (
    CPU,
    SCALE,
    load_pipeline,
    model_config,
    our_model,
    random,
    random_frames,
    random_text,
    relative,
)

# The objective


def train_config(*overrides: str) -> TrainConfig:
    return to_run_config(compose(["+flavour=t2v-tiny", *overrides])).train


def objective(folder: Path, *, first_frame: bool = False, draw: bool = False, shift: float = 5.0) -> Objective:
    return Objective(
        model=model_config(folder),
        train=train_config("train.timestep_mean=0.3", "train.timestep_std=1.2"),
        **{"first_frame": first_frame, "shift": shift, "scaling_factor": SCALE, "draw": draw},
        **{"device": CPU, "dtype": torch.float32},
    )


def random_clip(seed: int = 0) -> Clip:
    mean, first = random(5, 8, 12, 16, seed=seed) / SCALE, random(1, 8, 12, 16, seed=seed + 100) / SCALE
    logvar = torch.full_like(mean, -3.0)
    return Clip(f"clip-{seed}", mean, logvar, first, logvar[:1], random_text(6, seed=seed))


def model_inputs(transformer: nn.Module, loss: Any) -> dict[str, Any]:
    """What the model is given while `loss()` is computed, with its answer."""
    seen: list[dict[str, Any]] = []
    names = ("latents", "text", "pooled", "timestep", "scale_factor", "sparsity")
    hook = transformer.register_forward_hook(
        lambda module, args, kwargs, output: seen.append({**dict(zip(names, args, strict=True)), "velocity": output}),
        with_kwargs=True,
    )
    with torch.no_grad():
        value = loss()
    hook.remove()
    return {**seen[-1], "loss": value}


def keyed_noise(*where: object, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed_of(*where)))


@pytest.mark.parametrize("shift", [1.0, 5.0, 10.0])
def test_sigma_is_a_shifted_logit_normal(tiny_t2v: Path, shift: float) -> None:
    sigma = objective(tiny_t2v, shift=shift).sigma
    quantiles = torch.linspace(0.01, 0.99, 25, dtype=torch.float64)
    plain = torch.sigmoid(0.3 + 1.2 * torch.special.ndtri(quantiles))
    expected = shift * plain / (1 + (shift - 1) * plain)
    torch.testing.assert_close(torch.tensor([sigma(float(q)) for q in quantiles], dtype=torch.float64), expected)
    assert 0 < sigma(0.0) < sigma(1.0) < 1


@pytest.mark.parametrize("draw", [False, True])
def test_the_loss_is_flow_matching(tiny_t2v: Path, draw: bool) -> None:
    goal, clip, transformer = objective(tiny_t2v, draw=draw), random_clip(), our_model(tiny_t2v)
    seen = model_inputs(transformer, lambda: goal.training_loss(transformer, clip, clip.text, 3))
    where = (goal.train.seed, 3, clip.key)
    shape = clip.mean_THWC.shape
    clean = clip.mean_THWC * SCALE
    if draw:
        clean = clean + SCALE * math.exp(-1.5) * keyed_noise(*where, "posterior", shape=shape)
    noise, sigma = keyed_noise(*where, "noise", shape=shape), goal.sigma(unit_interval(*where, "sigma"))
    torch.testing.assert_close(seen["latents"][0, ..., :16], (1 - sigma) * clean + sigma * noise)
    assert seen["latents"][0, ..., 16:].count_nonzero() == 0
    assert seen["timestep"].dtype == torch.float32
    assert seen["timestep"].item() == pytest.approx(1000 * sigma)
    torch.testing.assert_close(seen["loss"], (seen["velocity"][0] - (noise - clean)).square().mean())


def test_draws_hang_on_clip_and_epoch_alone(tiny_t2v: Path) -> None:
    goal, transformer = objective(tiny_t2v, draw=True), our_model(tiny_t2v)

    def losses(order: list[tuple[int, int]]) -> dict[tuple[int, int], float]:
        torch.manual_seed(len(order))
        with torch.no_grad():
            clips = {seed: random_clip(seed) for seed, _ in order}
            return {
                (seed, epoch): float(goal.training_loss(transformer, clips[seed], clips[seed].text, epoch))
                for seed, epoch in order
            }

    forwards = losses([(0, 0), (1, 0), (0, 1), (1, 1)])
    assert losses([(1, 1), (0, 1), (0, 0)]).items() <= forwards.items()
    assert len(set(forwards.values())) == 4


def test_validation_is_the_same_every_time(tiny_t2v: Path) -> None:
    goal, transformer, clip = objective(tiny_t2v, draw=True), our_model(tiny_t2v), random_clip()
    seen = [
        model_inputs(transformer, lambda level=level: goal.validation_loss(transformer, clip, clip.text, level, 4))
        for level in (0, 1, 2, 3, 0)
    ]
    times = [float(call["timestep"]) for call in seen]
    assert times == sorted(times[:4]) + times[:1]
    assert times[1] == pytest.approx(1000 * goal.sigma(1.5 / 4))
    assert float(seen[0]["loss"]) == float(seen[4]["loss"])


def test_the_first_frame_stands_where_the_pipeline_puts_it(tiny_i2v: Path) -> None:
    pipeline = load_pipeline(Kandinsky5I2VPipeline, tiny_i2v)
    picture = random_frames(1)
    generator = torch.Generator().manual_seed(4)
    prepared = pipeline.prepare_latents(
        Image.fromarray(picture[0]), 1, 16, 64, 96, 17, torch.float32, CPU, generator=generator
    )
    # The cache's posterior of the first frame is the one that the pipeline draws from.
    mean, logvar = VideoAutoencoder(str(tiny_i2v), "cpu").encode(picture)
    generator.manual_seed(4)
    torch.randn(1, 5, 8, 12, 16, generator=generator)
    deviation = (0.5 * logvar).exp() * torch.randn(1, 16, 1, 8, 12, generator=generator)[0].permute(1, 2, 3, 0)
    torch.testing.assert_close((mean + deviation) * SCALE, prepared[0, :1, ..., :16], rtol=0, atol=1e-5)
    # What the model is given has it in the noise channels of frame 0, and the pipeline's other channels.
    goal, transformer = objective(tiny_i2v, first_frame=True), our_model(tiny_i2v)
    clip = dataclasses.replace(random_clip(), first_mean_1HWC=mean + deviation, first_logvar_1HWC=logvar)
    seen = model_inputs(transformer, lambda: goal.training_loss(transformer, clip, clip.text, 0))
    given = seen["latents"]
    assert given.shape == prepared.shape
    torch.testing.assert_close(given[:, :1], prepared[:, :1], rtol=0, atol=1e-5)
    assert torch.equal(given[..., 16:], prepared[..., 16:])
    noise = keyed_noise(goal.train.seed, 0, clip.key, "noise", shape=(5, 8, 12, 16))
    error = (seen["velocity"][0] - (noise - clip.mean_THWC * SCALE)).square()
    torch.testing.assert_close(seen["loss"], error[1:].mean())


def test_the_loss_ignores_frame_0_of_image_to_video(tiny_i2v: Path) -> None:
    goal, transformer, clip = objective(tiny_i2v, first_frame=True), our_model(tiny_i2v), random_clip()
    assert clip.first_mean_1HWC is not None
    elsewhere = clip.mean_THWC.clone()
    elsewhere[0] += 5
    other = dataclasses.replace(clip, mean_THWC=elsewhere)
    moved = dataclasses.replace(clip, first_mean_1HWC=clip.first_mean_1HWC + 5)
    with torch.no_grad():
        loss, same, different = (goal.training_loss(transformer, c, c.text, 0) for c in (clip, other, moved))
    assert torch.equal(loss, same)
    assert not torch.equal(loss, different)


def test_caption_dropout_leaves_no_clip_uncaptioned_for_ever(tiny_t2v: Path) -> None:
    goal = objective(tiny_t2v)
    drops = np.array([[goal.drops_caption(f"clip-{i}", epoch) for i in range(50)] for epoch in range(100)])
    assert abs(drops.mean() - 0.1) < 0.02
    assert drops.any(0).all(), "every clip is dropped at times"
    assert drops.mean(0).max() < 0.3
    assert len({row.tobytes() for row in drops}) > 90, "epochs differ"
    none, all_ = (
        dataclasses.replace(goal, train=dataclasses.replace(goal.train, caption_dropout=rate)) for rate in (0.0, 1.0)
    )
    assert not any(none.drops_caption(f"clip-{i}", 0) for i in range(50))
    assert all(all_.drops_caption(f"clip-{i}", 0) for i in range(50))


# The optimiser


def optimizer_config(*overrides: str) -> OptimizerConfig:
    return to_run_config(compose(["+flavour=t2v-tiny", *overrides])).optimizer


def test_the_learning_rate_warms_up_and_then_keeps_or_falls() -> None:
    constant = optimizer_config("optimizer.lr=0.8", "optimizer.warmup_steps=4")
    assert [learning_rate(constant, step, 8) for step in range(1, 9)] == pytest.approx([0.2, 0.4, 0.6] + [0.8] * 5)
    cosine = dataclasses.replace(constant, schedule="cosine")
    rates = [learning_rate(cosine, step, 12) for step in range(1, 13)]
    assert rates[3] == pytest.approx(0.8)
    assert rates[7] == pytest.approx(0.4)
    assert rates[11] == pytest.approx(0, abs=1e-12)
    assert sorted(rates[3:], reverse=True) == rates[3:]
    assert learning_rate(optimizer_config("optimizer.lr=0.8", "optimizer.warmup_steps=0"), 1, 8) == 0.8


def test_allocating_the_optimisers_state_moves_no_weight() -> None:
    config = optimizer_config("optimizer.lr=0.1", "optimizer.weight_decay=0.5")

    def small() -> nn.Linear:
        layer = nn.Linear(4, 3)
        layer.load_state_dict({"weight": random(3, 4), "bias": random(3, seed=1)})
        return layer

    allocated, untouched = small(), small()
    optimisers = [make_optimiser(model, config, CPU) for model in (allocated, untouched)]
    state = optimiser_tensors(allocated, optimisers[0])
    assert set(state) == {"weight", "bias"}
    assert set(state["weight"]) == {"step", "exp_avg", "exp_avg_sq"}
    assert all(value.count_nonzero() == 0 for values in state.values() for value in values.values())
    assert torch.equal(allocated.weight, untouched.weight)
    assert allocated.weight.grad is None
    for model, optimiser in zip((allocated, untouched), optimisers, strict=True):
        model(random(2, 4, seed=2)).square().sum().backward()
        optimiser.step()
    assert torch.equal(allocated.weight, untouched.weight), "and the first step is that of a fresh optimiser"


# Image-to-video


def test_a_clip_without_its_first_frame_trains_as_text_to_video(tiny_i2v: Path) -> None:
    goal, transformer, clip = objective(tiny_i2v, first_frame=True), our_model(tiny_i2v), random_clip()
    rates = (0.0, 1.0)
    kept, dropped = (
        dataclasses.replace(goal, train=dataclasses.replace(goal.train, first_frame_dropout=rate)) for rate in rates
    )
    with torch.no_grad():
        plain = dataclasses.replace(goal, first_frame=False).training_loss(transformer, clip, clip.text, 3)
        assert torch.equal(dropped.training_loss(transformer, clip, clip.text, 3), plain)
        assert not torch.equal(kept.training_loss(transformer, clip, clip.text, 3), plain)
        held_out = [each.validation_loss(transformer, clip, clip.text, 0, 2) for each in (kept, dropped)]
    assert torch.equal(*held_out), "validation is image-to-video"


def test_first_frames_are_dropped_at_their_rate_and_apart_from_captions(tiny_i2v: Path) -> None:
    goal = objective(tiny_i2v, first_frame=True)
    half = dataclasses.replace(
        goal, train=dataclasses.replace(goal.train, first_frame_dropout=0.5, caption_dropout=0.5)
    )
    keys = [(f"clip-{i}", epoch) for i in range(40) for epoch in range(40)]
    frames, captions = (np.array([f(*key) for key in keys]) for f in (half.drops_first_frame, half.drops_caption))
    assert abs(frames.mean() - 0.5) < 0.05
    assert abs((frames & captions).mean() - 0.25) < 0.05
    assert len({frames.reshape(40, 40)[:, epoch].tobytes() for epoch in range(40)}) == 40, "epochs differ"


def test_the_input_is_what_the_inference_pipeline_prepares(tiny_i2v: Path) -> None:
    """diffusers' own `prepare_latents`, from a picture on, and ours at σ = 1 from what precache keeps of it."""
    picture = random_frames(1)[0]
    pipeline = load_pipeline(Kandinsky5I2VPipeline, tiny_i2v)
    theirs = pipeline.prepare_latents(
        image=Image.fromarray(picture),
        batch_size=1,
        height=64,
        width=96,
        num_frames=17,
        dtype=torch.float32,
        device=CPU,
        generator=torch.Generator().manual_seed(5),
    )
    generator = torch.Generator().manual_seed(5)
    noise = torch.randn(1, 5, 8, 12, 16, generator=generator)[0]
    draw = torch.randn(1, 16, 1, 8, 12, generator=generator)[0].permute(1, 2, 3, 0)
    mean, logvar = VideoAutoencoder(str(tiny_i2v), "cpu").encode(picture[None])
    first = mean + (0.5 * logvar).exp() * draw

    class Drawn(Objective):
        def sigma(self, uniform: float, tokens: int | None = None) -> float:
            return 1.0

        def _noise(self, shape: torch.Size, where: tuple[object, ...]) -> Tensor:
            return noise if where[-1] == "noise" else draw

    class Recording(nn.Module):
        def forward(self, hidden: Tensor, *rest: object) -> Tensor:
            self.hidden = hidden
            return hidden[..., :16]

    fields = {f.name: getattr(objective(tiny_i2v, first_frame=True), f.name) for f in dataclasses.fields(Objective)}
    goal, stub = Drawn(**{**fields, "draw": True}), Recording()
    clip = dataclasses.replace(
        random_clip(), mean_THWC=torch.zeros(5, 8, 12, 16), logvar_THWC=torch.zeros(5, 8, 12, 16)
    )
    clip = dataclasses.replace(clip, first_mean_1HWC=mean, first_logvar_1HWC=logvar)
    goal.training_loss(stub, clip, clip.text, 0)
    assert stub.hidden.shape == theirs.shape == (1, 5, 8, 12, 33)
    torch.testing.assert_close(stub.hidden, theirs, rtol=0, atol=1e-5)
    assert torch.equal(stub.hidden[0, 1:, ..., :16], theirs[0, 1:, ..., :16])
    assert relative(stub.hidden[0, :1, ..., :16], first * SCALE) < 1e-5
