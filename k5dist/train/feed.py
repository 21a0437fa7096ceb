"""Clips from the cache to the step: reads run ahead on threads, so that a step finds its clips in memory."""

from __future__ import annotations

import collections
import dataclasses
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from torch import Tensor

from k5dist import storage
from k5dist.cache import layout
from k5dist.cache.order import Batch, draw_caption, draw_key, epoch_batches, split_held_out
from k5dist.cache.rows import Rows
from k5dist.cache.shards import Place, ShardStore, place, places, read_parquet
from k5dist.config import ConfigError
from k5dist.model.forward import Text
from k5dist.plan import RunPlan
from k5dist.train.objective import Clip
from k5dist.train.rollout import rollout_draw

_READERS = 4
_PLACE, _SHAPE = ["shard", "offset", "length", "tensors"], ["frames", "height", "width"]
_KEPT_TEXTS = 128  # up to 1.8 MB each, page-locked where there is a GPU


class TextStore:
    """Encoded captions by text; the few that are in use are kept in memory. `rows` says where they lie."""

    def __init__(self, cache_uri: str, encoding: layout.TextEncoding, rows: Rows, *, pin: bool) -> None:
        self.pin = pin
        self.store = layout.captions(cache_uri, encoding)
        self.rows = rows
        self._kept: dict[str, Text] = {}

    def get(self, caption: str) -> Text:
        """Raises ConfigError when the caption was never encoded with this encoding."""
        key = layout.caption_key(caption)
        kept = self._kept.get(key)  # one look-up: other threads fill and empty it meanwhile
        if kept is not None:
            return kept
        row = self.rows.find(key)
        if row is None:
            rule = (
                f"the cache holds no text features of {caption[:60]!r} (encoding {self.store.uri.rsplit('/', 1)[-1]})"
            )
            raise ConfigError("stages", caption[:60], rule, "run with precache among the stages")
        tensors = pinned(self.store.read(place(row)), self.pin)
        text = Text(tensors["qwen"][None], tensors["clip"][None])
        self._kept[key] = text
        if len(self._kept) > _KEPT_TEXTS:
            self._kept.clear()
        return text


@dataclass
class Dataset:
    """The committed samples of a cache: split, order, reading."""

    store: ShardStore
    rows: Rows  # where each lies, and its captions: read as they are asked for
    keys: list[str]
    buckets: list[tuple[int, int, int]]
    datasets: list[str]
    repeats: list[int]
    probabilities: list[float | None]
    train_rows: list[int]
    held_out_rows: list[int]
    texts: TextStore
    features: dict[str, Place] | None  # CREPA's, by key; None where it is off
    feature_store: ShardStore
    pin: bool  # tensors in page-locked memory, from where a GPU takes them while it computes

    @classmethod
    def open(cls, plan: RunPlan, encoding: layout.TextEncoding) -> Dataset:
        """The run's samples that the plan's cache holds.

        Raises:
            ConfigError: when there is no such cache, it was made for another plan, or it lost samples of the run.
        """
        cache_uri, held_out = plan.cache_uri, plan.config.data.held_out
        layout.check_header(cache_uri, plan.cache_fingerprint)
        selected, shapes = _selected(plan, encoding)
        keys = selected.column("key").to_pylist()
        names = selected.column("dataset").combine_chunks().dictionary_encode()
        buckets = _buckets(shapes)
        datasets = _of(names.dictionary.to_pylist(), names.indices.to_numpy())
        train, kept = split_held_out(keys, held_out, list(zip(datasets, buckets, strict=True)))
        pin = plan.world.device == "cuda"
        texts = Rows(storage.join(plan.run_uri, layout.TEXTS), _PLACE)
        return cls(
            store=layout.samples(cache_uri),
            rows=Rows(storage.join(plan.run_uri, layout.PLACES), [*_PLACE, "captions"]),
            keys=keys,
            buckets=buckets,
            datasets=datasets,
            repeats=selected.column("repeats").to_pylist(),
            probabilities=selected.column("probability").to_pylist(),
            train_rows=train,
            held_out_rows=kept,
            texts=TextStore(cache_uri, encoding, texts, pin=pin),
            features=_features(plan, keys),
            feature_store=layout.features(cache_uri, plan.features_id or "none"),
            pin=pin,
        )

    @property
    def feature_dim(self) -> int:
        """Width of CREPA's features; 0 where it is off."""
        return next(iter(self.features.values())).tensors[0][1][-1] if self.features else 0

    def read(self, row: int) -> Clip:
        """A clip as validation sees it: with the first of its captions."""
        found = self._row(row)
        return self._clip(found, self.keys[row], found["captions"][0])

    def read_drawn(self, row: int, copy: int, *, seed: int, epoch: int) -> Clip:
        """One of a clip's copies as training sees it in an epoch: with the caption that is drawn for it."""
        found, key = self._row(row), draw_key(self.keys[row], copy)
        clip = self._clip(found, key, draw_caption(found["captions"], seed=seed, epoch=epoch, key=key))
        if self.features is None:
            return clip
        features = pinned(self.feature_store.read(self.features[self.keys[row]]), self.pin)
        return dataclasses.replace(clip, features_ThwD=features["features"])

    def _row(self, row: int) -> dict[str, Any]:
        found = self.rows.row(row)
        if found["key"] != self.keys[row]:
            raise OSError(f"{self.rows.uri} was replaced while this worker reads it; start the run again")
        return found

    def _clip(self, row: dict[str, Any], key: str, caption: str) -> Clip:
        tensors = pinned(self.store.read(place(row)), self.pin)
        return Clip(
            key,
            tensors["mean"],
            tensors["logvar"],
            tensors.get("first_mean"),
            tensors.get("first_logvar"),
            self.texts.get(caption),
            tensors.get("mask"),
        )

    def epoch(self, epoch: int, seed: int, batch_size: int) -> list[Batch]:
        """The epoch's batches over training rows; `Batch.rows` index this dataset."""
        rows = self.train_rows
        batches = epoch_batches(
            [self.keys[r] for r in rows],
            [self.buckets[r] for r in rows],
            seed=seed,
            epoch=epoch,
            batch_size=batch_size,
            repeats=[self.repeats[r] for r in rows],
            probabilities=[self.probabilities[r] for r in rows],
        )
        return [dataclasses.replace(batch, rows=tuple(rows[i] for i in batch.rows)) for batch in batches]

    def check_batch(self, batch_size: int) -> None:
        """Raises ConfigError when no bucket has enough training clips for one whole batch, counted as an epoch does."""
        expected: collections.Counter[tuple[int, int, int]] = collections.Counter()
        for row in self.train_rows:
            probability = self.probabilities[row]
            expected[self.buckets[row]] += self.repeats[row] * (1.0 if probability is None else probability)  # type: ignore[assignment]
        if not expected:
            raise ConfigError("data.source", None, "the cache holds no clip to train on", "see failures.parquet")
        bucket, share = expected.most_common(1)[0]
        count = max(1, int(share + 1e-6))
        if count < batch_size:
            name = "×".join(map(str, bucket))
            rule = f"a batch holds clips of one bucket, and the largest ({name}) has {count} training clips an epoch"
            raise ConfigError("train.batch_size", batch_size, rule, f"train.batch_size={count} or less, or more clips")


def pinned(tensors: dict[str, Tensor], pin: bool) -> dict[str, Tensor]:
    return {name: tensor.pin_memory() for name, tensor in tensors.items()} if pin else tensors


def _selected(plan: RunPlan, encoding: layout.TextEncoding) -> tuple[pa.Table, pa.Table]:
    """The run's samples without their captions, and their shapes in the same order, by key; no index is read."""
    uri, places_uri = (storage.join(plan.run_uri, name) for name in (layout.SELECTION, layout.PLACES))
    fix = "run with precache among the stages"
    if not storage.exists(uri) or not storage.exists(places_uri):
        raise ConfigError("stages", list(plan.config.stages), "the run has no list of its samples", fix)
    selected = layout.read_selected(uri, captions=False)
    shapes = read_parquet(places_uri, ["key", *_SHAPE])
    stores = layout.samples(plan.cache_uri), layout.captions(plan.cache_uri, encoding)
    if not layout.still_true(shapes, *stores):
        rule = f"records were taken out of the cache since the run noted where its samples lie ({layout.PLACES})"
        raise ConfigError("stages", list(plan.config.stages), rule, fix)
    if shapes.column("key") != selected.column("key"):
        rule = f"{layout.PLACES} names other samples than {layout.SELECTION}: an interrupted precache left it"
        raise ConfigError("stages", list(plan.config.stages), rule, fix)
    missing = shapes.column("frames").null_count
    if missing:
        rule = f"{missing} of the run's {selected.num_rows} samples are not in its cache {plan.cache_uri}"
        raise ConfigError("stages", list(plan.config.stages), rule, fix)
    return selected, shapes


def _buckets(shapes: pa.Table) -> list[tuple[int, int, int]]:
    """One object a bucket, however many rows have it."""
    columns = np.stack([shapes.column(name).to_numpy() for name in _SHAPE], 1)
    distinct, rows = np.unique(columns, axis=0, return_inverse=True)
    return _of([tuple(row) for row in distinct.tolist()], rows.reshape(-1))


def _of(values: list[Any], indices: np.ndarray) -> list[Any]:
    return [values[at] for at in indices.tolist()]


def _features(plan: RunPlan, keys: Sequence[str]) -> dict[str, Place] | None:
    """Where CREPA's features of the run's samples are; raises ConfigError where some have none of its encoder."""
    if not plan.features_id:
        return None
    table = layout.features(plan.cache_uri, plan.features_id).index()
    found = dict(zip(table.column("key").to_pylist(), places(table), strict=True))
    missing = sum(key not in found for key in keys)
    if missing:
        encoder = f"{plan.config.crepa.encoder} at {plan.config.crepa.encoder_size}"
        rule = f"{missing} of the run's {len(keys)} samples have no features of {encoder} in the cache"
        fix = "run with precache among the stages: it adds features alone; or crepa.enabled=false"
        raise ConfigError("crepa.enabled", True, rule, fix)
    return {key: found[key] for key in keys}


@dataclass
class Step:
    """What one worker gets for one optimiser step: its clips with weights, and the number of real clips over all."""

    epoch: int
    batch: int
    last_of_epoch: bool
    clips: list[tuple[Clip, float]]
    num_real: int
    waited: float
    datasets: list[str] = field(default_factory=list)  # of the clips, one each; empty where they are made up
    of_dataset: dict[str, int] = field(default_factory=dict)  # real clips over all workers
    draws: list[float] = field(default_factory=list)  # the least of each micro-batch over all workers; for rollouts


class Feed:
    """Steps from (epoch, batch) on, read `ahead` steps in advance."""

    def __init__(
        self,
        dataset: Dataset,
        *,
        seed: int,
        batch_size: int,
        rank: int,
        size: int,
        epoch: int,
        batch: int,
        ahead: int = 2,
        rolls_out: bool = False,
    ) -> None:
        self.dataset, self.seed, self.batch_size = dataset, seed, batch_size
        self.rank, self.size, self.ahead, self.rolls_out = rank, size, ahead, rolls_out
        self._start = (epoch, batch)
        self._pool = ThreadPoolExecutor(_READERS, thread_name_prefix="feed")

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _read(self, epoch: int, row: int, copy: int) -> Clip:
        return self.dataset.read_drawn(row, copy, seed=self.seed, epoch=epoch)

    def _order(self) -> Iterator[tuple[int, int, bool, Batch]]:
        epoch, first = self._start
        while True:
            batches = self.dataset.epoch(epoch, self.seed, self.batch_size)
            for at in range(first, len(batches)):
                batch = batches[at].sorted_by(self._draws(epoch, batches[at])) if self.rolls_out else batches[at]
                yield epoch, at, at == len(batches) - 1, batch
            epoch, first = epoch + 1, 0

    def _draws(self, epoch: int, batch: Batch) -> list[float]:
        """By which clips are rolled out; fillings come last, they count for nothing."""
        keys = [draw_key(self.dataset.keys[row], copy) for row, copy in zip(batch.rows, batch.copies, strict=True)]
        draws = [rollout_draw(self.seed, epoch, key) for key in keys]
        return [draw if weight else 1.0 for draw, weight in zip(draws, batch.weights, strict=True)]

    def __iter__(self) -> Iterator[Step]:
        order = self._order()
        waiting: collections.deque[tuple[int, int, bool, Batch, list[tuple[Future[Clip], float]]]] = collections.deque()

        def request() -> None:
            epoch, at, last, batch = next(order)
            mine = batch.of_worker(self.rank, self.size)
            reads = [(self._pool.submit(self._read, epoch, row, copy), weight) for row, copy, weight in mine]
            waiting.append((epoch, at, last, batch, reads))

        for _ in range(self.ahead):
            request()
        while True:
            epoch, at, last, batch, reads = waiting.popleft()
            request()
            started = time.perf_counter()
            clips = [(read.result(), weight) for read, weight in reads]
            waited = time.perf_counter() - started
            names = [self.dataset.datasets[row] for row, _, _ in batch.of_worker(self.rank, self.size)]
            real = [row for row, weight in zip(batch.rows, batch.weights, strict=True) if weight]
            counts = collections.Counter(self.dataset.datasets[row] for row in real)
            draws = self._draws(epoch, batch)[:: self.size] if self.rolls_out else []
            yield Step(epoch, at, last, clips, batch.num_real, waited, names, dict(counts), draws)


def padded_share(items: Sequence, rank: int, size: int) -> Iterable[tuple[int, bool]]:
    """Positions of `items` that this of `size` workers handles, as many on each: (position, real or repeated)."""
    if not items:
        return []
    rounds = -(-len(items) // size)
    mine = [r * size + rank for r in range(rounds)]
    return [(at, True) if at < len(items) else (len(items) - 1, False) for at in mine]
