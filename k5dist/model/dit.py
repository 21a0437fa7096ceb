"""The Kandinsky 5 video DiT, written for training: weights and arithmetic of diffusers' `Kandinsky5Transformer3DModel`.

What differs is where things are computed. A block takes its modulation as an input (so the fp32 modulation layers are
FSDP2 groups of their own outside the compiled block), rotary tables are cosines and sines instead of 2 × 2 matrices,
each block says what its backward recomputes, and the tokens may be shared by a context-parallel group.

Shape suffixes: B clips, T H W latent frames and sides in tokens, S visual tokens, L text tokens, C channels,
M model_dim, E head_dim / 2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from k5dist.config import PATCH, ModelConfig
from k5dist.model.attention import Attention, Rope, flash_attention
from k5dist.model.context import ContextGroup
from k5dist.model.crepa import CrepaHead
from k5dist.model.gelu import gelu
from k5dist.model.nabla import NablaParameters
from k5dist.model.recompute import run_block
from k5dist.model.tokens import flatten, unflatten, unpatchify
from k5dist.model.tread import Router, Routing, Visual
from k5dist.model.weight_stream import WeightStream

# Kept in fp32 whatever the run's precision, as diffusers keeps them (`_keep_in_fp32_modules`).
FP32_MODULES = ("time_embeddings", "modulation", "visual_modulation", "text_modulation")
_ROPE_POSITIONS = (128, 128, 128)
_TEXT_ROPE_POSITIONS = 1024


def _frequencies(count: int) -> Tensor:
    # On the CPU even where parameters are built on the meta device: no checkpoint holds these.
    return torch.exp(-math.log(10_000.0) * torch.arange(count, dtype=torch.float32, device="cpu") / count)


def _angles(positions: int, dim: int) -> Tensor:
    return torch.outer(torch.arange(positions, dtype=torch.float32, device="cpu"), _frequencies(dim // 2))


class TimeEmbedding(nn.Module):
    freqs: Tensor

    def __init__(self, model_dim: int, time_dim: int) -> None:
        super().__init__()
        self.register_buffer("freqs", _frequencies(model_dim // 2), persistent=False)
        self.in_layer = nn.Linear(model_dim, time_dim)
        self.activation = nn.SiLU()
        self.out_layer = nn.Linear(time_dim, time_dim)

    def forward(self, time_B: Tensor) -> Tensor:
        angles = torch.outer(time_B.float(), self.freqs)
        return self.out_layer(self.activation(self.in_layer(torch.cat([angles.cos(), angles.sin()], dim=-1))))


class TextEmbedding(nn.Module):
    def __init__(self, text_dim: int, dim: int) -> None:
        super().__init__()
        self.in_layer = nn.Linear(text_dim, dim)
        self.norm = nn.LayerNorm(dim)

    def forward(self, text: Tensor) -> Tensor:
        text = self.in_layer(text)
        return self.norm(text).type_as(text)


class VisualEmbedding(nn.Module):
    def __init__(self, channels: int, model_dim: int) -> None:
        super().__init__()
        self.in_layer = nn.Linear(PATCH**2 * channels, model_dim)

    def forward(self, x_BTHWC: Tensor) -> Tensor:
        """[B, T, 2H, 2W, C] → [B, T, H, W, M]."""
        batch, frames, height, width, channels = x_BTHWC.shape
        x = x_BTHWC.reshape(batch, frames, height // PATCH, PATCH, width // PATCH, PATCH, channels)
        return self.in_layer(x.permute(0, 1, 2, 4, 3, 5, 6).flatten(4))


class TextRope(nn.Module):
    args: Tensor

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.register_buffer("args", _angles(_TEXT_ROPE_POSITIONS, head_dim), persistent=False)

    def forward(self, length: int) -> Rope:
        angles = self.args[:length]
        return Rope(angles.cos(), angles.sin())


class VisualRope(nn.Module):
    args_0: Tensor
    args_1: Tensor
    args_2: Tensor

    def __init__(self, axes_dims: Sequence[int]) -> None:
        super().__init__()
        for axis, (dim, positions) in enumerate(zip(axes_dims, _ROPE_POSITIONS, strict=True)):
            self.register_buffer(f"args_{axis}", _angles(positions, dim), persistent=False)

    def forward(self, tokens_THW: Sequence[int], scale_factor: Sequence[float]) -> Tensor:
        """Angles [T, H, W, E], fp32."""
        tables = (self.args_0, self.args_1, self.args_2)
        for size, table in zip(tokens_THW, tables, strict=True):
            assert size <= len(table), f"{size} tokens on an axis of {len(table)} positions"
        scaled = [table[:size] / factor for table, size, factor in zip(tables, tokens_THW, scale_factor, strict=True)]
        frames, height, width = tokens_THW
        return torch.cat(
            [
                scaled[0][:, None, None].expand(-1, height, width, -1),
                scaled[1][None, :, None].expand(frames, -1, width, -1),
                scaled[2][None, None].expand(frames, height, -1, -1),
            ],
            dim=-1,
        )


class Modulation(nn.Module):
    def __init__(self, time_dim: int, model_dim: int, num_params: int) -> None:
        super().__init__()
        self.activation = nn.SiLU()
        self.out_layer = nn.Linear(time_dim, num_params * model_dim)

    def forward(self, time_BC: Tensor) -> Tensor:
        return self.out_layer(self.activation(time_BC))


class FeedForward(nn.Module):
    def __init__(self, dim: int, ff_dim: int) -> None:
        super().__init__()
        self.in_layer = nn.Linear(dim, ff_dim, bias=False)
        self.out_layer = nn.Linear(ff_dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_layer(gelu(self.in_layer(x)))

    def added(self, x_BSM: Tensor, gate_B1M: Tensor, normed_BSM: Tensor) -> Tensor:
        """x + gate · forward(normed).

        Where weight and gate are both trained, the gate multiplies the weight instead of the product, which the gate's
        gradient then does not ask for: the dearest layer need not be computed again. In fp32 the reference's own order
        is kept, to the bit.
        """
        layer = self.out_layer
        trained = type(layer) is nn.Linear and layer.weight.requires_grad and gate_B1M.requires_grad
        if not trained or len(x_BSM) > 1 or x_BSM.dtype == torch.float32:
            return _gated(x_BSM, gate_B1M, self(normed_BSM))
        weight = (gate_B1M.flatten()[:, None] * layer.weight.float()).type_as(x_BSM)
        out = F.linear(gelu(self.in_layer(normed_BSM)), weight)
        return (x_BSM.float() + out.float()).type_as(x_BSM)


def _modulated(norm: nn.Module, x_BSM: Tensor, shift_B1M: Tensor, scale_B1M: Tensor) -> Tensor:
    return (norm(x_BSM.float()) * (scale_B1M + 1.0) + shift_B1M).type_as(x_BSM)


def _gated(x_BSM: Tensor, gate_B1M: Tensor, out_BSM: Tensor) -> Tensor:
    return (x_BSM.float() + gate_B1M * out_BSM.float()).type_as(x_BSM)


class TextBlock(nn.Module):
    """Self-attention and feed-forward over the text's tokens; `modulation` is what `text_modulation` returned."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        dim = model.model_dim
        self.text_modulation = Modulation(model.time_dim, dim, 6)
        self.self_attention_norm = nn.LayerNorm(dim, elementwise_affine=False)
        self.self_attention = Attention(dim, model.head_dim, flash_attention)
        self.feed_forward_norm = nn.LayerNorm(dim, elementwise_affine=False)
        self.feed_forward = FeedForward(dim, model.ff_dim)

    def forward(self, x_BLM: Tensor, modulation: Tensor, rope: Rope) -> Tensor:
        x = x_BLM
        shift, scale, gate, ff_shift, ff_scale, ff_gate = modulation.float().unsqueeze(1).chunk(6, dim=-1)
        x = _gated(x, gate, self.self_attention(_modulated(self.self_attention_norm, x, shift, scale), rope=rope))
        return _gated(x, ff_gate, self.feed_forward(_modulated(self.feed_forward_norm, x, ff_shift, ff_scale)))


class VisualBlock(nn.Module):
    """Self-attention, attention to the text, feed-forward; `modulation` is what `visual_modulation` returned.

    `recompute` is what the backward computes again: "none", all but matrix products and attention ("linear"), all but
    self-attention ("attention"), or everything ("full").
    """

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        dim = model.model_dim
        self.recompute = "none"
        self.visual_modulation = Modulation(model.time_dim, dim, 9)
        self.self_attention_norm = nn.LayerNorm(dim, elementwise_affine=False)
        self.self_attention = Attention(dim, model.head_dim)
        self.cross_attention_norm = nn.LayerNorm(dim, elementwise_affine=False)
        self.cross_attention = Attention(dim, model.head_dim, flash_attention)
        self.feed_forward_norm = nn.LayerNorm(dim, elementwise_affine=False)
        self.feed_forward = FeedForward(dim, model.ff_dim)

    def forward(
        self,
        x_BSM: Tensor,
        text_BLM: Tensor,
        modulation: Tensor,
        rope: Rope,
        sparsity: NablaParameters | None,
        num_tokens: int,
    ) -> Tensor:
        arguments = (x_BSM, text_BLM, modulation, rope, sparsity, num_tokens)
        if not torch.is_grad_enabled():  # asked first: validation is one graph, whatever training recomputes
            return self.compute(*arguments)
        return run_block(self.recompute, self.compute, *arguments)

    def compute(
        self,
        x_BSM: Tensor,
        text_BLM: Tensor,
        modulation: Tensor,
        rope: Rope,
        sparsity: NablaParameters | None,
        num_tokens: int,
    ) -> Tensor:
        x = x_BSM
        own, cross, ff = (part.chunk(3, dim=-1) for part in modulation.float().unsqueeze(1).chunk(3, dim=-1))
        out = _modulated(self.self_attention_norm, x, *own[:2])
        out = self.self_attention(out, rope=rope, sparsity=sparsity, num_tokens=num_tokens)
        x = _gated(x, own[2], out)
        out = self.cross_attention(_modulated(self.cross_attention_norm, x, *cross[:2]), text=text_BLM)
        x = _gated(x, cross[2], out)
        return self.feed_forward.added(x, ff[2], _modulated(self.feed_forward_norm, x, *ff[:2]))


class OutLayer(nn.Module):
    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.modulation = Modulation(model.time_dim, model.model_dim, 2)
        self.norm = nn.LayerNorm(model.model_dim, elementwise_affine=False)
        self.out_layer = nn.Linear(model.model_dim, PATCH**2 * model.out_visual_dim)

    def forward(self, x_BSM: Tensor, time_BC: Tensor) -> Tensor:
        """Patches [B, S, 4C]."""
        shift, scale = self.modulation(time_BC).float().unsqueeze(1).chunk(2, dim=-1)
        return self.out_layer(_modulated(self.norm, x_BSM, shift, scale))


class VideoTransformer(nn.Module):
    """Parameters carry the names of diffusers' `Kandinsky5Transformer3DModel`, so checkpoints fit either way."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        channels = 2 * model.in_visual_dim + 1 if model.visual_cond else model.in_visual_dim
        self.context: ContextGroup | None = None
        self.stream: WeightStream | None = None
        self.time_embeddings = TimeEmbedding(model.model_dim, model.time_dim)
        self.text_embeddings = TextEmbedding(model.in_text_dim, model.model_dim)
        self.pooled_text_embeddings = TextEmbedding(model.in_text_dim2, model.time_dim)
        self.visual_embeddings = VisualEmbedding(channels, model.model_dim)
        self.text_rope_embeddings = TextRope(model.head_dim)
        self.visual_rope_embeddings = VisualRope(model.axes_dims)
        self.text_transformer_blocks = nn.ModuleList(TextBlock(model) for _ in range(model.num_text_blocks))
        self.visual_transformer_blocks = nn.ModuleList(VisualBlock(model) for _ in range(model.num_visual_blocks))
        self.out_layer = OutLayer(model)
        self.crepa_head: CrepaHead | None = None

    def share_tokens(self, context: ContextGroup) -> None:
        """Visual tokens are split over the group from here on (Ulysses); every rank gets the whole velocity."""
        self.context = context
        for block in self.visual_transformer_blocks:
            attention = block.get_submodule("self_attention")
            assert isinstance(attention, Attention)
            attention.context = context

    def forward(
        self,
        latents_BTHWC: Tensor,
        text_BLC: Tensor,
        pooled_BC: Tensor,
        timestep_B: Tensor,
        scale_factor: tuple[float, float, float],
        sparsity: NablaParameters | None,
        routing: Routing | None = None,
        features_ThwD: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Velocity [B, T, H, W, out_visual_dim] of the noisy latents, whose last dimension is all input channels.

        Args:
            timestep_B: 1000 σ, fp32.
            scale_factor: RoPE's divisors along (T, H, W).
            sparsity: NABLA's parameters for this clip's shape; dense attention without.
            routing: TREAD's routes for this clip, in training.
            features_ThwD: CREPA's, in training: its alignment (`CrepaHead`) is returned beside the velocity.
        """
        text = self.text_embeddings(text_BLC)
        time = self.time_embeddings(timestep_B) + self.pooled_text_embeddings(pooled_BC)
        text_rope = self.text_rope_embeddings(text.shape[1])
        for block in self.text_transformer_blocks:
            assert isinstance(block, TextBlock)
            text = block(text, block.text_modulation(time), text_rope)
        x_BTHWM = self.visual_embeddings(latents_BTHWC)
        tokens_THW = x_BTHWM.shape[1:4]
        angles = self.visual_rope_embeddings(tokens_THW, scale_factor)[None]
        x, angles = (flatten(each, sparsity is not None) for each in (x_BTHWM, angles))
        del x_BTHWM  # two units in a context of two
        own = angles
        if self.context is not None:
            x, own = self.context.own_tokens(x), self.context.own_tokens(angles)
        num_tokens, frame_tokens, sparse = math.prod(tokens_THW), math.prod(tokens_THW[1:]), sparsity is not None
        visual = Visual(x, Rope(own[0].cos(), own[0].sin()), sparsity, num_tokens)
        alignment: Tensor | None = None
        router = routing and Router(routing, angles[0], frame_tokens, sparse=sparse, context=self.context)
        for number, block in enumerate(self.visual_transformer_blocks):
            assert isinstance(block, VisualBlock)
            visual = visual if router is None else router.enter(number, visual)
            x, rope, kept_sparsity, kept_tokens = visual
            x = block(x, text, block.visual_modulation(time), rope, kept_sparsity, kept_tokens)
            visual = visual._replace(x_BsM=x)
            visual = visual if router is None else router.leave(number, visual)
            if features_ThwD is not None and self.crepa_head is not None and number == self.crepa_head.block_index:
                alignment = self.crepa_head(visual.x_BsM, features_ThwD, tuple(tokens_THW), sparse, self.context)
        x = visual.x_BsM
        patches = self.out_layer(x, time)
        if self.context is not None:
            patches = self.context.gather_tokens(patches, num_tokens)
        velocity = unpatchify(unflatten(patches, tokens_THW, sparse))
        if features_ThwD is None:
            return velocity
        assert alignment is not None, "features belong to a model with a projection head"
        return velocity, alignment
