"""Video files in and out: probe a file, decode one clip at exact times, encode a review video.

Only PyAV and numpy are used, so a decode worker starts in a fraction of a second. What a damaged or foreign file
makes PyAV raise leaves here as a VideoError, which the failure ledger can hold; an error of the storage behind a file
object (a lost connection, a refused credential) passes through untouched, since it says nothing about the video and
is worth a retry.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import BinaryIO, Literal, cast

import av
import numpy as np
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, Interpolation, VideoReformatter
from av.video.stream import VideoStream

VideoFile = BinaryIO | str
Stage = Literal["probe", "decode"]
_Timed = tuple[float, float, VideoFrame]  # begin and end in seconds after the stream's first frame

# Containers round timestamps to their time base (Matroska: whole milliseconds), so a frame due at 41.667 ms may be
# stamped 42 ms. Half a millisecond undoes that and is far below any frame's duration.
TIME_TOLERANCE = 0.0005

# Several decode workers share a machine: a decoder that takes every core only fights its neighbours.
DECODER_THREADS = 4

# libswscale widens its Lanczos window by the downscaling ratio, which is the antialiasing. The other flags turn off
# its shortcuts: without them chroma is dropped horizontally and results depend on the CPU's instruction set.
_SCALING = (
    Interpolation.LANCZOS
    | Interpolation.ACCURATE_RND
    | Interpolation.FULL_CHR_H_INT
    | Interpolation.FULL_CHR_H_INP
    | Interpolation.BITEXACT
)

# libswscale numbers the YUV matrices as frames do (AVColorSpace), but for the second codes of BT.601 and BT.2020.
_MATRIX_SYNONYMS = {6: Colorspace.ITU601, 10: Colorspace.BT2020}

# Best first; options give about the same visual quality (visually lossless at review size).
_ENCODERS: dict[str, dict[str, str]] = {
    "libx264": {"crf": "18", "preset": "medium"},
    "libopenh264": {"rc_mode": "quality", "qmin": "10", "qmax": "24"},
    "mpeg4": {"qmin": "2", "qmax": "4"},
}

# A playlist under a video's name would make FFmpeg open whatever it lists, on this machine or elsewhere.
_ONLY_FILES = {"format_whitelist": "mov,matroska,avi,gif,mpegts,mpeg"}

# What a file's content can make PyAV raise besides its own errors: impossible numbers and undecodable text.
_DATA_ERRORS = (av.FFmpegError, ValueError, ArithmeticError, LookupError, EOFError)


@dataclass(frozen=True)
class VideoInfo:
    """What a file says about its video stream.

    width and height are pixels as displayed: after sample aspect ratio and rotation. duration is in seconds,
    frame_rate the average in frames a second, rotation the clockwise turn (0, 90, 180 or 270 degrees) that the player
    applies to the stored picture.
    """

    width: int
    height: int
    duration: float
    frame_rate: float
    codec: str
    rotation: int


class VideoError(Exception):
    """A video that cannot be used: .stage is where ("probe" or "decode"), .reason one sentence saying why."""

    def __init__(self, stage: Stage, reason: str):
        super().__init__(stage, reason)  # both as args, so that the error survives pickling between workers
        self.stage: Stage = stage
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.stage}: {self.reason}"


def probe(file: VideoFile) -> VideoInfo:
    """Read a video's facts from its header and its first frame.

    file is a path or a seekable binary file object (read by small ranges, left open). Raises VideoError with
    stage "probe".
    """
    with _open(file, "probe") as (container, stream):
        # The rotation travels with the decoded frame; a first frame also proves that the codec is understood.
        frame = next(container.decode(stream), None)
        if frame is None:
            raise VideoError("probe", "the video stream holds no frame")
        width, height = _display_size(frame, stream)
        rate = stream.average_rate or stream.guessed_rate
        if not rate:
            raise VideoError("probe", "the video stream states no frame rate")
        codec = stream.codec_context.codec.canonical_name
        transposed, _, mirror_y = _orientation(frame)
        duration = _duration(container, stream)  # last: it may read the container to its end
        return VideoInfo(width, height, duration, float(rate), codec, 90 * transposed + 180 * mirror_y)


def decode_clip(
    file: VideoFile, *, start: float, end: float | None, num_frames: int, frame_rate: float, height: int, width: int
) -> np.ndarray:
    """Decode num_frames frames at frame_rate a second from start on, scaled to cover height × width, centre cropped.

    Frame i is the source frame on screen at start + i / frame_rate seconds after the stream's first frame, whatever
    the source's frame rate, constant or not. start and end are in seconds; the last of these times may be end itself,
    not later. Colours follow the stream's matrix and range (HDR stays unmapped), shape its pixel aspect and rotation.

    file is a path or a seekable binary file object (left open): decoding begins at the keyframe before start and stops
    with the last frame needed, so only that part of the file is read.

    Returns uint8 RGB [num_frames, height, width, 3]. Raises VideoError with stage "decode" where the file cannot be
    decoded or is too short, ValueError for a num_frames, frame_rate, height or width that is not positive.
    """
    if min(num_frames, height, width) < 1 or not 0 < frame_rate < math.inf:
        raise ValueError(f"{num_frames=}, {frame_rate=}, {height=} and {width=} must all be positive")
    if not 0 <= start < math.inf or (end is not None and not start <= end):
        raise VideoError("decode", f"start {start} s and end {end} s do not bound a clip")
    times = start + np.arange(num_frames) / frame_rate
    if end is not None and times[-1] > end + TIME_TOLERANCE:
        raise _too_short(end - start, times, frame_rate)
    clip = np.empty((num_frames, height, width, 3), np.uint8)

    def fill(seek_to: float) -> None:
        with _open(file, "decode") as (container, stream):
            _fill(clip, _timed(container, stream, seek_to), stream, times, frame_rate)

    try:
        fill(start)
    except VideoError as error:
        # An index that lies, or a decoder that cannot begin at that keyframe: from the beginning it may still work.
        if start == 0 or error.reason.startswith("too short"):
            raise
        fill(0)
    return clip


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
                interpolation=_SCALING,
                threads=1,
            )
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))


@contextmanager
def _open(file: VideoFile, stage: Stage) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Open a file's first real video stream; whatever the data makes PyAV raise inside becomes a VideoError."""
    try:
        if not isinstance(file, str):
            file.seek(0)
        # Tags in an old 8-bit encoding are common and must not cost the clip.
        with av.open(file, mode="r", metadata_errors="replace", options=_ONLY_FILES) as container:
            # An album cover is a video stream to FFmpeg.
            streams = [s for s in container.streams.video if not s.disposition & s.disposition.attached_pic]
            if not streams:
                raise VideoError(stage, "the file has no video stream")
            stream = streams[0]
            stream.thread_type = "AUTO"  # pyright: ignore[reportAttributeAccessIssue]
            stream.codec_context.thread_count = DECODER_THREADS
            yield container, stream
    except _DATA_ERRORS as error:
        said = error.strerror if isinstance(error, av.FFmpegError) and error.strerror else str(error)
        raise VideoError(stage, f"{type(error).__name__}: {said}") from error


def _duration(container: InputContainer, stream: VideoStream) -> float:
    """Seconds of video: the stream's own, else the container's, else by reading every packet's time."""
    time_base = stream.time_base or Fraction(1, av.time_base)
    if stream.duration:
        return float(stream.duration * time_base)
    if container.duration:
        return container.duration / av.time_base
    spans = [(p.pts, p.pts + (p.duration or 0)) for p in container.demux(stream) if p.pts is not None]
    if not spans:
        raise VideoError("probe", "the file states no duration and its packets have no timestamps")
    return float((max(end for _, end in spans) - min(begin for begin, _ in spans)) * time_base)


def _timed(container: InputContainer, stream: VideoStream, seek_to: float) -> Iterator[_Timed]:
    """Frames in presentation order from the keyframe before seek_to (seconds after the first frame) on."""
    frames = container.decode(stream)
    # Decoded also ahead of a seek, for its timestamp: a header's start_time is not always that of a frame.
    first = next(frames, None)
    if first is None:
        return
    origin, tick = _timestamp(first), float(first.time_base or 0)
    rate = stream.average_rate or stream.guessed_rate
    frames = chain([first], frames)
    if seek_to > 0:
        container.seek(origin + int((seek_to + TIME_TOLERANCE) / tick), stream=stream)
        frames = container.decode(stream)
    for frame in frames:
        begin = (_timestamp(frame) - origin) * tick
        yield begin, begin + (frame.duration * tick or (1 / float(rate) if rate else 0)), frame


def _timestamp(frame: VideoFrame) -> int:
    """A frame's presentation time in ticks of its time base."""
    if frame.pts is None:  # FFmpeg has already guessed from decoding times, where there are any
        raise VideoError("decode", "the frames have no timestamps")
    return frame.pts


def _fill(clip: np.ndarray, frames: Iterator[_Timed], stream: VideoStream, times: np.ndarray, rate: float) -> None:
    """Write into clip [T, H, W, 3] the frame that is on screen at each of times [T], reading frames no further."""
    reformatter = VideoReformatter()
    filled, until, shown = 0, 0.0, None
    for begin, end, frame in frames:
        # Only the next frame's begin says how long one stays on screen: durations are often wrong or missing.
        due = int(np.searchsorted(times, begin - TIME_TOLERANCE, side="left"))
        if due > filled:
            if shown is None:
                raise VideoError("decode", f"no frame is on screen at {times[0]:g} s")
            clip[filled:due] = _fit(shown, stream, reformatter, *clip.shape[1:3])
            filled = due
        if filled == len(times):
            return
        if frame.is_corrupt:  # even one that is not shown: what follows is predicted from it
            raise VideoError("decode", f"the frame at {begin:.3f} s is damaged")
        shown, until = frame, end
    if shown is None:
        raise VideoError("decode", "no frame could be decoded")
    if times[-1] > until - TIME_TOLERANCE:
        raise _too_short(until - float(times[0]), times, rate)
    clip[filled:] = _fit(shown, stream, reformatter, *clip.shape[1:3])


def _fit(frame: VideoFrame, stream: VideoStream, reformatter: VideoReformatter, height: int, width: int) -> np.ndarray:
    """One frame as uint8 RGB [height, width, 3]: upright, scaled to cover, centre cropped."""
    shown_width, shown_height = _display_size(frame, stream)
    scale = max(width / shown_width, height / shown_height)
    cover = max(width, round(shown_width * scale)), max(height, round(shown_height * scale))
    transposed, mirror_x, mirror_y = _orientation(frame)
    yuv = not frame.format.is_rgb  # matrix and range mean nothing to an RGB source
    rgb = reformatter.reformat(
        frame,
        width=cover[transposed],
        height=cover[not transposed],
        format="rgb24",
        src_colorspace=_matrix(frame) if yuv else None,
        src_color_range=_range(frame) if yuv else None,
        dst_color_range=ColorRange.JPEG,
        interpolation=_SCALING,
        threads=1,
    ).to_ndarray()
    if transposed:
        rgb = rgb.swapaxes(0, 1)
    rgb = rgb[:: -1 if mirror_y else 1, :: -1 if mirror_x else 1]
    top, left = (cover[1] - height) // 2, (cover[0] - width) // 2
    return rgb[top : top + height, left : left + width]


def _orientation(frame: VideoFrame) -> tuple[bool, bool, bool]:
    """How to turn the stored picture upright: (transpose, then mirror left-right, then mirror top-bottom)."""
    try:
        data = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # a kind of side data that PyAV has no name for; the angle it can still tell
        turns = ((False, False, False), (True, False, True), (False, True, True), (True, True, False))
        return turns[round(frame.rotation / 90) % 4]
    if data is None:
        return False, False, False
    # Stored (x, y) shows at (a·x + c·y, b·x + d·y). An angle between goes to the nearest right one. Read in full
    # because PyAV's own frame.rotation takes a mirrored picture for one upside down.
    a, b, _, c, d = np.frombuffer(data, np.int32)[:5].tolist()
    if abs(a) + abs(d) >= abs(b) + abs(c):
        return False, a < 0, d < 0
    return True, c < 0, b < 0


def _display_size(frame: VideoFrame, stream: VideoStream) -> tuple[int, int]:
    """(width, height) as shown: sample aspect ratio widens or narrows the stored picture, then it is turned."""
    width, height = max(1, round(frame.width * (stream.sample_aspect_ratio or 1))), frame.height
    return (height, width) if _orientation(frame)[0] else (width, height)


def _matrix(frame: VideoFrame) -> Colorspace:
    """The YUV matrix of a frame; untagged, the rule of players: BT.709 for HD, BT.601 below."""
    untagged = Colorspace.ITU709 if frame.width >= 1280 or frame.height > 576 else Colorspace.ITU601
    matrix = _MATRIX_SYNONYMS.get(frame.colorspace, frame.colorspace)
    return Colorspace(matrix) if matrix in set(Colorspace) else untagged


def _range(frame: VideoFrame) -> ColorRange:
    """Full or limited range; untagged video is limited, unless its pixel format says full (yuvj420p)."""
    full = frame.color_range == ColorRange.JPEG or frame.format.name.startswith("yuvj")
    return ColorRange.JPEG if full else ColorRange.MPEG


def _too_short(has: float, times: np.ndarray, frame_rate: float) -> VideoError:
    num, needs = len(times), len(times) / frame_rate
    wanted = f"{num} frames at {frame_rate:g} a second from {times[0]:g} s on"
    return VideoError("decode", f"too short: has {max(0.0, has):.3f} s, needs {needs:.3f} s for {wanted}")
