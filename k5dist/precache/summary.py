"""What a precache saw and did, by dataset and bucket, and the ledger of what it could not use."""

from __future__ import annotations

import collections
import io
import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from k5dist import storage
from k5dist.cache import layout
from k5dist.cache.shards import read_parquet

WHATS = ("seen", "encoded", "cached_before", "too_short", "too_long", "broken")
NO_BUCKET = ""  # of a clip that failed before it had one


class Failure(NamedTuple):
    """A clip that cannot be used: where it was found so, and why."""

    dataset: str
    uri: str
    start: float
    stage: str
    reason: str

    @property
    def what(self) -> str:
        kind = self.reason[:8].replace(" ", "_")
        return kind if kind == "too_long" else "too_short" if self.reason.startswith("too short") else "broken"


@dataclass
class Busy:
    """How much of its time a pool of encoders was at work: from the first beginning to the last end, in seconds."""

    workers: int = 1
    seconds: float = 0.0
    first: float = math.inf
    last: float = -math.inf

    def add(self, began: float, ended: float) -> None:
        """One piece of work, in seconds since the epoch; what never began has 0 for both."""
        if ended > 0:
            self.seconds += ended - began
            self.first, self.last = min(self.first, began), max(self.last, ended)

    @property
    def span(self) -> float:
        return max(0.0, self.last - self.first)

    @property
    def share(self) -> float:
        """0 … 1; 0 where there was no work."""
        return self.seconds / (self.workers * self.span) if self.span else 0.0


@dataclass
class Summary:
    """Counts by (dataset, bucket, what), with `what` one of WHATS; a clip cut into several samples is several."""

    counts: collections.Counter[tuple[str, str, str]] = field(default_factory=collections.Counter)
    captions_encoded: int = 0
    vae: Busy = field(default_factory=Busy)
    failures: list[Failure] = field(default_factory=list)

    def count(self, what: str, row: dict[str, Any]) -> None:
        """Count a probed row (with or without a bucket)."""
        self.counts[row["dataset"], bucket_name(row), what] += 1

    def fail(self, failure: Failure, bucket: str = NO_BUCKET) -> None:
        self.failures.append(failure)
        self.counts[failure.dataset, bucket, failure.what] += 1

    def total(self, what: str, dataset: str | None = None, bucket: str | None = None) -> int:
        return sum(
            count
            for (name, shape, kind), count in self.counts.items()
            if kind == what and dataset in (None, name) and bucket in (None, shape)
        )

    @property
    def seen(self) -> int:
        return self.total("seen")

    @property
    def datasets(self) -> list[str]:
        return sorted({name for name, _, _ in self.counts})

    def rows(self) -> list[tuple[str, str]]:
        """The closing table: the total, then every dataset and its buckets, then the commonest reasons of failure."""
        told = (f"{self.total(what)} {what.replace('_', ' ')}" for what in ("seen", "encoded", "cached_before"))
        rows = [("clips", ", ".join(told)), ("captions", f"{self.captions_encoded} encoded")]
        if self.vae.span:
            told = f"{self.vae.workers} busy {self.vae.share:.0%} of {self.vae.span:.1f} s"
            rows.append(("VAE workers", told))
        for dataset in self.datasets:
            rows.append((dataset, self._told(dataset, None)))
            shapes = sorted({shape for name, shape, _ in self.counts if name == dataset and shape != NO_BUCKET})
            rows += [(f"  {shape}", self._told(dataset, shape)) for shape in shapes]
        rows.append(("failed", str(len(self.failures))))
        reasons = collections.Counter(f"{failure.stage}: {failure.reason}" for failure in self.failures)
        return rows + [("", f"{count} × {reason}") for reason, count in reasons.most_common(5)]

    def table(self) -> list[dict[str, Any]]:
        """The counts as rows, one a dataset and bucket (empty: of what failed before it had one)."""
        places = sorted({(dataset, bucket) for dataset, bucket, _ in self.counts})
        return [
            {"dataset": dataset, "bucket": bucket, **{what: self.total(what, dataset, bucket) for what in WHATS}}
            for dataset, bucket in places
        ]

    def _told(self, dataset: str, bucket: str | None) -> str:
        found = ((what, self.total(what, dataset, bucket)) for what in WHATS)
        return ", ".join(f"{what.replace('_', ' ')} {count}" for what, count in found if count or what != "too_long")

    def metrics(self) -> dict[str, float]:
        """Totals, and each dataset's as `precache/<dataset>/<what>`."""
        counts = {what: self.total(what) for what in WHATS[:3]}
        counts |= {"captions_encoded": self.captions_encoded, "failed": len(self.failures)}
        shares = {"vae_busy": self.vae.share} if self.vae.span else {}
        counts |= {f"{dataset}/{what}": self.total(what, dataset) for dataset in self.datasets for what in WHATS}
        return {f"precache/{name}": float(value) for name, value in (counts | shares).items()}


def bucket_name(row: dict[str, Any]) -> str:
    return f"{row['frames']}×{row['height']}×{row['width']}" if row["frames"] else NO_BUCKET


def write_ledger(cache_uri: str, failures: Iterable[Failure], looked_at: Collection[str]) -> None:
    """Bring `failures.parquet` up to date: what failed when it was last looked at, of all runs that share the cache.

    Of the URIs `looked_at` it holds what fails now, and keeps what it says of others; `count` says in how many runs in
    a row.
    """
    uri = layout.failures_uri(cache_uri)
    before: list[dict[str, Any]] = []
    if storage.exists(uri):
        before = read_parquet(uri).to_pylist()
    counts = {(row["uri"], row["start"], row["stage"]): row["count"] for row in before}
    looked_at = set(looked_at)
    rows = [row for row in before if row["uri"] not in looked_at]
    rows += [
        {**failure._asdict(), "count": counts.get((failure.uri, failure.start, failure.stage), 0) + 1}
        for failure in failures
    ]
    data = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=layout.FAILURE_SCHEMA), data)
    storage.publish_bytes(uri, data.getvalue())
