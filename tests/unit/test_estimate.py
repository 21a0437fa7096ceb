"""The arithmetic of real models: tokens, weights and operations as the real classes have them; facts of GPUs."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from pathlib import Path
from typing import Any

import pytest

from k5dist import estimate
from k5dist.compose import compose, to_run_config
from k5dist.config import ModelConfig, RunConfig
from k5dist.shapes import Bucket

TINY = "+flavour=t2v-tiny"


@functools.cache
def configure(*overrides: str) -> RunConfig:
    return to_run_config(compose(list(overrides)))


def test_tokens_are_counted_after_vae_and_patches() -> None:
    assert Bucket(121, 512, 768).latent_shape == (31, 64, 96)
    assert Bucket(121, 512, 768).tokens == 47_616
    assert Bucket(121, 768, 1280).tokens == 119_040
    assert Bucket(1, 64, 96).latent_shape == (1, 8, 12)


def model_of(flavour: str) -> ModelConfig:
    return configure(f"+flavour={flavour}").model


def meta_transformer(model: ModelConfig) -> Any:
    import torch
    from diffusers import Kandinsky5Transformer3DModel

    with torch.device("meta"):
        return Kandinsky5Transformer3DModel(**dataclasses.asdict(model))


@pytest.mark.parametrize("flavour", ["t2v-tiny", "t2v-lite-sft-5s", "t2v-pro-sft-5s-hd"])
def test_parameters_are_those_of_the_real_class(flavour: str) -> None:
    model = model_of(flavour)
    transformer = meta_transformer(model)
    assert estimate.parameters(model) == sum(p.numel() for p in transformer.parameters())
    blocks = (transformer.visual_transformer_blocks[0], transformer.text_transformer_blocks[0])
    visual, text = (sum(p.numel() for p in block.parameters()) for block in blocks)
    assert (estimate.visual_block_parameters(model), estimate.text_block_parameters(model)) == (visual, text)
    outside = {name: p.numel() for name, p in transformer.named_parameters() if "_blocks." not in name}
    assert estimate.root_parameters(model) == sum(outside.values())

    def exact(module: Any) -> int:
        names = ("modulation", "time_embeddings")
        return sum(p.numel() for name, p in module.named_parameters() if any(part in name for part in names))

    assert estimate.exact_parameters(model) == exact(transformer)
    assert estimate.visual_block_exact_parameters(model) == exact(blocks[0])
    assert estimate.root_exact_parameters(model) == sum(
        size for name, size in outside.items() if "modulation" in name or "time_embeddings" in name
    )


@pytest.fixture(scope="module")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from k5dist.model.tiny import build_tiny_checkpoint

    folder = tmp_path_factory.mktemp("checkpoint")
    build_tiny_checkpoint(folder, task="t2v", architecture=dataclasses.asdict(model_of("t2v-tiny")))
    return folder


def test_the_sparse_tiny_flavours_checkpoint_says_so(tmp_path: Path) -> None:
    from k5dist.model.pretrained import check_architecture, identity
    from k5dist.model.tiny import build_tiny_checkpoint

    config = configure("+flavour=t2v-tiny-nabla")
    build_tiny_checkpoint(tmp_path, task=config.flavour.task, architecture=config.to_mapping()["model"])
    said = json.loads((tmp_path / "transformer" / "config.json").read_text())
    assert (said["attention_type"], said["attention_P"], said["attention_add_sta"]) == ("nabla", 0.6, True)
    assert [said[f"attention_w{axis}"] for axis in "THW"] == [3, 1, 1]
    check_architecture(config.model, said)
    assert identity(config) != identity(configure(TINY))
    assert config.validation_shape == (17, 128, 128)


@pytest.mark.parametrize("targets", ["attention", "attention+ffn"])
@pytest.mark.parametrize("rank", [1, 16])
def test_lora_parameters_are_those_that_peft_trains(tiny_checkpoint: Path, targets: str, rank: int) -> None:
    import torch

    from k5dist.model.transformer import build_transformer
    from tests.unit.models import lora_config

    model = model_of("t2v-tiny")
    lora = lora_config(rank, 1.0, targets)
    transformer = build_transformer(str(tiny_checkpoint), model, lora=lora, dtype=torch.bfloat16)
    trained = sum(p.numel() for p in transformer.parameters() if p.requires_grad)
    assert estimate.lora_parameters(model, lora) == trained


def test_all_parameters_train_without_an_adapter(tiny_checkpoint: Path) -> None:
    import torch

    from k5dist.model.transformer import build_transformer

    model = model_of("t2v-tiny")
    transformer = build_transformer(str(tiny_checkpoint), model, lora=None, dtype=torch.bfloat16)
    assert estimate.parameters(model) == sum(p.numel() for p in transformer.parameters() if p.requires_grad)


def counted_flops(model: ModelConfig, shape: tuple[int, int, int], text_tokens: int, training: str | None) -> int:
    """What torch counts in the transformer's blocks, forward, or with the backward of `training` (lora or full).

    Counted are the matrix products of the blocks' attention and feed-forward layers. Not counted, here as in the
    estimate: the embeddings, the output layer and every modulation (together under 1% of a real clip's), and all that
    is not a matrix product (norms, RoPE, softmax, GELU), which torch's counter ignores. Adapters' own products are
    outside both as well.
    """
    import torch
    from diffusers import Kandinsky5Transformer3DModel
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    transformer: Any = Kandinsky5Transformer3DModel(**dataclasses.asdict(model))
    transformer.requires_grad_(training == "full")
    # Whatever is trained, gradients flow through all blocks down to their inputs.
    time, height, width = shape
    clip = torch.randn(1, time, 2 * height, 2 * width, 2 * model.in_visual_dim + 1, requires_grad=True)
    text = torch.randn(1, text_tokens, model.in_text_dim, requires_grad=True)
    positions = tuple(torch.arange(side) for side in shape)
    pooled, timestep = torch.randn(1, model.in_text_dim2), torch.tensor([500.0])
    # The plain implementation: its backward is made of matrix products, without a fused kernel's recomputation.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        output = transformer(clip, text, timestep, pooled, positions, torch.arange(text_tokens)).sample
        if training:
            output.sum().backward()
    flops = {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    return sum(
        count
        for name, count in flops.items()
        if name.endswith(("self_attention", "cross_attention", "feed_forward")) and "_blocks." in name
    )


def test_forward_flops_are_those_that_torch_counts() -> None:
    model, shape = model_of("t2v-tiny"), (3, 4, 6)
    flops = estimate.forward_flops(model, math.prod(shape), text_tokens=5)
    assert flops.linear + flops.attention == counted_flops(model, shape, 5, None)


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_training_flops_are_those_that_torch_counts(adapter: str) -> None:
    model, shape = model_of("t2v-tiny"), (3, 4, 6)
    flops = estimate.forward_flops(model, math.prod(shape), text_tokens=5)
    assert flops.training(adapter) == counted_flops(model, shape, 5, adapter)


def test_density_thins_out_self_attention_alone() -> None:
    model, tokens = model_of("t2v-pro-sft-5s-hd"), 119_040
    dense, sparse = estimate.forward_flops(model, tokens), estimate.forward_flops(model, tokens, density=0.2)
    assert sparse.linear == dense.linear
    gone = 0.8 * model.num_visual_blocks * 4 * tokens**2 * model.model_dim
    assert dense.attention - sparse.attention == pytest.approx(gone)


@pytest.mark.parametrize(("name", "part"), [("NVIDIA H200 141GB", "H200"), (None, "assumed"), ("Voodoo 2", "assumed")])
def test_an_unknown_gpu_is_assumed_and_said_to_be(name: str | None, part: str) -> None:
    shown, rate, size = estimate.gpu_facts(name)
    assert part in shown
    assert rate > 1e14
    assert size > 40 * estimate.GIB
    assert estimate.is_known_gpu(name) == ("assumed" not in shown)


@pytest.mark.parametrize(
    ("name", "gib"),
    [
        *(("NVIDIA H200", 140.4), ("NVIDIA H100 80GB HBM3", 79.6), ("NVIDIA A100-SXM4-80GB", 79.2)),
        *(("NVIDIA A100-SXM4-40GB", 39.6), ("NVIDIA GH200 480GB", 95.6)),  # names that hold another's
    ],
)
def test_a_gpus_memory_is_what_a_process_can_use(name: str, gib: float) -> None:
    assert estimate.gpu_facts(name)[2] / estimate.GIB == pytest.approx(gib, abs=0.05)
