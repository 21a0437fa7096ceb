"""LoRAs that others left: diffusers' `pytorch_lora_weights.safetensors` and PEFT's adapter folders, as a start.

Strict: what is found must be the configured adapter, layer by layer; else a ConfigError says which key fits it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from k5dist import storage
from k5dist.cache.keys import content_digest
from k5dist.config import ConfigError, LoraConfig, ModelConfig
from k5dist.estimate import layer_shape
from k5dist.model.pretrained import is_hub_id
from k5dist.model.weights import StoredTensor, read_header

LORA_FILE = "pytorch_lora_weights.safetensors"
_PEFT_FILE, _PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
_METADATA = "lora_adapter_metadata"
_NAME = re.compile(
    r"(?:transformer\.|base_model\.model\.)?(?:transformer\.)?"
    r"((?:text|visual)_transformer_blocks\.\d+\..+?)\.(lora_A|lora_B|lora_magnitude_vector)(?:\.default)?(?:\.weight)?"
)
Shapes = Mapping[str, tuple[int, int]]  # (out, in) features of each adapted layer


@dataclasses.dataclass(frozen=True)
class FoundLora:
    """A LoRA's file, by layer and part (`lora_A`, `lora_B`, `lora_magnitude_vector`), and how it is scaled."""

    tensors: dict[str, dict[str, StoredTensor]]
    alpha: float | None
    use_rslora: bool

    @property
    def rank(self) -> int:
        return next(iter(self.tensors.values()))["lora_A"].shape[0]

    @property
    def layers(self) -> dict[str, set[str]]:
        """Names of layers by kind of block, as `LoraConfig.layers` has them."""
        found: dict[str, set[str]] = {}
        for path in self.tensors:
            block, _, layer = path.split(".", 2)
            found.setdefault(block.partition("_")[0], set()).add(layer)
        return found


def identity(lora: LoraConfig) -> str:
    """What stands for the content of `lora.init_from` in the run's fingerprint; empty without one."""
    if lora.init_from is None:
        return ""
    if is_hub_id(lora.init_from):
        return f"hub:{lora.init_from}"
    file, config = _files(lora.init_from)
    digest = hashlib.sha256(content_digest(file).encode() + json.dumps(config, sort_keys=True).encode())
    return f"lora:{digest.hexdigest()[:16]}"


def check(lora: LoraConfig, model: ModelConfig) -> None:
    """Raises ConfigError when `lora.init_from` is not the configured adapter. A hub id passes: workers ask it."""
    if lora.init_from is None or is_hub_id(lora.init_from):
        return
    storage.check_readable("lora.init_from", lora.init_from)
    blocks = {"text": model.num_text_blocks, "visual": model.num_visual_blocks}
    shapes = {
        f"{kind}_transformer_blocks.{number}.{layer}": layer_shape(model, layer)
        for kind, layers in lora.layers.items()
        for number in range(blocks[kind])
        for layer in layers
    }
    _match(lora, find(lora.init_from), shapes)


def read_adapters(lora: LoraConfig, transformer: nn.Module) -> dict[str, StoredTensor] | None:
    """The tensors of `lora.init_from` by the names of the model's parameters; None where adapters start from nothing.

    Raises ConfigError, as `check` does.
    """
    if lora.init_from is None:
        return None
    sizes = {name: tuple(parameter.shape) for name, parameter in transformer.named_parameters() if ".lora_" in name}
    shapes = {
        name.partition(".lora_A.")[0]: (sizes[name.replace(".lora_A.", ".lora_B.")][0], size[1])
        for name, size in sizes.items()
        if ".lora_A." in name
    }
    found = find(lora.init_from)
    _match(lora, found, shapes)
    return {
        f"{path}.{part}.default.weight": tensor
        for path, parts in found.tensors.items()
        for part, tensor in parts.items()
    }


def find(init_from: str) -> FoundLora:
    """Read a LoRA's header; raises ConfigError when it is none of a Kandinsky 5 transformer."""
    file, config = _files(init_from)
    stored, metadata = read_header(file)
    config = config or json.loads(metadata.get(_METADATA, "{}"))
    config = {key.removeprefix("transformer."): value for key, value in config.items()}
    tensors: dict[str, dict[str, StoredTensor]] = {}
    for name, tensor in stored.items():
        match = _NAME.fullmatch(name)
        if match is None:
            rule = (
                f"{file.rsplit('/', 1)[-1]} holds {name!r}: no LoRA of this transformer as diffusers or PEFT write it"
            )
            raise ConfigError("lora.init_from", init_from, rule, "name a LoRA that was exported by diffusers or PEFT")
        tensors.setdefault(match[1], {})[match[2]] = tensor
    if not tensors or any(not {"lora_A", "lora_B"} <= parts.keys() for parts in tensors.values()):
        rule = f"{file.rsplit('/', 1)[-1]} lacks factors"
        raise ConfigError("lora.init_from", init_from, rule, "name a LoRA with both factors of every layer")
    alpha = config.get("lora_alpha")
    if any(value != alpha for value in (config.get("alpha_pattern") or {}).values()):
        raise ConfigError("lora.init_from", init_from, "its layers have several alphas", "name a LoRA with one alpha")
    return FoundLora(tensors, None if alpha is None else float(alpha), bool(config.get("use_rslora", False)))


def _files(init_from: str) -> tuple[str, dict[str, Any]]:
    """The weights' file and, of a PEFT folder, its configuration."""
    folder = _downloaded(init_from) if is_hub_id(init_from) else storage.normalise(init_from)
    if folder.endswith(".safetensors"):
        return folder, {}
    if storage.exists(storage.join(folder, LORA_FILE)):
        return storage.join(folder, LORA_FILE), {}
    file, config = storage.join(folder, _PEFT_FILE), storage.join(folder, _PEFT_CONFIG)
    if storage.exists(file) and storage.exists(config):
        return file, json.loads(storage.read_text(config))
    rule = f"a LoRA's folder has {LORA_FILE}, or {_PEFT_FILE} and {_PEFT_CONFIG}"
    raise ConfigError("lora.init_from", init_from, rule, "name the folder that holds them")


def _downloaded(hub_id: str) -> str:
    from huggingface_hub import snapshot_download

    try:
        return str(Path(snapshot_download(hub_id, allow_patterns=[LORA_FILE, _PEFT_FILE, _PEFT_CONFIG])))
    except Exception as error:
        rule = f"the hub must hold it and be reachable ({type(error).__name__})"
        raise ConfigError(
            "lora.init_from", hub_id, rule, "check the name and network, or name a local folder"
        ) from error


def _match(lora: LoraConfig, found: FoundLora, shapes: Shapes) -> None:
    """Raises ConfigError with the key that does not fit, first those that a user can set."""
    ranks = {parts["lora_A"].shape[0] for parts in found.tensors.values()}
    if len(ranks) > 1:
        raise _unusable(lora, f"its layers have several ranks: {sorted(ranks)}")
    if found.rank != lora.rank:
        raise _other("rank", lora.rank, found.rank)
    if {kind: set(layers) for kind, layers in lora.layers.items() if layers} != found.layers:
        fix = _targets(lora, found.layers)
        if fix is None:
            raise _unusable(lora, "its layers are not the same in all blocks of a kind")
        rule = f"lora.init_from={lora.init_from} adapts other layers"
        shown = lora.targets if isinstance(lora.targets, str) else list(lora.targets)
        raise ConfigError("lora.targets", shown, rule, fix)
    for path, (rows, columns) in shapes.items():
        parts = found.tensors.get(path, {})
        sizes = (*(parts[part].shape for part in ("lora_A", "lora_B") if part in parts),)
        if sizes != ((lora.rank, columns), (rows, lora.rank)):
            raise _unusable(lora, f"{path} has factors {sizes or 'nowhere'}, the model's layer is {rows} × {columns}")
    if found.tensors.keys() - shapes.keys():
        raise _unusable(lora, "it has more blocks than the model")
    has_lengths = {"lora_magnitude_vector" in parts for parts in found.tensors.values()}
    if has_lengths != {lora.use_dora}:
        raise _other("use_dora", lora.use_dora, not lora.use_dora)
    if found.use_rslora != lora.use_rslora:
        raise _other("use_rslora", lora.use_rslora, found.use_rslora)
    alpha = float(lora.rank) if found.alpha is None else found.alpha  # as diffusers and PEFT take it
    if alpha != lora.alpha:
        raise _other("alpha", lora.alpha, alpha)


def _other(key: str, value: Any, found: Any) -> ConfigError:
    shown = str(found).lower() if isinstance(found, bool) else f"{found:g}"
    rule = f"the LoRA of lora.init_from was trained with lora.{key}={shown}"
    return ConfigError(f"lora.{key}", value, rule, f"lora.{key}={shown}")


def _unusable(lora: LoraConfig, rule: str) -> ConfigError:
    return ConfigError(
        "lora.init_from", lora.init_from, rule, "a LoRA of this very transformer, or lora.init_from=null"
    )


def _targets(lora: LoraConfig, found: Mapping[str, set[str]]) -> str | None:
    """The settings that adapt just the layers found; presets first."""
    names = tuple(sorted({layer for layers in found.values() for layer in layers}))
    blocks = "all" if len(found) > 1 else next(iter(found))
    for targets in ("attention", "attention+ffn", names):
        try:
            layers = dataclasses.replace(lora, targets=targets, blocks=blocks).layers
        except ConfigError:
            return None
        if {kind: set(names) for kind, names in layers.items() if names} == found:
            said = targets if isinstance(targets, str) else f"[{','.join(targets)}]"
            return f"lora.targets={said} lora.blocks={blocks}"
    return None
