"""Masks beside clips: which part of a picture the loss counts, decoded with the clip's own cut and crop.

`clip.mp4` with `mask_suffix=.mask.mp4` has `clip.mask.mp4`: white counts, black does not. Stored at the latents' grid,
as a mean over what a latent comes from: 8 × 8 pixels of frame 0, and of frames 4t − 3 to 4t for latent frame t.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from k5dist import storage
from k5dist.datasets import IMAGE_SUFFIXES
from k5dist.precache.video import VideoError, decode_clip
from k5dist.shapes import VAE_SPACE_COMPRESSION, VAE_TIME_COMPRESSION

NO_MASK = np.zeros((0, 1, 1), np.float32)


def mask_uri(uri: str, suffix: str) -> str:
    """The mask's place: the clip's name with `suffix` for its own."""
    folder, slash, name = uri.rpartition("/")
    return f"{folder}{slash}{name.rpartition('.')[0] or name}{suffix}"


def read_mask(row: Mapping[str, Any]) -> np.ndarray:
    """The mask of a sample at its latents' grid, fp32 [T, H, W] in 0…1; a still image stands for all frames.

    Raises:
        VideoError: where it cannot be decoded, or is shorter than its clip.
    """
    still = row["mask"].lower().endswith(IMAGE_SUFFIXES)
    try:
        with storage.open_read(row["mask"]) as file:
            pixels = decode_clip(
                file,  # type: ignore[arg-type]
                start=0.0 if still else row["start"],
                end=None if still or row["end"] < 0 else row["end"],
                num_frames=1 if still else row["frames"],
                frame_rate=row["frame_rate"] or 1.0,
                height=row["height"],
                width=row["width"],
                crop=row["crop"],
                crop_seed=row["crop_seed"],
            )
    except VideoError as error:
        raise VideoError(error.stage, f"its mask: {error.reason}") from error
    except FileNotFoundError as error:
        raise VideoError("decode", f"its mask: there is no {row['mask'].rsplit('/', 1)[-1]}") from error
    grid = to_grid(pixels)
    frames = (row["frames"] - 1) // VAE_TIME_COMPRESSION + 1
    return np.repeat(grid, frames, axis=0) if still else grid


def to_grid(pixels_THWC: np.ndarray) -> np.ndarray:
    """uint8 RGB of 4k + 1 frames → fp32 [k + 1, H / 8, W / 8] in 0…1."""
    frames, height, width, _ = pixels_THWC.shape
    side = VAE_SPACE_COMPRESSION
    blocks = pixels_THWC.reshape(frames, height // side, side, width // side, side, 3)
    grid = blocks.mean((2, 4, 5), dtype=np.float32) / np.float32(255)
    later = grid[1:].reshape(-1, VAE_TIME_COMPRESSION, *grid.shape[1:]).mean(1)
    return np.concatenate([grid[:1], later])
