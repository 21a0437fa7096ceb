"""A frozen base in one byte a weight: int8 or float8 with a scale for each row, multiplied in the compute type.

q = round(w / s), s = max|row| / 127 for int8; for float8 (e4m3) the nearest of its numbers to w / s, s = max|row| /
448. A layer's weight is q · s, made anew for its product and for that of its backward, so it is never kept.

The bytes lie in a parameter of the *compute type* (two or four of them a number): FSDP2 of torch 2.11 takes no integer
parameters, and casts float8 ones to its `param_dtype` before it gathers them. Bytes in bf16's clothes are sharded by
rows, gathered as they are, and need nothing of FSDP2. Why not torchao: docs/adr/0019.

Shape suffixes: S tokens, N out features, K in features, P packed in features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from k5dist.config import ConfigError

TYPES = {"int8": torch.int8, "float8": torch.float8_e4m3fn}
_LARGEST = {"int8": 127.0, "float8": 448.0}


def quantise(weight_NK: Tensor, kind: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(bytes packed as numbers of `dtype` [N, P], scales [N] of `dtype`).

    The scale is rounded to `dtype` before it divides, so that nothing is lost when it is stored and gathered in it.
    """
    weight = weight_NK.float()
    scale = (weight.abs().amax(dim=1) / _LARGEST[kind]).clamp_min(1e-30).to(dtype)
    scaled = (weight / scale.float()[:, None]).clamp(-_LARGEST[kind], _LARGEST[kind])
    whole = scaled.round() if kind == "int8" else scaled
    return whole.to(TYPES[kind]).view(torch.uint8).view(dtype), scale


def dequantise(stored_NP: Tensor, scale_N: Tensor, kind: str, dtype: torch.dtype) -> Tensor:
    """The weight [N, K] in `dtype`: one rounding of the exact product."""
    numbers = stored_NP.view(torch.uint8).view(TYPES[kind])
    return (numbers.float() * scale_N.float()[:, None]).to(dtype)


class QuantisedLinear(nn.Linear):
    """An `nn.Linear` with frozen weights in one byte each; made of one in place by `quantise_blocks`."""

    stored: nn.Parameter
    scale: nn.Parameter
    kind: str

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """[N, K] in the compute type, made anew; of a sharded layer this worker's rows."""
        stored, scale = (_local(each) for each in (self.stored, self.scale))
        return dequantise(stored, scale, self.kind, stored.dtype)

    def forward(self, input: Tensor) -> Tensor:
        return _Product.apply(input, self.stored, self.scale, self.bias, self.kind)

    def fill(self, read_rows: Callable[[int, int], Tensor], fill_shard: Callable[..., None]) -> None:
        """Quantise this worker's rows of a checkpoint's weight, read once, where they will lie."""
        kept: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

        def part(at: int) -> Callable[[int, int], Tensor]:
            def rows(first: int, count: int) -> Tensor:
                if (first, count) not in kept:
                    read = read_rows(first, count).to(_local(self.stored).device)
                    # What an unquantised base would hold: the checkpoint in the compute type.
                    kept[first, count] = quantise(read.to(self.stored.dtype), self.kind, self.stored.dtype)
                return kept[first, count][at]

            return rows

        fill_shard(self.stored, part(0))
        fill_shard(self.scale, part(1))


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class _Product(torch.autograd.Function):
    """x [S, K] times weight [N, K]ᵀ plus bias → [S, N]; keeps bytes for its backward, not the weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, stored: Tensor, scale: Tensor, bias: Tensor | None, kind: str) -> Tensor:
        ctx.save_for_backward(stored, scale)
        ctx.kind = kind
        return F.linear(x, dequantise(stored, scale, kind, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:  # type: ignore[override]
        stored, scale = ctx.saved_tensors
        return grad @ dequantise(stored, scale, ctx.kind, grad.dtype), None, None, None, None


def quantise_blocks(transformer: nn.Module, kind: str) -> None:
    """Make the linear layers of the transformer blocks (attention, feed-forward) quantised ones, in place.

    Adapters and the fp32 modulations stay as they are; so does what lies outside the blocks, a hundredth of the model.
    Parameters may be on meta.
    """
    for module in _block_layers(transformer):
        weight = module.weight
        per_number = weight.dtype.itemsize
        assert weight.shape[1] % per_number == 0, "features come in multiples of four"
        del module.weight
        module.__class__ = QuantisedLinear
        if weight.is_meta:
            packed = torch.empty(weight.shape[0], weight.shape[1] // per_number, dtype=weight.dtype, device="meta")
            scale = torch.empty(weight.shape[0], dtype=weight.dtype, device="meta")
        else:
            packed, scale = quantise(weight.detach(), kind, weight.dtype)
        module.kind = kind  # type: ignore[assignment]
        module.register_parameter("stored", nn.Parameter(packed, requires_grad=False))
        module.register_parameter("scale", nn.Parameter(scale, requires_grad=False))


@torch.no_grad()
def round_blocks(transformer: nn.Module, kind: str) -> None:
    """Give the same layers of an unquantised transformer (ours or diffusers') the weights that `kind` can hold."""
    for module in _block_layers(transformer):
        packed, scale = quantise(module.weight, kind, module.weight.dtype)
        module.weight.copy_(dequantise(packed, scale, kind, module.weight.dtype))


def _block_layers(transformer: nn.Module) -> list[nn.Linear]:
    """Linear layers of attention and feed-forward; not adapters, not the fp32 modulations."""
    layers = []
    for path, module in transformer.named_modules():
        names = path.split(".")
        inside = len(names) > 2 and names[0].endswith("_transformer_blocks") and "modulation" not in names[2]
        if inside and type(module) is nn.Linear and not any(name.startswith("lora_") for name in names):
            layers.append(module)
    return layers


def quantised_layers(model: nn.Module) -> dict[str, QuantisedLinear]:
    return {path: module for path, module in model.named_modules() if isinstance(module, QuantisedLinear)}


def check_device(model: nn.Module, device: torch.device) -> None:
    """Raises ConfigError on a GPU whose compiler knows no float8 numbers."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 9):
        return
    if any(layer.kind == "float8" for layer in quantised_layers(model).values()):
        rule = f"{torch.cuda.get_device_name(device)} has no float8 numbers (Ada, Hopper and later have)"
        raise ConfigError("lora.base_dtype", "float8", rule, "lora.base_dtype=int8")
