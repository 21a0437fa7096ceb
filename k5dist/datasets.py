"""The datasets of a run: where each one's clips are, and how a clip becomes samples.

`data.*` holds the defaults of every dataset, and is the one dataset `main` where `data.datasets` names none. Every rule
on these keys stands here; an error names the key where the value was set, in the entry or in `data.*`.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from k5dist.schema import ConfigError, build, check_names, one_of, positive
from k5dist.shapes import (
    VAE_TIME_COMPRESSION,
    Bucket,
    area_ladder,
    check_num_frames,
    check_sides,
    edge_ladder,
    parse_resolution,
)

MAIN = "main"
CAPTION_STRATEGIES = ("textfile", "filename", "manifest", "json", "instance")
CROPS = ("center", "random", "none")
SEGMENTS = ("first", "uniform", "all")
BUCKET_STRATEGIES = ("aspect_ratio", "resolution_frames")
RESOLUTION_TYPES = ("pixel", "area", "pixel_area")
VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".gif")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
MANIFEST_SUFFIXES = (".jsonl", ".csv", ".parquet")
_EMBEDDED = "package://k5dist/"  # the tiny flavours' default source: it gives way to any other


@dataclass(frozen=True)
class DatasetKeys:
    """What can be said of one dataset; meanings and units stand in conf/data/clips.yaml."""

    source: str | None
    caption_strategy: str | None
    instance_prompt: str | None
    caption_lines: bool
    repeats: int
    probability: float | None
    resolution: str | int | float | tuple[int, ...]
    resolution_type: str
    crop: str
    num_frames: int
    min_frames: int | None
    max_frames: int | None
    frame_rate: float
    segments: str
    max_segments: int | None
    bucket_strategy: str
    frame_interval: int
    mask_suffix: str | None


KEYS = tuple(field.name for field in dataclasses.fields(DatasetKeys))


@dataclass(frozen=True)
class DatasetConfig(DatasetKeys):
    """One dataset with every key resolved. `own` are the keys that its entry set itself."""

    name: str
    own: tuple[str, ...]

    def key(self, name: str) -> str:
        """The configuration key where `name` was set."""
        return f"data.datasets.{self.name}.{name}" if name in self.own else f"data.{name}"

    @property
    def is_manifest(self) -> bool:
        return (self.source or "").lower().endswith(MANIFEST_SUFFIXES)

    @property
    def captions_from(self) -> str:
        """The caption strategy; where none is set: a manifest's own column, else the text file beside a clip."""
        return self.caption_strategy or ("manifest" if self.is_manifest else "textfile")

    @property
    def frame_counts(self) -> tuple[int, ...]:
        """The frames that a video's sample may have, most first."""
        if self.bucket_strategy == "aspect_ratio":
            return (self.num_frames,)
        fewest = 2 if self.min_frames is None else self.min_frames  # a video of one frame must be asked for
        return tuple(range(self.num_frames, fewest - 1, -self.frame_interval)) or (self.num_frames,)

    def resolutions(self, unit: int) -> tuple[tuple[int, int], ...]:
        """(height, width) of the buckets; those that are computed have sides that are multiples of `unit` pixels.

        Raises:
            ConfigError: where `resolution` is not of the kind that `resolution_type` says, or too small.
        """
        key, value = self.key("resolution"), self.resolution
        if self.resolution_type == "pixel":
            if not isinstance(value, (int, float)):
                return parse_resolution(key, value)
            found = edge_ladder(int(value), unit) if value == int(value) and value % unit == 0 and value > 0 else ()
            rule = f"the shorter edge in pixels, a multiple of {unit} (or [height, width], or a preset)"
            near = max(unit, round(value / unit) * unit) if math.isfinite(value) else unit
        elif self.resolution_type == "area":
            pixels = value * 1e6 if isinstance(value, (int, float)) and 0 < value < 1000 else 0
            found = area_ladder(pixels, unit)
            rule, near = f"with resolution_type=area: megapixels, enough for sides of {unit} pixels", 0.4
        else:
            found = area_ladder(value * value, unit) if isinstance(value, int) and 0 < value < 100_000 else ()
            rule = f"with resolution_type=pixel_area: the edge in pixels of a square of that area, at least {unit}"
            near = 640
        if not found:
            raise ConfigError(key, value, rule, f"{key}={near}")
        return found

    def buckets(self, unit: int) -> tuple[Bucket, ...]:
        """Of its videos; an image has one frame, whatever these say."""
        return tuple(Bucket(frames, *sides) for frames in self.frame_counts for sides in self.resolutions(unit))


@dataclass(frozen=True)
class DataConfig(DatasetKeys):
    datasets: Mapping[str, Mapping[str, Any]]
    held_out: float

    def __post_init__(self) -> None:
        if not 0 <= self.held_out < 1:
            rule = "a share of the clips, 0 ≤ share < 1"
            raise ConfigError("data.held_out", self.held_out, rule, "data.held_out=0.05")
        for dataset in self.resolve():
            _check(dataset)

    def resolve(self) -> tuple[DatasetConfig, ...]:
        """The datasets, each with what it leaves out taken from `data.*`.

        Raises:
            ConfigError: for names, keys and types that are not what they must be.
        """
        defaults = {name: getattr(self, name) for name in KEYS}
        if not self.datasets:
            return (DatasetConfig(**defaults, name=MAIN, own=()),)
        if self.source is not None and not self.source.startswith(_EMBEDDED):
            rule = "data.datasets names the sources of this run, each in its own entry"
            fix = "data.source=null, or name it as one more dataset: +data.datasets.main.source=…"
            raise ConfigError("data.source", self.source, rule, fix)
        defaults["source"] = None
        return tuple(_entry(name, entry, defaults) for name, entry in self.datasets.items())


def _entry(name: str, entry: Mapping[str, Any], defaults: Mapping[str, Any]) -> DatasetConfig:
    path = f"data.datasets.{name}."
    if not re.fullmatch(r"[a-z0-9_-]+", name):
        rule = "a dataset's name is made of a-z, 0-9, _ and -"
        near = re.sub(r"[^a-z0-9_-]+", "-", name.lower()).strip("-") or MAIN
        raise ConfigError("data.datasets", name, rule, f"name it {near}")
    check_names(entry, KEYS, path)
    if not entry.get("source"):
        raise ConfigError(f"{path}source", entry.get("source"), "a dataset needs a source", f"+{path}source=<folder>")
    return build(DatasetConfig, {**defaults, **entry, "name": name, "own": tuple(entry)}, path)


def _check(dataset: DatasetConfig) -> None:
    """Every rule on one dataset that needs nothing but the dataset."""
    key = dataset.key
    one_of(key("resolution_type"), dataset.resolution_type, RESOLUTION_TYPES)
    one_of(key("crop"), dataset.crop, CROPS)
    one_of(key("segments"), dataset.segments, SEGMENTS)
    one_of(key("bucket_strategy"), dataset.bucket_strategy, BUCKET_STRATEGIES)
    for name in ("repeats", "frame_rate"):
        positive(key(name), getattr(dataset, name))
    for name in ("min_frames", "max_frames", "max_segments"):
        if getattr(dataset, name) is not None:
            positive(key(name), getattr(dataset, name))
    if dataset.probability is not None and not 0 < dataset.probability <= 1:
        raise ConfigError(key("probability"), dataset.probability, "0 < probability ≤ 1", f"{key('probability')}=0.5")
    if dataset.resolution_type == "pixel" and not isinstance(dataset.resolution, (int, float)):
        for height, width in parse_resolution(key("resolution"), dataset.resolution):
            check_sides(key("resolution"), height, width)
    suffix = dataset.mask_suffix
    if suffix is not None and (
        "/" in suffix or suffix.count(".") < 2 or not suffix.lower().endswith(VIDEO_SUFFIXES + IMAGE_SUFFIXES)
    ):
        rule = "what stands for a clip's own suffix in its mask's name: two suffixes, of a video or an image last"
        raise ConfigError(key("mask_suffix"), suffix, rule, f"{key('mask_suffix')}=.mask.mp4")
    _check_frames(dataset)
    _check_captions(dataset)


def _check_frames(dataset: DatasetConfig) -> None:
    key = dataset.key
    check_num_frames(key("num_frames"), dataset.num_frames)
    if dataset.frame_interval < 1 or dataset.frame_interval % VAE_TIME_COMPRESSION:
        rule = "the VAE compresses time by 4: steps between counts of frames must be multiples of 4"
        raise ConfigError(key("frame_interval"), dataset.frame_interval, rule, f"{key('frame_interval')}=24")
    if dataset.min_frames is not None and dataset.min_frames > dataset.num_frames:
        rule = f"no sample has more than num_frames={dataset.num_frames} frames"
        fix = f"{key('min_frames')}={dataset.num_frames}"
        raise ConfigError(key("min_frames"), dataset.min_frames, rule, fix)
    fewest = dataset.frame_counts[-1]
    if dataset.max_frames is not None and dataset.max_frames < fewest:
        rule = f"a clip must have at least {fewest} frames: with fewer allowed none is left"
        raise ConfigError(key("max_frames"), dataset.max_frames, rule, f"{key('max_frames')}={fewest}")
    if dataset.segments == "uniform" and dataset.max_segments is None:
        rule = "segments=uniform spreads max_segments windows over a clip"
        raise ConfigError(key("max_segments"), None, rule, f"{key('max_segments')}=4")


def _check_captions(dataset: DatasetConfig) -> None:
    key = dataset.key("caption_strategy")
    if dataset.caption_strategy is None:
        return
    one_of(key, dataset.caption_strategy, CAPTION_STRATEGIES)
    if dataset.caption_strategy == "instance" and not (dataset.instance_prompt or "").strip():
        name = dataset.key("instance_prompt")
        rule = "caption_strategy=instance captions every clip with instance_prompt"
        raise ConfigError(name, dataset.instance_prompt, rule, f"{name}='a photo of sks person'")
    if dataset.caption_strategy == "manifest" and dataset.source is not None and not dataset.is_manifest:
        rule = (
            f"only a manifest ({' '.join(MANIFEST_SUFFIXES)}) has captions of its own; the source is {dataset.source}"
        )
        raise ConfigError(key, dataset.caption_strategy, rule, f"{key}=textfile")
