"""Self- and cross-attention of the DiT over one clip: dense through PyTorch's fused kernels, sparse through NABLA's,
to a text through `text_attention`'s where there are any.

Shape suffixes: B batch, S tokens, H heads, D head_dim, M model_dim, E head_dim / 2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from k5dist.config import ConfigError
from k5dist.model import norm_rope
from k5dist.model.context import ContextGroup
from k5dist.model.flash4 import flash4_attention, interface
from k5dist.model.nabla import NablaParameters, nabla_attention, nabla_map
from k5dist.model.text_attention import has_kernel, text_attention


class Rope(NamedTuple):
    """Rotation of every token: cosines and sines, [S, E], fp32."""

    cosine: Tensor
    sine: Tensor


FLASH = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
# In order of preference. cuDNN's kernels are the fastest of PyTorch's for long sequences on Hopper, but build a plan
# for every shape, so the many lengths of a text's keys are not for them.
DENSE = [SDPBackend.CUDNN_ATTENTION, *FLASH]
# (queries [B, S, H, D], keys and values [B, L, H, D]) → [B, S, H, D]
DenseAttention = Callable[[Tensor, Tensor, Tensor], Tensor]


def prefer_flash(transformer: nn.Module, version: str) -> None:
    """Let the visual blocks' dense self-attention run FlashAttention 3 or 4 ("flash3", "flash4") from its own package.

    Raises ConfigError when the package is not there or this torch does not know it.
    """
    try:
        dense = _from_package(version)
    except (ImportError, AttributeError, ValueError, RuntimeError) as error:
        rule = f"its package must be installed, with CUDA kernels ({type(error).__name__}: {error})"
        raise ConfigError("train.attention", version, rule, "train.attention=auto") from error
    for module in transformer.modules():
        if isinstance(module, Attention) and module.dense is dense_attention:
            module.dense = dense


def _from_package(version: str) -> DenseAttention:
    if version == "flash4":
        interface()
        return flash4_attention
    from torch.nn import attention

    attention.activate_flash_attention_impl("FA3")
    return flash_attention


def flash_attention(query_BSHD: Tensor, key_BSHD: Tensor, value_BSHD: Tensor) -> Tensor:
    """By PyTorch's own FlashAttention, or the one that was activated in its place."""
    return dense_attention(query_BSHD, key_BSHD, value_BSHD, FLASH)


def dense_attention(
    query_BSHD: Tensor, key_BSHD: Tensor, value_BSHD: Tensor, kernels: list[SDPBackend] = DENSE
) -> Tensor:
    """By the first of `kernels` that can."""
    q, k, v = (x.transpose(1, 2) for x in (query_BSHD, key_BSHD, value_BSHD))
    with sdpa_kernel(kernels, set_priority=True):
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def rotate(x_BSHD: Tensor, rope: Rope) -> Tensor:
    """Rotary embedding in fp32, rounded to bf16 whatever the run's precision: the model was trained so."""
    cosine, sine = rope.cosine[:, None], rope.sine[:, None]
    first, second = x_BSHD.float().unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.stack([cosine * first - sine * second, sine * first + cosine * second], dim=-1)
    return rotated.flatten(-2).to(torch.bfloat16).type_as(x_BSHD)


def _normed(norm: nn.RMSNorm, x_BSHD: Tensor) -> Tensor:
    """In fp32; a bf16 weight beside an fp32 input would miss the fused kernel."""
    return F.rms_norm(x_BSHD.float(), norm.normalized_shape, norm.weight.float(), norm.eps).type_as(x_BSHD)


def _prepared(norm: nn.RMSNorm, x_BSHD: Tensor, rope: Rope | None) -> Tensor:
    """Queries or keys as attention takes them: normed and, with `rope`, turned."""
    if norm_rope.has_kernel(x_BSHD):
        eps = torch.finfo(torch.float32).eps if norm.eps is None else norm.eps  # as F.rms_norm has it
        return norm_rope.norm_rope(x_BSHD, norm.weight, eps, rope)
    normed = _normed(norm, x_BSHD)
    return normed if rope is None else rotate(normed, rope)


class Attention(nn.Module):
    """Multi-head attention with RMS-normed queries and keys; over a context-parallel group where it has one."""

    def __init__(self, dim: int, head_dim: int, dense: DenseAttention = dense_attention) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.context: ContextGroup | None = None
        self.dense = dense
        self.to_query = nn.Linear(dim, dim)
        self.to_key = nn.Linear(dim, dim)
        self.to_value = nn.Linear(dim, dim)
        self.query_norm = nn.RMSNorm(head_dim)
        self.key_norm = nn.RMSNorm(head_dim)
        self.out_layer = nn.Linear(dim, dim)

    def forward(
        self,
        x_BSM: Tensor,
        *,
        text: Tensor | None = None,
        rope: Rope | None = None,
        sparsity: NablaParameters | None = None,
        num_tokens: int = 0,
    ) -> Tensor:
        """Attend to `text` if given, else to itself.

        Args:
            rope: turns queries and keys.
            sparsity: makes it NABLA's.
            num_tokens: of the whole clip, where a context-parallel group shares them.
        """
        source = x_BSM if text is None else text
        query = self.to_query(x_BSM).unflatten(-1, (-1, self.head_dim))
        key = self.to_key(source).unflatten(-1, (-1, self.head_dim))
        value = self.to_value(source).unflatten(-1, (-1, self.head_dim))
        query, key = _prepared(self.query_norm, query, rope), _prepared(self.key_norm, key, rope)
        if text is not None and has_kernel(query):  # every worker of a context holds the whole text
            out = text_attention(query, key, value)
        elif self.context is None:
            out = attend(query, key, value, sparsity, self.dense)
        else:
            query, key, value = (self.context.heads_for_tokens(x, num_tokens) for x in (query, key, value))
            out = self.context.tokens_for_heads(attend(query, key, value, sparsity, self.dense))
        return self.out_layer(out.flatten(-2))


def attend(
    query_BSHD: Tensor,
    key_BSHD: Tensor,
    value_BSHD: Tensor,
    sparsity: NablaParameters | None,
    dense: DenseAttention = dense_attention,
) -> Tensor:
    if sparsity is None:
        return dense(query_BSHD, key_BSHD, value_BSHD)
    blocks = nabla_map(query_BSHD, key_BSHD, sparsity)
    return nabla_attention(query_BSHD, key_BSHD, value_BSHD, blocks)
