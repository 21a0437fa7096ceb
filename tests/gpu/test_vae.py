"""The VAE's encoder on a real GPU: its kernels against plain torch, its latents against fp32 and stock, its memory."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from k5dist.model import vae as ours
from k5dist.model.vae import Encoder, TorchOperations

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICE = torch.device("cuda")
BF16, FP32 = 1e-2, 1e-5


def make_vae(dtype: torch.dtype, **sizes: Any) -> Any:
    from diffusers import AutoencoderKLHunyuanVideo

    torch.manual_seed(0)
    vae: Any = AutoencoderKLHunyuanVideo(**sizes).eval().requires_grad_(False)
    for name, parameter in vae.named_parameters():
        if parameter.ndim == 1:
            parameter.normal_(std=0.3).add_("norm" in name and name.endswith("weight"))
    return vae.to(DEVICE, dtype)


def make_frames(count: int, height: int, width: int) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(0)
    level = torch.linspace(0, 160, count, device=DEVICE).view(-1, 1, 1, 1)
    noise = torch.randint(0, 96, (count, height, width, 3), device=DEVICE, generator=generator)
    return (noise + level).byte()


def stock(vae: Any, frames_THW3: Tensor) -> Tensor:
    video = (frames_THW3.float() / 127.5 - 1).to(vae.dtype).permute(3, 0, 1, 2)[None]
    with torch.no_grad():
        return vae.encode(video.contiguous()).latent_dist.parameters[0].permute(1, 2, 3, 0)


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected.double()).norm() / expected.double().norm())


@pytest.fixture(autouse=True)
def _full_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


def random(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(0)).to(dtype)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, FP32), (torch.bfloat16, BF16)])
@pytest.mark.parametrize("channels", [8, 24, 128, 256, 512])
def test_kernels_equal_plain_torch(channels: int, dtype: torch.dtype, limit: float) -> None:
    from k5dist.model.vae_triton import TritonOperations

    x = random(2, 5, 37, 50, channels, dtype=dtype) + 3
    scale = random(2, channels, dtype=torch.float32)
    affine = scale, scale.flip(0) + 1
    for scaling, silu, frames, border in ((affine, True, range(-2, 3), 1), (None, True, range(1, 5), 1),
                                          (affine, False, range(5), 0)):  # fmt: skip
        options: dict[str, Any] = {"silu": silu, "frames": frames, "border": border}
        got, expected = (each.pad(x, scaling, **options) for each in (TritonOperations, TorchOperations))
        assert relative(got, expected) < limit
    norm = torch.nn.GroupNorm(4, channels, device=DEVICE).requires_grad_(False)
    bias, sums, affines = x[0, 0, 0, 0].clone(), [], []
    for operations in (TritonOperations, TorchOperations):
        residual = x.flip(1).contiguous()
        parts = operations.moments(x[:, 1:4].contiguous(), bias=bias, residual=residual[:, 1:4], out=residual[:, 1:4])
        sums.append(residual)
        affines.append(torch.stack(ours.Norm(norm).affine(parts)))
    assert relative(*sums) < limit
    assert relative(*affines) < limit


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, FP32), (torch.bfloat16, BF16)])
def test_attention_equals_plain_torch(dtype: torch.dtype, limit: float, monkeypatch: pytest.MonkeyPatch) -> None:
    from k5dist.model import vae_triton

    q, k, v = random(3, 2, 5, 333, 512, dtype=dtype).unbind(0)
    expected = TorchOperations.attend(q.float(), k.float(), v.float())
    assert relative(vae_triton.TritonOperations.attend(q, k, v), expected) < limit
    monkeypatch.setattr(vae_triton, "SCORES", 1 << 17)
    assert relative(vae_triton.TritonOperations.attend(q, k, v), expected) < limit


@pytest.mark.parametrize("frames", [1, 17, 29])
def test_fp32_equals_stock(frames: int) -> None:
    vae, video = make_vae(torch.float32, block_out_channels=(64, 64, 128, 128)), make_frames(frames, 72, 104)
    expected = stock(vae, video)
    for patch in (False, True):
        assert relative(Encoder(vae, patch_conv=patch, compile=True)(video), expected) < FP32


def test_bf16_is_no_further_from_fp32_than_stock() -> None:
    video = make_frames(61, 256, 256)
    reference = stock(make_vae(torch.float32), video)
    vae = make_vae(torch.bfloat16)
    allowed = 1.2 * relative(stock(vae, video), reference)
    assert allowed < 0.1
    for patch in (False, True):
        assert relative(Encoder(vae, patch_conv=patch, compile=True)(video), reference) < allowed


def test_the_same_twice_and_with_little_memory_left() -> None:
    vae, video = make_vae(torch.bfloat16), make_frames(29, 256, 384)
    encoder = Encoder(vae, compile=True)
    first = encoder(video)
    free, _ = torch.cuda.mem_get_info()
    ballast = torch.empty(max(0, free - (6 << 30)), dtype=torch.uint8, device=DEVICE)
    assert torch.equal(encoder(video), first)
    del ballast


def test_nothing_waits_for_the_device() -> None:
    vae, video = make_vae(torch.bfloat16, block_out_channels=(64, 64, 128, 128)), make_frames(29, 64, 96)
    encoder = Encoder(vae, compile=True)
    encoder(video)
    torch.cuda.set_sync_debug_mode("error")
    try:
        encoder(video)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_patched_convolutions_fit_12_gib() -> None:
    """One whole tile and a short one at 768 × 1280; a tile's length decides, not the clip's."""
    torch.cuda.empty_cache()
    vae, video = make_vae(torch.bfloat16), make_frames(25, 768, 1280)
    encoder = Encoder(vae, patch_conv=True, compile=True)
    torch.cuda.reset_peak_memory_stats()
    patched = encoder(video)
    later_frames = math.prod(video.shape[1:]) * (121 - len(video))
    assert torch.cuda.max_memory_allocated() + later_frames < 12 << 30
    assert relative(Encoder(vae, compile=True)(video), patched) < 2e-2
