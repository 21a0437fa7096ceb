"""What a block's backward computes again, and what its forward keeps (selective activation checkpointing)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

_SDPA_NAMES = ("cudnn_attention", "flash_attention", "efficient_attention", "flash_attention_for_cpu")
_SDPA = frozenset(getattr(torch.ops.aten, f"_scaled_dot_product_{name}").default for name in _SDPA_NAMES)
_PRODUCTS = {torch.ops.aten.mm.default: 0, torch.ops.aten.addmm.default: 1, torch.ops.aten._scaled_mm.default: 0}


def keep_attention(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Keep the outputs of self-attention and NABLA's map: a third to two thirds of a block's work in little memory.

    Cross-attention is not kept: computing it again costs next to nothing, its output is as large as any. It is an
    operator of its own, or told by its keys, fewer than its queries.
    """
    return _keep_if(_is_attention(op, args))


def keep_linear(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Keep matrix products as well; norms, modulation, RoPE, GELU and gates are computed again.

    Not the products that widen an adapter's few columns: they are as large as any, and cost nothing.
    """
    if op in _PRODUCTS:
        left, right = args[_PRODUCTS[op] : _PRODUCTS[op] + 2]
        return _keep_if(8 * left.shape[-1] >= right.shape[-1])
    return _keep_if(_is_attention(op, args))


def _is_attention(op: Any, args: Any) -> bool:
    ours = (
        torch.ops.k5dist.nabla_attention.default,
        torch.ops.k5dist.nabla_map.default,
        torch.ops.k5dist.flash4.default,
    )
    return op in ours or (op in _SDPA and args[0].shape[2] == args[1].shape[2])


def _keep_if(kept: bool) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


_POLICIES = {"attention": keep_attention, "linear": keep_linear}


def run_block(recompute: str, compute: Callable[..., Tensor], *args: Any) -> Tensor:
    """Call `compute(*args)`, keeping for its backward what the policy says ("none" recomputes nothing)."""
    if recompute == "none":
        return compute(*args)
    # The blocks draw from no generator (an adapter's dropout is keyed), so none's state need be restored.
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if recompute in _POLICIES:
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _POLICIES[recompute])
    return checkpoint(compute, *args, **options)
