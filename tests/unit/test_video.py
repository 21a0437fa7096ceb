"""Probing, exact times, damage, colours and sizes, on clips whose frames carry their own number."""

import io
import pickle
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

import av
import numpy as np
import pytest
from av.audio.frame import AudioFrame
from av.video.reformatter import ColorRange, Colorspace

from k5dist.precache import video
from k5dist.precache.video import VideoError, VideoInfo, decode_clip, encode_mp4, probe
from tests.numbered import HEIGHT, WIDTH, numbered, numbers, write


def decode(file: Any, start: float, num_frames: int, frame_rate: float, **changes: Any) -> np.ndarray:
    wanted: dict[str, Any] = {"end": None, "height": HEIGHT, "width": WIDTH} | changes
    return decode_clip(file, start=start, num_frames=num_frames, frame_rate=frame_rate, **wanted)


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """96 numbered frames at 24 a second (4 s, a keyframe at least each half second), by codec and container."""
    folder = tmp_path_factory.mktemp("clips")
    frames = [numbered(i) for i in range(96)]
    made = {
        "h264.mp4": {"codec": "libx264", "container": "mp4"},
        "h264.open.mp4": {"options": {"x264-params": "open-gop=1:bframes=3"}},  # frames shown before their keyframe
        "h264.mkv": {"codec": "libx264", "container": "matroska"},  # timestamps in whole milliseconds
        "h264.ts": {"codec": "libx264", "container": "mpegts"},  # first timestamp far from 0, no index to seek by
        "mpeg4.mp4": {"codec": "mpeg4", "container": "mp4"},
        "mpeg4.avi": {"codec": "mpeg4", "container": "avi"},  # no presentation times in the container
        "vp9.webm": {"codec": "libvpx-vp9", "container": "webm", "options": {"deadline": "realtime", "cpu-used": "8"}},
    }
    return {name: write(str(folder / name), frames, **how) for name, how in made.items()}


CLIPS = ["h264.mp4", "h264.open.mp4", "h264.mkv", "h264.ts", "mpeg4.mp4", "mpeg4.avi", "vp9.webm"]


@pytest.fixture(scope="module")
def mp4(clips: dict[str, str]) -> str:
    return clips["h264.mp4"]


@pytest.mark.parametrize("name", CLIPS)
@pytest.mark.parametrize(
    ("start", "frame_rate", "expected"),
    [
        (0, 24, list(range(96))),
        (0, 12, list(range(0, 96, 2))),
        (0, 48, [i // 2 for i in range(40)]),
        (0, 30, [i * 24 // 30 for i in range(60)]),
        (10 / 24, 24, list(range(10, 20))),  # within the first group of pictures
        (71 / 24, 24, list(range(71, 96))),  # after several
        (72 / 24, 12, list(range(72, 96, 2))),  # on a keyframe
        (50.5 / 24, 24, list(range(50, 60))),  # between two frames the earlier one is on screen
        (95 / 24, 24, [95]),
    ],
)
def test_each_output_frame_is_the_source_frame_on_screen(
    clips: dict[str, str], name: str, start: float, frame_rate: float, expected: list[int]
) -> None:
    clip = decode(clips[name], start, len(expected), frame_rate)
    assert clip.shape == (len(expected), HEIGHT, WIDTH, 3)
    assert clip.dtype == np.uint8
    assert numbers(clip) == expected


@pytest.mark.parametrize("container", ["mp4", "matroska"])
def test_variable_frame_rate_goes_by_timestamps(container: str) -> None:
    pts = [0, 10, 250, 260, 270, 1000, 1001, 1500, 1540, 2000]  # milliseconds
    file = write(
        io.BytesIO(), [numbered(i) for i in range(10)], pts=pts, time_base=Fraction(1, 1000), container=container, gop=3
    )
    for start in (0.0, 0.26, 1.2):
        times = start + np.arange(int((2.0 - start) * 50) + 1) / 50
        expected = [max(i for i, p in enumerate(pts) if p / 1000 <= t + 0.0005) for t in times]
        assert numbers(decode(file, start, len(times), 50)) == expected


def test_times_count_from_the_first_frame() -> None:
    pts = [48 + i for i in range(24)]
    file = write(io.BytesIO(), [numbered(i) for i in range(24)], pts=pts, container="matroska", gop=6)
    assert numbers(decode(file, 0, 24, 24)) == list(range(24))
    assert numbers(decode(file, 0.5, 6, 24)) == list(range(12, 18))


def test_a_clip_reads_only_its_part_of_the_file(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (120, HEIGHT, WIDTH, 3), np.uint8)
    encode_mp4(noise, tmp_path / "noise.mp4", frame_rate=24)
    write(str(tmp_path / "gops.mp4"), list(noise), gop=10)

    class Counting(io.BytesIO):
        count = 0

        def read(self, size: int | None = -1, /) -> bytes:
            data = super().read(size)
            self.count += len(data)
            return data

    whole = (tmp_path / "gops.mp4").read_bytes()
    for start, share in ((0.0, 0.35), (4.5, 0.35)):
        file = Counting(whole)
        decode(file, start, 6, 24)
        assert file.count < share * len(whole)


def test_a_seek_that_misses_falls_back_to_the_beginning(mp4: str, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = video.timed_frames
    asked: list[float] = []

    def late(container: Any, stream: Any, seek_to: float) -> Any:
        asked.append(seek_to)
        return honest(container, stream, seek_to + 1 if seek_to else 0)

    monkeypatch.setattr(video, "timed_frames", late)
    assert numbers(decode(mp4, 1.25, 12, 24)) == list(range(30, 42))
    assert asked == [1.25, 0]


def test_too_short_says_what_it_has_and_needs(mp4: str) -> None:
    for changes in ({"start": 0.5, "num_frames": 85}, {"start": 9.0, "num_frames": 1}):
        with pytest.raises(VideoError, match=r"^decode: too short: has (3.500|0.000) s, needs ") as caught:
            decode(mp4, frame_rate=24, **cast(Any, changes))
        assert caught.value.stage == "decode"
    assert len(decode(mp4, 0.5, 84, 24)) == 84
    with pytest.raises(VideoError, match=r"too short: has 1.000 s, needs 1.083 s for 26 frames at 24 a second"):
        decode(mp4, 1.0, 26, 24, end=2.0)
    assert numbers(decode(mp4, 1.0, 25, 24, end=2.0)) == list(range(24, 49))


def test_file_object_equals_path_and_stays_open(mp4: str) -> None:
    with open(mp4, "rb") as file:
        assert probe(file) == probe(mp4)
        for start in (0.0, 2.1):
            assert np.array_equal(decode(file, start, 8, 12), decode(mp4, start, 8, 12))
        assert not file.closed


def test_probe_tells_the_facts(clips: dict[str, str]) -> None:
    codecs = {"h264": "h264", "mpeg4": "mpeg4", "vp9": "vp9"}
    for name, path in clips.items():
        info = probe(path)
        assert (info.width, info.height, info.rotation) == (WIDTH, HEIGHT, 0)
        assert info.codec == codecs[name.partition(".")[0]]
        assert info.duration == pytest.approx(4.0, abs=0.05)
        assert info.frame_rate == pytest.approx(24, rel=0.01)


def broken_files(mp4: str, folder: Path) -> dict[str, bytes]:
    audio = io.BytesIO()
    with av.open(audio, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.rate = 16000
        container.mux(cast(Any, stream).encode(frame))
        container.mux(cast(Any, stream).encode(None))
    whole = Path(mp4).read_bytes()
    return {
        "empty": b"",
        "text": b"a caption, not a clip\n" * 50,
        "zeros": bytes(4096),
        "index cut off": whole[: len(whole) * 2 // 3],
        "audio only": audio.getvalue(),
    }


def test_unusable_files_raise_video_errors(mp4: str, tmp_path: Path) -> None:
    for name, data in broken_files(mp4, tmp_path).items():
        path = tmp_path / f"{name}.mp4"
        path.write_bytes(data)
        for file in (str(path), io.BytesIO(data)):
            with pytest.raises(VideoError) as caught:
                probe(file)
            assert caught.value.stage == "probe", name
            with pytest.raises(VideoError) as caught:
                decode(file, 0.5, 4, 24)
            assert caught.value.stage == "decode", name
            assert "\n" not in caught.value.reason
    with pytest.raises(VideoError, match="no video stream"):
        probe(io.BytesIO(broken_files(mp4, tmp_path)["audio only"]))
    with pytest.raises(VideoError, match="probe"):
        probe(str(tmp_path / "nowhere.mp4"))


def test_a_file_cut_in_the_middle_never_gives_a_wrong_clip(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (72, HEIGHT, WIDTH, 3), np.uint8)
    encode_mp4(noise, tmp_path / "noise.mp4", frame_rate=24)  # the index comes first, so the head is readable
    whole = (tmp_path / "noise.mp4").read_bytes()
    head = io.BytesIO(whole[: len(whole) // 2])
    assert np.array_equal(decode(head, 0, 12, 24), decode(io.BytesIO(whole), 0, 12, 24))
    for start in (0.0, 1.0, 2.5):
        with pytest.raises(VideoError) as caught:
            decode(head, start, 48 if start < 2 else 4, 24)
        assert caught.value.stage == "decode"


@pytest.mark.parametrize("frame_rate", [24, 6])
def test_damage_in_the_needed_part_is_an_error(frame_rate: float) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (72, HEIGHT, WIDTH, 3), np.uint8)
    file = write(io.BytesIO(), list(noise), options={"crf": "30"})
    with av.open(io.BytesIO(file.getvalue()), mode="r") as container:
        packets = [p for p in container.demux(video=0) if p.size]
    assert packets[25].pos is not None
    data = bytearray(file.getvalue())
    # The end of the picture's data, which the decoder conceals: it raises nothing and only marks the frame.
    begin, size = packets[25].pos, packets[25].size
    data[begin + size // 2 : begin + size] = bytes(size - size // 2)
    with pytest.raises(VideoError, match=r"decode: the frame at 1\.\d+ s is damaged"):
        decode(io.BytesIO(data), 0, int(frame_rate * 2.5), frame_rate)
    for start in (0.0, 2.5):  # the rest of the file is still good
        assert np.array_equal(decode(io.BytesIO(data), start, 12, 24), decode(file, start, 12, 24))


def test_storage_errors_pass_through(mp4: str) -> None:
    class Lost(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            raise ConnectionError("lost")

    with pytest.raises(ConnectionError):
        decode(Lost(Path(mp4).read_bytes()), 0, 4, 24)


def test_arguments_are_checked(mp4: str) -> None:
    for changes in ({"num_frames": 0}, {"frame_rate": 0.0}, {"frame_rate": float("nan")}, {"height": 0}):
        wanted = {"start": 0, "num_frames": 1, "frame_rate": 24} | changes
        with pytest.raises(ValueError, match="must all be positive"):
            decode(mp4, **cast(Any, wanted))
    for start, end in ((-1.0, None), (float("nan"), None), (2.0, 1.0), (0.0, float("nan"))):
        with pytest.raises(VideoError, match="bound"):
            decode(mp4, start, 1, 24, end=end)


def test_video_error_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(VideoError(stage="decode", reason="too short: …")))
    assert (error.stage, error.reason) == ("decode", "too short: …")


def corners(height: int = 64, width: int = 96) -> np.ndarray:
    """A picture that looks different in each of the eight ways to lay it."""
    picture = np.full((height, width, 3), 128, np.uint8)
    picture[: height // 2, : width // 2] = (220, 30, 30)
    picture[: height // 2, width // 2 :] = (30, 200, 30)
    picture[height // 2 :, : width // 2] = (30, 30, 220)
    return picture


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((a.astype(float) - b) ** 2)))


@pytest.mark.parametrize("hflip", [False, True])
@pytest.mark.parametrize("rotation", [0, 90, 180, 270])
def test_rotation_is_applied(rotation: int, hflip: bool) -> None:
    picture = corners()
    file = write(
        io.BytesIO(), [picture] * 3, rotation=rotation, hflip=hflip, matrix=Colorspace.ITU601, options={"crf": "4"}
    )
    upright = np.rot90(picture, rotation // 90)  # the writer's angle is counter-clockwise
    upright = upright[:, ::-1] if hflip else upright
    info = probe(file)
    assert (info.height, info.width) == upright.shape[:2]
    if not hflip:
        assert info.rotation == -rotation % 360
    clip = decode(file, 0, 2, 24, height=upright.shape[0], width=upright.shape[1])
    assert psnr(clip[0], upright) > 28


def test_sample_aspect_ratio_is_applied() -> None:
    file = write(io.BytesIO(), [corners(64, 64)] * 3, aspect=Fraction(3, 2), options={"crf": "4"})
    assert probe(file) == VideoInfo(96, 64, 0.125, 24.0, "h264", 0, 3)
    clip = decode(file, 0, 1, 24, height=64, width=96)
    assert psnr(clip[0], corners()) > 26


@pytest.mark.parametrize("color_range", [ColorRange.MPEG, ColorRange.JPEG])
@pytest.mark.parametrize("matrix", [Colorspace.ITU709, Colorspace.ITU601])
@pytest.mark.parametrize("pix_fmt", ["yuv444p", "yuv444p10le"])  # 8-bit full range has formats of its own (yuvj…)
def test_colours_follow_the_tags(matrix: Colorspace, color_range: ColorRange, pix_fmt: str) -> None:
    file = write(
        io.BytesIO(), [corners()] * 3, matrix=matrix, color_range=color_range, pix_fmt=pix_fmt, options={"crf": "1"}
    )
    clip = decode(file, 0, 1, 24, height=64, width=96)
    assert np.abs(clip[0].astype(int) - corners()).max() <= 4


@pytest.mark.parametrize(("codec", "pix_fmt"), [("ffv1", "bgr0"), ("ffv1", "gray"), ("libx265", "yuv420p10le")])
def test_other_pixel_formats(codec: str, pix_fmt: str) -> None:
    options = {"x265-params": "log-level=none"} if codec == "libx265" else None
    frames = [numbered(i) for i in range(20)]
    file = write(io.BytesIO(), frames, codec=codec, pix_fmt=pix_fmt, container="matroska", options=options)
    assert numbers(decode(file, 0.25, 10, 24)) == list(range(6, 16))


def test_resize_covers_and_crops_the_centre() -> None:
    ramp = np.linspace(0, 255, 192).astype(np.uint8)
    picture = np.broadcast_to(ramp[None, :, None], (96, 192, 3)).copy()
    file = write(io.BytesIO(), [picture] * 2, options={"crf": "1"}, matrix=Colorspace.ITU601)
    square = decode(file, 0, 1, 24, height=48, width=48)[0].astype(float)
    expected = picture[0, 48:144, 0].reshape(48, 2).mean(1)
    assert np.abs(square - expected[None, :, None]).max() < 4
    tall = decode(file, 0, 1, 24, height=96, width=31)[0].astype(float)
    assert np.abs(tall - ramp[80:111][None, :, None]).max() < 4
    large = decode(file, 0, 1, 24, height=200, width=300)[0]
    assert large.shape == (200, 300, 3)


def test_downscaling_is_antialiased() -> None:
    stripes = np.zeros((128, 256, 3), np.uint8)
    stripes[:, ::2] = 255
    file = write(io.BytesIO(), [stripes] * 2, codec="ffv1", pix_fmt="bgr0", container="matroska")
    clip = decode(file, 0, 1, 24, height=16, width=32)
    assert np.abs(clip[:, :, 2:-2].astype(int) - 127).max() <= 2  # the filter rings at the border


def test_encode_then_decode_is_close(tmp_path: Path) -> None:
    t, y, x = np.meshgrid(np.arange(13), np.arange(64), np.arange(96), indexing="ij")
    waves = [127 + 100 * np.sin((x * a + y * b) / 12 + t / 3 + c) for a, b, c in ((1, 0, 0), (0, 1, 1), (1, 1, 2))]
    frames = np.stack(waves, -1).astype(np.uint8)
    path = tmp_path / "wave.mp4"
    encode_mp4(frames, path, frame_rate=24)
    assert probe(str(path)) == VideoInfo(96, 64, pytest.approx(13 / 24), 24.0, "h264", 0, 13)  # pyright: ignore[reportArgumentType]
    clip = decode(str(path), 0, 13, 24, height=64, width=96)
    assert psnr(clip, frames) > 34
    assert np.abs((clip.astype(float) - frames).mean(axis=(0, 1, 2))).max() < 1
    data = path.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")


def test_encode_refuses_what_it_cannot_write(tmp_path: Path) -> None:
    for shape in ((0, 64, 64, 3), (4, 64, 64), (4, 64, 64, 4)):
        with pytest.raises(ValueError, match="must be uint8"):
            encode_mp4(np.zeros(shape, np.uint8), tmp_path / "a.mp4", frame_rate=24)
    with pytest.raises(ValueError, match="must be uint8"):
        encode_mp4(np.zeros((4, 64, 64, 3), np.float32), tmp_path / "a.mp4", frame_rate=24)
    with pytest.raises(ValueError, match="even sides"):
        encode_mp4(np.zeros((4, 63, 64, 3), np.uint8), tmp_path / "a.mp4", frame_rate=24)
    assert not (tmp_path / "a.mp4").exists()


def test_encoders_fall_back_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(av, "codecs_available", {"mpeg4"})
    path = str(tmp_path / "old.mp4")
    encode_mp4(np.stack([numbered(i) for i in range(30)]), path, frame_rate=30000 / 1001)
    info = probe(path)
    assert info.codec == "mpeg4"
    assert info.frame_rate == pytest.approx(29.97, abs=0.001)
    assert numbers(decode(path, 0, 30, 30000 / 1001)) == list(range(30))


def test_a_playlist_called_mp4_opens_nothing_else(tmp_path: Path) -> None:
    frames = np.zeros((12, 32, 32, 3), np.uint8)
    encode_mp4(frames, tmp_path / "secret.mp4", frame_rate=12)
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{tmp_path}/secret.mp4\n#EXT-X-ENDLIST\n"
    (tmp_path / "clip.mp4").write_text(playlist)
    with pytest.raises(VideoError):
        probe(str(tmp_path / "clip.mp4"))
