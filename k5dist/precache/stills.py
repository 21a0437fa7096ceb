"""Still images, and the animations that FFmpeg does not read (WebP, PNG), as frames with times.

Pillow decodes them: it honours what photographs carry (EXIF orientation, CMYK, palettes with transparency). An image
is recognised by its first bytes, whatever its name, and only the one decoder for these bytes is tried.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import BinaryIO

import numpy as np
from av.video.frame import VideoFrame
from PIL import Image

from k5dist.precache.source import MAX_PIXELS, Stage, Timed, VideoError, too_large

# Read whole, since Pillow's errors and the storage's are alike and only the storage's deserve a retry.
MAX_BYTES = 1 << 29

_HEAD = 12  # bytes that tell a format
_ANIMATED = {"WEBP", "PNG"}  # in the others several pictures are pages, thumbnails or eyes
_NO_DELAY = 0.1  # seconds that viewers show a frame whose delay is zero
_ORIENTATION = 0x0112  # the EXIF tag
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_CLOCKWISE = {3: 180, 4: 180, 5: 90, 6: 90, 7: 270, 8: 270}
_HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}


def image_format(file: BinaryIO, stage: Stage) -> str | None:
    """Pillow's name of the image format that a file's first bytes announce, None for anything else.

    Raises VideoError for HEIC, whose tiles FFmpeg would show as if each were the picture.
    """
    file.seek(0)
    head = file.read(_HEAD)
    if head[4:8] == b"ftyp" and head[8:12] in _HEIF_BRANDS:
        raise VideoError(stage, "HEIC images are not read: convert them to JPEG or PNG")
    signatures = {b"\x89PNG\r\n\x1a\n": "PNG", b"\xff\xd8\xff": "JPEG", b"BM": "BMP"}
    signatures |= {b"II*\0": "TIFF", b"MM\0*": "TIFF"}
    if (head[:4], head[8:]) == (b"RIFF", b"WEBP"):
        return "WEBP"
    if head[4:] in (b"ftypavif", b"ftypavis"):
        return "AVIF"
    return next((name for start, name in signatures.items() if head.startswith(start)), None)


@contextmanager
def open_image(file: BinaryIO, kind: str, stage: Stage) -> Iterator[Image.Image]:
    """The image in file, not decoded yet; whatever Pillow raises inside becomes a VideoError."""
    file.seek(0)
    data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise VideoError(stage, f"an image file of more than {MAX_BYTES >> 20} MiB")
    try:
        with Image.open(BytesIO(data), formats=[kind]) as image:
            if image.width * image.height > MAX_PIXELS:
                raise too_large(stage, *image.size)
            yield image
    except VideoError:
        raise
    except Image.DecompressionBombError as error:  # above the same limit, raised before its size can be read
        raise VideoError(stage, f"a picture larger than {MAX_PIXELS} pixels") from error
    except Exception as error:  # Pillow's decoders raise anything, from struct.error to SyntaxError
        raise VideoError(stage, f"{kind} image: {type(error).__name__}: {' '.join(str(error).split())}") from error


def count(image: Image.Image) -> int:
    """How many frames an image shows one after another; 1 for a still one."""
    return getattr(image, "n_frames", 1) if image.format in _ANIMATED else 1


def turned(image: Image.Image) -> int:
    """The clockwise turn in degrees (0, 90, 180 or 270) that a viewer gives the stored picture."""
    return _CLOCKWISE.get(_orientation(image), 0)


def image_frames(image: Image.Image) -> Iterator[Timed]:
    """Each frame upright, opaque, with its time; a still image lasts 0 s."""
    frames, begin = count(image), 0.0
    for index in range(frames):
        image.seek(index)
        image.load()
        lasts = 0.0 if frames == 1 else image.info.get("duration", 0) / 1000 or _NO_DELAY
        yield begin, begin + lasts, VideoFrame.from_ndarray(_rgb(image), format="rgb24")
        begin += lasts


def _rgb(image: Image.Image) -> np.ndarray:
    """uint8 RGB [H, W, 3], upright, over white where it is transparent."""
    if image.mode in ("I", "F") and image.format != "PNG":
        raise ValueError(f"pixels of {image.mode!r} (32 bits) have no known white")
    if image.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion clips it at 255
        grey = np.asarray(image).astype(np.uint32)
        upright = _upright(image, Image.fromarray(((grey + 128) // 257).astype(np.uint8)))
        return np.asarray(upright.convert("RGB"))
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGB", image.size, "white")
        white.paste(rgba, mask=rgba.getchannel("A"))
        return np.asarray(_upright(image, white))
    return np.asarray(_upright(image, image.convert("RGB")))


def _upright(tagged: Image.Image, image: Image.Image) -> Image.Image:
    """image turned as tagged's EXIF says."""
    orientation = _orientation(tagged)
    if orientation == 1:
        return image
    return image.transpose(_TURNS[orientation])


def _orientation(image: Image.Image) -> int:
    """EXIF's orientation, 1 to 8; 1 (upright) where the tags are absent or damaged: they must not cost the picture."""
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
    except Exception:
        return 1
    return orientation if orientation in range(1, 9) else 1
