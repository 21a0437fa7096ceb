"""Self- and cross-attention of the DiT as a diffusers attention processor: dense, and NABLA's sparse one.

Shape suffixes: B batch, S tokens, H heads, D head_dim, N blocks of 64 tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from k5dist.config import NABLA_BLOCK, ModelConfig

BLOCK_TOKENS = NABLA_BLOCK**2


@dataclass(frozen=True)
class NablaParameters:
    """The checkpoint's sparse attention: probability kept, sliding-tile window [1, 1, N, N] or-ed to the map."""

    probability: float
    window: Tensor


def sliding_tile_window(shape: tuple[int, int, int], window: tuple[int, int, int], device: torch.device) -> Tensor:
    """Which blocks see each other whatever the map says, bool [N, N] over blocks in (T, H, W) order.

    `shape` is the number of blocks and `window` the width in blocks along (T, H, W); a block sees those at most half a
    width away, along each axis.
    """
    near = []
    for size, width in zip(shape, window, strict=True):
        at = torch.arange(size, device=device)
        near.append((at[:, None] - at[None, :]).abs() <= width // 2)
    t, h, w = near
    mask = t[:, None, None, :, None, None] & h[None, :, None, None, :, None] & w[None, None, :, None, None, :]
    num_blocks = math.prod(shape)
    return mask.reshape(num_blocks, num_blocks)


@torch.no_grad()
def nabla_map(query_BSHD: Tensor, key_BSHD: Tensor, parameters: NablaParameters) -> Tensor:
    """The blocks each query block attends to: bool [B, H, N, N].

    Softmax over the scaled products of block means; the smallest set of key blocks whose probabilities sum to P is
    kept, or-ed with the window (Kandinsky 5.0's NABLA, as diffusers' `nablaT_v2` computes it).
    """
    query, key = (x.transpose(1, 2).unflatten(2, (-1, BLOCK_TOKENS)).mean(-2) for x in (query_BSHD, key_BSHD))
    scores = query @ key.transpose(-2, -1)
    probabilities = torch.softmax(scores / math.sqrt(query.shape[-1]), dim=-1)
    values, order = probabilities.sort(-1)
    kept = values.cumsum(-1) >= 1 - parameters.probability
    return torch.zeros_like(kept).scatter_(-1, order, kept) | parameters.window


def nabla_attention(query_BSHD: Tensor, key_BSHD: Tensor, value_BSHD: Tensor, parameters: NablaParameters) -> Tensor:
    """Reference sparse attention, any device: each head under its own expanded mask, so memory is S × S of one head."""
    blocks = nabla_map(query_BSHD, key_BSHD, parameters)
    heads = []
    for head in range(query_BSHD.shape[2]):
        mask = blocks[:, head].repeat_interleave(BLOCK_TOKENS, -2).repeat_interleave(BLOCK_TOKENS, -1)
        q, k, v = (x[:, :, head] for x in (query_BSHD, key_BSHD, value_BSHD))
        heads.append(F.scaled_dot_product_attention(q, k, v, attn_mask=mask))
    return torch.stack(heads, dim=2)


def dense_attention(query_BSHD: Tensor, key_BSHD: Tensor, value_BSHD: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (query_BSHD, key_BSHD, value_BSHD))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def rotate(x_BSHD: Tensor, rope: Tensor) -> Tensor:
    """Rotary embedding in fp32, rounded to bf16 whatever the run's precision: the model was trained so."""
    pairs = x_BSHD.reshape(*x_BSHD.shape[:-1], -1, 1, 2).float()
    return (rope * pairs).sum(dim=-1).reshape(x_BSHD.shape).to(torch.bfloat16).type_as(x_BSHD)


class AttentionProcessor:
    """What diffusers' `Kandinsky5Attention` calls: projections, q/k norms in fp32, RoPE, attention, projection."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        rotary_emb: Tensor | None = None,
        sparse_params: dict[str, Any] | None = None,
    ) -> Tensor:
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query = attn.to_query(hidden_states).unflatten(-1, (attn.num_heads, -1))
        key = attn.to_key(source).unflatten(-1, (attn.num_heads, -1))
        value = attn.to_value(source).unflatten(-1, (attn.num_heads, -1))
        query = attn.query_norm(query.float()).type_as(query)
        key = attn.key_norm(key.float()).type_as(key)
        if rotary_emb is not None:
            query, key = rotate(query, rotary_emb), rotate(key, rotary_emb)
        if sparse_params is None:
            out = dense_attention(query, key, value)
        else:
            out = nabla_attention(query, key, value, sparse_params["nabla"])
        return attn.out_layer(out.flatten(-2))


def nabla_parameters(model: ModelConfig, tokens_THW: tuple[int, int, int], device: torch.device) -> NablaParameters:
    """For a clip of (T, H, W) tokens; H and W are multiples of 8 (the plan saw to it).

    The window is always or-ed in: the inference pipeline never reads `attention_add_sta` either.
    """
    window = (model.attention_wT, model.attention_wH, model.attention_wW)
    probability = model.attention_P
    assert probability is not None and all(w is not None for w in window), "NABLA checkpoints say P and windows"
    frames, height, width = tokens_THW
    blocks = (frames, height // NABLA_BLOCK, width // NABLA_BLOCK)
    widths = (int(window[0] or 0), int(window[1] or 0), int(window[2] or 0))
    return NablaParameters(probability, sliding_tile_window(blocks, widths, device)[None, None])
