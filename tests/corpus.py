"""Footage as it comes: damaged, odd, foreign and hostile files, each with what must come of it.

Everything is made here by PyAV, Pillow and numpy. `write_corpus(folder)` writes the files; CASES says which.
"""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import av
import numpy as np
from av.audio.frame import AudioFrame
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.reformatter import ColorPrimaries, Colorspace, ColorTrc
from av.video.stream import VideoStream
from PIL import Image

from tests.numbered import INTERLACED, numbered, write

NUM_FRAMES = 24  # of a clip, unless said


@dataclass(frozen=True)
class Case:
    """A file and its fate: `frames` decode at its own rate from 0 s on and not one more, or VideoError."""

    name: str  # the file's name
    make: Callable[[Path], bytes | None]  # its content, or None where the path was made some other way
    frames: int = NUM_FRAMES
    excess: int = 0  # frames that are too many; 0: one more than `frames` where these are few
    stage: str = ""  # "probe": neither probe nor decode works; "decode": probe does
    reason: str = ""  # a part of the error's reason


CASES: dict[str, Case] = {}


def write_corpus(folder: Path) -> None:
    """Write every case's file into an existing folder."""
    for case in CASES.values():
        path = folder / case.name
        content = case.make(path)
        if content is not None:
            path.write_bytes(content)


def _add(name: str, make: Callable[[], bytes] | bytes, **fate: Any) -> None:
    assert name not in CASES
    CASES[name] = Case(name, (lambda _: make) if isinstance(make, bytes) else (lambda _: make()), **fate)


def _add_path(name: str, make: Callable[[Path], None], **fate: Any) -> None:
    CASES[name] = Case(name, make, **fate)


@cache
def _clip(**how: Any) -> bytes:
    """NUM_FRAMES numbered frames as `write` encodes them; count and size (H, W) take other ones."""
    count, size = how.pop("count", NUM_FRAMES), how.pop("size", None)
    frames = [np.resize(numbered(i), (*size, 3)) if size else numbered(i) for i in range(count)]
    for name in ("options", "container_options"):
        how[name] = dict(how.get(name, ()))
    return write(io.BytesIO(), frames, **how).getvalue()


@cache
def _noise(container: str = "mp4", moov_first: bool = False) -> bytes:
    """A clip of NUM_FRAMES incompressible frames, so that its data is most of the file."""
    frames = np.random.default_rng(0).integers(0, 256, (NUM_FRAMES, 64, 96, 3), np.uint8)
    codec = "mpeg4" if container == "avi" else "libx264"
    with TemporaryDirectory() as folder:  # a file, since FFmpeg opens it again to bring the index forward
        options = {"movflags": "+faststart"} if moov_first else None
        path = Path(write(f"{folder}/noise", list(frames), codec=codec, container=container, container_options=options))
        return path.read_bytes()


def _cut(container: str, part: float, moov_first: bool = False) -> bytes:
    data = _noise(container, moov_first)
    return data[: int(part * len(data))]


def _damaged(container: str, flips: int) -> bytes:
    """Bits turned over in the middle third of the file, where pictures are."""
    data = np.frombuffer(_noise(container, container == "mp4"), np.uint8).copy()
    where = np.random.default_rng(1).integers(len(data) // 3, 2 * len(data) // 3, flips)
    data[where] ^= 0x40
    return data.tobytes()


def _patched(data: bytes, box: bytes, offset: int, value: bytes) -> bytes:
    """data with value written at offset after the first box's name."""
    at = data.index(box) + 4 + offset
    return data[:at] + value + data[at + len(value) :]


def _resized(width: int, height: int, codec: str = "libx264") -> bytes:
    """An MP4 whose headers declare another size than its pictures have."""
    data = _clip(codec=codec)
    at = data.index(b"avc1" if codec == "libx264" else b"mp4v", data.index(b"stsd")) + 28
    data = data[:at] + struct.pack(">HH", width, height) + data[at + 4 :]
    return _patched(data, b"tkhd", 76, struct.pack(">II", width << 16, height << 16))


def _muxed(codec: str, pix_fmt: str, size: tuple[int, int], payload: bytes) -> bytes:
    """A MOV of three packets that no encoder has seen."""
    file = io.BytesIO()
    with av.open(file, "w", format="mov") as output:
        stream = cast(VideoStream, output.add_stream(codec, rate=24))
        stream.width, stream.height, stream.pix_fmt = 96, 64, pix_fmt
        for i in range(3):
            packet = Packet(payload)
            packet.stream, packet.pts, packet.dts, packet.time_base = stream, i, i, Fraction(1, 24)
            output.mux(packet)
    data = file.getvalue()  # an encoder refuses such sizes, so they are written into the header afterwards
    return _patched(data, b"stsd", 36, struct.pack(">HH", *size))


def _audio(container: str = "mp4", cover: bool = False, video: int = 0) -> bytes:
    """Half a second of silence, with cover art or with so many video streams."""
    file = io.BytesIO()
    with av.open(file, "w", format=container) as output:
        streams: list[Any] = [output.add_stream("libx264", rate=24) for _ in range(video)]
        art: Any = output.add_stream("mjpeg", rate=1) if cover else None
        sound: Any = output.add_stream("aac", rate=16000)
        for stream in [*streams, art] if cover else streams:
            stream.width, stream.height, stream.pix_fmt = 128, 64, "yuv420p"
        if cover:
            art.pix_fmt, art.disposition = "yuvj420p", art.disposition.attached_pic
            output.mux(art.encode(VideoFrame.from_ndarray(numbered(255)).reformat(format="yuvj420p")))
            output.mux(art.encode(None))
        for index, stream in enumerate(streams):
            for i in range(NUM_FRAMES):
                frame = VideoFrame.from_ndarray(numbered(i if index == 0 else 255 - i)).reformat(format="yuv420p")
                frame.pts = i
                output.mux(stream.encode(frame))
            output.mux(stream.encode(None))
        for i in range(8):
            silence = AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            silence.rate, silence.pts = 16000, 1024 * i
            output.mux(sound.encode(silence))
        output.mux(sound.encode(None))
    return file.getvalue()


def _edited() -> bytes:
    """An MP4 whose edit list skips the first 6 of its frames."""
    data = _clip(options=(("bf", "0"),))
    seconds, media = struct.unpack(">I", data[(at := data.index(b"mdhd") + 16) : at + 4])[0], b"elst"
    begin = struct.pack(">I", 6 * seconds // 24)
    return _patched(data, media, 12, begin)


def _image(kind: str, mode: str = "RGB", size: tuple[int, int] = (96, 64), **how: Any) -> bytes:
    file = io.BytesIO()
    picture = Image.fromarray(numbered(37)).resize(size)
    (picture.convert("RGB").quantize(16) if mode == "P" else picture.convert(mode)).save(file, kind, **how)
    return file.getvalue()


def _animation(kind: str, frames: int, size: tuple[int, int] = (96, 64), **how: Any) -> bytes:
    file = io.BytesIO()
    first, *rest = [Image.fromarray(numbered(i)).resize(size) for i in range(frames)]
    first.save(file, kind, save_all=True, append_images=rest, **how)
    return file.getvalue()


def _png16() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.linspace(0, 65535, 64 * 96).reshape(64, 96).astype(np.uint16)).save(file, "PNG")
    return file.getvalue()


def _exif_jpeg() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return _image("JPEG", exif=exif)


def _png_bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that declares a gigantic picture."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(bytes(1 << 16)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + pixels + chunk(b"IEND", b"")


def _symlink_loop(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(path.name)


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def _playlists() -> Iterator[tuple[str, bytes]]:
    yield "m3u8.mp4", b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nplain.mp4\n#EXT-X-ENDLIST\n"
    yield "ffconcat.mp4", b"ffconcat version 1.0\nfile plain.mp4\n"
    yield "ffconcat.mkv", b"ffconcat version 1.0\nfile plain.mp4\n"
    yield (
        "sdp.mp4",
        b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nm=video 9 RTP/AVP 96\na=rtpmap:96 H264/90000\n",
    )
    yield "dash.mp4", b'<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"></MPD>'


def _broken() -> None:
    invalid: dict[str, Any] = {"stage": "probe", "reason": "Invalid data"}
    for name, data in {
        "empty.mp4": b"",
        "one byte.mp4": b"\0",
        "zeros.mp4": bytes(4096),
        "text.mp4": b"a caption, not a clip\n" * 50,
        "page.mp4": b"<!DOCTYPE html><html><body>404 Not Found</body></html>\n" * 20,
        **dict(_playlists()),
    }.items():
        _add(name, data, stage="probe")
    part_left: dict[str, Any] = {"frames": 9, "excess": NUM_FRAMES}
    for part in (0.01, 0.3, 0.6, 0.99):
        fate = invalid if part < 0.99 else {"stage": "probe", "reason": "no video stream"}
        _add(f"moov last, cut at {part}.mp4", lambda p=part: _cut("mp4", p), **fate)
    for part in (0.02, 0.2, 0.4, 0.7, 0.95):
        fate = invalid if part == 0.02 else {"stage": "decode"} if part < 0.5 else part_left
        _add(f"moov first, cut at {part}.mp4", lambda p=part: _cut("mp4", p, True), **fate)
    for container, suffix in (("matroska", "mkv"), ("avi", "avi")):
        _add(f"cut at 0.005.{suffix}", lambda c=container: _cut(c, 0.005), stage="probe")
        for part in (0.2, 0.6, 0.9):
            fate = {"stage": "decode"} if part < (0.8 if suffix == "avi" else 0.5) else part_left
            _add(f"cut at {part}.{suffix}", lambda c=container, p=part: _cut(c, p), **fate)
    for container, suffix in (("mp4", "mp4"), ("matroska", "mkv"), ("avi", "avi")):
        _add(f"flipped.{suffix}", lambda c=container: _damaged(c, 200), stage="decode")
    _add("audio.mp4", _audio, stage="probe", reason="no video stream")
    _add("cover only.m4a", lambda: _audio(cover=True), stage="probe", reason="no video stream")
    _add("jpeg, cut.jpg", lambda: _image("JPEG")[:700], frames=1, stage="decode", reason="truncated")
    _add("bomb.png", lambda: _png_bomb(50_000, 50_000), stage="probe", reason="larger than 178956970 pixels")
    _add("bomb of 100 Mpixel.png", lambda: _png_bomb(10_000, 10_000), frames=1, stage="decode")
    _add("heic.heic", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(500), stage="probe", reason="HEIC")
    # Gigantic by the picture itself, by the container alone (the pictures are small: they count), and without codec.
    bomb = _png_bomb(50_000, 50_000)
    _add("gigantic png.mov", lambda: _muxed("png", "rgb24", (50_000, 50_000), bomb), stage="probe")
    _add("hidden gigantic png.mov", lambda: _muxed("png", "rgb24", (96, 64), bomb), stage="probe")
    _add("gigantic raw.mov", lambda: _muxed("rawvideo", "rgb24", (30_000, 30_000), bytes(100)), stage="probe")
    _add("gigantic in the header.mp4", lambda: _resized(65535, 65535))
    _add("gigantic mpeg4.mp4", lambda: _resized(65535, 65535, "mpeg4"))
    _add("unknown codec.mp4", lambda: _clip().replace(b"avc1", b"zzzz"), stage="probe")
    _add_path("loop.mp4", _symlink_loop, stage="probe", reason="symbolic links")
    _add_path("folder.mp4", Path.mkdir, stage="probe", reason="not a regular file")
    _add_path("pipe.mp4", _fifo, stage="probe", reason="not a regular file")


def _clips() -> None:
    """Whole clips: containers, codecs, sizes, pixel formats, orientations."""
    for name, how in {
        "plain.mp4": {},
        "one frame.mp4": {"count": 1},
        "two frames.mp4": {"count": 2},
        "1x1.mkv": {"count": 9, "size": (1, 1), "codec": "ffv1", "pix_fmt": "bgr0"},
        "2x2.mp4": {"count": 9, "size": (2, 2)},
        "odd 33x65.mp4": {"count": 9, "size": (33, 65), "pix_fmt": "yuv444p"},
        "odd 33x65 420.mkv": {"count": 9, "size": (33, 65), "codec": "ffv1"},
        "anamorphic.mp4": {"aspect": Fraction(4, 3)},
        "10 bit.mp4": {"pix_fmt": "yuv420p10le"},
        "12 bit.mkv": {"codec": "libx265", "pix_fmt": "yuv422p12le", "options": (("x265-params", "log-level=none"),)},
        "444.mp4": {"pix_fmt": "yuv444p"},
        "422.mp4": {"pix_fmt": "yuv422p"},
        "grey.mkv": {"codec": "ffv1", "pix_fmt": "gray"},
        "grey16.mkv": {"codec": "ffv1", "pix_fmt": "gray16le"},
        "rgb ffv1.mkv": {"codec": "ffv1", "pix_fmt": "bgr0"},
        "rgb huffyuv.avi": {"codec": "huffyuv", "pix_fmt": "rgb24"},
        "alpha qtrle.mov": {"codec": "qtrle", "pix_fmt": "argb"},
        "alpha yuva.mkv": {"codec": "ffv1", "pix_fmt": "yuva420p"},
        "alpha png.mov": {"codec": "png", "pix_fmt": "rgba"},
        "alpha prores.mov": {"codec": "prores_ks", "pix_fmt": "yuva444p10le"},
        "interlaced.mp4": {"flags": INTERLACED, "options": (("x264-params", "tff=1"),)},
        "interlaced mpeg2.mpg": {"codec": "mpeg2video", "flags": INTERLACED, "rate": 25},
        "pq.mp4": {"codec": "libx265", "pix_fmt": "yuv420p10le", "transfer": ColorTrc.SMPTE2084}
        | {"matrix": Colorspace.BT2020, "options": (("x265-params", "log-level=none"),)},
        "hlg.mp4": {"pix_fmt": "yuv420p10le", "transfer": ColorTrc.ARIB_STD_B67, "primaries": ColorPrimaries.BT2020},
        "from 100 s.mkv": {"pts": tuple(range(2400, 2424))},
        "negative, no edit list.mp4": {"pts": tuple(range(-6, 18)), "container_options": (("use_editlist", "0"),)},
        "variable rate.mp4": {"pts": tuple(i * (i + 1) // 2 for i in range(NUM_FRAMES)), "rate": 240},
        "gap of an hour.mp4": {"pts": (*range(12), *range(86400, 86412))},
        "name with spaces.mp4": {},
        "-i.mp4": {},
        "line\nbreak 'quote' \"double\".mp4": {},
        "concat:a|b.mp4": {},
        "кадр 影片 🎬.mp4": {},
        "n" * 236 + ".mp4": {},
        "html.avi.mp4": {"codec": "mpeg4", "container": "avi"},
        "flash.flv": {"codec": "flv", "container": "flv", "rate": 25},
        "windows.wmv": {"codec": "wmv2", "container": "asf", "rate": 25},
        "vp8.ogv": {"codec": "libvpx", "container": "ogg", "options": (("deadline", "realtime"),)},
        "vp9.webm": {"codec": "libvpx-vp9", "container": "webm", "options": (("deadline", "realtime"),)},
    }.items():
        suffix = name.rpartition(".")[2]
        containers = {"mkv": "matroska", "avi": "avi", "mov": "mov", "mpg": "mpeg"}
        whole: dict[str, Any] = {"container": containers.get(suffix, "mp4"), **how}
        _add(name, lambda how=whole: _clip(**how), frames=whole.get("count", NUM_FRAMES))
    for rotation in (90, 180, 270):
        _add(f"rotated {rotation}.mp4", lambda r=rotation: _clip(rotation=r))
    early = tuple(range(-6, 18))
    _add("negative.mp4", lambda: _clip(pts=early), frames=NUM_FRAMES - 6)  # the part before 0 is not shown
    no_times: dict[str, Any] = {"container": "matroska", "container_options": (("avoid_negative_ts", "disabled"),)}
    _add("no times.mkv", lambda: _clip(pts=early, **no_times), stage="decode", reason="no timestamps")
    _add("mirrored.mp4", lambda: _clip(hflip=True))
    _add("16384 wide.mp4", lambda: _clip(count=9, size=(16, 16384)), stage="decode", reason="cut off nearly all")
    _add("edit list.mp4", _edited, frames=NUM_FRAMES - 6)
    for box, offset in (("mvhd", 16), ("mdhd", 16), ("tkhd", 20)):
        for what, value in (("huge", b"\x7f\xff\xff\xff"), ("zero", bytes(4))):
            data = box.encode()
            _add(f"{what} duration in {box}.mp4", lambda b=data, o=offset, v=value: _patched(_clip(), b, o, v))
    _add("wrong size in the header.mp4", lambda: _resized(640, 32))
    _add("two videos.mp4", lambda: _audio(video=2))
    _add("cover and video.mp4", lambda: _audio(cover=True, video=1))


def _images() -> None:
    for name, make in {
        "still.png": lambda: _image("PNG"),
        "still.jpg": lambda: _image("JPEG"),
        "still.webp": lambda: _image("WEBP"),
        "still.bmp": lambda: _image("BMP"),
        "still.tiff": lambda: _image("TIFF"),
        "still.gif": lambda: _image("GIF"),
        "still.avif": lambda: _image("AVIF"),
        "a png.mp4": lambda: _image("PNG"),
        "exif.jpg": _exif_jpeg,
        "16 bit.png": _png16,
        "grey.jpg": lambda: _image("JPEG", "L"),
        "cmyk.jpg": lambda: _image("JPEG", "CMYK"),
        "alpha.png": lambda: _image("PNG", "RGBA"),
        "palette.png": lambda: _image("PNG", "P", transparency=0),
        "two pages.tiff": lambda: _animation("TIFF", 2),
        "1x1.png": lambda: _image("PNG", size=(1, 1)),
    }.items():
        _add(name, make, frames=1)
    _add("ribbon.png", lambda: _image("PNG", size=(4096, 2)), frames=1, stage="decode", reason="cut off nearly all")
    for kind, suffix in (("GIF", "gif"), ("WEBP", "webp"), ("PNG", "apng")):
        _add(f"animated.{suffix}", lambda k=kind: _animation(k, 10, duration=80), frames=10)
    _add("no delay.gif", lambda: _animation("GIF", 10, duration=0), frames=10)
    _add("cut animation.webp", lambda: _animation("WEBP", 10, duration=80)[:600], frames=10, stage="probe")
    _add("float.tiff", lambda: _image("TIFF", "F"), frames=1, stage="decode", reason="no known white")


_broken()
_clips()
_images()
