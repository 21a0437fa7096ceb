"""Offloading on a GPU: the gradients to the bit, and the memory that it is for."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from k5dist.estimate import Recompute
from k5dist.model.dit import VideoTransformer
from k5dist.model.forward import predict_velocity
from k5dist.train.offload import Offload
from k5dist.train.parallelise import compile_blocks, offload_blocks, set_recompute
from tests.gpu.test_model import GPU, in_bf16, inputs, model_config, weights

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
MODEL = model_config("t2v-lite-sft-5s", attention_type="regular", num_visual_blocks=6)


@pytest.fixture(autouse=True)
def same_kernels_same_bits(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """cuDNN's attention sums gradients in no fixed order; under this flag FlashAttention's fixed order is used."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else the flag refuses matrix products
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


SHAPE = (9, 64, 96)  # 13,824 tokens: an activation is 6.75 MiB


def gradients(recompute: Recompute, clips: int) -> tuple[dict[str, Tensor], int, list[int]]:
    """Of `clips` clips one after another; the peak of memory, and how many tensors each block moved."""
    transformer = VideoTransformer(MODEL)
    transformer.load_state_dict(weights(MODEL))
    in_bf16(transformer)
    set_recompute(transformer, recompute)
    compile_blocks(transformer)
    offload = Offload(recompute.offload, 1 << 30, GPU, smallest=4 << 20)
    if recompute.offload:
        offload_blocks(transformer, offload)
    latents, text, time = inputs(MODEL, SHAPE, 37)
    for clip in range(clips):
        noisy, features = (latents + clip).bfloat16(), text.to(GPU, torch.bfloat16)
        if clip == clips - 1:
            torch.cuda.reset_peak_memory_stats()
        predict_velocity(transformer, MODEL, noisy, False, time, features).float().square().sum().backward()
    peak = torch.cuda.max_memory_allocated()
    found = {name: p.grad for name, p in transformer.named_parameters() if p.grad is not None}
    return found, peak, [len(block.kept) for block in offload.blocks]


@pytest.mark.parametrize("keep", [0, 6], ids=["attention", "linear"])
def test_gradients_are_the_same_to_the_bit_in_less_memory(keep: int) -> None:
    expected, whole, _ = gradients(Recompute(keep, 6 - keep), clips=3)
    found, less, moved = gradients(Recompute(keep, 6 - keep, offload=5), clips=3)
    differing = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert not differing
    assert min(moved) >= 2
    if not keep:
        return  # what `attention` keeps is little beside one block's backward at this size
    assert less < whole - 2 * 2 * 13_824 * MODEL.model_dim * 2, "at least two blocks' input and attention output"
