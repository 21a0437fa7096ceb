"""What every reader of footage shares: the error, the way a file is opened, and frames with their times.

Only regular files are opened, and only by Python: FFmpeg sees bytes, never a name, so that neither a playlist nor a
name like "concat:a|b" or "-i" can make it open anything else.
"""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from itertools import chain
from typing import BinaryIO, Literal, cast

import av
from av.container import InputContainer
from av.filter import Graph
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

VideoFile = BinaryIO | str
Stage = Literal["probe", "decode"]
Timed = tuple[float, float, VideoFrame]  # begin and end in seconds after the stream's first frame

# Containers round timestamps to their time base (Matroska: whole milliseconds), so a frame due at 41.667 ms may be
# stamped 42 ms. Half a millisecond undoes that and is far below any frame's duration.
TIME_TOLERANCE = 0.0005

# The largest picture that is decoded, in pixels: a few bytes can declare far more than any memory holds. This is where
# Pillow draws its line too; five 8K pictures are smaller.
MAX_PIXELS = 178_956_970

# Several decode workers share a machine: a decoder that takes every core only fights its neighbours.
DECODER_THREADS = 4

# A playlist under a video's name would make FFmpeg open whatever it lists, on this machine or elsewhere.
_ONLY_FILES = {"format_whitelist": "mov,matroska,avi,gif,mpegts,mpeg,flv,asf,ogg,mxf"}

# What a file's content can make PyAV raise besides its own errors: impossible numbers and undecodable text.
_DATA_ERRORS = (av.FFmpegError, ValueError, ArithmeticError, LookupError, EOFError)

# bwdif looks at this many lines above and below; a smaller picture it refuses.
_MIN_DEINTERLACED = 4


class VideoError(Exception):
    """A video that cannot be used: .stage is where ("probe" or "decode"), .reason one sentence saying why."""

    def __init__(self, stage: Stage, reason: str):
        super().__init__(stage, reason)  # both as args, so that the error survives pickling between workers
        self.stage: Stage = stage
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.stage}: {self.reason}"


@contextmanager
def open_bytes(file: VideoFile, stage: Stage) -> Iterator[BinaryIO]:
    """A path's bytes (closed at the end) or a file object's (left open), from their beginning.

    Raises VideoError for a path that is no readable regular file: a pipe or a device could block for ever.
    """
    if not isinstance(file, str):
        file.seek(0)
        yield file
        return
    try:
        if not stat.S_ISREG(os.stat(file).st_mode):
            raise VideoError(stage, "it is not a regular file")
        opened = open(file, "rb")  # noqa: SIM115  (closed below; what the caller raises must not be taken for ours)
    except (OSError, ValueError) as error:  # ValueError: a name with a null character
        said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise VideoError(stage, f"{type(error).__name__}: {said}") from error
    with opened:
        yield opened


@contextmanager
def open_stream(file: BinaryIO, stage: Stage) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Open a file's first real video stream; whatever the data makes PyAV raise inside becomes a VideoError."""
    try:
        file.seek(0)
        # Tags in an old 8-bit encoding are common and must not cost the clip.
        with av.open(file, mode="r", metadata_errors="replace", options=_ONLY_FILES) as container:
            # An album cover is a video stream to FFmpeg.
            streams = [s for s in container.streams.video if not s.disposition & s.disposition.attached_pic]
            if not streams:
                raise VideoError(stage, "the file has no video stream")
            stream, context = streams[0], streams[0].codec_context
            if context is None:  # a codec that this FFmpeg does not know
                raise VideoError(stage, "the video's codec is unknown")
            if context.width * context.height > MAX_PIXELS:
                raise too_large(stage, context.width, context.height)
            context.options = {"max_pixels": str(MAX_PIXELS)}  # the stream itself may say more than its container
            context.thread_count = DECODER_THREADS
            stream.thread_type = "AUTO"  # pyright: ignore[reportAttributeAccessIssue]
            yield container, stream
    except _DATA_ERRORS as error:
        said = error.strerror if isinstance(error, av.FFmpegError) and error.strerror else str(error)
        raise VideoError(stage, f"{type(error).__name__}: {said}") from error
    except OSError as error:  # the storage's own, but for this one: what the data says lies before the file's beginning
        if error.errno != errno.EINVAL:
            raise
        raise VideoError(stage, "the file points outside itself") from error


def too_large(stage: Stage, width: int, height: int) -> VideoError:
    return VideoError(stage, f"a picture of {width} by {height} is larger than {MAX_PIXELS} pixels")


def timed_frames(container: InputContainer, stream: VideoStream, seek_to: float) -> Iterator[Timed]:
    """Frames in presentation order from the keyframe before seek_to (seconds after the first frame) on.

    Interlaced ones come deinterlaced, at the same rate.
    """
    frames = container.decode(stream)
    # Decoded also ahead of a seek, for its timestamp: a header's start_time is not always that of a frame.
    first = next(frames, None)
    if first is None:
        return
    origin, tick = _seconds(first), first.time_base or stream.time_base or Fraction(1, av.time_base)
    rate = stream.average_rate or stream.guessed_rate
    frames = chain([first], frames)
    if seek_to > 0:
        container.seek(int((origin + Fraction(seek_to + TIME_TOLERANCE)) / tick), stream=stream)
        frames = container.decode(stream)
    for frame in _progressive(frames):
        begin = float(_seconds(frame) - origin)
        lasts = float(frame.duration * (frame.time_base or 0))
        yield begin, begin + (lasts or (1 / float(rate) if rate else 0)), frame


def _seconds(frame: VideoFrame) -> Fraction:
    """A frame's presentation time in seconds of its stream's clock."""
    if frame.pts is None or frame.time_base is None:  # FFmpeg has already guessed from decoding times, if there are any
        raise VideoError("decode", "the frames have no timestamps")
    return frame.pts * frame.time_base


def _progressive(frames: Iterator[VideoFrame]) -> Iterator[VideoFrame]:
    """frames with the combing of interlaced ones removed (bwdif), one frame out for each in.

    Progressive frames pass untouched, also those between interlaced ones. The two moments of an interlaced frame
    become one picture, that of its first field.
    """
    graph, layout = None, None
    for frame in frames:
        now = frame.width, frame.height, frame.format.name
        if graph is not None and now != layout:  # the stream changes its picture size on the way
            yield from _pulled(graph, None)
            graph = None
        if graph is None:
            if not frame.interlaced_frame or min(now[:2]) < _MIN_DEINTERLACED:
                yield frame
                continue
            graph, layout = _deinterlacer(frame), now
        yield from _pulled(graph, frame)
    if graph is not None:
        yield from _pulled(graph, None)


def _deinterlacer(frame: VideoFrame) -> Graph:
    """A filter graph for frames like this one: interlaced frames in, one progressive frame for each out."""
    graph = Graph()
    graph.threads = 1
    source = graph.add_buffer(
        width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base or Fraction(1, 1000)
    )
    graph.link_nodes(source, graph.add("bwdif", mode="send_frame", deint="interlaced"), graph.add("buffersink"))
    graph.configure()
    return graph


def _pulled(graph: Graph, frame: VideoFrame | None) -> Iterator[VideoFrame]:
    """Put a frame (None: the end) into the graph and take out what is ready."""
    graph.vpush(frame)
    while True:
        try:
            yield cast(VideoFrame, graph.vpull())
        except (av.BlockingIOError, av.EOFError):
            return
