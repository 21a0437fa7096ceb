"""Where things stand in a cache, and what its rows mean: the contract that precache writes and training reads.

    cache/<cache fingerprint>/
      cache.json                      fingerprint, identity of what encoded it
      shards/*.safetensors            latents, bf16, unscaled: `mean`, `logvar` [T, H, W, 16];
                                      image-to-video also `first_mean`, `first_logvar` [1, H, W, 16]; with
                                      masks also `mask` [T, H, W, 1], 0…1
      index/*.parquet                 one row a sample
      orders/*.parquet                which samples lie together, while they are being encoded (k5dist/cache/orders.py)
      captions/<encoding>/…           the same three; `qwen` [L, in_text_dim] of true length L, `clip` [in_text_dim2]
      features/<encoder>/…            shards and index of CREPA's: `features` [T, h, w, D], a sample's latent frames
      failures.parquet                what could not be encoded, and why

Captions stand apart under the key of their encoding (template, crop, length): another template encodes text again, and
no latents.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from k5dist import storage
from k5dist.cache.keys import key_of
from k5dist.cache.shards import ShardStore, read_parquet
from k5dist.config import ConfigError

CACHE_VERSION = 2
SELECTION = "samples.parquet"  # in a run's folder: the samples it trains on
SAMPLE_COLUMNS = {
    "frames": pa.int32(),
    "height": pa.int32(),
    "width": pa.int32(),
    "uri": pa.string(),
    "start": pa.float64(),
    "end": pa.float64(),
    "frame_rate": pa.float64(),
    "crop": pa.string(),
    "first_frame": pa.bool_(),
}
SELECTION_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("dataset", pa.string()),
        ("captions", pa.list_(pa.string())),
        ("repeats", pa.int32()),
        ("probability", pa.float64()),  # null: in every epoch
    ]
)
FEATURE_COLUMNS = {"uri": pa.string()}
CAPTION_COLUMNS = {"caption": pa.string(), "text_length": pa.int32()}
FAILURE_SCHEMA = pa.schema(
    [
        ("dataset", pa.string()),
        ("uri", pa.string()),
        ("start", pa.float64()),
        ("stage", pa.string()),
        ("reason", pa.string()),
        ("count", pa.int32()),
    ]
)


@dataclass(frozen=True)
class TextEncoding:
    """How captions become text features: the template around them, the tokens cut off in front, the tokens kept."""

    template: str
    start: int
    max_tokens: int

    @property
    def id(self) -> str:
        return key_of({"template": self.template, "start": self.start, "max_tokens": self.max_tokens})[:16]


def image_uri(run_uri: str, at: int) -> str:
    """Where the latents of `validation.images[at]` lie, in the run's folder."""
    return storage.join(run_uri, "images", f"{at:02d}.safetensors")


def caption_key(caption: str) -> str:
    return key_of({"caption": caption})


def samples(cache_uri: str) -> ShardStore:
    return ShardStore(cache_uri, SAMPLE_COLUMNS)


def captions(cache_uri: str, encoding: TextEncoding) -> ShardStore:
    return ShardStore(storage.join(cache_uri, "captions", encoding.id), CAPTION_COLUMNS)


def features(cache_uri: str, features_id: str) -> ShardStore:
    """A vision encoder's features under the keys of the samples."""
    return ShardStore(storage.join(cache_uri, "features", features_id), FEATURE_COLUMNS)


def failures_uri(cache_uri: str) -> str:
    return storage.join(cache_uri, "failures.parquet")


def write_header(cache_uri: str, fingerprint: str, pretrained_identity: str) -> None:
    header = {"version": CACHE_VERSION, "fingerprint": fingerprint, "pretrained": pretrained_identity}
    storage.publish_bytes(storage.join(cache_uri, "cache.json"), json.dumps(header, indent=2).encode())


def check_header(cache_uri: str, fingerprint: str) -> None:
    """Raises ConfigError when there is no cache at `cache_uri`, or it was encoded for another plan."""
    uri = storage.join(cache_uri, "cache.json")
    if not storage.exists(uri):
        raise ConfigError(
            "stages", cache_uri, "there is no cache for this plan yet", "run with precache among the stages"
        )
    header = json.loads(storage.read_text(uri))
    found = (header.get("version"), header.get("fingerprint"))
    if found != (CACHE_VERSION, fingerprint):
        rule = f"cache {found[1]} (version {found[0]}) does not fit plan {fingerprint} (version {CACHE_VERSION})"
        raise ConfigError("stages", cache_uri, rule, "run with precache among the stages, or name another storage.root")


def selection(
    keys: Sequence[str],
    *,
    datasets: Sequence[str] | None = None,
    captions: Sequence[Sequence[str]] | None = None,
    repeats: Sequence[int] | None = None,
    probability: Sequence[float | None] | None = None,
) -> pa.Table:
    """A run's samples, sorted by key; what is left out is one dataset whose clips have no caption and count once."""
    count = len(keys)
    columns = [
        keys,
        ["main"] * count if datasets is None else datasets,
        [[""]] * count if captions is None else captions,
        [1] * count if repeats is None else repeats,
        [None] * count if probability is None else probability,
    ]
    arrays = [pa.array(column, field.type) for column, field in zip(columns, SELECTION_SCHEMA, strict=True)]
    return pa.table(arrays, schema=SELECTION_SCHEMA).sort_by("key")


def write_selection(uri: str, table: pa.Table) -> None:
    """The samples that a run trains on, in the run's own folder."""
    data = io.BytesIO()
    pq.write_table(table.cast(SELECTION_SCHEMA), data, compression="zstd")
    storage.publish_bytes(uri, data.getvalue())


def read_selection(uri: str) -> list[str]:
    """The keys of a run's samples, sorted."""
    return read_parquet(uri, ["key"]).column("key").to_pylist()


def read_selected(uri: str) -> pa.Table:
    """A run's samples with their dataset, captions, repeats and probability, sorted by key.

    Raises:
        ConfigError: where an earlier release wrote it, with keys alone.
    """
    data = pa.BufferReader(storage.read_bytes(uri))
    if pq.read_schema(data).names != SELECTION_SCHEMA.names:
        rule = "an earlier release chose this run's samples"
        raise ConfigError("resume", uri, rule, "resume=never, or another name")
    return pq.read_table(data).cast(SELECTION_SCHEMA)
