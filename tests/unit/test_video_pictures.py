"""What one frame becomes: images, transparency, HDR, crops."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc
from PIL import Image

from k5dist.precache import hdr
from k5dist.precache.video import VideoError, decode_clip, probe
from tests.numbered import numbered, write


def still(file: Any, height: int, width: int, **how: Any) -> np.ndarray:
    return decode_clip(file, start=0, end=None, num_frames=1, frame_rate=24, height=height, width=width, **how)[0]


def saved(picture: np.ndarray | Image.Image, kind: str, **how: Any) -> io.BytesIO:
    file = io.BytesIO()
    (picture if isinstance(picture, Image.Image) else Image.fromarray(picture)).save(file, kind, **how)
    return file


def corners() -> np.ndarray:
    picture = np.full((64, 96, 3), 128, np.uint8)
    picture[:32, :48], picture[:32, 48:], picture[32:, :48] = (220, 30, 30), (30, 200, 30), (30, 30, 220)
    return picture


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF"])
def test_an_image_is_one_frame(kind: str) -> None:
    file = saved(corners(), kind)
    info = probe(file)
    assert (info.width, info.height, info.num_frames, info.is_image, info.is_hdr) == (96, 64, 1, True, False)
    assert (info.duration, info.frame_rate) == (0, 0)
    assert np.abs(still(file, 64, 96).astype(int) - corners())[:28, :44].mean() < 8
    for start, num_frames in ((0.0, 2), (1.0, 1)):
        with pytest.raises(VideoError, match=r"decode: too short: it is a still image, needs "):
            decode_clip(file, start=start, end=None, num_frames=num_frames, frame_rate=24, height=64, width=96)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation: int) -> None:
    exif, upright = Image.Exif(), corners()
    exif[0x0112] = orientation
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.swapaxes(0, 1),
        6: np.rot90(upright, 1),  # counter-clockwise, which the tag undoes
        7: upright[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(upright, -1),
    }[orientation]
    file = saved(np.ascontiguousarray(stored), "PNG", exif=exif)
    info = probe(file)
    assert (info.width, info.height) == (96, 64)
    assert np.array_equal(still(file, 64, 96), upright)


def test_transparency_shows_white() -> None:
    rgba = np.dstack([corners(), np.full((64, 96), 255, np.uint8)])
    rgba[:32, :48, 3], rgba[32:, 48:, 3] = 0, 128
    expected = corners()
    expected[:32, :48], expected[32:, 48:] = 255, round((128 * 128 + 255 * 127) / 255)
    bgra = np.ascontiguousarray(rgba[..., [2, 1, 0, 3]])
    for file in (
        saved(rgba, "PNG"),
        write(io.BytesIO(), [bgra] * 2, codec="ffv1", pix_fmt="bgra", source="bgra", container="matroska"),
    ):
        assert np.abs(still(file, 64, 96).astype(int) - expected).max() <= 1
        # Scaled, nothing of the red under the transparent part bleeds out.
        assert np.abs(still(file, 32, 48)[:14, :22].astype(int) - 255).max() <= 2


def test_sixteen_bit_grey_is_not_clipped() -> None:
    ramp = np.repeat(np.linspace(0, 65535, 96)[None], 64, 0).astype(np.uint16)
    assert np.abs(still(saved(ramp, "PNG"), 64, 96)[0, :, 0] - ramp[0] / 257).max() <= 1


def test_crops() -> None:
    ramp = np.repeat(np.repeat(np.arange(192, dtype=np.uint8)[None], 32, 0)[..., None], 3, 2)
    files = [saved(ramp, "PNG"), write(io.BytesIO(), [ramp] * 5, codec="ffv1", pix_fmt="bgr0", container="matroska")]
    for file in files:
        assert still(file, 32, 96)[0, 0, 0] == still(file, 32, 96, crop="center")[0, 0, 0] == 48
        lefts = [int(still(file, 32, 96, crop="random", crop_seed=seed)[0, 0, 0]) for seed in range(30)]
        assert lefts == [int(still(file, 32, 96, crop="random", crop_seed=seed)[0, 0, 0]) for seed in range(30)]
        assert len(set(lefts)) > 15 and min(lefts) < 20 and max(lefts) > 76 and max(lefts) <= 96
        squeezed = still(file, 32, 96, crop="none")[0, :, 0].astype(int)
        assert np.abs(squeezed[4:-4] - 2 * np.arange(96)[4:-4]).max() <= 1
    clip = decode_clip(
        files[1], start=0, end=None, num_frames=5, frame_rate=24, height=32, width=96, crop="random", crop_seed=-7
    )
    assert (clip == clip[:1]).all()
    with pytest.raises(ValueError, match="crop"):
        still(files[0], 32, 96, crop="letterbox")


def hdr_file(signal: np.ndarray, transfer: ColorTrc) -> Any:
    """A clip of grey columns, 16 pixels wide, of these signals 0 … 1, as 10-bit BT.2020."""
    codes = np.repeat(np.round(signal * 65535).astype(np.uint16), 16)
    picture = np.broadcast_to(codes[None, :, None], (64, len(codes), 3)).copy()
    return write(
        io.BytesIO(),
        [picture] * 2,
        source="rgb48le",
        pix_fmt="yuv420p10le",
        matrix=Colorspace.BT2020,
        color_range=ColorRange.MPEG,
        transfer=transfer,
        primaries=ColorPrimaries.BT2020,
        options={"crf": "1"},
    )


@pytest.mark.parametrize("transfer", hdr.TRANSFERS)
def test_hdr_becomes_sdr(transfer: ColorTrc) -> None:
    # Black, grey card, diffuse white (BT.2408: PQ 38 and 58%, HLG 38 and 75%), something brighter, the nominal peak.
    signal = [0, 0.38, 0.58, 0.65, 0.752] if transfer == ColorTrc.SMPTE2084 else [0, 0.38, 0.75, 0.85, 1]
    file = hdr_file(np.array(signal), transfer)
    assert probe(file).is_hdr
    shown = still(file, 64, 80)[:, 8::16].astype(int)
    assert (np.ptp(shown, axis=-1) <= 2).all()  # neutral stays neutral
    black, grey, white, bright, peak = shown.mean((0, 2))
    assert black <= 1
    assert 100 <= grey <= 116
    assert 222 <= white <= 240
    assert white < bright < peak
    assert peak >= 253


def test_tone_curve_is_monotone_and_the_gamut_is_taken_down() -> None:
    ramp = np.repeat(np.arange(65536, dtype=np.uint16)[None, :, None], 3, 2)
    for transfer in hdr.TRANSFERS:
        assert (np.diff(hdr.tone_map(ramp, transfer, ColorPrimaries.BT2020)[0].astype(int), axis=0) >= 0).all()
    assert hdr.pq_light(hdr.pq_signal(np.array([0.1, 26, 203, 1000, 10000]))) == pytest.approx([0.1, 26, 203, 1e3, 1e4])
    assert hdr.roll_off(np.array([26.0, 80.0])) == pytest.approx([26.0, 80.0])
    red = np.array([[[30000, 15000, 15000]]], np.uint16)
    wide, same = (hdr.tone_map(red, 16, p)[0, 0].astype(int) for p in (ColorPrimaries.BT2020, ColorPrimaries.BT709))
    assert wide[0] > same[0] and wide[1] < same[1]


def test_sdr_is_not_mapped(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> np.ndarray:
        raise AssertionError("an SDR picture was tone-mapped")

    monkeypatch.setattr(hdr, "tone_map", never)
    pictures = [numbered(i) // 2 + 60 for i in range(3)]
    file = write(io.BytesIO(), pictures, codec="ffv1", pix_fmt="bgr0", container="matroska", transfer=ColorTrc.BT709)
    assert np.array_equal(still(file, 64, 128), pictures[0])
    assert not probe(file).is_hdr
