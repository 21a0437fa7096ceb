"""What runs inside Ray Data's workers: probe, decode, the VAE, the text encoders, the shard writers.

A row is a plain dict all the way. A row that fails keeps going with `error` and `stage` set and without its payload, so
that one broken clip never stops the others and always reaches the ledger. Storage that does not answer is no clip's
fault: StorageUnavailable goes up and ends the job.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from k5dist import storage
from k5dist.cache import layout
from k5dist.cache.keys import content_digest, key_of, seed_of
from k5dist.cache.shards import Record
from k5dist.config import ConfigError
from k5dist.datasets import DatasetConfig
from k5dist.precache.attempts import Attempts
from k5dist.precache.cuts import Unfit, cuts
from k5dist.precache.masks import NO_MASK, mask_uri, read_mask
from k5dist.precache.stream import PADDING, is_padding, one_group
from k5dist.precache.video import VideoError, decode_clip, probe
from k5dist.retry import StorageUnavailable

Rows = dict[str, Any]
_SHAPES = pa.list_(pa.list_(pa.int64()))
NO_FRAMES = np.zeros((0, 1, 1, 3), np.uint8)
NOTHING_DECODED = {"pixels": NO_FRAMES, "mask_grid": NO_MASK}


def _guarded(row: Rows, stage: str, attempts: Attempts | None, work: Callable[[Rows], Rows], lost: Rows) -> Rows:
    """`work(row)`; for a row that is nothing, has failed, or killed its worker too often only `lost`, the payload."""
    if row["error"] or is_padding(row):
        return row | lost
    if attempts is None:
        return work(row)
    reason = attempts.begin(stage, row)
    if reason:
        return row | lost | _failed(stage, reason)
    try:
        return work(row)
    finally:
        attempts.end(stage, row)


@contextlib.contextmanager
def _bounded(attempts: Attempts | None, what: str, keys: list[str], setting: str) -> Iterator[None]:
    """Work on many rows at once: if it kills its worker too often, what makes it large is to blame, and no row."""
    if attempts is None or not keys:
        yield
        return
    row = {"key": keys[0]}
    reason = attempts.begin(what, row)
    if reason:
        raise ConfigError(setting, f"{len(keys)} at once", f"{what}: {reason}", f"a smaller {setting}, or more memory")
    try:
        yield
    finally:
        attempts.end(what, row)


def probe_clip(
    row: Rows,
    *,
    datasets: Mapping[str, DatasetConfig],
    unit: int,
    facts: Mapping[str, Any],
    attempts: Attempts | None = None,
) -> list[Rows]:
    """The samples that a row gives, each with its content key and bucket; the row itself, failed, where it gives none.

    `unit` is what sides of computed buckets are multiples of, `facts` what else decides how a sample is encoded.
    """
    samples: list[Rows] = []

    def work(row: Rows) -> Rows:
        samples.extend(_probe(row, datasets[row["dataset"]], unit, facts))
        return row

    left = _guarded(row, "probe", attempts, work, {})
    return samples or [left]


def _probe(row: Rows, dataset: DatasetConfig, unit: int, facts: Mapping[str, Any]) -> list[Rows]:
    try:
        with storage.open_read(row["uri"]) as file:
            info = probe(file)  # type: ignore[arg-type]
        if info.is_image and facts["first_frame"]:
            raise Unfit("too short: an image has no frames after the first, which image-to-video learns")
        found = cuts(info, row["start"], None if row["end"] < 0 else row["end"], dataset)
        digest = content_digest(row["uri"])
        mask = "" if dataset.mask_suffix is None else mask_uri(row["uri"], dataset.mask_suffix)
        masked = {"mask": content_digest(mask)} if mask else {}
    except StorageUnavailable:
        raise
    except VideoError as error:
        return [row | _failed(error.stage, error.reason)]
    except Unfit as error:
        return [row | _failed("probe", str(error))]
    except Exception as error:
        return [row | _failed("probe", f"{type(error).__name__}: {error}")]
    aspect = np.log(info.width / info.height)
    height, width = min(dataset.resolutions(unit), key=lambda sides: abs(np.log(sides[1] / sides[0]) - aspect))
    samples = []
    for start, frames in found:
        # An image has no rate: the same picture at another one is the same sample.
        cut = {"start": start, "end": row["end"], "frame_rate": 0.0 if info.is_image else dataset.frame_rate}
        sample = cut | {"frames": frames, "height": height, "width": width, "crop": dataset.crop}
        sample["crop_seed"] = seed_of("crop", digest, start) if dataset.crop == "random" else 0
        key = key_of({"content": digest, **sample, **facts, **masked})
        samples.append(row | sample | {"key": key, "mask": mask})
    return samples


def decode_row(row: Rows, *, attempts: Attempts | None = None) -> Rows:
    """Adds `pixels`, uint8 RGB [T, H, W, 3], and `mask_grid`, fp32 at the latents' [T, H, W] (none: no frames)."""
    return _guarded(row, "decode", attempts, _decode, NOTHING_DECODED)


def _decode(row: Rows) -> Rows:
    try:
        with storage.open_read(row["uri"]) as file:
            pixels = decode_clip(
                file,  # type: ignore[arg-type]
                start=row["start"],
                end=None if row["end"] < 0 else row["end"],
                num_frames=row["frames"],
                frame_rate=row["frame_rate"] or 1.0,  # an image: one frame, at its beginning
                height=row["height"],
                width=row["width"],
                crop=row["crop"],
                crop_seed=row["crop_seed"],
            )
        mask = read_mask(row) if row.get("mask") else NO_MASK
    except StorageUnavailable:
        raise
    except VideoError as error:
        return row | _failed(error.stage, error.reason) | NOTHING_DECODED
    except Exception as error:
        return row | _failed("decode", f"{type(error).__name__}: {error}") | NOTHING_DECODED
    return row | {"pixels": pixels, "mask_grid": mask}


class VaeStage:
    """An actor with the VAE: `pixels` → the posterior as bf16 bits, for image-to-video also the first frame's alone."""

    def __init__(
        self, pretrained: str, device: str, first_frame: bool, attempts: Attempts | None = None,
        *, patch_conv: bool = False, tiling: bool = False,
    ) -> None:  # fmt: skip
        from k5dist.model.encoders import VideoAutoencoder, to_bits

        self.vae = VideoAutoencoder(pretrained, device, patch_conv=patch_conv, tiling=tiling)
        self.to_bits, self.first_frame, self.attempts = to_bits, first_frame, attempts
        self.compare = tiling  # the first clip is encoded whole as well, to tell how far tiles are off

    def __call__(self, row: Rows) -> Rows:
        pixels, mask = row.pop("pixels"), row.pop("mask_grid", NO_MASK)
        nothing: Rows = {
            "tensors": [],
            "shapes": [],
            "names": [],
            "tiling_error": 0.0,
            "vae_began": 0.0,
            "vae_ended": 0.0,
        }
        encode = partial(self._encode, pixels=pixels, mask=mask, nothing=nothing)
        return _guarded(row, "vae", self.attempts, encode, nothing)

    def _encode(self, row: Rows, *, pixels: np.ndarray, mask: np.ndarray, nothing: Rows) -> Rows:
        import torch

        began = time.time()
        try:
            error_of_tiles = self.vae.tiling_error(pixels) if self.compare else 0.0
            self.compare = False
            posterior: dict[str, Any] = dict(zip(("mean", "logvar"), self.vae.encode(pixels), strict=True))
            if self.first_frame:
                posterior |= dict(zip(("first_mean", "first_logvar"), self.vae.encode(pixels[:1]), strict=True))
        except Exception as error:
            return row | nothing | _failed("vae", f"{type(error).__name__}: {error}")
        if len(mask):
            posterior["mask"] = torch.from_numpy(mask[..., None].copy())
        bits = {name: self.to_bits(tensor) for name, tensor in posterior.items()}
        return row | {
            "tiling_error": error_of_tiles,
            "vae_began": began,
            "vae_ended": time.time(),
            "names": list(bits),
            "tensors": [array.tobytes() for array in bits.values()],
            "shapes": [list(array.shape) for array in bits.values()],
        }


class TextStage:
    """An actor with both text encoders: batches of captions → features as bf16 bits."""

    def __init__(
        self, pretrained: str, device: str, encoding: layout.TextEncoding, attempts: Attempts | None = None,
        offload: bool = False,
    ) -> None:  # fmt: skip
        from k5dist.model.encoders import TextEncoders, to_bits

        self.encoders, self.to_bits = TextEncoders(pretrained, encoding, device, offload=offload), to_bits
        self.attempts = attempts

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        real = [str(caption) for key, caption in zip(batch["key"], batch["caption"], strict=True) if key != PADDING]
        keys = [str(key) for key in batch["key"] if key != PADDING]
        with _bounded(self.attempts, "text", keys, "precache.text_batch_size"):
            features = iter(self.encoders.encode(real) if real else [])
        bits = [[self.to_bits(tensor) for tensor in next(features)] if key != PADDING else [] for key in batch["key"]]
        table = pa.table(
            {
                "key": pa.array([str(key) for key in batch["key"]]),
                "caption": pa.array([str(caption) for caption in batch["caption"]]),
                "group": pa.array(batch["group"].tolist(), pa.int64()),
                "names": pa.array([["qwen", "clip"][: len(row)] for row in bits], pa.list_(pa.string())),
                "tensors": pa.array([[array.tobytes() for array in row] for row in bits], pa.list_(pa.binary())),
                "shapes": pa.array([[list(array.shape) for array in row] for row in bits], _SHAPES),
            }
        )
        return table  # type: ignore[return-value]  (Ray Data takes Arrow tables as well)


def write_samples(table: pa.Table, *, cache_uri: str, attempts: Attempts | None = None) -> pa.Table:
    """One shard of the rows that have tensors; passes on what a summary needs of every row."""
    table = one_group(table)
    with _bounded(attempts, "write", table.column("key").to_pylist(), "precache.shard_size_mib"):
        _write_samples(table, cache_uri)
    return table.select(["key", "error", "stage", "tiling_error", "vae_began", "vae_ended"])


def _write_samples(table: pa.Table, cache_uri: str) -> None:
    columns = list(layout.SAMPLE_COLUMNS)
    rows = table.to_pylist()
    good = [row for row in rows if not row["error"]]
    records = [
        Record(
            row["key"],
            _arrays(row),
            {
                **{name: row[name] for name in columns if name in row},
                "end": None if row["end"] < 0 else row["end"],
                "first_frame": "first_mean" in row["names"],
            },
        )
        for row in {row["key"]: row for row in good}.values()
    ]
    if records:
        layout.samples(cache_uri).write(records)


def write_captions(
    table: pa.Table, *, cache_uri: str, encoding: layout.TextEncoding, attempts: Attempts | None = None
) -> pa.Table:
    table = one_group(table)
    with _bounded(attempts, "write", table.column("key").to_pylist(), "precache.shard_size_mib"):
        records = [
            Record(row["key"], _arrays(row), {"caption": row["caption"], "text_length": row["shapes"][0][0]})
            for row in table.to_pylist()
        ]
        layout.captions(cache_uri, encoding).write(records)
    return table.select(["key"])


def _arrays(row: Rows) -> dict[str, np.ndarray]:
    return {
        name: np.frombuffer(data, np.uint16).reshape(shape)
        for name, data, shape in zip(row["names"], row["tensors"], row["shapes"], strict=True)
    }


def _failed(stage: str, reason: str) -> dict[str, str]:
    return {"stage": stage, "error": reason.strip() or stage}
