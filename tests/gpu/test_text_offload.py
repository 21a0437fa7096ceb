"""`precache.offload_during_startup` on a GPU: the same features to the bit, and next to nothing that stays there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from k5dist.model.encoders import TextEncoders, text_encoding

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CAPTIONS = ["a red car", "", "Cyclists ride through a city street, in the rain"]


def test_text_encoders_pass_through_the_gpu(tiny_t2v: Path) -> None:
    encoding = text_encoding(None, None, 256)
    whole = TextEncoders(str(tiny_t2v), encoding, "cuda").encode(CAPTIONS)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    encoders = TextEncoders(str(tiny_t2v), encoding, "cuda", offload=True)
    assert torch.cuda.memory_allocated() == before
    weights = sum(p.numel() * p.element_size() for p in encoders.pipeline.text_encoder.parameters())
    torch.cuda.reset_peak_memory_stats()
    passed = encoders.encode(CAPTIONS)
    assert all(p.device.type == "cpu" for p in encoders.pipeline.text_encoder.parameters())
    assert torch.cuda.max_memory_allocated() - before < weights + (64 << 20)  # 64 MiB: workspaces and activations
    for one, other in zip(whole, passed, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
