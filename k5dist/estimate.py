"""Arithmetic of the model: parameters, floating-point operations, bytes. Pure Python, used by the plan and by MFU.

Counting rule for model FLOPs: a multiply-add is two operations, the backward of a linear layer costs twice its forward
(once where its weight is frozen), attention's backward twice its forward, and recomputation counts for nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from k5dist.config import PATCH, VAE_SPACE_COMPRESSION, VAE_TIME_COMPRESSION, ModelConfig

GIB = 1024**3
# Dense bf16 matrix rate of the vendors' data sheets, in FLOP/s, and memory in GiB, by a part of the device's name.
GPU_FACTS = {"B200": (2250e12, 180), "H200": (989e12, 141), "H100": (989e12, 80), "A100": (312e12, 80)}
GPU_FACTS |= {"L40": (181e12, 48), "RTX 5090": (209e12, 32), "RTX 4090": (165e12, 24), "RTX 3090": (71e12, 24)}
ASSUMED_GPU = "H100"
ASSUMED_MFU = 0.4  # a compiled, fully recomputed step measured 40% on H200
ASSUMED_NABLA_DENSITY = 0.2
TEXT_TOKENS = 256


@dataclass(frozen=True)
class Bucket:
    """Clips of one shape, in pixels and frames."""

    frames: int
    height: int
    width: int

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Latent frames, height and width."""
        time = (self.frames - 1) // VAE_TIME_COMPRESSION + 1
        return time, self.height // VAE_SPACE_COMPRESSION, self.width // VAE_SPACE_COMPRESSION

    @property
    def tokens(self) -> int:
        time, height, width = self.latent_shape
        return time * (height // PATCH) * (width // PATCH)

    def __str__(self) -> str:
        return f"{self.frames}×{self.height}×{self.width}"


def _attention_parameters(model: ModelConfig) -> int:
    return 4 * (model.model_dim**2 + model.model_dim) + 2 * model.head_dim


def visual_block_parameters(model: ModelConfig) -> int:
    modulation = model.time_dim * 9 * model.model_dim + 9 * model.model_dim
    return modulation + 2 * _attention_parameters(model) + 2 * model.model_dim * model.ff_dim


def parameters(model: ModelConfig) -> int:
    """Weights of `Kandinsky5Transformer3DModel`, all of them."""
    dim, time_dim = model.model_dim, model.time_dim
    channels = 2 * model.in_visual_dim + 1 if model.visual_cond else model.in_visual_dim
    embeddings = (dim + 1) * time_dim + (time_dim + 1) * time_dim  # time
    embeddings += (model.in_text_dim + 1) * dim + 2 * dim  # text
    embeddings += (model.in_text_dim2 + 1) * time_dim + 2 * time_dim  # pooled text
    embeddings += (PATCH**2 * channels + 1) * dim  # visual
    text_block = time_dim * 6 * dim + 6 * dim + _attention_parameters(model) + 2 * dim * model.ff_dim
    out = (time_dim + 1) * 2 * dim + (dim + 1) * PATCH**2 * model.out_visual_dim
    return (
        embeddings + model.num_text_blocks * text_block + model.num_visual_blocks * visual_block_parameters(model) + out
    )


def lora_parameters(model: ModelConfig, rank: int, targets: str) -> int:
    """Weights of rank-`rank` adapters on every text and visual block."""
    dim = model.model_dim
    attention = 4 * rank * 2 * dim
    ffn = 2 * rank * (dim + model.ff_dim) if targets == "attention+ffn" else 0
    return model.num_text_blocks * (attention + ffn) + model.num_visual_blocks * (2 * attention + ffn)


@dataclass(frozen=True)
class Flops:
    """Forward operations of one clip: linear layers, and attention as the model computes it (sparse or not)."""

    linear: float
    attention: float

    def training(self, adapter: str) -> float:
        return (3 if adapter == "full" else 2) * self.linear + 3 * self.attention


def forward_flops(model: ModelConfig, tokens: int, density: float = 1.0, text_tokens: int = TEXT_TOKENS) -> Flops:
    """One forward of one clip of `tokens` visual tokens; `density` is the share of attention blocks NABLA keeps."""
    dim, ff = model.model_dim, model.ff_dim
    visual = 2 * tokens * (6 * dim**2 + 2 * dim * ff) + 2 * text_tokens * 2 * dim**2
    text = 2 * text_tokens * (4 * dim**2 + 2 * dim * ff)
    linear = model.num_visual_blocks * visual + model.num_text_blocks * text
    self_attention = 4 * tokens**2 * dim * density
    attention = model.num_visual_blocks * (self_attention + 4 * tokens * text_tokens * dim)
    attention += model.num_text_blocks * 4 * text_tokens**2 * dim
    return Flops(float(linear), float(attention))


@dataclass(frozen=True)
class Memory:
    """Estimated peak bytes on one worker."""

    weights: float
    gradients: float
    optimizer: float
    gathered: float
    activations: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.gathered + self.activations


def training_memory(
    model: ModelConfig, *, trainable: int, full: bool, bf16: bool, shards: int, tokens: int, checkpointing: bool
) -> Memory:
    """Peak bytes a worker while training one clip of `tokens` tokens (already divided by context parallelism).

    Full fine-tuning keeps fp32 masters; a frozen base under an adapter is stored in the compute type. Gradients and
    AdamW's two moments are fp32 on the trainable weights. FSDP2 gathers the block at work and prefetches one more.
    """
    compute = 2 if bf16 else 4
    frozen = parameters(model) if not full else 0
    weights = (frozen * compute + trainable * 4) / shards
    gathered = 2 * visual_block_parameters(model) * compute if shards > 1 else 0
    block_input = tokens * model.model_dim * compute
    # What one block's backward holds at once: normed inputs, q, k, v, attention output and fp32 sums (about 14
    # activations of model_dim) and two of ff_dim.
    block_work = tokens * compute * (14 * model.model_dim + 2 * model.ff_dim)
    blocks = model.num_visual_blocks
    activations = blocks * block_input + block_work if checkpointing else blocks * block_work
    return Memory(weights, trainable * 4 / shards, trainable * 8 / shards, gathered, activations)


def sample_cache_bytes(model: ModelConfig, bucket: Bucket, *, first_frame: bool, text_tokens: int) -> int:
    """bf16 bytes of one clip in the cache: posterior mean and log-variance, and its share of text at full length."""
    time, height, width = bucket.latent_shape
    frames = time + 1 if first_frame else time
    return 2 * (
        frames * height * width * 2 * model.in_visual_dim + text_tokens * model.in_text_dim + model.in_text_dim2
    )


def gpu_facts(name: str | None) -> tuple[str, float, float]:
    """Name, bf16 FLOP/s and bytes of memory of a GPU; of an assumed one where the name is unknown."""
    for part, (rate, gib) in GPU_FACTS.items():
        if name and part.lower() in name.lower():
            return name, rate, gib * GIB
    rate, gib = GPU_FACTS[ASSUMED_GPU]
    return f"{ASSUMED_GPU} (assumed)", rate, gib * GIB
