"""What a block's backward computes again, and what its forward keeps (selective activation checkpointing)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

POLICIES = ("none", "attention", "full")
_SDPA_NAMES = ("cudnn_attention", "flash_attention", "efficient_attention", "flash_attention_for_cpu")
_SDPA = frozenset(getattr(torch.ops.aten, f"_scaled_dot_product_{name}").default for name in _SDPA_NAMES)


def keep_attention(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Keep the outputs of self-attention and NABLA's map: a third to two thirds of a block's work in little memory.

    Cross-attention is told by its keys, fewer than its queries; computing it again costs next to nothing.
    """
    sparse = (torch.ops.k5dist.nabla_attention.default, torch.ops.k5dist.nabla_map.default)
    kept = op in sparse or (op in _SDPA and args[0].shape[2] == args[1].shape[2])
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def run_block(recompute: str, compute: Callable[..., Tensor], *args: Any) -> Tensor:
    """Call `compute(*args)`, keeping for its backward what the policy says."""
    if recompute == "none" or not torch.is_grad_enabled():
        return compute(*args)
    # The blocks draw no random numbers, so no generator's state is kept.
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if recompute == "attention":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, keep_attention)
    return checkpoint(compute, *args, **options)
