"""The frame on screen at each time, over codecs, containers and frame rates."""

from __future__ import annotations

import io
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from PIL import Image

from k5dist.precache.video import VideoError, decode_clip, probe
from tests.numbered import HEIGHT, INTERLACED, WIDTH, numbered, numbers, write

REALTIME = {"deadline": "realtime", "cpu-used": "8"}
QUIET = {"x265-params": "log-level=none"}
FILES: dict[str, dict[str, Any]] = {
    "h264 mp4": {},
    "h264 mov": {"container": "mov"},
    "h264 mkv": {"container": "matroska"},
    "h264 open gop": {"options": {"x264-params": "open-gop=1:bframes=3"}},
    "hevc mp4": {"codec": "libx265", "options": QUIET},
    "hevc mkv": {"codec": "libx265", "container": "matroska", "options": QUIET},
    "mpeg4 avi": {"codec": "mpeg4", "container": "avi"},
    "mpeg4 mp4": {"codec": "mpeg4"},
    "vp8 webm": {"codec": "libvpx", "container": "webm", "options": REALTIME},
    "vp9 webm": {"codec": "libvpx-vp9", "container": "webm", "options": REALTIME},
    "mjpeg avi": {"codec": "mjpeg", "container": "avi", "pix_fmt": "yuvj420p"},
    "ffv1 mkv": {"codec": "ffv1", "container": "matroska"},
    "prores mov": {"codec": "prores_ks", "container": "mov", "pix_fmt": "yuv422p10le"},
}
RATES = [Fraction(r) for r in (12, 24, 25, 30, 50, 60)] + [Fraction(n * 1000, 1001) for n in (24, 30, 60)]


def decode(file: Any, start: float, num_frames: int, rate: float = 24) -> list[int]:
    clip = decode_clip(file, start=start, end=None, num_frames=num_frames, frame_rate=rate, height=HEIGHT, width=WIDTH)
    return numbers(clip)


def on_screen(begins: np.ndarray, start: float, num_frames: int, rate: float = 24) -> list[int]:
    times = start + np.arange(num_frames) / rate
    return (np.searchsorted(begins, times + 0.0005, side="right") - 1).tolist()


@pytest.mark.parametrize("name", FILES)
def test_every_rate_is_resampled_by_time(name: str) -> None:
    for rate in RATES:
        if "mpeg4" in name and rate.denominator > 1 and "avi" not in name:
            continue  # MPEG-4's own clock cannot hold these in an MP4 without rounding
        count = 30
        file = write(io.BytesIO(), [numbered(i) for i in range(count)], rate=rate, **FILES[name])
        begins = np.arange(count) / float(rate)
        for start in (0.0, float(10 / rate) + 0.003, float(17.5 / rate)):
            num_frames = int((count / float(rate) - start) * 24)
            got = np.array(decode(file, start, num_frames))
            if rate.denominator == 1:
                assert got.tolist() == on_screen(begins, start, num_frames), f"{rate=} {start=}"
                continue
            # Some begin within a millisecond of a 24th, and containers round them: either neighbour is right.
            before, after = (np.array(on_screen(begins, start + d, num_frames)) for d in (-0.0011, 0.0011))
            assert ((np.maximum(before, 0) <= got) & (got <= after)).all(), f"{rate=} {start=}"


@pytest.mark.parametrize("container", ["mp4", "mov", "matroska", "webm"])
def test_variable_rate_from_an_offset(container: str) -> None:
    pts = np.cumsum([5000, 40, 10, 500, 33, 34, 33, 700, 100, 5, 45, 300])
    codec = {"codec": "libvpx", "options": REALTIME} if container == "webm" else {}
    file = write(
        io.BytesIO(),
        [numbered(i) for i in range(len(pts))],
        pts=pts.tolist(),
        time_base=Fraction(1, 1000),
        container=container,
        gop=4,
        **codec,
    )
    begins = (pts - pts[0]) / 1000
    for start in (0.0, 0.2, 0.61, 1.3):
        num_frames = int((begins[-1] - start) * 24)
        assert decode(file, start, num_frames) == on_screen(begins, start, num_frames)


def test_gif_goes_by_its_own_delays() -> None:
    file, delays = io.BytesIO(), [40, 200, 30, 100, 500, 70]
    first, *rest = [Image.fromarray(numbered(i)) for i in range(6)]
    first.save(file, "GIF", save_all=True, append_images=rest, duration=delays)
    begins = np.cumsum([0, *delays[:-1]]) / 1000
    for start in (0.0, 0.3):
        assert decode(file, start, 12) == on_screen(begins, start, 12)
    info = probe(file)
    assert info.duration == pytest.approx(0.94)
    assert (info.num_frames, info.is_image) == (6, False)


@pytest.mark.parametrize("kind", ["WEBP", "PNG"])
def test_other_animations_go_by_their_own_delays(kind: str) -> None:
    file, delays = io.BytesIO(), [40, 200, 30, 100, 500, 70]
    first, *rest = [Image.fromarray(numbered(i)) for i in range(6)]
    first.save(file, kind, save_all=True, append_images=rest, duration=delays)
    begins = np.cumsum([0, *delays[:-1]]) / 1000
    assert decode(file, 0.3, 12) == on_screen(begins, 0.3, 12)
    assert probe(file).num_frames == 6
    with pytest.raises(VideoError, match="too short"):
        decode(file, 0.5, 12)


def test_interlaced_frames_lose_their_combs_and_keep_their_times() -> None:
    combed = []
    for i in range(20):  # a bar whose two fields are 2 pixels apart, as its motion has it
        picture = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
        picture[::2, 4 * i : 4 * i + 20] = picture[1::2, 4 * i + 2 : 4 * i + 22] = 255
        combed.append(picture)
    options = {"x264-params": "tff=1", "crf": "8"}
    file = write(io.BytesIO(), combed, rate=25, flags=INTERLACED, options=options)
    clip = decode_clip(file, start=0.2, end=None, num_frames=15, frame_rate=25, height=HEIGHT, width=WIDTH)
    rough = np.abs(np.diff(clip[..., 0].astype(int), axis=1)).mean((1, 2))
    assert rough.max() < 3 < np.abs(np.diff(combed[5][..., 0].astype(int), axis=0)).mean()
    left = [int(np.argmax(frame[::2, :, 0].mean(0) > 100)) for frame in clip]
    assert np.abs(np.array(left) - 4 * np.arange(5, 20)).max() <= 2


def test_one_second_of_a_long_file_reads_a_little_of_it() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (480, HEIGHT, WIDTH, 3), np.uint8)
    whole = write(io.BytesIO(), list(noise), gop=24, codec="mpeg4", options={"qmin": "8", "qmax": "8"}).getvalue()

    class Counting(io.BytesIO):
        count = 0

        def read(self, size: int | None = -1, /) -> bytes:
            data = super().read(size)
            self.count += len(data)
            return data

    file = Counting(whole)
    decode(file, 10.0, 24)
    assert file.count < 0.3 * len(whole)
