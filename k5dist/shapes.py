"""Shapes of clips: which frames and sides the VAE, the patches and NABLA take, presets, and the tokens they make."""

from __future__ import annotations

import math
from dataclasses import dataclass

from k5dist.schema import ConfigError

SD_RESOLUTIONS = ((512, 512), (512, 768), (768, 512))
HD_RESOLUTIONS = ((1024, 1024), (640, 1408), (1408, 640), (768, 1280), (1280, 768), (896, 1152), (1152, 896))
RESOLUTION_PRESETS = {"sd": SD_RESOLUTIONS, "hd": HD_RESOLUTIONS}
VAE_TIME_COMPRESSION = 4
VAE_SPACE_COMPRESSION = 8
PATCH = 2
NABLA_BLOCK = 8  # a NABLA block is 8 × 8 tokens of one latent frame
SIDE_UNIT = VAE_SPACE_COMPRESSION * PATCH
NABLA_SIDE_UNIT = SIDE_UNIT * NABLA_BLOCK
MAX_ASPECT = 2.2  # of buckets that are computed, long side by short side
_ASPECTS = (1.0, 5 / 4, 4 / 3, 3 / 2, 16 / 9, 2.0, MAX_ASPECT)


@dataclass(frozen=True)
class Bucket:
    """Clips of one shape, in pixels and frames."""

    frames: int
    height: int
    width: int

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Latent frames, height and width."""
        time = (self.frames - 1) // VAE_TIME_COMPRESSION + 1
        return time, self.height // VAE_SPACE_COMPRESSION, self.width // VAE_SPACE_COMPRESSION

    @property
    def token_shape(self) -> tuple[int, int, int]:
        """Tokens along time, height and width."""
        time, height, width = self.latent_shape
        return time, height // PATCH, width // PATCH

    @property
    def tokens(self) -> int:
        return math.prod(self.token_shape)

    def __str__(self) -> str:
        return f"{self.frames}×{self.height}×{self.width}"


def parse_resolution(key: str, value: str | tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """`[height, width]`, `"512x768"` (height × width) or a preset's name, as a tuple of (height, width)."""
    if isinstance(value, str):
        if value in RESOLUTION_PRESETS:
            return RESOLUTION_PRESETS[value]
        sides = value.lower().split("x")
        if len(sides) == 2 and all(side.isdigit() for side in sides):
            return ((int(sides[0]), int(sides[1])),)
    elif len(value) == 2:
        return ((int(value[0]), int(value[1])),)
    rule = f"[height, width] in pixels, or a preset: {', '.join(RESOLUTION_PRESETS)}"
    raise ConfigError(key, value, rule, f"{key}=[512,768]")


def area_ladder(pixels: float, unit: int) -> tuple[tuple[int, int], ...]:
    """(height, width) of about `pixels` in every usual aspect ratio, square first; empty where none is possible.

    Sides are multiples of `unit`, ratios lie between 1:2.2 and 2.2:1.
    """
    found: list[tuple[int, int]] = []
    for aspect in _ASPECTS if pixels >= unit * unit else ():
        short = round((pixels / aspect) ** 0.5 / unit) * unit
        if short:
            long = short if aspect == 1 else max(short, round(pixels / short / unit) * unit)
            found += _both_ways(short, long)
    return tuple(dict.fromkeys(found))


def edge_ladder(short: int, unit: int) -> tuple[tuple[int, int], ...]:
    """(height, width) with the shorter edge given, in every usual aspect ratio, square first."""
    found = [sides for aspect in _ASPECTS for sides in _both_ways(short, round(short * aspect / unit) * unit)]
    return tuple(dict.fromkeys(found))


def _both_ways(short: int, long: int) -> list[tuple[int, int]]:
    """Lying and standing, unless it is narrower than any bucket may be."""
    return [(short, long), (long, short)] if long <= MAX_ASPECT * short else []


def default_resolution(resolutions: tuple[tuple[int, int], ...]) -> tuple[int, int]:
    """The model cards' own example among a preset's resolutions, else the first."""
    return next((r for r in resolutions if r in ((512, 768), (768, 1280))), resolutions[0])


def check_num_frames(key: str, frames: int) -> None:
    if frames < 1 or (frames - 1) % VAE_TIME_COMPRESSION:
        below = max(1, (frames - 1) // VAE_TIME_COMPRESSION * VAE_TIME_COMPRESSION + 1)
        rule = "the VAE keeps the first frame and compresses the others in time by 4: frames must be 4k + 1"
        raise ConfigError(key, frames, rule, f"{key}={below} or {key}={below + VAE_TIME_COMPRESSION}")


def check_sides(key: str, height: int, width: int) -> None:
    rule = f"sides must be multiples of {SIDE_UNIT} pixels (VAE 8 × patch 2)"
    _check_multiples(key, height, width, SIDE_UNIT, rule)


def check_nabla_sides(key: str, height: int, width: int) -> None:
    rule = f"NABLA attention works on blocks of 8 × 8 tokens: sides must be multiples of {NABLA_SIDE_UNIT} pixels"
    _check_multiples(key, height, width, NABLA_SIDE_UNIT, rule)


def _check_multiples(key: str, height: int, width: int, unit: int, rule: str) -> None:
    if height < unit or width < unit or height % unit or width % unit:
        near = f"[{_nearest_multiple(height, unit)},{_nearest_multiple(width, unit)}]"
        raise ConfigError(key, [height, width], rule, f"{key}={near}")


def _nearest_multiple(value: int, unit: int) -> int:
    return max(unit, round(value / unit) * unit)
