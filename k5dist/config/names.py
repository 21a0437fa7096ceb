"""Names of the weights that a run may train, without building the model: what patterns of the configuration are held
against before anything is started."""

from __future__ import annotations

from collections.abc import Iterator

from k5dist.config.lora import LoraConfig
from k5dist.config.model import ModelConfig

_EMBEDDINGS = ("time_embeddings.in_layer", "time_embeddings.out_layer", "text_embeddings.in_layer")
_EMBEDDINGS += ("text_embeddings.norm", "pooled_text_embeddings.in_layer", "pooled_text_embeddings.norm")
_ROOT = (*_EMBEDDINGS, "visual_embeddings.in_layer", "out_layer.modulation.out_layer", "out_layer.out_layer")
_PROJECTIONS = ("to_query", "to_key", "to_value", "out_layer")
_ADAPTERS = ("lora_A.default.weight", "lora_B.default.weight", "lora_magnitude_vector.default.weight")


def weight_names(model: ModelConfig) -> Iterator[str]:
    """All of the transformer's."""
    for layer in _ROOT:
        yield from (f"{layer}.weight", f"{layer}.bias")
    for block, attentions in _blocks(model):
        kind = "visual" if block.startswith("visual") else "text"
        yield from (f"{block}.{kind}_modulation.out_layer.{end}" for end in ("weight", "bias"))
        for attention in attentions:
            yield from (f"{block}.{attention}.{name}.{end}" for name in _PROJECTIONS for end in ("weight", "bias"))
            yield from (f"{block}.{attention}.{name}.weight" for name in ("query_norm", "key_norm"))
        yield from (f"{block}.feed_forward.{name}.weight" for name in ("in_layer", "out_layer"))


def adapter_names(model: ModelConfig, lora: LoraConfig) -> Iterator[str]:
    """All of the adapters'."""
    ends = _ADAPTERS if lora.use_dora else _ADAPTERS[:2]
    for block, _ in _blocks(model):
        layers = lora.layers.get(block.partition("_")[0], ())
        yield from (f"{block}.{layer}.{end}" for layer in layers for end in ends)


def _blocks(model: ModelConfig) -> Iterator[tuple[str, tuple[str, ...]]]:
    for at in range(model.num_text_blocks):
        yield f"text_transformer_blocks.{at}", ("self_attention",)
    for at in range(model.num_visual_blocks):
        yield f"visual_transformer_blocks.{at}", ("self_attention", "cross_attention")
