"""Adapters through PEFT, and what PEFT leaves to us: dropout that a recomputed block draws again, DoRA over shards.

Shape suffixes: B clips, S tokens, N out features, K in features, R rank.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from k5dist.cache.keys import seed_of
from k5dist.config import LoraConfig
from k5dist.model.weights import HEAD, StoredTensor, fill_shard, is_adapter

ADAPTER = "default"  # PEFT's name for the only one


def target_pattern(lora: LoraConfig) -> str:
    """Full names of the adapted layers. By suffix alone `out_layer` would also hit the model's own output layer."""
    kinds = [
        rf"{kind}_transformer_blocks\.\d+\.({'|'.join(re.escape(layer) for layer in layers)})"
        for kind, layers in lora.layers.items()
        if layers
    ]
    return "|".join(f"({kind})" for kind in kinds)


def peft_config(lora: LoraConfig) -> Any:
    from peft import LoraConfig as PeftLoraConfig

    alpha: Any = lora.alpha  # PEFT's annotation says int, its arithmetic takes any number
    return PeftLoraConfig(
        r=lora.rank,
        lora_alpha=alpha,
        target_modules=target_pattern(lora),
        lora_dropout=lora.dropout,
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
    )


def inject(transformer: nn.Module, lora: LoraConfig) -> None:
    """Adapters on the targets, in place; parameters may be on meta."""
    from peft import inject_adapter_in_model
    from peft.tuners.lora.layer import Linear

    inject_adapter_in_model(peft_config(lora), transformer)
    key = DropoutKey()
    for path, module in transformer.named_modules():
        if isinstance(module, Linear):
            if lora.dropout:
                module.lora_dropout[ADAPTER] = KeyedDropout(lora.dropout, path, key)
            if lora.use_dora:
                module.lora_variant[ADAPTER] = ShardedDora()


# Dropout


class DropoutKey:
    """What all dropout of a model is drawn from, set for each clip: a number on the device, no generator's state."""

    def __init__(self) -> None:
        self.number = torch.zeros((), dtype=torch.int32, device="cpu")

    def set(self, seed: int, device: torch.device) -> None:
        self.number = self.number.to(device)  # the same tensor from then on: compiled blocks know it
        self.number.fill_(seed & 0x7FFF_FFFF)


class KeyedDropout(nn.Module):
    """Dropout whose draws are a hash of (key, layer, token of the clip, channel).

    Recomputing a block, compiled or not, drops the same numbers again without any generator's state being kept, and
    workers that share a clip's tokens drop what one worker with all of them would.
    """

    layer: Tensor

    def __init__(self, probability: float, path: str, key: DropoutKey) -> None:
        super().__init__()
        self.probability, self.key = probability, key
        # A tensor, not a number: the compiler makes one graph for all blocks, and would make one for each number.
        layer = torch.tensor(seed_of(path) & 0x7FFF_FFFF, dtype=torch.int32, device="cpu")
        self.register_buffer("layer", layer, persistent=False)
        # Text is whole on every worker of a context-parallel group, visual tokens are not.
        of_text = path.startswith("text_") or path.endswith(("cross_attention.to_key", "cross_attention.to_value"))
        self.shares_tokens = not of_text
        self.context_rank = 0

    def forward(self, x_BSK: Tensor) -> Tensor:
        if not self.training:
            return x_BSK
        tokens, channels = x_BSK.shape[-2:]
        first = self.context_rank * tokens
        rows = torch.arange(first, first + tokens, dtype=torch.int32, device=x_BSK.device)
        columns = torch.arange(channels, dtype=torch.int32, device=x_BSK.device)
        rows = _mixed(_mixed(rows) ^ _mixed(self.key.number ^ self.layer))
        drawn = _mixed(rows[:, None] + _mixed(columns)[None, :])  # uniform over all of int32
        kept = drawn >= int(self.probability * 2**32) - 2**31
        return x_BSK * kept * (1 / (1 - self.probability))


def _mixed(x: Tensor) -> Tensor:
    """A bijection of int32 whose every output bit hangs on every input bit: Wellons' lowbias32. Products wrap."""
    x = (x ^ ((x >> 16) & 0xFFFF)) * 0x7FEB352D
    x = (x ^ ((x >> 15) & 0x1FFFF)) * (0x846CA68B - 2**32)
    return x ^ ((x >> 16) & 0xFFFF)


def dropout_key(transformer: nn.Module) -> DropoutKey | None:
    """That of the model's adapters; None where they drop nothing."""
    return next((module.key for module in transformer.modules() if isinstance(module, KeyedDropout)), None)


def share_dropout(transformer: nn.Module, context_rank: int) -> None:
    """Tell dropout which run of a clip's visual tokens this worker of a context-parallel group holds."""
    for module in transformer.modules():
        if isinstance(module, KeyedDropout) and module.shares_tokens:
            module.context_rank = context_rank


# DoRA


class ShardedDora(DoraLinearVariant):
    """DoRA: y = m / ‖W + s B A‖ · (W x + s B A drop(x)) + bias, the norm a row's, a constant to the gradient
    (DoRA, Liu et al. 2024, section 4.3).

    PEFT's own forward makes an identity matrix of K × K to multiply the factors, takes the norm in bf16, and with
    dropout multiplies by W once more. Inside FSDP2's groups the factors are whole, so their product can be taken.
    """

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        first_RK, second_NR = module.lora_A[active_adapter].weight, module.lora_B[active_adapter].weight
        base, scale = module.get_base_layer(), module.scaling[active_adapter]
        norm_N = row_norms(base.weight.detach(), first_RK.detach(), second_NR.detach(), scale)
        factor_N = module.lora_magnitude_vector[active_adapter].weight.float() / norm_N
        dropped = module.lora_dropout[active_adapter](x)
        delta = F.linear(F.linear(dropped, first_RK), second_NR) * scale
        plain = result if base.bias is None else result - base.bias
        out = (factor_N * (plain + delta).float()).type_as(result)
        return out if base.bias is None else out + base.bias


def lengths_of_dora(transformer: nn.Module) -> list[nn.Module]:
    """The modules that hold DoRA's trained lengths. None is ever called: `ShardedDora` reads their weights."""
    return [module for path, module in transformer.named_modules() if is_length(f"{path}.weight")]


def is_length(name: str) -> bool:
    """Whether a parameter is a trained length of DoRA's; fp32 always: around 1 two bf16 are 1/128 apart."""
    return name.endswith(f".lora_magnitude_vector.{ADAPTER}.weight")


def row_norms(weight_NK: Tensor, first_RK: Tensor, second_NR: Tensor, scale: float) -> Tensor:
    """‖W + s B A‖ of each row, fp32 [N]."""
    return (weight_NK.float() + scale * (second_NR @ first_RK).float()).square().sum(dim=1).sqrt()


# Where adapters start


def initialise_trained(transformer: nn.Module, seed: int, found: dict[str, StoredTensor] | None = None) -> None:
    """Fill the adapters: from `found` by their names, else LoRA's usual start (A uniform in ±1/√in, B zero); and a
    projection head, its matrices and biases like A and B.

    Drawn whole by name: alike for every number of shards. DoRA's lengths are those of the base's rows.
    """
    for name, parameter in transformer.named_parameters():
        if found is not None and is_adapter(name):
            fill_shard(parameter, found[name].read_rows)
        elif is_length(name):
            _fill_lengths(parameter, transformer.get_submodule(name.partition(".lora_")[0]))
        elif is_adapter(name) or name.startswith(HEAD):
            fill_shard(parameter, _drawn(name, parameter, seed))


def _drawn(name: str, parameter: Tensor, seed: int) -> Callable[[int, int], Tensor]:
    whole = torch.zeros(parameter.shape)
    if ".lora_A." in name or (name.startswith(HEAD) and parameter.ndim == 2):
        bound = 1 / math.sqrt(parameter.shape[1])
        whole.uniform_(-bound, bound, generator=torch.Generator().manual_seed(seed_of(seed, name)))
    return lambda first, count: whole[first : first + count]


@torch.no_grad()
def _fill_lengths(parameter: Tensor, layer: nn.Module) -> None:
    """Norms of the base's rows. A sharded base's rows lie where their lengths do; a streamed base is whole anywhere."""
    weight = cast(Tensor, layer.get_submodule("base_layer").weight)
    weight, own = (each.to_local() if isinstance(each, DTensor) else each for each in (weight, parameter))
    lengths = weight.float().square().sum(dim=1).sqrt()
    if len(lengths) == parameter.shape[0]:
        fill_shard(parameter, lambda first, count: lengths[first : first + count])
        return
    assert len(lengths) == len(own), "a row and its length lie on one worker"
    own.copy_(lengths)
