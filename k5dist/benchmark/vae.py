"""Timing of the VAE's encoder alone: `python -m k5dist.benchmark.vae --out FILE [--quick]`.

A VAE of the full size with random weights encodes frames that lie on the device, as stock diffusers does it (eager; in
channels_last_3d with its encoder compiled) and as we do it. Each variant gets a fresh copy of the model, is timed by
CUDA events (median of 3 after one call to warm up), and is held against stock's bf16 latents and, at 61×256×256,
against fp32. A variant that fails is reported and stops no other. Then come the kernels one encode spends its time on,
and the rates of the convolutions alone, also as 2D convolutions over three stacked frames, which would need a copy.

`--quick` on a CPU runs all of it with a tiny VAE in fp32; its times mean nothing.
Shape suffixes: T frames, H W sides, C channels.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor

from k5dist.console import console, say
from k5dist.model.vae import Encoder

GIB = 1 << 30
SHAPES = [(61, 512, 768), (121, 768, 1280)]
REFERENCE_SHAPE = (61, 256, 256)  # small enough for stock in fp32
QUICK_SHAPES, QUICK_REFERENCE = [(29, 32, 48)], (21, 16, 24)
TURNS = 3
# (channels in, out, frames, height, width, stride): the convolutions of a tile at 512×768 that take its time.
CONVOLUTIONS = [
    *[(128, 128, 17, 512, 768, 1), (256, 256, 17, 256, 384, 1), (512, 512, 9, 128, 192, 1), (512, 512, 5, 64, 96, 1)],
    *[(8, 128, 17, 512, 768, 1), (128, 256, 17, 256, 384, 1), (128, 128, 17, 512, 768, 2)],
]
QUICK_CONVOLUTIONS = [(8, 8, 5, 16, 16, 1), (8, 8, 5, 16, 16, 2)]
Encode = Callable[[Tensor], Tensor]  # uint8 [T, H, W, 3] → mean and log-variance [t, h, w, 2C]


@dataclass(frozen=True)
class Setting:
    """What is run on: the model (on the CPU, in fp32), the device and its dtype."""

    vae: Any
    device: torch.device
    dtype: torch.dtype
    turns: int


def make_vae(quick: bool) -> Any:
    from diffusers import AutoencoderKLHunyuanVideo

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"block_out_channels": (8, 8, 16, 16), "norm_num_groups": 4, "layers_per_block": 1}
    vae: Any = AutoencoderKLHunyuanVideo(**(sizes if quick else {}))
    return vae.eval().requires_grad_(False)


def make_frames(shape: tuple[int, int, int]) -> Tensor:
    """A smooth picture that moves, with noise on it; uint8 [T, H, W, 3]."""
    frames, height, width = shape
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 3, 4, 9, 9, generator=generator)
    smooth = F.interpolate(coarse, size=(frames, 32, 32), mode="trilinear")[0].transpose(0, 1)
    video = torch.empty(frames, height, width, 3, dtype=torch.uint8)
    for at, picture in enumerate(smooth):
        large = F.interpolate(picture[None], size=(height, width), mode="bilinear")[0].permute(1, 2, 0)
        noise = torch.rand(height, width, 1, generator=generator)
        video[at] = (220 * large + 35 * noise).byte()
    return video


def stock(vae: Any, compiled: bool = False) -> Encode:
    if compiled:
        vae.encoder = torch.compile(vae.encoder.to(memory_format=torch.channels_last_3d), dynamic=False)

    @torch.no_grad()
    def encode(frames_THW3: Tensor) -> Tensor:
        video = (frames_THW3.float() / 127.5 - 1.0).to(vae.dtype).permute(3, 0, 1, 2)[None]
        # In our order of axes the frames are channels_last_3d already; eager stock is timed as the pipelines call it.
        video = video.contiguous(memory_format=torch.channels_last_3d if compiled else torch.contiguous_format)
        return vae.encode(video).latent_dist.parameters[0].permute(1, 2, 3, 0)

    return encode


def variants(on_gpu: bool) -> dict[str, Callable[[Any], Encode]]:
    return {
        "stock": stock,
        "stock, channels_last_3d, compiled": lambda vae: stock(vae, compiled=on_gpu),
        "ours": lambda vae: Encoder(vae, compile=on_gpu),
        "ours, patched": lambda vae: Encoder(vae, patch_conv=True, compile=on_gpu),
        "ours, plain torch between": Encoder,
        "ours, cuDNN measures": lambda vae: _measuring(Encoder(vae, compile=on_gpu)),
    }


def _measuring(encode: Encode) -> Encode:
    """cuDNN tries its algorithms on the first call instead of asking its heuristics: to know what that would bring."""

    def run(frames_THW3: Tensor) -> Tensor:
        with torch.backends.cudnn.flags(enabled=True, benchmark=True, deterministic=False, allow_tf32=False):
            return encode(frames_THW3)

    return run


def milliseconds(work: Callable[[], object], device: torch.device, turns: int) -> float:
    """Median time of one call."""
    times = []
    for _ in range(turns):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            work()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        else:
            begin = time.perf_counter()
            work()
            times.append(1e3 * (time.perf_counter() - begin))
    return sorted(times)[len(times) // 2]


def difference(got: Tensor, expected: Tensor) -> dict[str, float]:
    """Relative error of all, and the largest one relative to the largest value; means and log-variances together."""
    off = got.double() - expected.double()
    return {
        "relative": float(off.norm() / expected.double().norm()),
        "largest": float(off.abs().max() / expected.abs().max()),
    }


@contextlib.contextmanager
def fresh(setting: Setting, dtype: torch.dtype) -> Iterator[Any]:
    """The model on the device, which is empty before and after."""
    _forget()
    vae = copy.deepcopy(setting.vae)
    torch.nn.Module.to(vae, setting.device, dtype)  # past diffusers' warning about casts, of which it names none
    try:
        yield vae
    finally:
        del vae
        _forget()


def _forget() -> None:
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def guarded(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return work()
    except Exception as failure:  # one that does not run here must not stop the others
        return {"failed": f"{type(failure).__name__}: {failure}"[:400]}


def time_variant(
    setting: Setting, build: Callable[[Any], Encode], frames: Tensor, expected: dict[str, Tensor]
) -> tuple[dict[str, Any], Tensor]:
    """Its time, peak memory (allocated; weights and frames included) and errors; its latents."""
    on_gpu = setting.device.type == "cuda"
    with fresh(setting, setting.dtype) as vae:
        frames, encode = frames.to(setting.device), build(vae)
        begin = time.perf_counter()
        latents = encode(frames).float().cpu()
        row: dict[str, Any] = {"first_call_s": round(time.perf_counter() - begin, 2)}
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        row["ms"] = milliseconds(lambda: encode(frames), setting.device, setting.turns)
        if on_gpu:
            row["peak_gib"] = torch.cuda.max_memory_allocated() / GIB
            row["reserved_gib"] = torch.cuda.max_memory_reserved() / GIB
        row["same_twice"] = torch.equal(encode(frames).float().cpu(), latents)
    row["errors"] = {name: difference(latents, other) for name, other in expected.items()}
    return row, latents


def compare(
    setting: Setting, chosen: list[str], shape: tuple[int, int, int], precise: bool
) -> Iterator[dict[str, Any]]:
    expected: dict[str, Tensor] = {}
    frames = make_frames(shape)
    if precise:
        with fresh(setting, torch.float32) as vae, _without_tf32():
            expected["fp32"] = stock(vae)(frames.to(setting.device)).cpu()
    known = variants(setting.device.type == "cuda")
    for name, build in ((name, known[name]) for name in chosen):

        def once(name: str = name, build: Callable[[Any], Encode] = build) -> dict[str, Any]:
            row, latents = time_variant(setting, build, frames, expected)
            if name == "stock":
                expected["stock"] = latents
            return row

        row = {"variant": name, "shape": shape, **guarded(once)}
        say(f"{name} {shape}: {row.get('failed') or format(row['ms'], '.1f') + ' ms'}")
        yield row


@contextlib.contextmanager
def _without_tf32() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=False, allow_tf32=False):
        yield
    torch.backends.cuda.matmul.allow_tf32 = before


def kernels(setting: Setting, shape: tuple[int, int, int]) -> dict[str, Any]:
    """Where one of our encodes spends its time: ms and calls of the 15 longest kernels."""
    from torch.profiler import ProfilerActivity, profile

    on_gpu, frames = setting.device.type == "cuda", make_frames(shape).to(setting.device)
    with fresh(setting, setting.dtype) as vae:
        encode = Encoder(vae, compile=on_gpu)
        encode(frames)
        with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
            encode(frames)
        spent = {
            event.key[:120]: (event.self_device_time_total if on_gpu else event.self_cpu_time_total, event.count)
            for event in profiler.key_averages()
        }
    longest = sorted(spent.items(), key=lambda item: -item[1][0])[:15]
    return {"kernels": {name: {"ms": us / 1e3, "calls": calls} for name, (us, calls) in longest}}


def convolution(setting: Setting, sizes: tuple[int, ...]) -> dict[str, Any]:
    """One convolution of a padded input: as we run it, by cuDNN's own measurements, and as a 2D one."""
    channels, out_channels, frames, height, width, stride = sizes
    options: dict[str, Any] = {"device": setting.device, "dtype": setting.dtype}
    x = torch.randn(1, frames + 2, height + 2, width + 2, channels, **options).permute(0, 4, 1, 2, 3)
    weight = torch.randn(out_channels, channels, 3, 3, 3, **options).to(memory_format=torch.channels_last_3d)
    time_stride = 2 if stride == 2 and channels > 128 else 1
    steps = (time_stride, stride, stride)
    voxels = ((frames - 1) // time_stride + 1) * (height // stride) * (width // stride)
    flops = 2 * 27 * channels * out_channels * voxels
    flat = torch.randn(frames, height + 2, width + 2, 3 * channels, **options).permute(0, 3, 1, 2)
    flat_weight = torch.randn(out_channels, 3 * channels, 3, 3, **options).to(memory_format=torch.channels_last)
    works: dict[str, Callable[[], object]] = {
        "3d": lambda: F.conv3d(x, weight, None, steps),
        "3d, cuDNN measures": lambda: _measuring(lambda x: F.conv3d(x, weight, None, steps))(x),
        "2d": lambda: F.conv2d(flat, flat_weight, None, stride),
    }
    row: dict[str, Any] = {}
    for name, work in works.items():
        work()
        spent = milliseconds(work, setting.device, setting.turns)
        row[name] = {"ms": spent, "tflops": flops / spent / 1e9}
    return row


def _shape(text: str) -> tuple[int, int, int]:
    frames, height, width = map(int, text.split("x"))
    return frames, height, width


def show(found: dict[str, Any]) -> None:
    table = Table(title=f"VAE encode on {found['device']}", title_justify="left", box=None)
    for name in ("shape", "variant", "ms", "peak GiB", "to stock", "to fp32", "same twice"):
        table.add_column(name, overflow="fold")
    for row in found["rows"]:
        shape = "×".join(map(str, row["shape"]))
        if "failed" in row:
            table.add_row(shape, row["variant"], row["failed"])
            continue
        errors = [f"{row['errors'][to]['relative']:.1e}" if to in row["errors"] else "–" for to in ("stock", "fp32")]
        peak = f"{row['peak_gib']:.2f}" if "peak_gib" in row else "–"
        table.add_row(shape, row["variant"], f"{row['ms']:.1f}", peak, *errors, str(row["same_twice"]))
    console.print(table)
    for row in found["convolutions"]:
        rates = row.get("failed") or ", ".join(f"{k} {v['tflops']:.0f}" for k, v in row.items() if k != "sizes")
        say(f"convolution {row['sizes']}, TFLOP/s: {rates}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m k5dist.benchmark.vae", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON file, written anew after every row")
    parser.add_argument("--quick", action="store_true", help="one small clip; on a CPU with a tiny VAE")
    parser.add_argument(
        "--variants", nargs="+", default=[*variants(True)], choices=[*variants(True)], help="default: all"
    )
    parser.add_argument(
        "--shapes", nargs="+", type=_shape, metavar="TxHxW", help="only these, and no parts: 121x768x1280"
    )
    arguments = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    if not on_gpu and not arguments.quick:
        parser.error("without a GPU only --quick runs, and its times mean nothing")
    dtype = torch.bfloat16 if on_gpu else torch.float32
    setting = Setting(make_vae(not on_gpu), device, dtype, TURNS if on_gpu else 1)
    name = torch.cuda.get_device_name(device) if on_gpu else "CPU (a tiny VAE: times mean nothing)"
    found: dict[str, Any] = {"device": name, "torch": torch.__version__, "cudnn": torch.backends.cudnn.version()}
    found |= {"dtype": str(dtype), "rows": [], "convolutions": []}
    reference, shapes = (QUICK_REFERENCE, QUICK_SHAPES) if arguments.quick else (REFERENCE_SHAPE, SHAPES)
    for shape in arguments.shapes or (reference, *shapes):
        for row in compare(setting, arguments.variants, shape, precise=shape == reference):
            found["rows"].append(row)
            arguments.out.write_text(json.dumps(found, indent=1) + "\n")
    if not arguments.shapes:
        for sizes in CONVOLUTIONS if on_gpu else QUICK_CONVOLUTIONS:
            found["convolutions"].append({"sizes": sizes, **guarded(lambda s=sizes: convolution(setting, s))})
        found["profile"] = guarded(lambda: kernels(setting, shapes[0]))
    arguments.out.write_text(json.dumps(found, indent=1) + "\n")
    show(found)


if __name__ == "__main__":
    main()
