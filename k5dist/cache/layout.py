"""Where things stand in a cache, and what its rows mean: the contract that precache writes and training reads.

    cache/<cache fingerprint>/
      cache.json                      fingerprint, identity of what encoded it
      shards/*.safetensors            latents, bf16, unscaled: `mean`, `logvar` [T, H, W, 16];
                                      image-to-video also `first_mean`, `first_logvar` [1, H, W, 16]
      index/*.parquet                 one row a sample
      orders/*.parquet                which samples lie together, while they are being encoded (k5dist/cache/orders.py)
      captions/<encoding>/…           the same three; `qwen` [L, in_text_dim] of true length L, `clip` [in_text_dim2]
      failures.parquet                what could not be encoded, and why

Captions stand apart under the key of their encoding (template, crop, length): another template encodes text again, and
no latents.
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from k5dist import storage
from k5dist.cache.keys import key_of
from k5dist.cache.shards import ShardStore, read_parquet
from k5dist.config import ConfigError

CACHE_VERSION = 1
SELECTION = "samples.parquet"  # in a run's folder: the samples it trains on
SAMPLE_COLUMNS = {
    "frames": pa.int32(),
    "height": pa.int32(),
    "width": pa.int32(),
    "caption": pa.string(),
    "caption_key": pa.string(),
    "uri": pa.string(),
    "start": pa.float64(),
    "end": pa.float64(),
    "first_frame": pa.bool_(),
}
CAPTION_COLUMNS = {"caption": pa.string(), "text_length": pa.int32()}
FAILURE_SCHEMA = pa.schema(
    [
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


def caption_key(caption: str) -> str:
    return key_of({"caption": caption})


def samples(cache_uri: str) -> ShardStore:
    return ShardStore(cache_uri, SAMPLE_COLUMNS)


def captions(cache_uri: str, encoding: TextEncoding) -> ShardStore:
    return ShardStore(storage.join(cache_uri, "captions", encoding.id), CAPTION_COLUMNS)


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


def write_selection(uri: str, keys: list[str]) -> None:
    """The keys of the samples that a run trains on, in the run's own folder."""
    data = io.BytesIO()
    pq.write_table(pa.table({"key": pa.array(sorted(keys), pa.string())}), data)
    storage.publish_bytes(uri, data.getvalue())


def read_selection(uri: str) -> list[str]:
    return read_parquet(uri).column("key").to_pylist()
