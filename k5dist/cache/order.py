"""The order of batches: a pure function of (index, seed, epoch, global batch), the same on every number of workers.

Every batch holds clips of one bucket. A bucket's clips are shuffled anew each epoch and cut into batches; the last one
may be short, and is then filled up with repetitions of weight zero, so that every clip counts exactly once an epoch
whatever the batch. Batches of long and short buckets are spread evenly over the epoch by their share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from k5dist.cache.keys import seed_of, unit_interval


@dataclass(frozen=True)
class Batch:
    """Rows of the index that make one global batch, with the weight of each (1, or 0 for filling)."""

    rows: tuple[int, ...]
    weights: tuple[float, ...]

    @property
    def num_real(self) -> int:
        return int(sum(self.weights))

    def of_worker(self, rank: int, size: int) -> list[tuple[int, float]]:
        """The (row, weight) pairs of one of `size` data-parallel workers: positions rank, rank + size, …"""
        if len(self.rows) % size:
            raise ValueError(f"a batch of {len(self.rows)} clips cannot be split over {size} workers")
        return list(zip(self.rows, self.weights, strict=True))[rank::size]


def split_held_out(keys: Sequence[str], share: float) -> tuple[list[int], list[int]]:
    """Rows for training and rows held out: the `share` of clips with the smallest hash, at least one if share > 0.

    Membership hangs on a clip's own key: adding clips moves few others, and never by their order.
    """
    if share <= 0 or len(keys) < 2:
        return list(range(len(keys))), []
    count = min(len(keys) - 1, max(1, round(share * len(keys))))
    by_hash = sorted(range(len(keys)), key=lambda row: unit_interval("held out", keys[row]))
    held_out = set(by_hash[:count])
    return [row for row in range(len(keys)) if row not in held_out], sorted(held_out)


def epoch_batches(
    keys: Sequence[str], buckets: Sequence[tuple[int, int, int]], *, seed: int, epoch: int, batch_size: int
) -> list[Batch]:
    """All batches of one epoch, in order. `keys` and `buckets` describe the rows; their order does not matter."""
    by_bucket: dict[tuple[int, int, int], list[int]] = {}
    for row in sorted(range(len(keys)), key=lambda row: keys[row]):
        by_bucket.setdefault(buckets[row], []).append(row)
    placed: list[tuple[float, tuple[int, int, int], Batch]] = []
    for bucket in sorted(by_bucket):
        rows = by_bucket[bucket]
        shuffle = np.random.Generator(np.random.Philox(seed_of(seed, epoch, bucket)))
        shuffled = [rows[i] for i in shuffle.permutation(len(rows))]
        batches = [_batch(shuffled[at : at + batch_size], batch_size) for at in range(0, len(rows), batch_size)]
        offset = unit_interval(seed, epoch, bucket, "offset")
        placed += [((i + offset) / len(batches), bucket, batch) for i, batch in enumerate(batches)]
    return [batch for _, _, batch in sorted(placed, key=lambda item: item[:2])]


def _batch(rows: list[int], batch_size: int) -> Batch:
    fill = [rows[i % len(rows)] for i in range(batch_size - len(rows))]
    return Batch((*rows, *fill), (1.0,) * len(rows) + (0.0,) * len(fill))
