"""The loop that an informed user of diffusers would write: the stock model, fully recomputed, compiled, under FSDP2.

It is sharded and stepped like ours, so what a comparison shows is the model's code. Stock NABLA cannot train (eager it
asks for terabytes, compiled its backward has no kernel), so sparse checkpoints are attended densely here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from k5dist.config import ModelConfig, RunConfig
from k5dist.model.dit import FP32_MODULES
from k5dist.model.nabla import NablaParameters
from k5dist.model.transformer import adapt
from k5dist.train.optimiser import trained_dtype
from k5dist.train.parallelise import RECOMPILE_LIMIT


class StockTransformer(nn.Module):
    """diffusers' `Kandinsky5Transformer3DModel` behind the signature of ours."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        from diffusers import Kandinsky5Transformer3DModel

        keys = ("in_visual_dim", "in_text_dim", "in_text_dim2", "time_dim", "out_visual_dim", "model_dim", "ff_dim")
        keys += ("num_text_blocks", "num_visual_blocks", "axes_dims", "visual_cond")
        self.stock = Kandinsky5Transformer3DModel(**{key: getattr(model, key) for key in keys})

    def forward(
        self,
        latents_BTHWC: Tensor,
        text_BLC: Tensor,
        pooled_BC: Tensor,
        timestep_B: Tensor,
        scale_factor: tuple[float, float, float],
        sparsity: NablaParameters | None,
    ) -> Tensor:
        _, frames, height, width, _ = latents_BTHWC.shape
        device = latents_BTHWC.device
        positions: Any = [torch.arange(size, device=device) for size in (frames, height // 2, width // 2)]
        out: Any = self.stock(
            hidden_states=latents_BTHWC,
            encoder_hidden_states=text_BLC,
            timestep=timestep_B,
            pooled_projections=pooled_BC,
            visual_rope_pos=positions,
            text_rope_pos=torch.arange(text_BLC.shape[1], device=device),
            scale_factor=scale_factor,
            return_dict=True,
        )
        return out.sample


def build_baseline(config: RunConfig, mesh: DeviceMesh, dtype: torch.dtype) -> StockTransformer:
    """On the meta device, adapted, compiled, recomputed and sharded."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        transformer = StockTransformer(config.model)
    lora = config.lora if config.adapter == "lora" else None
    stock: Any = adapt(transformer.stock, lora, dtype, trained_dtype(config.optimizer))
    if config.train.compile and mesh.device_type == "cuda":
        torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
        for block in stock.visual_transformer_blocks:
            block.compile()
    for blocks in (stock.text_transformer_blocks, stock.visual_transformer_blocks):
        for at, block in enumerate(blocks):
            blocks[at] = checkpoint_wrapper(block, preserve_rng_state=False)
    shards = mesh["shard", "context"]._flatten("shards")
    fsdp_mesh = mesh["replicate", "shards"] if mesh["replicate"].size() > 1 else shards
    exact = MixedPrecisionPolicy(param_dtype=torch.float32, cast_forward_inputs=False)
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for path, module in stock.named_modules():
        if path.rsplit(".", 1)[-1] in FP32_MODULES:
            fully_shard(module, mesh=fsdp_mesh, mp_policy=exact)
    for block in (*stock.text_transformer_blocks, *stock.visual_transformer_blocks):
        fully_shard(block, mesh=fsdp_mesh, mp_policy=policy)
    fully_shard(transformer, mesh=fsdp_mesh, mp_policy=policy)
    return transformer
