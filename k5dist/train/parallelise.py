"""Parallelism as functions applied to a finished model: compile, then checkpointing, then FSDP2, in that order."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from k5dist.config import TrainConfig
from k5dist.plan import World

# Shapes a block may be compiled for (buckets, text lengths, training and validation); past it dynamo runs eagerly
# without a word, and its default of 8 is soon reached.
RECOMPILE_LIMIT = 64
BLOCK_LISTS = ("text_transformer_blocks", "visual_transformer_blocks")


def make_mesh(world: World) -> DeviceMesh:
    """Workers as (replicate, shard): HSDP's two axes; plain FSDP2 is replicate = 1."""
    return init_device_mesh(world.device, (world.replicate, world.shard), mesh_dim_names=("replicate", "shard"))


def compute_dtype(train: TrainConfig) -> torch.dtype:
    return torch.bfloat16 if train.precision == "bf16" else torch.float32


def parallelise(transformer: nn.Module, mesh: DeviceMesh, train: TrainConfig) -> nn.Module:
    """Wrap every block, then the root, in place. Parameters are still on the meta device."""
    for name in BLOCK_LISTS:
        blocks: Any = transformer.get_submodule(name)
        for i, block in enumerate(blocks):
            if train.compile and mesh.device_type == "cuda":
                # Not as one graph: the fp32 modulation is an FSDP2 group of its own, and its hooks break the graph
                # where the block begins. Checkpointing goes around what is compiled for the same reason.
                torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
                torch._dynamo.config.accumulated_recompile_limit = 8 * RECOMPILE_LIMIT
                block.compile()
            if train.activation_checkpointing:
                blocks[i] = checkpoint_wrapper(block, preserve_rng_state=False)
    shard(transformer, mesh, compute_dtype(train))
    return transformer


def shard(transformer: nn.Module, mesh: DeviceMesh, dtype: torch.dtype) -> None:
    """FSDP2 a block and a root, with the modules that diffusers keeps in fp32 in groups of their own.

    Inputs are not cast: `cast_forward_inputs` would round the fp32 RoPE tables at every block and make recomputed
    tensors differ from saved ones. Gradients are reduced in fp32.
    """
    fsdp_mesh = mesh if mesh["replicate"].size() > 1 else mesh["shard"]
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    options: Any = {"mesh": fsdp_mesh, "mp_policy": policy}
    if dtype != torch.float32:
        exact = MixedPrecisionPolicy(param_dtype=torch.float32, cast_forward_inputs=False)
        for module in _fp32_modules(transformer):
            fully_shard(module, mesh=fsdp_mesh, mp_policy=exact)
    for name in BLOCK_LISTS:
        for block in transformer.get_submodule(name).children():
            fully_shard(block, **options)
    fully_shard(transformer, **options)


def _fp32_modules(transformer: nn.Module) -> list[nn.Module]:
    """Time embedding and modulations: small layers whose rounding the whole network would feel."""
    names = ("time_embeddings", "modulation", "visual_modulation", "text_modulation")
    return [module for path, module in transformer.named_modules() if path.rsplit(".", 1)[-1] in names]


def set_gradient_sync(transformer: nn.Module, *, last: bool, full: bool) -> None:
    """What the coming backward of an accumulated step reduces.

    An adapter's gradients are small: they are summed up whole and reduced with the last micro-batch. Those of all
    weights would fill a GPU (fp32, unsharded): they are reduce-scattered each time, and only HSDP's all-reduce waits.
    """
    assert isinstance(transformer, FSDPModule)
    transformer.set_requires_gradient_sync(last or full)
    if full:
        transformer.set_requires_all_reduce(last)
