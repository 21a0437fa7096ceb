"""The DiT on the meta device, with its adapters, ready to be sharded and then filled."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from k5dist.cache.keys import seed_of
from k5dist.config import LoraConfig, ModelConfig
from k5dist.model.attention import AttentionProcessor
from k5dist.model.pretrained import check_architecture, component_uri, read_config
from k5dist.model.weights import fill_shard, is_adapter, load_weights

_ATTENTION = r"(self_attention|cross_attention)\.(to_query|to_key|to_value|out_layer)"
_FFN = r"feed_forward\.(in_layer|out_layer)"
# By suffix alone `out_layer` would also hit the model's own output layer and every modulation.
LORA_TARGETS = {
    "attention": rf"(text|visual)_transformer_blocks\.\d+\.{_ATTENTION}",
    "attention+ffn": rf"(text|visual)_transformer_blocks\.\d+\.({_ATTENTION}|{_FFN})",
}


def build_transformer(pretrained: str, model: ModelConfig, *, lora: LoraConfig | None, dtype: torch.dtype) -> nn.Module:
    """`Kandinsky5Transformer3DModel` with parameters on the meta device (buffers are real).

    With `lora`, the base is frozen and stored in `dtype` (time embedding and modulation stay fp32, as diffusers keeps
    them) and the adapters are fp32; without, every weight is trainable and fp32.
    """
    from accelerate import init_empty_weights
    from diffusers import Kandinsky5Transformer3DModel

    config = read_config(pretrained, "transformer")
    check_architecture(model, config)
    with init_empty_weights(include_buffers=False):
        transformer: Any = Kandinsky5Transformer3DModel.from_config(config)
    transformer.set_attn_processor(AttentionProcessor())
    if lora is None:
        return transformer.float().requires_grad_(True)
    transformer.requires_grad_(False)
    keep_fp32 = tuple(Kandinsky5Transformer3DModel._keep_in_fp32_modules)
    for name, parameter in transformer.named_parameters():
        fp32 = any(part in keep_fp32 for part in name.split("."))
        parameter.data = parameter.data.to(torch.float32 if fp32 else dtype)
    transformer.add_adapter(peft_config(lora))
    for name, parameter in transformer.named_parameters():
        if is_adapter(name):
            parameter.data = parameter.data.float()
    return transformer


def peft_config(lora: LoraConfig) -> Any:
    from peft import LoraConfig as PeftLoraConfig

    alpha: Any = lora.alpha  # PEFT's annotation says int, its arithmetic takes any number
    return PeftLoraConfig(r=lora.rank, lora_alpha=alpha, target_modules=LORA_TARGETS[lora.targets])


def materialise(transformer: nn.Module, pretrained: str, *, device: torch.device, seed: int) -> None:
    """Allocate the (sharded) parameters on `device` and fill them: base from the checkpoint, adapters from `seed`."""
    # RoPE's tables are buffers that no checkpoint holds; `to_empty` would destroy them.
    buffers = {name: buffer.to(device) for name, buffer in transformer.named_buffers()}
    transformer.to_empty(device=device)
    for name, buffer in buffers.items():
        owner, _, attribute = name.rpartition(".")
        transformer.get_submodule(owner).register_buffer(attribute, buffer, persistent=False)
    load_weights(transformer, component_uri(pretrained, "transformer"))
    _initialise_adapters(transformer, seed)


def _initialise_adapters(transformer: nn.Module, seed: int) -> None:
    """LoRA's usual start (A uniform in ±1/√in, B zero), drawn whole by name: the same for every number of shards."""
    for name, parameter in transformer.named_parameters():
        if not is_adapter(name):
            continue
        whole = torch.zeros(parameter.shape)
        if ".lora_A." in name:
            plain = name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", "")
            generator = torch.Generator().manual_seed(seed_of(seed, plain))
            bound = 1 / math.sqrt(parameter.shape[1])
            whole.uniform_(-bound, bound, generator=generator)
        fill_shard(parameter, lambda first, count, whole=whole: whole[first : first + count])
