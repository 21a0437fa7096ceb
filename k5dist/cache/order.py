"""The order of batches: a pure function of (samples, seed, epoch, global batch), the same on every number of workers.

Every batch holds clips of one bucket. A bucket's clips are shuffled anew each epoch and cut into batches; the last one
may be short, and is then filled up with repetitions of weight zero, so that every clip counts exactly as often in an
epoch as its dataset says, whatever the batch. Batches of long and short buckets are spread evenly over the epoch by
their share.

Samples come as strata, runs of rows that are alike but for their keys, and a batch is computed when it is asked for:
nothing of the size of an epoch is ever held.
"""

from __future__ import annotations

import bisect
import heapq
import math
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from k5dist.cache.keys import unit_interval
from k5dist.cache.permutation import Permutation

Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Stratum:
    """Samples that lie side by side, rows `first` to `first + count`, by key."""

    bucket: Shape
    dataset: str
    repeats: int  # how often each counts in an epoch
    probability: float | None  # the share of them that an epoch sees; None: all
    held_out: bool
    first: int
    count: int

    @property
    def rows(self) -> range:
        return range(self.first, self.first + self.count)

    @property
    def expected(self) -> float:
        """How many clips of it an epoch counts, on average."""
        return self.count * self.repeats * (1.0 if self.probability is None else self.probability)


@dataclass(frozen=True)
class Batch:
    """Rows that make one global batch, with the weight of each (1, or 0 for filling).

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


class EpochOrder:
    """All batches of one epoch, in order; any of them is found without those before it."""

    def __init__(self, strata: Sequence[Stratum], *, seed: int, epoch: int, batch_size: int) -> None:
        of_bucket: dict[Shape, list[Stratum]] = {}
        for stratum in strata:
            if not stratum.held_out:
                of_bucket.setdefault(stratum.bucket, []).append(stratum)
        parts = (_BucketOrder(bucket, of_bucket[bucket], seed, epoch, batch_size) for bucket in sorted(of_bucket))
        self._parts = [part for part in parts if part.num_batches]

    def __len__(self) -> int:
        return sum(part.num_batches for part in self._parts)

    def batches(self, first: int = 0) -> Iterator[Batch]:
        """From the batch at position `first` on."""
        # Before a time t lie at most t · batches + 1 of a bucket's: so many at most are `first` or fewer in all.
        time = (first - len(self._parts) - 1) / max(1, len(self))
        begun = [part.batches_before(time) for part in self._parts]
        waiting = [(part.time(at), i, at) for i, (part, at) in enumerate(zip(self._parts, begun, strict=True))]
        waiting = [item for item in waiting if item[2] < self._parts[item[1]].num_batches]
        heapq.heapify(waiting)
        position = sum(begun)
        assert position <= max(first, 0)
        while waiting:
            _, i, at = waiting[0]
            part = self._parts[i]
            if at + 1 < part.num_batches:
                heapq.heapreplace(waiting, (part.time(at + 1), i, at + 1))
            else:
                heapq.heappop(waiting)
            if position >= first:
                yield part.batch(at)
            position += 1


class _BucketOrder:
    """One bucket's batches in an epoch. Batch i stands at time (i + offset) / batches of it."""

    def __init__(self, bucket: Shape, strata: Sequence[Stratum], seed: int, epoch: int, batch_size: int) -> None:
        self.draws = [_Draws(stratum, seed, epoch) for stratum in strata]
        self.ends = list(accumulate(draws.count for draws in self.draws))
        self.count, self.batch_size = self.ends[-1], batch_size
        self.num_batches = -(-self.count // batch_size)
        self.offset = unit_interval(seed, epoch, bucket, "offset")
        self.shuffle = Permutation(self.count, seed, epoch, bucket)

    def time(self, at: int) -> float:
        return (at + self.offset) / self.num_batches

    def batches_before(self, time: float) -> int:
        at = min(self.num_batches, max(0, math.ceil(time * self.num_batches - self.offset)))
        while at > 0 and self.time(at - 1) >= time:  # the last digit may be off
            at -= 1
        return at

    def batch(self, at: int) -> Batch:
        start = at * self.batch_size
        real = min(self.batch_size, self.count - start)
        drawn = [self._drawn(self.shuffle(start + i)) for i in range(real)]
        filled = [drawn[i % real] for i in range(self.batch_size)]
        weights = (1.0,) * real + (0.0,) * (self.batch_size - real)
        return Batch(tuple(row for row, _ in filled), weights, tuple(copy for _, copy in filled))

    def _drawn(self, at: int) -> tuple[int, int]:
        i = bisect.bisect_right(self.ends, at)
        return self.draws[i].row_and_copy(at - (self.ends[i - 1] if i else 0))


class _Draws:
    """What an epoch sees of a stratum: each of its clips `repeats` times, or of a share of them.

    Shares of successive epochs follow one another in a shuffle of the stratum, and then in the next one, so every clip
    is seen once before any is seen again. One that an epoch meets at the end of a shuffle and in the next has copies.
    """

    def __init__(self, stratum: Stratum, seed: int, epoch: int) -> None:
        self.stratum = stratum
        self.start, end = 0, stratum.count
        if stratum.probability is not None:
            self.parts = (seed, stratum.bucket, stratum.dataset)
            offset, each = unit_interval(*self.parts, "share"), stratum.probability * stratum.count
            self.start, end = (int(each * number + offset) for number in (epoch, epoch + 1))
            self.laps: dict[int, Permutation] = {}
        self.count = (end - self.start) * stratum.repeats

    def row_and_copy(self, at: int) -> tuple[int, int]:
        at, copy = divmod(at, self.stratum.repeats)
        if self.stratum.probability is None:
            return self.stratum.first + at, copy
        count, repeats = self.stratum.count, self.stratum.repeats
        lap, at = divmod(self.start + at, count)
        if lap not in self.laps:  # an epoch meets two at most
            self.laps[lap] = Permutation(count, *self.parts, "lap", lap)
        return self.stratum.first + self.laps[lap](at), copy + repeats * (lap - self.start // count)


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


def draw_key(key: str, copy: int) -> str:
    """What the draws of one copy of a clip are keyed by: copies in one epoch must not repeat each other's noise."""
    return f"{key}/{copy}" if copy else key


def draw_caption(captions: Sequence[str], *, seed: int, epoch: int, key: str) -> str:
    """The caption that a clip (by its draw key) is seen with in an epoch."""
    if len(captions) == 1:
        return captions[0]
    return captions[int(unit_interval(seed, epoch, key, "which caption") * len(captions))]
