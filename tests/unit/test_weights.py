"""Weights from diffusers folders into the model: whole, strict, from anywhere."""

from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from diffusers import Kandinsky5Transformer3DModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from k5dist.model.transformer import build_transformer, materialise
from k5dist.model.weights import WEIGHTS_NAME, base_parameters, load_weights
from tests.unit.models import CPU, model_config


def empty_model(folder: Path) -> nn.Module:
    return build_transformer(str(folder), model_config(folder), lora=None, dtype=torch.float32).to_empty(device=CPU)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"out_layer.out_layer.bias": None}, r"missing \['out_layer.out_layer.bias'\]"),
        ({"extra.weight": torch.zeros(1)}, r"unexpected \['extra.weight'\]"),
        (
            {"out_layer.out_layer.bias": torch.zeros(63)},
            r"out_layer.out_layer.bias is \(63,\), the model wants \(64,\)",
        ),
    ],
    ids=["missing", "left over", "wrong shape"],
)
def test_weights_that_do_not_fit_are_refused(
    tiny_t2v: Path, tmp_path: Path, change: dict[str, Tensor | None], says: str
) -> None:
    tensors = load_file(tiny_t2v / "transformer" / WEIGHTS_NAME) | change
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, tmp_path / WEIGHTS_NAME)
    with pytest.raises(ValueError, match=says):
        load_weights(empty_model(tiny_t2v), str(tmp_path))


def test_a_truncated_file_is_refused(tiny_t2v: Path, tmp_path: Path) -> None:
    data = (tiny_t2v / "transformer" / WEIGHTS_NAME).read_bytes()
    (tmp_path / WEIGHTS_NAME).write_bytes(data[:-8])
    with pytest.raises(OSError, match="truncated"):
        load_weights(empty_model(tiny_t2v), str(tmp_path))


@pytest.mark.parametrize("place", ["file://", "memory://"])
def test_weights_come_from_shards_and_any_uri(tiny_t2v: Path, tmp_path: Path, place: str) -> None:
    whole: Any = Kandinsky5Transformer3DModel.from_pretrained(tiny_t2v / "transformer")
    whole.save_pretrained(tmp_path / "transformer", max_shard_size="100KB")
    assert len(list((tmp_path / "transformer").glob("*.safetensors"))) > 3
    uri = f"file://{tmp_path}"
    if place == "memory://":
        uri = f"memory://{tmp_path.name}"
        fsspec.filesystem("memory").put(str(tmp_path / "transformer"), f"/{tmp_path.name}/transformer", recursive=True)
    transformer = build_transformer(uri, model_config(tiny_t2v), lora=None, dtype=torch.float32)
    materialise(transformer, uri, device=CPU, seed=0)
    expected = dict(whole.named_parameters())
    for name, parameter in base_parameters(transformer):
        assert torch.equal(parameter, expected.pop(name)), name
    assert not expected
    positions = dict(whole.named_buffers()) | {"time_embeddings.freqs": whole.time_embeddings.freqs}
    assert all(torch.equal(buffer, positions[name]) for name, buffer in transformer.named_buffers())
