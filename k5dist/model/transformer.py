"""The DiT on the meta device, with its adapters, ready to be sharded and then filled."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TypeVar

import torch
from torch import nn

from k5dist.config import CrepaConfig, LoraConfig, ModelConfig
from k5dist.model.crepa import CrepaHead
from k5dist.model.dit import FP32_MODULES, VideoTransformer
from k5dist.model.lora import initialise_trained, inject, is_length
from k5dist.model.lora_files import read_adapters
from k5dist.model.pretrained import check_architecture, component_uri, read_config
from k5dist.model.quantised import check_device, quantise_blocks
from k5dist.model.weight_stream import WeightStream
from k5dist.model.weights import is_adapter, load_weights

Model = TypeVar("Model", bound=nn.Module)


def build_transformer(
    pretrained: str,
    model: ModelConfig,
    *,
    lora: LoraConfig | None,
    dtype: torch.dtype,
    trained: torch.dtype = torch.float32,
    crepa: CrepaConfig | None = None,
    feature_dim: int = 0,
) -> VideoTransformer:
    """The DiT of a diffusers checkpoint with parameters on the meta device (buffers are real).

    With `lora`, the base is frozen and stored in `dtype` (its blocks' linear layers in `lora.base_dtype`), and the
    adapters in `trained`; without, every weight is trainable and stored in `trained`. Time embedding and modulation are
    fp32 always, as diffusers keeps them.
    """
    check_architecture(model, read_config(pretrained, "transformer"))
    with torch.device("meta"):
        transformer = VideoTransformer(model)
    return add_head(adapt(transformer, lora, dtype, trained), model, crepa, feature_dim, trained)


def add_head(
    transformer: VideoTransformer, model: ModelConfig, crepa: CrepaConfig | None, feature_dim: int, trained: torch.dtype
) -> VideoTransformer:
    """Give the model CREPA's projection head, trained whatever else is, where it is on."""
    if crepa is not None and crepa.enabled:
        with torch.device("meta"):
            transformer.crepa_head = CrepaHead(crepa, model.model_dim, feature_dim).to(trained)
    return transformer


def adapt(transformer: Model, lora: LoraConfig | None, frozen: torch.dtype, trained: torch.dtype) -> Model:
    """Say what is trained and in which types it is stored, in place; `FP32_MODULES` and DoRA's lengths are fp32
    whatever is asked for."""
    transformer.requires_grad_(lora is None)
    for name, parameter in transformer.named_parameters():
        fp32 = any(part in FP32_MODULES for part in name.split("."))
        parameter.data = parameter.data.to(torch.float32 if fp32 else trained if lora is None else frozen)
    if lora is not None:
        inject(transformer, lora)
        for name, parameter in transformer.named_parameters():
            if is_adapter(name):
                parameter.data = parameter.data.to(torch.float32 if is_length(name) else trained)
        if lora.base_dtype:
            quantise_blocks(transformer, lora.base_dtype)
    return transformer


@contextlib.contextmanager
def adapters_off(transformer: nn.Module) -> Iterator[None]:
    """The model as it was before training, for a while. Not by PEFT's own switch, which also freezes the adapters."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in transformer.modules() if isinstance(module, BaseTunerLayer)]
    assert layers, "without adapters there is nothing to switch off"
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def materialise(
    transformer: nn.Module,
    pretrained: str,
    *,
    device: torch.device,
    seed: int,
    lora: LoraConfig | None = None,
) -> None:
    """Allocate the (sharded) parameters on `device` and fill them: base from the checkpoint, adapters from
    `lora.init_from` or `seed`."""
    check_device(transformer, device)
    stream = allocate(transformer, device)
    load_weights(transformer, component_uri(pretrained, "transformer"))
    initialise_trained(transformer, seed, None if lora is None else read_adapters(lora, transformer))
    if stream is not None:
        stream.start()


def allocate(transformer: nn.Module, device: torch.device) -> WeightStream | None:
    """Parameters from meta to `device`, uninitialised; buffers (RoPE's tables, in no checkpoint) keep theirs.

    Where weights are streamed, those lie on the host and are to be filled there before the returned stream is started.
    """
    buffers = {name: buffer.to(device) for name, buffer in transformer.named_buffers()}
    stream = getattr(transformer, "stream", None)
    elsewhere = stream.parameters if stream is not None else set()
    transformer._apply(lambda t: t if t in elsewhere else torch.empty_like(t, device=device))
    for name, buffer in buffers.items():
        owner, _, attribute = name.rpartition(".")
        transformer.get_submodule(owner).register_buffer(attribute, buffer, persistent=False)
    if stream is not None:
        stream.allocate()
    return stream
