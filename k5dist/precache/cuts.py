"""Which samples a clip gives: how many frames each has, and where it begins."""

from __future__ import annotations

import math

from k5dist.datasets import DatasetConfig
from k5dist.precache.source import TIME_TOLERANCE
from k5dist.precache.video import VideoInfo

_ROUNDING = 1e-6  # of a frame: 4.2 s × 10 a second must not be 41.999… frames


class Unfit(Exception):
    """A clip that is no sample of its dataset; the message says why, and begins with "too short" or "too long"."""


def available_frames(info: VideoInfo, start: float, end: float | None, frame_rate: float) -> int:
    """Frames at `frame_rate` a second between start and end (None: the file's end), by what the file says of itself.

    The same limits as decoding has: the last frame's time may be `end` itself, and lies before the file's end.
    """
    spans = [info.duration - start - TIME_TOLERANCE]
    if end is not None:
        spans.append(end - start + TIME_TOLERANCE)
    return max(0, math.floor(min(spans) * frame_rate + _ROUNDING) + 1)


def cuts(info: VideoInfo, start: float, end: float | None, dataset: DatasetConfig) -> list[tuple[float, int]]:
    """(start in seconds, frames) of every sample that a clip gives; at least one.

    Raises:
        Unfit: where the clip is too short or too long for its dataset.
    """
    if info.is_image:
        if (dataset.min_frames or 1) > 1:
            raise Unfit(f"too short: an image has one frame, min_frames={dataset.min_frames}")
        return [(start, 1)]
    rate = dataset.frame_rate
    available = available_frames(info, start, end, rate)
    has = f"it has {available} frames at {rate:g} a second"
    if available < (dataset.min_frames or 1):
        raise Unfit(f"too short: {has}, min_frames={dataset.min_frames}")
    if dataset.max_frames is not None and available > dataset.max_frames:
        raise Unfit(f"too long: {has}, max_frames={dataset.max_frames}")
    counts = dataset.frame_counts
    frames = next((count for count in counts if count <= available), None)
    if frames is None:
        if len(counts) == 1 and dataset.segments == "first":
            return [(start, counts[0])]  # what a file says of its length may be wrong: decoding tells
        raise Unfit(f"too short: {has}, the smallest bucket takes {counts[-1]}")
    return [(start + first / rate, frames) for first in _windows(available, frames, dataset)]


def _windows(available: int, frames: int, dataset: DatasetConfig) -> list[int]:
    """The first frame of each of a clip's windows of `frames` frames; they never overlap."""
    if dataset.segments == "first":
        return [0]
    fitting = available // frames
    wanted = min(fitting, dataset.max_segments or fitting)
    if dataset.segments == "all" or wanted == 1:
        return [at * frames for at in range(wanted)]
    return [round(at * (available - frames) / (wanted - 1)) for at in range(wanted)]
