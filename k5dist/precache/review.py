"""Write a clip as a video to look at."""

import math
from fractions import Fraction
from pathlib import Path
from typing import cast

import av
import numpy as np
from av.video.frame import VideoFrame
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, VideoReformatter
from av.video.stream import VideoStream

from k5dist.precache.picture import SCALING

# Best first; options give about the same visual quality (visually lossless at review size).
_ENCODERS: dict[str, dict[str, str]] = {
    "libx264": {"crf": "18", "preset": "medium"},
    "libopenh264": {"rc_mode": "quality", "qmin": "10", "qmax": "24"},
    "mpeg4": {"qmin": "2", "qmax": "4"},
}


def encode_mp4(frames: np.ndarray, path: str | Path, *, frame_rate: float) -> None:
    """Write frames as an MP4 that browsers play: H.264 yuv420p, index first (MPEG-4 where FFmpeg was built without).

    frames is uint8 RGB [T, H, W, 3] with even H and W (yuv420p halves the chroma), frame_rate in frames a second.
    Raises ValueError for frames of another shape or type, and av.FFmpegError or OSError where path cannot be written.
    """
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
        raise ValueError(f"frames must be uint8 [T, H, W, 3], not {frames.dtype} {list(frames.shape)}")
    height, width = frames.shape[1:3]
    if height % 2 or width % 2 or not 0 < frame_rate < math.inf:
        raise ValueError(f"yuv420p needs even sides and a positive frame rate, not {height} by {width} at {frame_rate}")
    encoder = next(name for name in _ENCODERS if name in av.codecs_available)
    with av.open(str(path), mode="w", format="mp4", options={"movflags": "+faststart"}) as container:
        rate = Fraction(frame_rate).limit_denominator(1001)
        stream = cast(VideoStream, container.add_stream(encoder, rate=rate, options=_ENCODERS[encoder]))
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        # Untagged, players guess the matrix from the size and small videos come out in slightly wrong colours.
        context = stream.codec_context
        context.colorspace, context.color_range = Colorspace.ITU709, ColorRange.MPEG
        context.color_primaries, context.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
        reformatter = VideoReformatter()
        for rgb in frames:
            picture = reformatter.reformat(
                VideoFrame.from_ndarray(np.ascontiguousarray(rgb), format="rgb24"),
                format="yuv420p",
                dst_colorspace=Colorspace.ITU709,
                src_color_range=ColorRange.JPEG,
                dst_color_range=ColorRange.MPEG,
                interpolation=SCALING,
                threads=1,
            )
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
