"""One decoded frame as an RGB picture: colour, transparency, HDR, pixel aspect, orientation, size and crop."""

from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter

from k5dist.precache import hdr
from k5dist.precache.source import VideoError

# libswscale widens its Lanczos window by the downscaling ratio, which is the antialiasing. The other flags turn off
# its shortcuts: without them chroma is dropped horizontally and results depend on the CPU's instruction set.
SCALING = (
    Interpolation.LANCZOS
    | Interpolation.ACCURATE_RND
    | Interpolation.FULL_CHR_H_INT
    | Interpolation.FULL_CHR_H_INP
    | Interpolation.BITEXACT
)

# libswscale numbers the YUV matrices as frames do (AVColorSpace), but for the second codes of BT.601 and BT.2020.
_MATRIX_SYNONYMS = {6: Colorspace.ITU601, 10: Colorspace.BT2020}

# Codings that no matrix undoes, by AVColorSpace's numbers. Taken for YUV they would be green and purple.
_NOT_YUV = {8: "YCgCo", 14: "ICtCp", 15: "IPT (Dolby Vision without a base layer)", 16: "YCgCo-R", 17: "YCgCo-R"}

# A crop that keeps less than this part of the picture is no clip of it, and scaling to cover would take this much more
# memory than the clip: 16384 by 16 pixels would be scaled to 786432 by 768.
_LEAST_KEPT = 1 / 32


@dataclass(frozen=True)
class Crop:
    """How a picture comes to height × width pixels: squeezed, or scaled to cover and cut.

    across and down place the window in what covering leaves over: 0 is left or top, just below 1 right or bottom, None
    the middle. All pictures of a clip share one Crop.
    """

    height: int
    width: int
    squeeze: bool = False
    across: float | None = None
    down: float | None = None


def crop_for(crop: str, seed: int, height: int, width: int) -> Crop:
    """The Crop that a name and a seed ask for. Raises ValueError for a name other than center, random and none."""
    if crop == "random":
        # Philox is specified: the same window on every machine and with every release of numpy.
        across, down = np.random.Generator(np.random.Philox(key=seed % 2**64)).random(2).tolist()
        return Crop(height, width, across=across, down=down)
    if crop not in ("center", "none"):
        raise ValueError(f"{crop=} must be 'center', 'random' or 'none'")
    return Crop(height, width, squeeze=crop == "none")


def to_picture(frame: VideoFrame, aspect: Fraction | None, crop: Crop, reformatter: VideoReformatter) -> np.ndarray:
    """One frame as uint8 RGB [height, width, 3]: upright, scaled, cropped, opaque over white, in SDR.

    aspect is the stream's pixel aspect ratio (None: square). Colours follow the frame's matrix and range; PQ and HLG
    are mapped by hdr.tone_map; BT.2020 colours of an SDR frame stay as they are. Transparent parts show white, which
    is what a page or a viewer puts behind them, and on which the black type and line art of such pictures stands out.
    Raises VideoError for a colour coding that is not understood, and where the crop would keep next to nothing.
    """
    shown_width, shown_height = display_size(frame, aspect)
    cover = crop.width, crop.height
    if not crop.squeeze:
        scale = max(crop.width / shown_width, crop.height / shown_height)
        cover = max(crop.width, round(shown_width * scale)), max(crop.height, round(shown_height * scale))
    if crop.width * crop.height < _LEAST_KEPT * cover[0] * cover[1]:
        shapes = f"{shown_width} by {shown_height} to {crop.width} by {crop.height}"
        raise VideoError("decode", f"cropping a picture of {shapes} would cut off nearly all of it")
    transposed, mirror_x, mirror_y = orientation(frame)
    rgb = _scaled(frame, cover[transposed], cover[not transposed], reformatter)
    if transposed:
        rgb = rgb.swapaxes(0, 1)
    rgb = rgb[:: -1 if mirror_y else 1, :: -1 if mirror_x else 1]
    top, left = _offset(cover[1] - crop.height, crop.down), _offset(cover[0] - crop.width, crop.across)
    rgb = rgb[top : top + crop.height, left : left + crop.width]
    return hdr.tone_map(rgb, frame.color_trc, frame.color_primaries) if is_hdr(frame) else rgb


def is_hdr(frame: VideoFrame) -> bool:
    """Whether the frame's signal is PQ or HLG."""
    return frame.color_trc in hdr.TRANSFERS


def display_size(frame: VideoFrame, aspect: Fraction | None) -> tuple[int, int]:
    """(width, height) as shown: the pixel aspect ratio widens or narrows the stored picture, then it is turned."""
    width, height = max(1, round(frame.width * (aspect or 1))), frame.height
    return (height, width) if orientation(frame)[0] else (width, height)


def orientation(frame: VideoFrame) -> tuple[bool, bool, bool]:
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


def _offset(free: int, part: float | None) -> int:
    """Where a window begins that leaves free pixels over."""
    return free // 2 if part is None else int(part * (free + 1))


def _scaled(frame: VideoFrame, width: int, height: int, reformatter: VideoReformatter) -> np.ndarray:
    """The stored picture as RGB [height, width, 3]: uint8, for HDR its uint16 signal."""
    how = _colours(frame)
    if not is_hdr(frame) and _has_alpha(frame):
        # Before scaling: what lies under transparent parts is arbitrary and must not bleed into the rest.
        frame, how = _over_white(reformatter.reformat(frame, format="rgba", **how, threads=1)), _colours(None)
    return reformatter.reformat(
        frame, width=width, height=height, format="rgb48le" if is_hdr(frame) else "rgb24", **how, threads=1
    ).to_ndarray()


def _colours(frame: VideoFrame | None) -> dict[str, int | None]:
    """The reformatter's arguments for a frame's colours (None: an RGB frame)."""
    yuv = frame is not None and not frame.format.is_rgb  # matrix and range mean nothing to an RGB source
    return {
        "src_colorspace": _matrix(frame) if frame and yuv else None,
        "src_color_range": _range(frame) if frame and yuv else None,
        "dst_color_range": ColorRange.JPEG,
        "interpolation": SCALING,
    }


def _has_alpha(frame: VideoFrame) -> bool:
    return frame.format.has_palette or any(component.is_alpha for component in frame.format.components)


def _over_white(rgba: VideoFrame) -> VideoFrame:
    """An RGBA frame (straight alpha) over white, as an RGB one."""
    pixels = rgba.to_ndarray()
    alpha = pixels[..., 3:].astype(np.uint16)
    over = (pixels[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255
    return VideoFrame.from_ndarray(over.astype(np.uint8), format="rgb24")


def _matrix(frame: VideoFrame) -> Colorspace:
    """The YUV matrix of a frame; untagged, the rule of players: BT.709 for HD, BT.601 below; BT.2020 for HDR."""
    if frame.colorspace in _NOT_YUV:
        raise VideoError("decode", f"colours coded as {_NOT_YUV[frame.colorspace]} are not understood")
    untagged = Colorspace.ITU709 if frame.width >= 1280 or frame.height > 576 else Colorspace.ITU601
    if is_hdr(frame):
        untagged = Colorspace.BT2020
    matrix = _MATRIX_SYNONYMS.get(frame.colorspace, frame.colorspace)
    return Colorspace(matrix) if matrix in set(Colorspace) else untagged


def _range(frame: VideoFrame) -> ColorRange:
    """Full or limited range; untagged video is limited, unless its pixel format says full (yuvj420p)."""
    full = frame.color_range == ColorRange.JPEG or frame.format.name.startswith("yuvj")
    return ColorRange.JPEG if full else ColorRange.MPEG
