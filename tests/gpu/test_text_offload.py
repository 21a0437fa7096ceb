"""`precache.offload_during_startup` on a GPU: the same features to the bit, and next to nothing that stays there."""

from __future__ import annotations

import gc
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
    gc.collect()  # what other tests left in cycles must not go while this one counts
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    encoders = TextEncoders(str(tiny_t2v), encoding, "cuda", offload=True)
    assert torch.cuda.memory_allocated() <= before, "nothing goes to the GPU until it is needed"
    weights = sum(p.numel() * p.element_size() for p in encoders.pipeline.text_encoder.parameters())
    torch.cuda.reset_peak_memory_stats()
    passed = encoders.encode(CAPTIONS)
    left = {str(p.device) for p in encoders.pipeline.text_encoder.parameters()}
    assert left == {"cpu"}
    peak = torch.cuda.max_memory_allocated() - before
    assert peak < weights + (64 << 20), f"{peak} bytes for {weights} of weights"  # 64 MiB: workspaces and activations
    for caption, one, other in zip(CAPTIONS, whole, passed, strict=True):
        for name, a, b in zip(("Qwen", "CLIP"), one, other, strict=True):
            assert a.shape == b.shape, (caption, name)
            off = float((a - b).abs().max())
            assert off == 0, f"{name}'s features of {caption!r} differ by {off:.1e} beside {float(a.abs().max()):.1e}"
