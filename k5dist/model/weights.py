"""Weights from a diffusers folder straight into the shards of a model: nobody ever holds the whole of it.

Every rank reads, by range requests, just the rows of each tensor that FSDP2 gave it (sharding is along dimension 0, so
a shard is one run of bytes in the file), from a local folder or any fsspec URI. Strict both ways.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from k5dist import storage
from k5dist.model.quantised import QuantisedLinear, quantised_layers

WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
_READERS = 8
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a safetensors file: where its bytes are."""

    uri: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    def read_rows(self, first: int, count: int) -> torch.Tensor:
        """Rows [first, first + count) of dimension 0, on CPU."""
        row_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
        start = self.offset + first * row_bytes
        data = storage.read_bytes(self.uri, start, start + count * row_bytes)
        if len(data) != count * row_bytes:
            raise OSError(f"{self.uri}: truncated at byte {start + len(data)}")
        return torch.frombuffer(bytearray(data), dtype=self.dtype).reshape(count, *self.shape[1:])


def stored_tensors(folder_uri: str) -> dict[str, StoredTensor]:
    """Every tensor of a diffusers component folder, from the headers of its files alone."""
    index = storage.join(folder_uri, f"{WEIGHTS_NAME}.index.json")
    files = [WEIGHTS_NAME]
    if storage.exists(index):
        files = sorted(set(json.loads(storage.read_text(index))["weight_map"].values()))
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        tensors |= read_header(storage.join(folder_uri, file))[0]
    return tensors


def read_header(uri: str) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """The tensors of one safetensors file, and its metadata."""
    length = int.from_bytes(storage.read_bytes(uri, 0, 8), "little")
    header = json.loads(storage.read_bytes(uri, 8, 8 + length))
    metadata = header.pop("__metadata__", {})
    tensors = {
        name: StoredTensor(uri, _DTYPES[entry["dtype"]], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
        for name, entry in header.items()
    }
    return tensors, metadata


def checkpoint_name(name: str) -> str:
    """A parameter's name in the checkpoint, without what adapters put into it."""
    return name.replace("base_layer.", "")


def is_adapter(name: str) -> bool:
    return ".lora_" in name


HEAD = "crepa_head."  # CREPA's projection head: trained and saved, in no checkpoint of diffusers


def base_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """(name in the checkpoint, parameter) of everything that a checkpoint holds, but for quantised weights."""
    quantised = {f"{path}.{name}" for path in quantised_layers(model) for name in ("stored", "scale")}
    for name, parameter in model.named_parameters():
        if not is_adapter(name) and not name.startswith(HEAD) and name not in quantised:
            yield checkpoint_name(name), parameter


def load_weights(model: nn.Module, folder_uri: str) -> None:
    """Fill the model's parameters (materialised, plain or sharded by FSDP2) from a diffusers folder.

    Raises:
        ValueError: when a tensor is missing, left over, or of another shape.
    """
    stored = stored_tensors(folder_uri)
    wanted: dict[str, nn.Parameter | QuantisedLinear] = dict(base_parameters(model))
    wanted |= {checkpoint_name(f"{path}.weight"): layer for path, layer in quantised_layers(model).items()}
    missing, left_over = sorted(wanted.keys() - stored.keys()), sorted(stored.keys() - wanted.keys())
    if missing or left_over:
        raise ValueError(f"{folder_uri}: missing {missing[:5]}, unexpected {left_over[:5]}")

    def fill(name: str) -> None:
        target, source = wanted[name], stored[name]
        layer = target if isinstance(target, QuantisedLinear) else None
        shape = (layer.out_features, layer.in_features) if layer else tuple(target.shape)  # type: ignore[union-attr]
        if shape != source.shape:
            raise ValueError(f"{folder_uri}: {name} is {source.shape}, the model wants {shape}")
        if isinstance(target, QuantisedLinear):
            target.fill(source.read_rows, fill_shard)
        else:
            fill_shard(target, source.read_rows)

    with ThreadPoolExecutor(_READERS) as pool, torch.no_grad():
        for done in [pool.submit(fill, name) for name in wanted]:
            done.result()


@torch.no_grad()
def fill_shard(parameter: torch.Tensor, read_rows: Callable[[int, int], torch.Tensor]) -> None:
    """Copy this rank's rows, as `read_rows(first, count)` gives them, into a parameter (plain or a DTensor)."""
    if not isinstance(parameter, DTensor):
        rows = read_rows(0, parameter.shape[0]) if parameter.ndim else read_rows(0, 1).reshape(())
        parameter.copy_(rows)
        return
    assert all(p.is_replicate() or p.is_shard(0) for p in parameter.placements), "FSDP2 shards dimension 0"
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    if shape[0]:
        parameter.to_local().copy_(read_rows(offset[0], shape[0]))
