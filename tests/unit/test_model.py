"""The model computes what diffusers computes: velocities, gradients, sparse maps; adapters change it as they should."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import diffusers.models.transformers.transformer_kandinsky as stock
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import (
    Kandinsky5I2VPipeline,
    Kandinsky5T2VPipeline,
    Kandinsky5Transformer3DModel,
)
from PIL import Image
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention.flex_attention import BlockMask
from torch.utils._python_dispatch import TorchDispatchMode

from k5dist.compose import compose, to_run_config
from k5dist.config import ConfigError
from k5dist.model.attention import attend, dense_attention, prefer_flash
from k5dist.model.dit import FP32_MODULES, VideoTransformer
from k5dist.model.forward import predict_velocity, rope_scale_factor
from k5dist.model.nabla import (
    BLOCK_TOKENS,
    NablaParameters,
    nabla_map,
    pack_bits,
    sliding_tile_window,
    unpack_bits,
)
from k5dist.model.weights import is_adapter
from k5dist.train.parallelise import compile_blocks
from tests.unit.models import (
    CPU,
    check_parity,
    load_pipeline,
    lora_config,
    model_config,
    our_model,
    pipeline_calls,
    random,
    random_text,
    relative,
)


@pytest.mark.parametrize(
    ("shape", "lengths"),
    [((17, 64, 96), (12, 5)), ((1, 480, 496), (3, 1)), ((5, 128, 64), (256, 40)), ((1, 1024, 480), (7, 7))],
    ids=["small", "standard definition", "portrait", "high definition"],
)
def test_text_to_video_equals_diffusers(tiny_t2v: Path, shape: tuple[int, int, int], lengths: tuple[int, int]) -> None:
    pipeline = load_pipeline(Kandinsky5T2VPipeline, tiny_t2v)
    check_parity(tiny_t2v, pipeline, pipeline_calls(pipeline, shape, lengths), first_frame=False)


@pytest.mark.parametrize(("shape", "lengths"), [((17, 64, 96), (9, 30)), ((21, 96, 64), (1, 1))])
def test_image_to_video_equals_diffusers(tiny_i2v: Path, shape: tuple[int, int, int], lengths: tuple[int, int]) -> None:
    pipeline = load_pipeline(Kandinsky5I2VPipeline, tiny_i2v)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*shape[1:], 3), dtype=np.uint8))
    check_parity(tiny_i2v, pipeline, pipeline_calls(pipeline, shape, lengths, image=image), first_frame=True)


def test_rope_scale_is_the_pipelines(tiny_t2v: Path) -> None:
    pipeline = load_pipeline(Kandinsky5T2VPipeline, tiny_t2v)
    sides = (64, 464, 480, 512, 768, 848, 864, 1024, 1280)
    for height in sides:
        for width in sides:
            assert rope_scale_factor(height, width) == pipeline._get_scale_factor(height, width)


def test_the_rope_scale_and_the_first_frame_matter(tiny_i2v: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transformer, model, time, text = our_model(tiny_i2v), model_config(tiny_i2v), torch.tensor([500.0]), random_text(4)
    latents = random(1, 2, 8, 8, 16)
    with torch.no_grad():
        out = predict_velocity(transformer, model, latents, True, time, text)
        unconditioned = predict_velocity(transformer, model, latents, False, time, text)
        monkeypatch.setattr("k5dist.model.forward.rope_scale_factor", lambda height, width: (1.0, 2.0, 2.0))
        other_scale = predict_velocity(transformer, model, latents, True, time, text)
    assert relative(unconditioned, out) > 1e-3
    assert relative(other_scale, out) > 1e-3


@pytest.mark.parametrize("flavour", ["t2v-lite-sft-5s", "t2v-pro-sft-5s-hd", "t2v-tiny"])
def test_every_parameter_has_diffusers_name_and_shape(flavour: str) -> None:
    """Of the real architectures, too: on the meta device they weigh nothing."""
    model = to_run_config(compose([f"+flavour={flavour}"])).model
    with torch.device("meta"):
        ours, theirs = VideoTransformer(model), Kandinsky5Transformer3DModel(**dataclasses.asdict(model))
    shapes = [(name, parameter.shape) for name, parameter in theirs.named_parameters()]
    assert [(name, parameter.shape) for name, parameter in ours.named_parameters()] == shapes
    assert set(FP32_MODULES) == set(Kandinsky5Transformer3DModel._keep_in_fp32_modules)


def test_a_block_is_one_graph_for_every_text_length(tiny_t2v: Path) -> None:
    """Compiled whole (as on a GPU, with another backend), for training and each recomputation, with the same result."""
    model, latents, time = model_config(tiny_t2v), random(1, 2, 8, 12, 16), torch.tensor([500.0])
    plain, compiled = our_model(tiny_t2v), our_model(tiny_t2v)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    blocks: Any = compiled.get_submodule("visual_transformer_blocks")
    for block, policy in zip(blocks, ("none", "linear", "attention", "full"), strict=True):
        block.recompute = policy
    with torch._dynamo.config.patch(automatic_dynamic_shapes=False, recompile_limit=8, accumulated_recompile_limit=64):
        compile_blocks(compiled, counter)  # type: ignore[arg-type]
        for length in (9, 5, 7):
            text = random_text(length)
            outs = [predict_velocity(each, model, latents, False, time, text) for each in (plain, compiled)]
            torch.testing.assert_close(outs[1], outs[0], rtol=0, atol=1e-5)
            for out in outs:
                out.square().sum().backward()
    assert counter.frame_count == 4, "one a policy"
    for (name, ours), (_, reference) in zip(compiled.named_parameters(), plain.named_parameters(), strict=True):
        assert ours.grad is not None and reference.grad is not None
        assert relative(ours.grad, reference.grad) <= 1e-4 or float(reference.grad.norm()) < 1e-5, name


@pytest.mark.parametrize(("recompute", "times"), [("none", 1), ("linear", 1), ("attention", 1), ("full", 2)])
def test_self_attention_is_computed_again_only_where_it_is_not_kept(tiny_t2v: Path, recompute: str, times: int) -> None:
    transformer, model = our_model(tiny_t2v), model_config(tiny_t2v)
    blocks = list(transformer.get_submodule("visual_transformer_blocks").children())
    for block in blocks:
        block.recompute = recompute  # type: ignore[assignment]
    calls: list[tuple[int, int]] = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if "scaled_dot_product" in str(func) and "backward" not in str(func):
                calls.append((args[0].shape[2], args[1].shape[2]))
            return func(*args, **(kwargs or {}))

    with Count():
        velocity = predict_velocity(
            transformer, model, random(1, 2, 8, 12, 16), False, torch.tensor([500.0]), random_text(5)
        )
        velocity.sum().backward()
    assert calls.count((48, 48)) == times * len(blocks)
    assert calls.count((48, 5)) == (1 if recompute == "none" else 2) * len(blocks), "cross-attention is cheap"


@pytest.mark.parametrize("version", ["flash3", "flash4"])
def test_flash_attention_belongs_to_bf16(version: str) -> None:
    with pytest.raises(ConfigError, match="FlashAttention takes bf16"):
        to_run_config(compose(["+flavour=t2v-tiny", f"train.attention={version}"]))


def test_a_missing_flash_package_is_the_users_to_install(tiny_t2v: Path) -> None:
    with pytest.raises(ConfigError, match="its package must be installed"):
        prefer_flash(our_model(tiny_t2v), "flash4")


# Sparse attention


def expand(blocks: Any) -> Tensor:
    """A BlockMask's lists of whole blocks as bool [B, H, N, N]."""
    counts, indices = blocks.full_kv_num_blocks, blocks.full_kv_indices
    listed = torch.arange(indices.shape[-1]) < counts[..., None]
    return torch.zeros_like(indices, dtype=torch.bool).scatter_(-1, indices.long(), listed)


def expand_tokens(blocks: Tensor) -> Tensor:
    return blocks.repeat_interleave(BLOCK_TOKENS, -2).repeat_interleave(BLOCK_TOKENS, -1)


@pytest.mark.parametrize("probability", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("contrast", [0.1, 8.0])
def test_the_nabla_map_is_diffusers(probability: float, contrast: float) -> None:
    query, key = random(2, 12 * BLOCK_TOKENS, 3, 16) * contrast, random(2, 12 * BLOCK_TOKENS, 3, 16, seed=1) * contrast
    window = sliding_tile_window((3, 2, 2), (3, 1, 1), CPU)[None, None]
    ours = unpack_bits(nabla_map(query, key, NablaParameters(probability, pack_bits(window[0, 0]))), 12)
    theirs = stock.nablaT_v2(query, key, window, thr=probability)
    assert torch.equal(ours, expand(theirs))
    assert 0 < ours.float().mean() < 1


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 2, 2), (5, 1, 4), (4, 3, 2), (13, 2, 3)])
@pytest.mark.parametrize("window", [(3, 1, 1), (11, 3, 3), (1, 5, 3)])
def test_the_window_is_the_pipelines(shape: tuple[int, int, int], window: tuple[int, int, int]) -> None:
    theirs = Kandinsky5T2VPipeline.fast_sta_nabla(*shape, *window, device="cpu")
    assert torch.equal(sliding_tile_window(shape, window, CPU), theirs)


def test_nabla_attention_is_masked_attention() -> None:
    query, key, value = (random(1, 6 * BLOCK_TOKENS, 2, 16, seed=seed) * 4 for seed in range(3))
    parameters = NablaParameters(0.5, pack_bits(torch.eye(6, dtype=torch.bool)))
    blocks = unpack_bits(nabla_map(query, key, parameters), 6)
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / math.sqrt(16)
    weights = scores.masked_fill(~expand_tokens(blocks), -math.inf).softmax(-1)
    expected = torch.einsum("bhqk,bkhd->bqhd", weights, value)
    sparse = attend(query, key, value, parameters)
    torch.testing.assert_close(sparse, expected, rtol=0, atol=1e-5)
    assert not torch.equal(blocks[:, 0], blocks[:, 1]), "every head has a map of its own"
    assert relative(dense_attention(query, key, value), sparse) > 1e-2


def masked_dispatch(query: Tensor, key: Tensor, value: Tensor, attn_mask: BlockMask | None, **_: Any) -> Tensor:
    """diffusers' attention call with a BlockMask taken at its word, which no CPU backend of theirs does."""
    if attn_mask is None:
        return dense_attention(query, key, value)
    mask = expand_tokens(expand(attn_mask))
    # A head at a time: one call for all rounds otherwise, and RoPE's rounding to bf16 makes the most of it.
    return torch.stack(
        [
            F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, head])
            for head, (q, k, v) in enumerate(zip(query.unbind(2), key.unbind(2), value.unbind(2), strict=True))
        ],
        dim=2,
    )


def test_a_nabla_model_equals_diffusers(tiny_nabla: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stock, "dispatch_attention_fn", masked_dispatch)
    pipeline = load_pipeline(Kandinsky5T2VPipeline, tiny_nabla)
    calls = pipeline_calls(pipeline, (9, 128, 256), (12, 5))
    assert calls[0][0]["sparse_params"]["P"] == 0.6
    check_parity(tiny_nabla, pipeline, calls, first_frame=False)


def test_a_nabla_model_is_not_dense(tiny_nabla: Path) -> None:
    transformer, model = our_model(tiny_nabla), model_config(tiny_nabla)
    arguments: Any = (random(1, 5, 16, 32, 16), False, torch.tensor([500.0]), random_text(4))
    with torch.no_grad():
        sparse = predict_velocity(transformer, model, *arguments)
        dense = predict_velocity(transformer, dataclasses.replace(model, attention_type="regular"), *arguments)
    assert relative(dense, sparse) > 1e-3


# Adapters


def adapted_modules(transformer: nn.Module) -> set[str]:
    return {name.partition(".lora_")[0] for name, _ in transformer.named_parameters() if is_adapter(name)}


@pytest.mark.parametrize("targets", ["attention", "attention+ffn"])
def test_lora_is_on_the_blocks_projections_only(tiny_t2v: Path, targets: str) -> None:
    model = model_config(tiny_t2v)
    blocks = [(f"text_transformer_blocks.{i}", ["self_attention"]) for i in range(model.num_text_blocks)]
    attentions = ["self_attention", "cross_attention"]
    blocks += [(f"visual_transformer_blocks.{i}", attentions) for i in range(model.num_visual_blocks)]
    wanted = set()
    for block, names in blocks:
        for projection in ("to_query", "to_key", "to_value", "out_layer"):
            wanted |= {f"{block}.{name}.{projection}" for name in names}
        if targets == "attention+ffn":
            wanted |= {f"{block}.feed_forward.in_layer", f"{block}.feed_forward.out_layer"}
    transformer = our_model(tiny_t2v, lora_config(4, 4.0, targets))
    assert adapted_modules(transformer) == wanted
    assert all(parameter.requires_grad == is_adapter(name) for name, parameter in transformer.named_parameters())


def test_fresh_adapters_change_nothing(tiny_t2v: Path) -> None:
    model = model_config(tiny_t2v)
    adapted = our_model(tiny_t2v, lora_config(4, 8.0, "attention+ffn"))
    arguments: Any = (model, random(1, 2, 8, 12, 16), False, torch.tensor([500.0]), random_text(4))
    with torch.no_grad():
        base = predict_velocity(our_model(tiny_t2v), *arguments)
        assert torch.equal(predict_velocity(adapted, *arguments), base)
        for name, parameter in adapted.named_parameters():
            if ".lora_B." in name:
                parameter.fill_(0.1)
        assert relative(predict_velocity(adapted, *arguments), base) > 1e-3


def test_adapters_start_from_the_seed(tiny_t2v: Path) -> None:
    lora = lora_config(4, 4.0, "attention")

    def first_factors(seed: int) -> dict[str, Tensor]:
        parameters = our_model(tiny_t2v, lora, seed).named_parameters()
        return {name: parameter.detach() for name, parameter in parameters if ".lora_A." in name}

    one, again, other = first_factors(0), first_factors(0), first_factors(1)
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one)
    assert len({float(factor[0, 0]) for factor in one.values()}) == len(one), "no two layers start alike"
