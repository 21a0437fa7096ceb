"""The model computes what diffusers computes: velocities, gradients, sparse maps, encodings, inputs."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import diffusers.models.transformers.transformer_kandinsky as stock
import fsspec
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKLHunyuanVideo,
    Kandinsky5I2VPipeline,
    Kandinsky5T2VPipeline,
    Kandinsky5Transformer3DModel,
)
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention.flex_attention import BlockMask
from torch.utils._python_dispatch import TorchDispatchMode

from k5dist.cache.keys import seed_of, unit_interval
from k5dist.compose import compose, to_run_config
from k5dist.config import ConfigError, LoraConfig, ModelConfig, OptimizerConfig, TrainConfig
from k5dist.model.attention import attend, dense_attention, prefer_flash
from k5dist.model.dit import FP32_MODULES, VideoTransformer
from k5dist.model.encoders import TextEncoders, VideoAutoencoder, text_encoding
from k5dist.model.forward import Text, predict_velocity, rope_scale_factor
from k5dist.model.nabla import (
    BLOCK_TOKENS,
    NablaParameters,
    nabla_map,
    pack_bits,
    sliding_tile_window,
    unpack_bits,
)
from k5dist.model.transformer import build_transformer, materialise
from k5dist.model.weights import WEIGHTS_NAME, base_parameters, is_adapter, load_weights
from k5dist.train.objective import Clip, Objective
from k5dist.train.optimiser import learning_rate, make_optimiser, optimiser_tensors

CPU = torch.device("cpu")
SCALE = 0.476986
CAPTIONS = ["a red car", "", "A dog's 2 tails\nwag.", "—日本 🙂", "Cyclists ride through a city street, in the rain"]


def model_config(folder: Path) -> ModelConfig:
    config = json.loads((folder / "transformer" / "config.json").read_text())
    values = {field.name: config.get(field.name) for field in dataclasses.fields(ModelConfig)}
    return ModelConfig(**{**values, "axes_dims": tuple(config["axes_dims"])})


def our_model(folder: Path, lora: LoraConfig | None = None, seed: int = 0) -> nn.Module:
    transformer = build_transformer(str(folder), model_config(folder), lora=lora, dtype=torch.float32)
    materialise(transformer, str(folder), device=CPU, seed=seed)
    return transformer


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_text(length: int, seed: int = 0) -> Text:
    return Text(random(1, length, 64, seed=seed), random(1, 32, seed=seed + 1))


def random_frames(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 64, 96, 3), dtype=np.uint8)


def relative(out: Tensor, reference: Tensor) -> float:
    return float((out - reference).norm() / reference.norm().clamp_min(1e-12))


# The forward and its gradients


def pipeline_calls(pipeline: Any, shape: tuple[int, int, int], lengths: tuple[int, int], **options: Any) -> list[Any]:
    """What the inference pipeline gives its transformer in one guided step, with the transformer's answers."""
    calls: list[tuple[dict[str, Any], Tensor]] = []

    def record(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        calls.append(({**kwargs, "hidden_states": kwargs["hidden_states"].clone()}, output.sample.clone()))

    frames, height, width = shape
    text, negative = random_text(lengths[0], seed=10), random_text(lengths[1], seed=20)
    pipeline.set_progress_bar_config(disable=True)
    hook = pipeline.transformer.register_forward_hook(record, with_kwargs=True)
    pipeline(
        **{"prompt_embeds_qwen": text.qwen_1LD, "prompt_embeds_clip": text.clip_1D},
        **{"negative_prompt_embeds_qwen": negative.qwen_1LD, "negative_prompt_embeds_clip": negative.clip_1D},
        prompt_cu_seqlens=torch.tensor([0, lengths[0]]),
        negative_prompt_cu_seqlens=torch.tensor([0, lengths[1]]),
        **{"num_frames": frames, "height": height, "width": width, "num_inference_steps": 1, "guidance_scale": 5.0},
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
        **options,
    )
    hook.remove()
    assert len(calls) == 2, "with and without the prompt"
    return calls


def our_velocity(transformer: nn.Module, model: ModelConfig, call: dict[str, Any], first_frame: bool) -> Tensor:
    """Ours for a recorded call, from nothing but its noise channels, time and text."""
    text = Text(call["encoder_hidden_states"], call["pooled_projections"])
    latents = call["hidden_states"][..., : model.in_visual_dim]
    return predict_velocity(transformer, model, latents, first_frame, call["timestep"], text)


def load_pipeline(cls: Any, folder: Path) -> Any:
    pipeline = cls.from_pretrained(folder, local_files_only=True)
    for parameter in pipeline.transformer.parameters():
        # Loaded weights lie unaligned in the file's map, where matrix products round otherwise; RoPE's rounding to bf16
        # would make 2e-5 of it.
        parameter.data = parameter.data.clone()
    return pipeline


def check_parity(folder: Path, pipeline: Any, calls: list[Any], first_frame: bool) -> None:
    """Velocities within 1e-5 and the gradient of every weight within a relative 1e-4."""
    transformer, model = our_model(folder), model_config(folder)
    for call, expected in calls:
        with torch.no_grad():
            velocity = our_velocity(transformer, model, call, first_frame)
        torch.testing.assert_close(velocity, expected, rtol=0, atol=1e-5)
        pipeline.transformer.zero_grad()
        transformer.zero_grad()
        direction = random(*expected.shape, seed=5)
        (our_velocity(transformer, model, call, first_frame) * direction).sum().backward()
        (pipeline.transformer(**call).sample * direction).sum().backward()
        expected_grads = {name: parameter.grad for name, parameter in pipeline.transformer.named_parameters()}
        for name, parameter in base_parameters(transformer):
            reference = expected_grads[name]
            assert parameter.grad is not None and reference is not None, name
            # A shift of all keys changes no attention, so the gradient of their bias is the small rest of a sum that
            # RoPE's rounding to bf16 runs through.
            assert relative(parameter.grad, reference) <= (1e-3 if name.endswith("to_key.bias") else 1e-4), name


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
    with torch._dynamo.config.patch(automatic_dynamic_shapes=False):
        for at, block in enumerate(compiled.get_submodule("visual_transformer_blocks").children()):
            block.recompute = ("none", "attention", "full")[at % 3]  # type: ignore[assignment]
            block.forward = torch.compile(block.forward, fullgraph=True, backend=counter)
        for length in (9, 5, 7):
            outs = [
                predict_velocity(each, model, latents, False, time, random_text(length)) for each in (plain, compiled)
            ]
            torch.testing.assert_close(outs[1], outs[0], rtol=0, atol=1e-5)
            for out in outs:
                out.square().sum().backward()
    assert counter.frame_count == 3
    for (name, ours), (_, reference) in zip(compiled.named_parameters(), plain.named_parameters(), strict=True):
        assert ours.grad is not None and reference.grad is not None
        assert relative(ours.grad, reference.grad) <= 1e-4 or float(reference.grad.norm()) < 1e-5, name


@pytest.mark.parametrize(("recompute", "times"), [("none", 1), ("attention", 1), ("full", 2)])
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
    transformer = our_model(tiny_t2v, LoraConfig(4, 4.0, targets))
    assert adapted_modules(transformer) == wanted
    assert all(parameter.requires_grad == is_adapter(name) for name, parameter in transformer.named_parameters())


def test_fresh_adapters_change_nothing(tiny_t2v: Path) -> None:
    model = model_config(tiny_t2v)
    adapted = our_model(tiny_t2v, LoraConfig(4, 8.0, "attention+ffn"))
    arguments: Any = (model, random(1, 2, 8, 12, 16), False, torch.tensor([500.0]), random_text(4))
    with torch.no_grad():
        base = predict_velocity(our_model(tiny_t2v), *arguments)
        assert torch.equal(predict_velocity(adapted, *arguments), base)
        for name, parameter in adapted.named_parameters():
            if ".lora_B." in name:
                parameter.fill_(0.1)
        assert relative(predict_velocity(adapted, *arguments), base) > 1e-3


def test_adapters_start_from_the_seed(tiny_t2v: Path) -> None:
    lora = LoraConfig(4, 4.0, "attention")

    def first_factors(seed: int) -> dict[str, Tensor]:
        parameters = our_model(tiny_t2v, lora, seed).named_parameters()
        return {name: parameter.detach() for name, parameter in parameters if ".lora_A." in name}

    one, again, other = first_factors(0), first_factors(0), first_factors(1)
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one)
    assert len({float(factor[0, 0]) for factor in one.values()}) == len(one), "no two layers start alike"


# Weights


def empty_model(folder: Path) -> nn.Module:
    return build_transformer(str(folder), model_config(folder), lora=None, dtype=torch.float32).to_empty(device=CPU)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"out_layer.out_layer.bias": None}, r"missing \['out_layer.out_layer.bias'\]"),
        ({"extra.weight": torch.zeros(1)}, r"unexpected \['extra.weight'\]"),
        (
            {"out_layer.out_layer.bias": torch.zeros(63)},
            r"out_layer.out_layer.bias is \(63,\), the model wants \(64,\)",
        ),
    ],
    ids=["missing", "left over", "wrong shape"],
)
def test_weights_that_do_not_fit_are_refused(
    tiny_t2v: Path, tmp_path: Path, change: dict[str, Tensor | None], says: str
) -> None:
    tensors = load_file(tiny_t2v / "transformer" / WEIGHTS_NAME) | change
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, tmp_path / WEIGHTS_NAME)
    with pytest.raises(ValueError, match=says):
        load_weights(empty_model(tiny_t2v), str(tmp_path))


def test_a_truncated_file_is_refused(tiny_t2v: Path, tmp_path: Path) -> None:
    data = (tiny_t2v / "transformer" / WEIGHTS_NAME).read_bytes()
    (tmp_path / WEIGHTS_NAME).write_bytes(data[:-8])
    with pytest.raises(OSError, match="truncated"):
        load_weights(empty_model(tiny_t2v), str(tmp_path))


@pytest.mark.parametrize("place", ["file://", "memory://"])
def test_weights_come_from_shards_and_any_uri(tiny_t2v: Path, tmp_path: Path, place: str) -> None:
    whole: Any = Kandinsky5Transformer3DModel.from_pretrained(tiny_t2v / "transformer")
    whole.save_pretrained(tmp_path / "transformer", max_shard_size="100KB")
    assert len(list((tmp_path / "transformer").glob("*.safetensors"))) > 3
    uri = f"file://{tmp_path}"
    if place == "memory://":
        uri = f"memory://{tmp_path.name}"
        fsspec.filesystem("memory").put(str(tmp_path / "transformer"), f"/{tmp_path.name}/transformer", recursive=True)
    transformer = build_transformer(uri, model_config(tiny_t2v), lora=None, dtype=torch.float32)
    materialise(transformer, uri, device=CPU, seed=0)
    expected = dict(whole.named_parameters())
    for name, parameter in base_parameters(transformer):
        assert torch.equal(parameter, expected.pop(name)), name
    assert not expected
    positions = dict(whole.named_buffers()) | {"time_embeddings.freqs": whole.time_embeddings.freqs}
    assert all(torch.equal(buffer, positions[name]) for name, buffer in transformer.named_buffers())


# Frozen encoders


def text_encoders(folder: Path, max_tokens: int = 256) -> TextEncoders:
    return TextEncoders(str(folder), text_encoding(None, None, max_tokens), "cpu")


def check_texts(folder: Path, captions: list[str], max_tokens: int = 256) -> list[int]:
    """All captions encoded together equal the stock pipeline's, one at a time; returns the token counts."""
    pipeline: Any = Kandinsky5T2VPipeline.from_pretrained(folder, local_files_only=True)
    encoded = text_encoders(folder, max_tokens).encode(captions)
    for caption, (qwen, clip) in zip(captions, encoded, strict=True):
        with torch.no_grad():
            expected, pooled, lengths = pipeline.encode_prompt(caption, max_sequence_length=max_tokens)
        assert len(qwen) == lengths[-1] == expected.shape[1], caption
        torch.testing.assert_close(qwen, expected[0], rtol=0, atol=1e-5)
        torch.testing.assert_close(clip, pooled[0], rtol=0, atol=1e-5)
    return [len(qwen) for qwen, _ in encoded]


def test_texts_encoded_together_equal_the_pipelines_one_by_one(tiny_t2v: Path) -> None:
    lengths = check_texts(tiny_t2v, CAPTIONS)
    assert lengths[1] == min(lengths), "the empty caption is the shortest"
    assert len(set(lengths)) > 2


def test_a_long_caption_is_cut(tiny_t2v: Path) -> None:
    assert check_texts(tiny_t2v, ["word " * 60], max_tokens=32) == [32]


def test_a_long_caption_cuts_no_other(tiny_t2v: Path) -> None:
    lengths = check_texts(tiny_t2v, ["a red car drives along the coast", "word " * 60], max_tokens=48)
    assert lengths[0] < lengths[1] == 48


@pytest.mark.parametrize(("frames", "latent_frames"), [(1, 1), (17, 5), (61, 16)])
def test_video_latents_equal_the_vaes(tiny_t2v: Path, frames: int, latent_frames: int) -> None:
    video = random_frames(frames)
    vae: Any = AutoencoderKLHunyuanVideo.from_pretrained(tiny_t2v / "vae")
    with torch.no_grad():
        pixels = torch.from_numpy(video).float().permute(3, 0, 1, 2)[None] / 127.5 - 1
        posterior = vae.encode(pixels).latent_dist
    mean, logvar = VideoAutoencoder(str(tiny_t2v), "cpu").encode(video)
    assert mean.shape == logvar.shape == (latent_frames, 8, 12, 16)
    torch.testing.assert_close(mean, posterior.mean[0].permute(1, 2, 3, 0), rtol=0, atol=1e-5)
    torch.testing.assert_close(logvar, posterior.logvar[0].permute(1, 2, 3, 0), rtol=0, atol=1e-5)


def test_the_last_frame_reaches_the_last_latent(tiny_t2v: Path) -> None:
    autoencoder = VideoAutoencoder(str(tiny_t2v), "cpu")
    video = random_frames(61)
    before, _ = autoencoder.encode(video)
    video[-1] = 255 - video[-1]
    after, _ = autoencoder.encode(video)
    assert relative(after[-1], before[-1]) > 0.01


def test_latents_decode_to_frames(tiny_t2v: Path) -> None:
    frames = VideoAutoencoder(str(tiny_t2v), "cpu").decode(random(5, 8, 12, 16))
    assert frames.shape == (17, 64, 96, 3)
    assert frames.dtype == np.uint8
    assert frames.std() > 5


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
