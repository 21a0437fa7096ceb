"""Footage of any kind in: probe a file, decode one clip at exact times.

Only PyAV, Pillow and numpy are used, so a decode worker starts in a fraction of a second. What a damaged or foreign
file makes them raise leaves here as a VideoError, which the failure ledger can hold; an error of the storage behind a
file object (a lost connection, a refused credential) passes through untouched, since it says nothing about the video
and is worth a retry.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain, islice
from typing import BinaryIO

import av
import numpy as np
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream

from k5dist.precache.picture import Crop, crop_for, display_size, is_hdr, orientation, to_picture
from k5dist.precache.review import encode_mp4
from k5dist.precache.source import TIME_TOLERANCE, Timed, VideoError, VideoFile, open_bytes, open_stream, timed_frames
from k5dist.precache.stills import count, image_format, image_frames, open_image, turned

__all__ = ["VideoError", "VideoFile", "VideoInfo", "decode_clip", "encode_mp4", "probe"]


@dataclass(frozen=True)
class VideoInfo:
    """What a file says about its video stream.

    width and height are pixels as displayed: after pixel aspect ratio and rotation. duration is in seconds,
    frame_rate the average in frames a second (both 0 for an image), rotation the clockwise turn (0, 90, 180 or 270
    degrees) that the player applies to the stored picture. num_frames is 1 for an image, else the header's count or
    else duration × frame_rate: an estimate, to plan with; only decoding tells. is_image: one still picture, whatever
    the file's kind (also a GIF of one frame). is_hdr: PQ or HLG, which decoding maps to SDR.
    """

    width: int
    height: int
    duration: float
    frame_rate: float
    codec: str
    rotation: int
    num_frames: int | None = None
    is_image: bool = False
    is_hdr: bool = False


def probe(file: VideoFile) -> VideoInfo:
    """Read a video's facts from its header and its first frame, an image's from its header.

    file is a path or a seekable binary file object (read by small ranges, left open). A file without a duration in its
    header is read to its end, an animated WebP or PNG is decoded to it. Raises VideoError with stage "probe".
    """
    with open_bytes(file, "probe") as opened:
        kind = image_format(opened, "probe")
        return _probe_stream(opened) if kind is None else _probe_image(opened, kind)


def _probe_stream(file: BinaryIO) -> VideoInfo:
    with open_stream(file, "probe") as (container, stream):
        # The rotation travels with the decoded frame; a first frame also proves that the codec is understood.
        frames = container.decode(stream)
        frame = next(frames, None)
        if frame is None:
            raise VideoError("probe", "the video stream holds no frame")
        width, height = display_size(frame, stream.sample_aspect_ratio)
        codec = stream.codec_context.codec.canonical_name
        transposed, _, mirror_y = orientation(frame)
        rotation = 90 * transposed + 180 * mirror_y
        if _is_still(container) and next(frames, None) is None:
            return VideoInfo(width, height, 0.0, 0.0, codec, rotation, 1, is_image=True)
        rate = stream.average_rate or stream.guessed_rate
        if not rate:
            raise VideoError("probe", "the video stream states no frame rate")
        duration = _stated_duration(container, stream)
        num_frames = stream.frames or None
        hdr = is_hdr(frame)
    if duration is None:
        duration = _measured_duration(file)
    num_frames = num_frames or max(1, round(duration * rate))
    return VideoInfo(width, height, duration, float(rate), codec, rotation, num_frames, is_hdr=hdr)


def _probe_image(file: BinaryIO, kind: str) -> VideoInfo:
    with open_image(file, kind, "probe") as image:
        rotation, frames, codec = turned(image), count(image), kind.lower()
        width, height = image.size if rotation % 180 == 0 else image.size[::-1]
        if frames == 1:
            return VideoInfo(width, height, 0.0, 0.0, codec, rotation, 1, is_image=True)
        duration = max(end for _, end, _ in image_frames(image))
        return VideoInfo(width, height, duration, frames / duration, codec, rotation, frames)


def decode_clip(
    file: VideoFile,
    *,
    start: float,
    end: float | None,
    num_frames: int,
    frame_rate: float,
    height: int,
    width: int,
    crop: str = "center",
    crop_seed: int = 0,
) -> np.ndarray:
    """Decode num_frames frames at frame_rate a second from start on as pictures of height × width pixels.

    Frame i is the source frame on screen at start + i / frame_rate seconds after the stream's first frame, whatever
    the source's frame rate, constant or not. start and end are in seconds; the last of these times may be end itself,
    not later. A still image is one frame at 0 s: enough for num_frames 1, too short for more. Interlaced video is
    deinterlaced; the rest of what makes a frame a picture (colour, HDR, transparency, orientation) says to_picture.

    crop is "center" or "random" (scaled to cover, then the middle or a window that is a pure function of crop_seed,
    the same for all frames) or "none" (squeezed to the shape, nothing cut off).

    file is a path or a seekable binary file object (left open): decoding begins at the keyframe before start and stops
    with the last frame needed, so only that part of the file is read; an image is read whole.

    Returns uint8 RGB [num_frames, height, width, 3]. Raises VideoError with stage "decode" where the file cannot be
    decoded or is too short, ValueError for a num_frames, frame_rate, height or width that is not positive and for an
    unknown crop.
    """
    if min(num_frames, height, width) < 1 or not 0 < frame_rate < math.inf:
        raise ValueError(f"{num_frames=}, {frame_rate=}, {height=} and {width=} must all be positive")
    how = crop_for(crop, crop_seed, height, width)
    if not 0 <= start < math.inf or (end is not None and not start <= end):
        raise VideoError("decode", f"start {start} s and end {end} s do not bound a clip")
    times = start + np.arange(num_frames) / frame_rate
    if end is not None and times[-1] > end + TIME_TOLERANCE:
        raise _too_short(end - start, times, frame_rate)
    clip = np.empty((num_frames, height, width, 3), np.uint8)

    def fill(file: BinaryIO, seek_to: float) -> None:
        with _frames(file, seek_to, times, frame_rate) as (frames, aspect):
            _fill(clip, frames, aspect, how, times, frame_rate)

    with open_bytes(file, "decode") as opened:
        try:
            fill(opened, start)
        except VideoError as error:
            # An index that lies, or a decoder that cannot begin at that keyframe: from the beginning it may still work.
            if start == 0 or error.reason.startswith("too short"):
                raise
            fill(opened, 0)
    return clip


@contextmanager
def _frames(
    file: BinaryIO, seek_to: float, times: np.ndarray, rate: float
) -> Iterator[tuple[Iterator[Timed], Fraction | None]]:
    """A file's frames from the keyframe before seek_to on, and its pixel aspect ratio."""
    needs_motion = len(times) > 1 or times[0] > TIME_TOLERANCE
    kind = image_format(file, "decode")
    if kind is not None:
        with open_image(file, kind, "decode") as image:
            if needs_motion and count(image) == 1:
                raise _too_short(0, times, rate, "it is a still image")
            yield image_frames(image), None
        return
    with open_stream(file, "decode") as (container, stream):
        # The delay of a single GIF frame says nothing: a GIF is looked at from its beginning, it is small.
        still = _is_still(container)
        frames = timed_frames(container, stream, 0 if still else seek_to)
        if still and needs_motion:
            first = list(islice(frames, 2))
            if len(first) == 1:
                raise _too_short(0, times, rate, "it is a still image")
            frames = chain(first, frames)
        yield frames, stream.sample_aspect_ratio


def _is_still(container: InputContainer) -> bool:
    """Whether a container's kind often holds one still picture."""
    return container.format.name == "gif"


def _stated_duration(container: InputContainer, stream: VideoStream) -> float | None:
    """Seconds of video: the stream's own, else the container's, None where neither is stated."""
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    return container.duration / av.time_base if container.duration else None


def _measured_duration(file: BinaryIO) -> float:
    """Seconds of video by reading every packet's time."""
    with open_stream(file, "probe") as (container, stream):
        time_base = stream.time_base or Fraction(1, av.time_base)
        spans = [(p.pts, p.pts + (p.duration or 0)) for p in container.demux(stream) if p.pts is not None]
    if not spans:
        raise VideoError("probe", "the file states no duration and its packets have no timestamps")
    return float((max(end for _, end in spans) - min(begin for begin, _ in spans)) * time_base)


def _fill(
    clip: np.ndarray, frames: Iterator[Timed], aspect: Fraction | None, crop: Crop, times: np.ndarray, rate: float
) -> None:
    """Write into clip [T, H, W, 3] the frame that is on screen at each of times [T], reading frames no further."""
    reformatter = VideoReformatter()

    def picture(frame: VideoFrame) -> np.ndarray:
        return to_picture(frame, aspect, crop, reformatter)

    filled, until, shown = 0, 0.0, None
    for begin, end, frame in frames:
        # Only the next frame's begin says how long one stays on screen: durations are often wrong or missing.
        due = int(np.searchsorted(times, begin - TIME_TOLERANCE, side="left"))
        if due > filled:
            if shown is None:
                raise VideoError("decode", f"no frame is on screen at {times[0]:g} s")
            clip[filled:due] = picture(shown)
            filled = due
        if filled == len(times):
            return
        if frame.is_corrupt:  # even one that is not shown: what follows is predicted from it
            raise VideoError("decode", f"the frame at {begin:.3f} s is damaged")
        shown, until = frame, end
    if shown is None:
        raise VideoError("decode", "no frame could be decoded")
    if times[-1] > max(until - TIME_TOLERANCE, 0):  # a still image lasts 0 s, and is there at 0
        raise _too_short(until - float(times[0]), times, rate)
    clip[filled:] = picture(shown)


def _too_short(has: float, times: np.ndarray, frame_rate: float, why: str = "") -> VideoError:
    num, needs = len(times), len(times) / frame_rate
    wanted = f"{num} frames at {frame_rate:g} a second from {times[0]:g} s on"
    has_said = why or f"has {max(0.0, has):.3f} s"
    return VideoError("decode", f"too short: {has_said}, needs {needs:.3f} s for {wanted}")
