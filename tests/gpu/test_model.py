"""The compiled bf16 model on a GPU, through the kernels that training uses, against diffusers' in fp32."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import Kandinsky5Transformer3DModel
from torch import Tensor, nn

from k5dist.benchmark.settings import Benchmark, BenchmarkSettings, plan_benchmark
from k5dist.compose import compose, to_run_config
from k5dist.config import ModelConfig
from k5dist.estimate import Recompute
from k5dist.model import nabla
from k5dist.model.dit import FP32_MODULES, VideoTransformer
from k5dist.model.forward import Text, predict_velocity
from k5dist.train.parallelise import compile_blocks, set_recompute
from k5dist.world import ClusterFacts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
GPU = torch.device("cuda")


def model_config(flavour: str, **changes: Any) -> ModelConfig:
    """A real architecture's heads and widths of text, narrower and with few blocks."""
    model = to_run_config(compose([f"+flavour={flavour}"])).model
    small = {
        "model_dim": 4 * model.head_dim,
        "ff_dim": 16 * model.head_dim,
        "num_text_blocks": 1,
        "num_visual_blocks": 2,
    }
    return dataclasses.replace(model, **{**small, **changes})


def weights(model: ModelConfig) -> dict[str, Tensor]:
    torch.manual_seed(0)
    with torch.device("cpu"):
        reference = VideoTransformer(model)
    for name, parameter in reference.named_parameters():
        if "modulation" in name:
            nn.init.normal_(parameter, std=0.05)
    return reference.state_dict()


def in_bf16(module: nn.Module) -> nn.Module:
    for name, parameter in module.named_parameters():
        if not any(part in FP32_MODULES for part in name.split(".")):
            parameter.data = parameter.data.bfloat16()
    return module.to(GPU)


def inputs(model: ModelConfig, shape: tuple[int, int, int], length: int) -> tuple[Tensor, Text, Tensor]:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(1, *shape, 16, generator=generator)
    qwen = torch.randn(1, length, model.in_text_dim, generator=generator)
    text = Text(qwen, torch.randn(1, model.in_text_dim2, generator=generator))
    return latents.to(GPU), text.to(GPU, torch.float32), torch.tensor([417.3], device=GPU)


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.float() for name, p in module.named_parameters() if p.grad is not None}


def relative(out: Tensor, reference: Tensor) -> float:
    return float((out.float() - reference.float()).norm() / reference.float().norm())


def run(module: nn.Module, velocity: Any) -> tuple[Tensor, dict[str, Tensor]]:
    out = velocity(module)
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(GPU)
    (out.float() * direction).sum().backward()
    return out.detach(), gradients(module)


def stock_velocity(
    module: nn.Module,
    latents: Tensor,
    text: Text,
    time: Tensor,
    first_frame: bool,
    dtype: torch.dtype,
) -> Tensor:
    _, frames, height, width, _ = latents.shape
    mask = latents.new_zeros(1, frames, height, width, 1)
    mask[:, 0] = float(first_frame)
    hidden = torch.cat([latents, torch.zeros_like(latents), mask], dim=-1).to(dtype)
    positions: Any = [torch.arange(size, device=GPU) for size in (frames, height // 2, width // 2)]
    text = text.to(GPU, dtype)
    # The rule of the pipeline: 480p's scale for sides within 480…854 pixels, else HD's.
    scale = (1.0, 2.0, 2.0) if all(480 <= 8 * side <= 854 for side in (height, width)) else (1.0, 3.16, 3.16)
    positions_L = torch.arange(text.qwen_1LD.shape[1], device=GPU)
    out = module(hidden, text.qwen_1LD, time, text.clip_1D, positions, positions_L, scale, None, return_dict=False)
    return out[0] if isinstance(out, tuple) else out


@pytest.mark.parametrize("first_frame", [False, True], ids=["t2v", "i2v"])
@pytest.mark.parametrize(
    "recompute", [Recompute(2, 0), Recompute(1, 1), Recompute(0, 0)], ids=["keep", "mixed", "full"]
)
@pytest.mark.parametrize("flavour", ["t2v-lite-sft-5s", "t2v-pro-sft-5s-hd"])
def test_dense_bf16_is_as_near_to_fp32_as_diffusers(flavour: str, recompute: Recompute, first_frame: bool) -> None:
    model = model_config(flavour, attention_type="regular")
    state = weights(model)
    latents, text, time = inputs(model, (5, 60, 64), 37)
    stocks = []
    for dtype in (torch.float32, torch.bfloat16):
        stock: Any = Kandinsky5Transformer3DModel(**dataclasses.asdict(model))
        stock.load_state_dict({name: tensor.clone() for name, tensor in state.items()})
        stock = stock.to(GPU) if dtype == torch.float32 else in_bf16(stock)
        velocity = functools.partial(
            stock_velocity, latents=latents, text=text, time=time, first_frame=first_frame, dtype=dtype
        )
        stocks.append(run(stock, velocity))
    ours = VideoTransformer(model)
    ours.load_state_dict(state)
    in_bf16(ours)
    set_recompute(ours, recompute)
    compile_blocks(ours)
    out, grads = run(
        ours,
        lambda m: predict_velocity(m, model, latents.bfloat16(), first_frame, time, text.to(GPU, torch.bfloat16)),
    )
    (exact, exact_grads), (stock_out, stock_grads) = stocks
    ours_off, stock_off = relative(out, exact), relative(stock_out, exact)
    assert ours_off <= 1.3 * stock_off + 1e-3, f"ours is off by {ours_off:.2e}, diffusers' by {stock_off:.2e}"
    noise = {name: relative(stock_grads[name], exact_grads[name]) for name in grads}
    errors = {name: relative(grads[name], exact_grads[name]) for name in grads}
    # Gradients of queries' and keys' biases are sums that almost cancel: noise by themselves, twice as large for one
    # order of rounding as for another on the same inputs.
    factor = {name: 3.0 if name.endswith(("to_query.bias", "to_key.bias")) else 1.5 for name in grads}
    worse = {name: (errors[name], noise[name]) for name in grads if errors[name] > factor[name] * noise[name] + 5e-3}
    assert not worse, {name: f"{ours:.2e} beside {theirs:.2e}" for name, (ours, theirs) in worse.items()}


@pytest.mark.parametrize("flavour", ["t2v-lite-sft-10s", "t2v-pro-sft-5s-hd"])
def test_nabla_bf16_is_near_the_masked_reference_in_fp32(flavour: str) -> None:
    """Each makes its own map, so blocks near the threshold differ, too; the bounds leave room for them."""
    model = model_config(flavour, attention_P=0.3, attention_wT=1, attention_wH=1, attention_wW=1)
    state = weights(model)
    latents, text, time = inputs(model, (5, 32, 48), 37)
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        ours = VideoTransformer(model)
        ours.load_state_dict(state)
        if dtype == torch.float32:
            ours.to(GPU)
        else:
            in_bf16(ours)
            compile_blocks(ours)
        results.append(
            run(
                ours,
                lambda m, dtype=dtype: predict_velocity(m, model, latents.to(dtype), False, time, text.to(GPU, dtype)),
            )
        )
    dense = VideoTransformer(model)
    dense.load_state_dict(state)
    regular = dataclasses.replace(model, attention_type="regular")
    with torch.no_grad():
        unmasked = predict_velocity(dense.to(GPU), regular, latents, False, time, text)
    (exact, exact_grads), (out, grads) = results
    off, other = relative(out, exact), relative(unmasked, exact)
    assert off <= 3e-2, f"off by {off:.2e}"
    assert other > 2 * off, f"dense attention is something else: {other:.2e} beside {off:.2e}"
    errors = {name: relative(grads[name], exact_grads[name]) for name in grads if not name.endswith("to_key.bias")}
    largest = sorted(((error, name) for name, error in errors.items()), reverse=True)[:5]
    assert largest[0][0] <= 0.15, largest
    mean = sum(errors.values()) / len(errors)
    assert mean <= 4e-2, (mean, largest)


def test_the_kernels_run_where_they_should(monkeypatch: pytest.MonkeyPatch) -> None:
    """bf16 on a GPU goes through Triton, not through the reference with its S × S."""
    from k5dist.model import nabla_triton

    calls: list[str] = []
    for name in ("forward", "backward"):
        kernel = getattr(nabla_triton, name)
        monkeypatch.setattr(nabla_triton, name, lambda *a, k=kernel, n=name: (calls.append(n), k(*a))[1])
    q, k, v = (torch.randn(1, 512, 2, 128, device=GPU, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    words = nabla.pack_bits(torch.eye(8, dtype=torch.bool, device=GPU)).expand(1, 2, 8, 1).contiguous()
    nabla.nabla_attention(q, k, v, words).sum().backward()
    assert calls == ["forward", "backward"]
    query, key, value = (x.unflatten(1, (8, 64)).transpose(2, 3) for x in (q, k, v))
    own = F.scaled_dot_product_attention(query, key, value)
    torch.testing.assert_close(
        nabla.nabla_attention(q, k, v, words), own.transpose(2, 3).flatten(1, 2), rtol=2e-2, atol=2e-2
    )


def test_a_step_waits_for_the_device_once(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The host runs ahead of the device through forward, backward and update, and looks only at the end."""
    import torch.distributed as dist

    from k5dist.benchmark.train import build, make_clip, make_objective, make_step
    from k5dist.train.optimiser import make_optimiser
    from k5dist.train.step import TrainStep

    for key, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29533"}.items():
        monkeypatch.setenv(key, value)
    settings = BenchmarkSettings(2, 1, 1, 64, 0.5, "none", False, None, None, None)
    overrides = ["+flavour=t2v-pro-sft-5s-hd", "data.num_frames=5", "data.resolution=[256,384]"]
    for adapter in (["adapter=lora"], ["adapter=full", "optimizer.kind=adamw_bf16"]):
        config = to_run_config(compose([*overrides, *adapter]))
        config = dataclasses.replace(config, model=model_config("t2v-pro-sft-5s-hd"))
        plan = plan_benchmark(config, settings, ClusterFacts(1, torch.cuda.get_device_name()))
        benchmark = Benchmark(plan, settings, "k5dist")
        dist.init_process_group("cpu:gloo,cuda:nccl", device_id=torch.device("cuda", 0))
        try:
            transformer = build(benchmark, GPU)
            optimiser = make_optimiser(transformer, plan.config.optimizer, GPU)
            work = TrainStep(plan, transformer, optimiser, make_objective(plan.config, GPU), None)
            clip = make_clip(benchmark)
            work.update(make_step(clip, 1, 1), 1)
            torch.cuda.set_sync_debug_mode("warn")
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                work.update(make_step(clip, 1, 2), 2)
            torch.cuda.set_sync_debug_mode("default")
        finally:
            dist.destroy_process_group()
        waits = [str(w.message) for w in caught if "synchroniz" in str(w.message)]
        places = [f"{w.filename}:{w.lineno}" for w in caught if "synchroniz" in str(w.message)]
        assert len(waits) == 1, (adapter, places)
