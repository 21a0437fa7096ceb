"""The order of batches: a pure function of (index, seed, epoch, global batch), the same on every number of workers.

Every batch holds clips of one bucket. A bucket's clips are shuffled anew each epoch and cut into batches; the last one
may be short, and is then filled up with repetitions of weight zero, so that every clip counts exactly as often in an
epoch as its dataset says, whatever the batch. Batches of long and short buckets are spread evenly over the epoch by
their share.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from k5dist.cache.keys import seed_of, unit_interval


@dataclass(frozen=True)
class Batch:
    """Rows of the index that make one global batch, with the weight of each (1, or 0 for filling).

    A clip that counts several times in an epoch has copies 0, 1, … of its row, which draw each for itself.
    """

    rows: tuple[int, ...]
    weights: tuple[float, ...]
    copies: tuple[int, ...]

    @property
    def num_real(self) -> int:
        return int(sum(self.weights))

    def sorted_by(self, values: Sequence[float]) -> Batch:
        """The same batch with its clips in the order of `values`."""
        order = sorted(range(len(self.rows)), key=lambda i: values[i])
        rows, weights, copies = (tuple(part[i] for i in order) for part in (self.rows, self.weights, self.copies))
        return Batch(rows, weights, copies)  # type: ignore[arg-type]

    def of_worker(self, rank: int, size: int) -> list[tuple[int, int, float]]:
        """(row, copy, weight) of what goes to one of `size` data-parallel workers: positions rank, rank + size, …"""
        if len(self.rows) % size:
            raise ValueError(f"a batch of {len(self.rows)} clips cannot be split over {size} workers")
        return list(zip(self.rows, self.copies, self.weights, strict=True))[rank::size]


def split_held_out(
    keys: Sequence[str], share: float, strata: Sequence[Hashable] | None = None
) -> tuple[list[int], list[int]]:
    """Rows for training and rows held out: of every stratum the `share` with the smallest hashes, at least one in all
    if share > 0.

    The total is shared out by largest remainders, so that strata too small for a clip of their own count together; none
    loses its only clip. Membership hangs on a clip's own key: adding clips moves few others, and never by their order.
    """
    if share <= 0 or len(keys) < 2:
        return list(range(len(keys))), []
    total = min(len(keys) - 1, max(1, round(share * len(keys))))
    of_stratum: dict[Hashable, list[int]] = {}
    for row in sorted(range(len(keys)), key=lambda row: unit_interval("held out", keys[row])):
        of_stratum.setdefault(None if strata is None else strata[row], []).append(row)
    if all(len(rows) == 1 for rows in of_stratum.values()):
        of_stratum = {None: [row for rows in of_stratum.values() for row in rows]}
    exact = {name: total * len(rows) / len(keys) for name, rows in of_stratum.items()}
    counts = {name: min(int(exact[name]), len(rows) - 1) for name, rows in of_stratum.items()}
    for name in sorted(exact, key=lambda name: (int(exact[name]) - exact[name], str(name))):
        if sum(counts.values()) < total and counts[name] < len(of_stratum[name]) - 1:
            counts[name] += 1
    held_out = {row for name, rows in of_stratum.items() for row in rows[: counts[name]]}
    return [row for row in range(len(keys)) if row not in held_out], sorted(held_out)


def epoch_batches(
    keys: Sequence[str],
    buckets: Sequence[tuple[int, int, int]],
    *,
    seed: int,
    epoch: int,
    batch_size: int,
    repeats: Sequence[int] | None = None,
    probabilities: Sequence[float | None] | None = None,
) -> list[Batch]:
    """All batches of one epoch, in order. The sequences describe the rows; the order of these does not matter.

    A row counts `repeats` times (once where not given), or with its probability not at all in this epoch.
    """
    by_bucket: dict[tuple[int, int, int], list[tuple[int, int]]] = {}
    for row in sorted(range(len(keys)), key=lambda row: keys[row]):
        probability = None if probabilities is None else probabilities[row]
        if probability is None or unit_interval(seed, epoch, keys[row], "seen") < probability:
            copies = 1 if repeats is None else repeats[row]
            by_bucket.setdefault(buckets[row], []).extend((row, copy) for copy in range(copies))
    placed: list[tuple[float, tuple[int, int, int], Batch]] = []
    for bucket in sorted(by_bucket):
        drawn = by_bucket[bucket]
        shuffle = np.random.Generator(np.random.Philox(seed_of(seed, epoch, bucket)))
        shuffled = [drawn[i] for i in shuffle.permutation(len(drawn))]
        batches = [_batch(shuffled[at : at + batch_size], batch_size) for at in range(0, len(drawn), batch_size)]
        offset = unit_interval(seed, epoch, bucket, "offset")
        placed += [((i + offset) / len(batches), bucket, batch) for i, batch in enumerate(batches)]
    return [batch for _, _, batch in sorted(placed, key=lambda item: item[:2])]


def _batch(drawn: list[tuple[int, int]], batch_size: int) -> Batch:
    filled = [drawn[i % len(drawn)] for i in range(batch_size)]
    weights = (1.0,) * len(drawn) + (0.0,) * (batch_size - len(drawn))
    return Batch(tuple(row for row, _ in filled), weights, tuple(copy for _, copy in filled))


def draw_key(key: str, copy: int) -> str:
    """What the draws of one copy of a clip are keyed by: copies in one epoch must not repeat each other's noise."""
    return f"{key}/{copy}" if copy else key


def draw_caption(captions: Sequence[str], *, seed: int, epoch: int, key: str) -> str:
    """The caption that a clip (by its draw key) is seen with in an epoch."""
    if len(captions) == 1:
        return captions[0]
    return captions[int(unit_interval(seed, epoch, key, "which caption") * len(captions))]
