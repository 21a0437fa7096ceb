"""What runs inside Ray Data's workers: probe, decode, the VAE, the text encoders, the shard writers.

A row is a plain dict all the way. A row that fails keeps going with `error` and `stage` set and without its payload, so
that one broken clip never stops the others and always reaches the ledger.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from k5dist import storage
from k5dist.cache import layout
from k5dist.cache.keys import content_digest, key_of, seed_of
from k5dist.cache.shards import Record
from k5dist.datasets import DatasetConfig
from k5dist.precache.cuts import Unfit, cuts
from k5dist.precache.video import VideoError, decode_clip, probe

Rows = dict[str, Any]
NO_FRAMES = np.zeros((0, 1, 1, 3), np.uint8)


def probe_clip(row: Rows, *, datasets: Mapping[str, DatasetConfig], unit: int, facts: Mapping[str, Any]) -> list[Rows]:
    """The samples that a row gives, each with its content key and bucket; the row itself, failed, where it gives none.

    `unit` is what sides of computed buckets are multiples of, `facts` what else decides how a sample is encoded.
    """
    dataset = datasets[row["dataset"]]
    try:
        with storage.open_read(row["uri"]) as file:
            info = probe(file)  # type: ignore[arg-type]
        if info.is_image and facts["first_frame"]:
            raise Unfit("too short: an image has no frames after the first, which image-to-video learns")
        found = cuts(info, row["start"], None if row["end"] < 0 else row["end"], dataset)
        digest = content_digest(row["uri"])
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
        samples.append(row | sample | {"key": key_of({"content": digest, **sample, **facts})})
    return samples


def decode_row(row: Rows) -> Rows:
    """Adds `pixels`, uint8 RGB [T, H, W, 3]."""
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
    except VideoError as error:
        return row | _failed(error.stage, error.reason) | {"pixels": NO_FRAMES}
    except Exception as error:
        return row | _failed("decode", f"{type(error).__name__}: {error}") | {"pixels": NO_FRAMES}
    return row | {"pixels": pixels}


class VaeStage:
    """An actor with the VAE: `pixels` → the posterior as bf16 bits, for image-to-video also the first frame's alone."""

    def __init__(self, pretrained: str, device: str, first_frame: bool) -> None:
        from k5dist.model.encoders import VideoAutoencoder, to_bits

        self.vae, self.to_bits = VideoAutoencoder(pretrained, device), to_bits
        self.first_frame = first_frame

    def __call__(self, row: Rows) -> Rows:
        pixels = row.pop("pixels")
        nothing = {"tensors": [], "shapes": [], "names": []}
        if row["error"]:
            return row | nothing
        try:
            posterior = dict(zip(("mean", "logvar"), self.vae.encode(pixels), strict=True))
            if self.first_frame:
                posterior |= dict(zip(("first_mean", "first_logvar"), self.vae.encode(pixels[:1]), strict=True))
        except Exception as error:
            return row | nothing | _failed("vae", f"{type(error).__name__}: {error}")
        bits = {name: self.to_bits(tensor) for name, tensor in posterior.items()}
        return row | {
            "names": list(bits),
            "tensors": [array.tobytes() for array in bits.values()],
            "shapes": [list(array.shape) for array in bits.values()],
        }


class TextStage:
    """An actor with both text encoders: batches of captions → features as bf16 bits."""

    def __init__(self, pretrained: str, device: str, encoding: layout.TextEncoding) -> None:
        from k5dist.model.encoders import TextEncoders, to_bits

        self.encoders, self.to_bits = TextEncoders(pretrained, encoding, device), to_bits

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        features = self.encoders.encode([str(caption) for caption in batch["caption"]])
        bits = [(self.to_bits(qwen), self.to_bits(clip)) for qwen, clip in features]
        table = pa.table(
            {
                "key": pa.array([str(key) for key in batch["key"]]),
                "caption": pa.array([str(caption) for caption in batch["caption"]]),
                "names": pa.array([["qwen", "clip"]] * len(bits)),
                "tensors": pa.array([[qwen.tobytes(), clip.tobytes()] for qwen, clip in bits]),
                "shapes": pa.array([[list(qwen.shape), list(clip.shape)] for qwen, clip in bits]),
            }
        )
        return table  # type: ignore[return-value]  (Ray Data takes Arrow tables as well)


def write_samples(table: pa.Table, *, cache_uri: str) -> pa.Table:
    """One shard of the rows that have tensors; passes on what a summary needs of every row."""
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
    return table.select(["key", "error", "stage"])


def write_captions(table: pa.Table, *, cache_uri: str, encoding: layout.TextEncoding) -> pa.Table:
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
