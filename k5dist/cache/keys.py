"""Content keys of the cache: two clips are one sample only if their bytes, their cut and their preprocessing are one.

A key never contains a file's name alone, and never its place: the same clip moved to another folder keeps its latents.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from k5dist import storage

WHOLE_FILE_BYTES = 8 * 2**20
SAMPLED_CHUNKS = 16
CHUNK_BYTES = 256 * 2**10


def content_digest(uri: str) -> str:
    """SHA-256 over a file's size and bytes; of files above 8 MiB over 16 evenly spaced chunks of 256 KiB.

    Reading whole films only to name them would cost more than encoding a few seconds of them.

    Raises:
        FileNotFoundError: where there is no such file.
    """
    size = storage.size(uri)
    digest = hashlib.sha256(str(size).encode())
    if size <= WHOLE_FILE_BYTES:
        digest.update(storage.read_bytes(uri))
    else:
        starts = [i * (size - CHUNK_BYTES) // (SAMPLED_CHUNKS - 1) for i in range(SAMPLED_CHUNKS)]
        for chunk in storage.read_ranges(uri, [(start, start + CHUNK_BYTES) for start in starts]):
            digest.update(chunk)
    return digest.hexdigest()


def key_of(facts: Mapping[str, Any]) -> str:
    """32 hexadecimal digits that stand for `facts` (JSON-able, in any order)."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def unit_interval(*parts: object) -> float:
    """A number in [0, 1) that is a pure function of `parts`: uniform over keys, equal on every machine."""
    digest = hashlib.sha256("\0".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def seed_of(*parts: object) -> int:
    """A 63-bit seed that is a pure function of `parts`."""
    return int.from_bytes(hashlib.sha256("\0".join(map(str, parts)).encode()).digest()[:8], "big") >> 1
