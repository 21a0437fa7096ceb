"""Clips whose frames carry their own number, so that a wrong frame cannot pass for the right one."""

from collections.abc import Sequence
from fractions import Fraction
from typing import Any, cast

import av
import numpy as np
from av.video.frame import VideoFrame
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc
from av.video.stream import VideoStream

HEIGHT, WIDTH, BITS = 64, 128, 8
INTERLACED = 1 << 18 | 1 << 29  # AV_CODEC_FLAG_INTERLACED_DCT and _ME: both fields of a frame coded apart


def numbered(number: int) -> np.ndarray:
    """uint8 [64, 128, 3] with number as eight black or white columns, the lowest bit left."""
    bits = (number >> np.arange(BITS)) & 1
    columns = np.repeat(bits * 255, WIDTH // BITS).astype(np.uint8)
    return np.broadcast_to(columns[None, :, None], (HEIGHT, WIDTH, 3)).copy()


def numbers(clip: np.ndarray) -> list[int]:
    """What numbered wrote into each frame of clip [T, H, W, 3], at any size of the same aspect ratio."""
    centres = (np.arange(BITS) + 0.5) * clip.shape[2] / BITS
    bits = clip.mean(axis=(1, 3))[:, centres.astype(int)] > 127
    return (bits * (1 << np.arange(BITS))).sum(1).tolist()


def write(
    file: Any,
    frames: Sequence[np.ndarray],
    *,
    pts: Sequence[int] | None = None,
    time_base: Fraction | None = None,
    rate: int | Fraction = 24,
    codec: str = "libx264",
    container: str = "mp4",
    gop: int = 12,
    pix_fmt: str = "yuv420p",
    source: str = "rgb24",
    matrix: Colorspace | None = None,
    color_range: ColorRange | None = None,
    transfer: ColorTrc | None = None,
    primaries: ColorPrimaries | None = None,
    aspect: Fraction | None = None,
    rotation: int = 0,
    hflip: bool = False,
    flags: int = 0,
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
) -> Any:
    """Encode frames (arrays in the pixel format source) at pts (in time_base; default one apart) and return file."""
    time_base = time_base or 1 / Fraction(rate)
    with av.open(file, "w", format=container, options=container_options or {}) as output:
        stream = cast(VideoStream, output.add_stream(codec, rate=rate, options=options or {}))
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = pix_fmt
        context = stream.codec_context
        context.gop_size, context.time_base = gop, time_base
        context.flags |= flags
        if codec == "mpeg4":
            context.max_b_frames = 2
        if aspect:
            context.sample_aspect_ratio = aspect
        if rotation or hflip:
            stream.set_display_rotation(rotation, hflip=hflip)
        tags = {"colorspace": matrix, "color_range": color_range, "color_trc": transfer, "color_primaries": primaries}
        for name, tag in tags.items():
            if tag is not None:
                setattr(context, name, tag)
        for number, picture in enumerate(frames):
            frame = VideoFrame.from_ndarray(picture, format=source)
            if source != pix_fmt:
                frame = frame.reformat(format=pix_fmt, dst_colorspace=matrix, dst_color_range=color_range)
            frame.pts, frame.time_base = (pts[number] if pts else number), time_base
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return file
