"""The VAE's encoder equals stock diffusers' for every length, in chunks too; its kernels equal plain torch.

The Triton kernels run in Triton's interpreter, in a process of its own (this file as a script): it is chosen at import.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from k5dist.model import vae as ours
from k5dist.model.vae import Encoder, TorchOperations, chunk_frames, time_tiles
from k5dist.model.vae_tiles import tiling_error

ROOT = Path(__file__).parents[2]


def make_vae() -> Any:
    """Random in all its parameters, those of norms and biases too."""
    from diffusers import AutoencoderKLHunyuanVideo

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"block_out_channels": (16, 24, 24, 32), "norm_num_groups": 8, "layers_per_block": 1}
    vae: Any = AutoencoderKLHunyuanVideo(**sizes).eval().requires_grad_(False)
    for name, parameter in vae.named_parameters():
        if parameter.ndim == 1:
            parameter.normal_(std=0.3).add_("norm" in name and name.endswith("weight"))
    return vae


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """These tensors are so small that threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def vae() -> Any:
    return make_vae()


def make_frames(count: int, height: int, width: int, seed: int = 0) -> Tensor:
    """Noise on a picture that grows brighter, so that a tile's statistics differ from the clip's."""
    generator = np.random.default_rng(seed)
    level = np.linspace(0, 160, count).reshape(-1, 1, 1, 1)
    return torch.from_numpy((generator.integers(0, 96, (count, height, width, 3)) + level).astype(np.uint8))


def stock(vae: Any, frames_THW3: Tensor) -> Tensor:
    video = frames_THW3.float().permute(3, 0, 1, 2)[None] / 127.5 - 1
    with torch.no_grad():
        return vae.encode(video).latent_dist.parameters[0].permute(1, 2, 3, 0)


def check_close(got: Tensor, expected: Tensor) -> None:
    """To fp32's noise, which grows with the largest sums."""
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 * float(expected.abs().max().clamp_min(1)))


# --- which frames are encoded together


@pytest.mark.parametrize("frames", [1, 5, 13, 17, 21, 25, 29, 61, 121, 241])
def test_tiles_give_each_latent_once(frames: int) -> None:
    tiles = time_tiles(frames, 16, 12)
    latents = []
    for tile in tiles:
        kept = range(tile.start // 4, (tile.stop - 1) // 4 + 1)[tile.first :]
        assert kept, "a tile that reaches nothing is not computed"
        latents += kept
    assert latents == list(range((frames - 1) // 4 + 1))
    assert tiles[-1].stop == frames


@pytest.mark.parametrize("frames", [0, 2, 16, 60, 62])
def test_frames_that_would_be_lost_are_refused(frames: int) -> None:
    with pytest.raises(ValueError, match=rf"{frames} frames: must be 4k \+ 1"):
        time_tiles(frames, 16, 12)


@pytest.mark.parametrize("shape", [(29, 64, 128), (5, 48, 32), (5, 80, 112)])
def test_spatial_tiles_are_those_of_stock(shape: tuple[int, int, int]) -> None:
    vae = make_vae()
    frames = make_frames(*shape)
    sides: dict[str, int] = {"tile_sample_min_height": 64, "tile_sample_min_width": 64}
    strides: dict[str, int] = {"tile_sample_stride_height": 48, "tile_sample_stride_width": 48}
    vae.enable_tiling(**sides, **strides)
    expected = stock(vae, frames)
    encoder = Encoder(vae, tiling=True)
    check_close(encoder(frames), expected)
    whole = encoder.encode(frames, tiling=False)
    several = max(shape[1:]) > 64
    assert (tiling_error(whole, encoder(frames)) > 1e-3) == several


def test_another_tiling_is_refused() -> None:
    vae = make_vae()
    vae.tile_sample_stride_num_frames = 8
    with pytest.raises(ValueError, match="other tiles"):
        Encoder(vae)


@pytest.mark.parametrize(
    ("frames", "stride", "limit", "expected"),
    [(17, 1, 100, 17), (17, 1, 8, 6), (9, 2, 7, 3), (17, 1, 4, 2), (5, 2, 1, 1)],
)
def test_chunks_are_even_and_their_halo_fits(frames: int, stride: int, limit: int, expected: int) -> None:
    assert chunk_frames(frames, stride, 1, limit) == expected
    assert limit < 3 or (expected - 1) * stride + 3 <= max(limit, 3)


def test_a_large_clip_is_chunked_by_its_shape() -> None:
    frame = 770 * 1282 * 128
    assert chunk_frames(17, 1, frame, ours.CHUNK_ELEMENTS) == 6
    assert chunk_frames(17, 1, frame, ours.PATCH_ELEMENTS) == 2
    assert chunk_frames(17, 1, 514 * 770 * 128, ours.CHUNK_ELEMENTS) == 17


# --- the encoder


@pytest.mark.parametrize(
    ("frames", "height", "width"),
    [(1, 40, 24), (5, 24, 40), (17, 40, 24), (21, 16, 24), (25, 16, 24), (29, 24, 24), (61, 24, 16)],
)
def test_the_encoder_equals_stock(vae: Any, frames: int, height: int, width: int) -> None:
    video = make_frames(frames, height, width)
    got = Encoder(vae)(video)
    assert got.shape == ((frames - 1) // 4 + 1, height // 8, width // 8, 32)
    check_close(got, stock(vae, video))


@pytest.mark.parametrize(
    "limit", [1, 4 * 26 * 34 * 24, 7 * 26 * 34 * 24]
)  # chunks of 1 frame, of 2, of 5 (17 = 3 · 5 + 2)
def test_chunks_change_nothing(vae: Any, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    video = make_frames(29, 24, 32)
    whole = Encoder(vae)(video)
    convolutions = count_convolutions(monkeypatch)
    monkeypatch.setattr(ours, "TorchOperations", KernelRules)
    monkeypatch.setattr(ours, "PATCH_ELEMENTS", limit)
    monkeypatch.setattr(ours, "GROUP_PIXELS", 1)
    check_close(Encoder(vae, patch_conv=True)(video), whole)
    assert len(convolutions) > 2 * 17, "17 convolutions for each of two tiles, were they whole"


class KernelRules(TorchOperations):
    """Holds the encoder to what the kernels ask of their arguments."""

    @staticmethod
    def pad(x_BTHWC: Tensor, affine: Any, **options: Any) -> Tensor:
        assert all(x.is_contiguous() for x in (x_BTHWC[0], *(affine or ())))
        return TorchOperations.pad(x_BTHWC, affine, **options)

    @staticmethod
    def moments(value_BTHWC: Tensor, **options: Any) -> Tensor:
        given = [x for x in (value_BTHWC, options.get("residual"), options.get("out")) if x is not None]
        assert all(x.shape == value_BTHWC.shape and x[0].is_contiguous() for x in given)
        return TorchOperations.moments(value_BTHWC, **options)


def count_convolutions(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    real, sizes = torch.nn.functional.conv3d, []

    def record(x: Tensor, *arguments: Any) -> Tensor:
        sizes.append(x.numel())
        return real(x, *arguments)

    monkeypatch.setattr(ours.F, "conv3d", record)
    return sizes


def test_no_convolution_is_fed_more_than_its_chunk(vae: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = count_convolutions(monkeypatch)
    limit = 4 * 26 * 34 * 24
    monkeypatch.setattr(ours, "PATCH_ELEMENTS", limit)
    monkeypatch.setattr(ours, "GROUP_PIXELS", 1)
    Encoder(vae, patch_conv=True)(make_frames(17, 24, 32))
    assert max(sizes) <= limit


def test_tiles_alone_equal_tiles_together(vae: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    video = make_frames(41, 16, 24)
    together = Encoder(vae)(video)
    monkeypatch.setattr(ours, "GROUP_PIXELS", 1)
    check_close(Encoder(vae)(video), together)


def test_a_tile_sees_itself_only(vae: Any) -> None:
    """As in stock: the last frame changes its own tile's statistics and with them its latents, none before."""
    video = make_frames(29, 16, 24)
    encoder = Encoder(vae)
    before = encoder(video)
    video[-1] = 255 - video[-1]
    changed = (encoder(video) - before).abs().amax((1, 2, 3)) > 1e-3
    assert changed.tolist() == [False] * 5 + [True] * 3


def test_clips_of_a_batch_are_as_if_alone(vae: Any, tmp_path: Path) -> None:
    from k5dist.model.encoders import VideoAutoencoder

    vae.save_pretrained(tmp_path / "vae")
    clips = np.stack([make_frames(21, 16, 24, seed).numpy() for seed in range(3)])
    autoencoder = VideoAutoencoder(str(tmp_path), "cpu", patch_conv=True)
    mean, logvar = autoencoder.encode_batch(clips)
    assert mean.shape == logvar.shape == (3, 6, 2, 3, 16)
    for at, clip in enumerate(clips):
        alone = autoencoder.encode(clip)
        assert torch.equal(mean[at], alone[0]) and torch.equal(logvar[at], alone[1])
        expected = stock(autoencoder.vae, torch.from_numpy(clip))
        check_close(torch.cat([mean[at], logvar[at]], dim=-1), expected)


def test_norms_do_not_cancel() -> None:
    """Moments of parts give the whole's GroupNorm, where the mean is far from zero too; the bias comes for free."""
    x = torch.randn(2, 3, 4, 5, 8, generator=torch.Generator().manual_seed(0)) + 300
    norm = torch.nn.GroupNorm(4, 8, eps=1e-6)
    bias = torch.arange(8.0)
    parts = torch.cat([TorchOperations.moments(x[:, :1]), TorchOperations.moments(x[:, 1:])], dim=1)
    scale, shift = ours.Norm(norm).affine(parts, bias)
    expected = norm.double()((x + bias).double().permute(0, 4, 1, 2, 3)).permute(0, 2, 3, 4, 1)
    got = x * scale[:, None, None, None] + shift[:, None, None, None]
    torch.testing.assert_close(got, expected.float(), rtol=0, atol=5e-4)


# --- the kernels, interpreted


CASES = [
    *[f"pad {kind} {dtype}" for kind in ("normalised", "affine", "plain", "strided") for dtype in ("fp32", "bf16")],
    *[f"moments {kind} {dtype}" for kind in ("bare", "in place", "sum", "slice") for dtype in ("fp32", "bf16")],
    *["moments far", "softmax", "attend"],
]


@pytest.fixture(scope="module")
def interpreted() -> dict[str, float]:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs triton, which has wheels for Linux only")
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", CASES)
def test_the_kernels_equal_plain_torch(interpreted: dict[str, float], case: str) -> None:
    assert interpreted[case] < (2e-2 if case.endswith("bf16") else 2e-5)


def error(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected.double()).abs().max() / expected.double().abs().max())


def run_pad(triton: Any, x: Tensor) -> dict[str, float]:
    batch, channels = x.shape[0], x.shape[-1]
    generator = torch.Generator().manual_seed(1)
    affine = tuple(torch.randn(batch, channels, generator=generator) for _ in range(2))
    cases: dict[str, tuple[Any, dict[str, Any]]] = {
        "normalised": (affine, {"silu": True, "frames": range(-2, 3), "border": 1}),
        "affine": (affine, {"silu": False, "frames": range(4), "border": 0}),
        "plain": (None, {"silu": True, "frames": range(-2, 4), "border": 1}),
        "strided": (affine, {"silu": True, "frames": range(2, 4), "border": 1}),
    }
    return {
        f"pad {name}": error(triton.pad(x, scaling, **options), TorchOperations.pad(x, scaling, **options))
        for name, (scaling, options) in cases.items()
    }


def run_moments(triton: Any, x: Tensor) -> dict[str, float]:
    y, bias = x.flip(1).contiguous(), torch.arange(x.shape[-1]).to(x.dtype)

    def once(operations: Any, name: str) -> tuple[Tensor, Tensor]:
        value, residual = x.clone(), y.clone()
        options: dict[str, dict[str, Any]] = {
            "bare": {},
            "in place": {"bias": bias, "out": value},
            "sum": {"bias": bias, "residual": residual, "out": residual},
            "slice": {"residual": residual[:, 1:3], "out": residual[:, 1:3]},
        }
        parts = operations.moments(value[:, 1:3].contiguous() if name == "slice" else value, **options[name])
        norm = torch.nn.GroupNorm(x.shape[-1] // 4, x.shape[-1]).requires_grad_(False)
        return torch.stack(ours.Norm(norm).affine(parts)), value + residual

    found = {}
    for name in ("bare", "in place", "sum", "slice"):
        pairs = zip(once(triton, name), once(TorchOperations, name), strict=True)
        found[f"moments {name}"] = max(error(got, expected) for got, expected in pairs)
    return found


def run_attention(kernels: Any, x: Tensor) -> dict[str, float]:
    q, k, v = (x.flatten(2, 3).roll(shift, dims=1) for shift in range(3))
    kernels.SCORES, kernels.SOFTMAX_TILE = 1000, 16  # several chunks of queries, several tiles a row
    scores = 30 * torch.randn(2, 3, 41, generator=torch.Generator().manual_seed(2)) - 50
    soft = kernels.softmax(scores, 0.5, torch.float32)
    attended = kernels.TritonOperations.attend(q, k, v)
    found = {"softmax": error(soft, (scores / 2).softmax(-1))}
    return found | {"attend": error(attended, TorchOperations.attend(q, k, v))}


def main() -> None:
    from k5dist.model import vae_triton as kernels
    from tests.unit.test_nabla import mend_interpreter

    mend_interpreter()
    kernels.TILE, kernels.PROGRAMS = 128, 7  # several tiles a program, several programs, the last of them short
    found: dict[str, float] = {}
    x = torch.randn(2, 4, 5, 3, 12, generator=torch.Generator().manual_seed(0)) + 2
    for name, dtype in {"fp32": torch.float32, "bf16": torch.bfloat16}.items():
        for run in (run_pad, run_moments):
            found |= {f"{case} {name}": value for case, value in run(kernels.TritonOperations, x.to(dtype)).items()}
    far = run_moments(kernels.TritonOperations, x / 4 + 300)
    found["moments far"] = far["moments bare"] / 100  # the shift is 1,200 deviations: its last bits are lost
    found |= run_attention(kernels, x)
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
