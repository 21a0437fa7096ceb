"""Arithmetic of the model: parameters, floating-point operations, and GPUs. Pure Python, used by the plan and by MFU.

Counting rule for model FLOPs: a multiply-add is two operations, the backward of a linear layer costs twice its forward
(once where its weight is frozen), attention's backward twice its forward, and recomputation counts for nothing. What a
run needs of a GPU's memory stands in `k5dist.memory`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from k5dist.config import BLOCK_LAYERS, CrepaConfig, LoraConfig, ModelConfig, RunConfig
from k5dist.config.crepa import HEAD_DIM
from k5dist.shapes import PATCH, Bucket

MIB, GIB = 2**20, 2**30
# By a part of the device's name, the first that fits: dense bf16 matrix rate of the vendors' data sheets in FLOP/s, and
# the memory that a process can use in MiB: what nvidia-smi says (of the A100, torch's total_memory).
GPU_FACTS = {"GH200 480GB": (989e12, 97_871), "B200": (2250e12, 183_359), "H200": (989e12, 143_771)}
GPU_FACTS |= {"H100 NVL": (835e12, 95_830), "H100": (989e12, 81_559)}
GPU_FACTS |= {"A100-SXM4-40GB": (312e12, 40_536), "A100-PCIE-40GB": (312e12, 40_536), "A100": (312e12, 81_100)}
GPU_FACTS |= {"L40": (181e12, 46_068), "RTX 5090": (209e12, 32_607), "RTX 4090": (165e12, 24_564)}
GPU_FACTS |= {"RTX 3090": (71e12, 24_576)}
ASSUMED_GPU = "H100"
ASSUMED_MFU = 0.4  # a compiled, fully recomputed step measured 40% on H200
ASSUMED_NABLA_DENSITY = 0.2
TEXT_TOKENS = 256


@dataclass(frozen=True)
class Recompute:
    """What the visual blocks keep for their backward: the last `keep` of them everything, the `attention` ones before
    them the outputs of their self-attention, all others nothing but their input. What the first `offload` blocks keep
    waits in the host's memory."""

    keep: int
    attention: int
    offload: int = 0


def _attention_parameters(model: ModelConfig) -> int:
    return 4 * (model.model_dim**2 + model.model_dim) + 2 * model.head_dim


def _modulation_parameters(model: ModelConfig, vectors: int) -> int:
    """A linear layer from the time embedding to `vectors` shifts, scales and gates."""
    return (model.time_dim + 1) * vectors * model.model_dim


def visual_block_parameters(model: ModelConfig) -> int:
    return _modulation_parameters(model, 9) + 2 * _attention_parameters(model) + 2 * model.model_dim * model.ff_dim


def text_block_parameters(model: ModelConfig) -> int:
    return _modulation_parameters(model, 6) + _attention_parameters(model) + 2 * model.model_dim * model.ff_dim


def root_parameters(model: ModelConfig) -> int:
    """Weights outside the blocks: embeddings and the output layer."""
    dim, time_dim = model.model_dim, model.time_dim
    channels = 2 * model.in_visual_dim + 1 if model.visual_cond else model.in_visual_dim
    embeddings = _time_embedding_parameters(model)
    embeddings += (model.in_text_dim + 1) * dim + 2 * dim  # text
    embeddings += (model.in_text_dim2 + 1) * time_dim + 2 * time_dim  # pooled text
    embeddings += (PATCH**2 * channels + 1) * dim  # visual
    return embeddings + _modulation_parameters(model, 2) + (dim + 1) * PATCH**2 * model.out_visual_dim


def _time_embedding_parameters(model: ModelConfig) -> int:
    return (model.model_dim + 1) * model.time_dim + (model.time_dim + 1) * model.time_dim


def parameters(model: ModelConfig) -> int:
    """Weights of `Kandinsky5Transformer3DModel`, all of them."""
    blocks = model.num_text_blocks * text_block_parameters(model)
    blocks += model.num_visual_blocks * visual_block_parameters(model)
    return blocks + root_parameters(model)


def visual_block_exact_parameters(model: ModelConfig) -> int:
    """Those of a visual block's weights that stay in fp32 when training in bf16."""
    return _modulation_parameters(model, 9)


def root_exact_parameters(model: ModelConfig) -> int:
    return _time_embedding_parameters(model) + _modulation_parameters(model, 2)


def exact_parameters(model: ModelConfig) -> int:
    """Weights that stay in fp32 when training in bf16: the time embedding and all modulations."""
    text = model.num_text_blocks * _modulation_parameters(model, 6)
    return text + model.num_visual_blocks * visual_block_exact_parameters(model) + root_exact_parameters(model)


def layer_shape(model: ModelConfig, layer: str) -> tuple[int, int]:
    """(out, in) features of a block's linear layer."""
    shapes = {"feed_forward.in_layer": (model.ff_dim, model.model_dim)}
    shapes["feed_forward.out_layer"] = (model.model_dim, model.ff_dim)
    return shapes.get(layer, (model.model_dim, model.model_dim))


def block_linear_parameters(model: ModelConfig, kind: str) -> int:
    """Weights, without biases, of the linear layers of a text or visual block: what `lora.base_dtype` stores."""
    return sum(n * k for n, k in (layer_shape(model, layer) for layer in BLOCK_LAYERS[kind]))


def linear_parameters(model: ModelConfig, *, visual: bool = True) -> int:
    """The same of all blocks, or of the text blocks alone."""
    blocks = _blocks(model)
    return sum(blocks[kind] * block_linear_parameters(model, kind) for kind in ("text", *["visual"] * visual))


def _blocks(model: ModelConfig) -> dict[str, int]:
    return {"text": model.num_text_blocks, "visual": model.num_visual_blocks}


def lora_parameters(model: ModelConfig, lora: LoraConfig) -> int:
    """Weights of the adapters: two factors a layer, with DoRA a length a row."""
    count = 0
    for kind, layers in lora.layers.items():
        shapes = [layer_shape(model, layer) for layer in layers]
        count += _blocks(model)[kind] * sum(lora.rank * (n + k) + lora.use_dora * n for n, k in shapes)
    return count


@dataclass(frozen=True)
class Flops:
    """Forward operations of one clip: linear layers, and attention as the model computes it (sparse or not)."""

    linear: float
    attention: float

    def training(self, adapter: str) -> float:
        return (3 if adapter == "full" else 2) * self.linear + 3 * self.attention


def forward_flops(
    model: ModelConfig,
    tokens: int,
    density: float = 1.0,
    text_tokens: int = TEXT_TOKENS,
    tokens_of_blocks: Sequence[int] | None = None,
) -> Flops:
    """One forward of one clip of `tokens` visual tokens; `density` is the share of attention blocks NABLA keeps.

    `tokens_of_blocks` are the tokens that each visual block computes, where TREAD lets some skip it.
    """
    dim, ff = model.model_dim, model.ff_dim
    counts = [tokens] * model.num_visual_blocks if tokens_of_blocks is None else tokens_of_blocks
    visual = sum(2 * count * (6 * dim**2 + 2 * dim * ff) + 2 * text_tokens * 2 * dim**2 for count in counts)
    text = 2 * text_tokens * (4 * dim**2 + 2 * dim * ff)
    attention = sum(4 * count**2 * dim * density + 4 * count * text_tokens * dim for count in counts)
    attention += model.num_text_blocks * 4 * text_tokens**2 * dim
    return Flops(float(visual + model.num_text_blocks * text), float(attention))


def clip_flops(
    config: RunConfig, tokens_THW: tuple[int, int, int], density: float = 1.0, text_tokens: int = TEXT_TOKENS
) -> Flops:
    """One training forward of one clip of that shape in tokens, by the blocks that TREAD leaves it."""
    counts = config.tread.tokens_of_blocks(config.model, tokens_THW, first_frame=config.flavour.task == "i2v")
    flops = forward_flops(config.model, math.prod(tokens_THW), density, text_tokens, counts)
    head = 2 * math.prod(tokens_THW) * crepa_parameters(config)  # trained whole: counted as the adapter's rule has it
    return Flops(flops.linear + head, flops.attention)


def crepa_parameters(config: RunConfig) -> int:
    """Weights of CREPA's projection head."""
    if not config.crepa.enabled:
        return 0
    width = config.crepa.feature_dim
    return (config.model.model_dim + 1) * HEAD_DIM + (HEAD_DIM + 1) * HEAD_DIM + (HEAD_DIM + 1) * width


def feature_cache_bytes(crepa: CrepaConfig, bucket: Bucket) -> int:
    """bf16 bytes of one clip's features in the cache."""
    return 2 * bucket.latent_shape[0] * math.prod(crepa.grid(bucket.height, bucket.width)) * crepa.feature_dim


def sample_cache_bytes(model: ModelConfig, bucket: Bucket, *, first_frame: bool, text_tokens: int) -> int:
    """bf16 bytes of one clip in the cache: posterior mean and log-variance, and its share of text at full length."""
    time, height, width = bucket.latent_shape
    frames = time + 1 if first_frame else time
    return 2 * (
        frames * height * width * 2 * model.in_visual_dim + text_tokens * model.in_text_dim + model.in_text_dim2
    )


def gpu_facts(name: str | None) -> tuple[str, float, float]:
    """Name, bf16 FLOP/s and bytes of usable memory of a GPU; of an assumed one where the name is unknown."""
    part = _known_part(name)
    rate, mib = GPU_FACTS[part or ASSUMED_GPU]
    return name if name and part else f"{ASSUMED_GPU} (assumed)", rate, float(mib * MIB)


def is_known_gpu(name: str | None) -> bool:
    return _known_part(name) is not None


def lacks_float8(name: str | None) -> bool:
    """Whether a GPU is known to be older than Ada and Hopper."""
    return any(part.lower() in (name or "").lower() for part in ("A100", "RTX 3090"))


def _known_part(name: str | None) -> str | None:
    return next((part for part in GPU_FACTS if name and part.lower() in name.lower()), None)
