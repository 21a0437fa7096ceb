"""Clips from the cache to the step: reads run ahead on threads, so that a step finds its clips in memory."""

from __future__ import annotations

import collections
import dataclasses
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
from torch import Tensor

from k5dist import storage
from k5dist.cache import layout
from k5dist.cache.order import Batch, draw_caption, draw_key, epoch_batches, split_held_out
from k5dist.cache.shards import Place, ShardStore, places
from k5dist.config import ConfigError
from k5dist.model.forward import Text
from k5dist.plan import RunPlan
from k5dist.train.objective import Clip

_READERS = 4
_KEPT_TEXTS = 128  # up to 1.8 MB each, page-locked where there is a GPU


class TextStore:
    """Encoded captions by text; the few that are in use are kept in memory."""

    def __init__(self, cache_uri: str, encoding: layout.TextEncoding, *, pin: bool) -> None:
        self.pin = pin
        self.store = layout.captions(cache_uri, encoding)
        table = self.store.index()
        self.places = dict(zip(table.column("key").to_pylist(), places(table), strict=True))
        self.lengths = dict(zip(table.column("key").to_pylist(), table.column("text_length").to_pylist(), strict=True))
        self._kept: dict[str, Text] = {}

    def get(self, caption: str) -> Text:
        """Raises ConfigError when the caption was never encoded with this encoding."""
        key = layout.caption_key(caption)
        kept = self._kept.get(key)  # one look-up: other threads fill and empty it meanwhile
        if kept is not None:
            return kept
        if key not in self.places:
            rule = (
                f"the cache holds no text features of {caption[:60]!r} (encoding {self.store.uri.rsplit('/', 1)[-1]})"
            )
            raise ConfigError("stages", caption[:60], rule, "run with precache among the stages")
        tensors = pinned(self.store.read(self.places[key]), self.pin)
        text = Text(tensors["qwen"][None], tensors["clip"][None])
        self._kept[key] = text
        if len(self._kept) > _KEPT_TEXTS:
            self._kept.clear()
        return text


@dataclass
class Dataset:
    """The committed samples of a cache: split, order, reading."""

    store: ShardStore
    places: list[Place]
    keys: list[str]
    buckets: list[tuple[int, int, int]]
    datasets: list[str]
    captions: list[list[str]]
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
        store = layout.samples(cache_uri)
        table, selected = _selected(
            store.index(["shard", "offset", "length", "tensors", "frames", "height", "width"]), plan
        )
        keys = table.column("key").to_pylist()
        train, kept = split_held_out(keys, held_out)
        pin = plan.world.device == "cuda"
        return cls(
            store=store,
            places=places(table),
            keys=keys,
            buckets=list(zip(*(table.column(name).to_pylist() for name in ("frames", "height", "width")), strict=True)),
            datasets=selected.column("dataset").to_pylist(),
            captions=selected.column("captions").to_pylist(),
            repeats=selected.column("repeats").to_pylist(),
            probabilities=selected.column("probability").to_pylist(),
            train_rows=train,
            held_out_rows=kept,
            texts=TextStore(cache_uri, encoding, pin=pin),
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
        return self._clip(row, self.keys[row], self.captions[row][0])

    def read_drawn(self, row: int, copy: int, *, seed: int, epoch: int) -> Clip:
        """One of a clip's copies as training sees it in an epoch: with the caption that is drawn for it."""
        key = draw_key(self.keys[row], copy)
        clip = self._clip(row, key, draw_caption(self.captions[row], seed=seed, epoch=epoch, key=key))
        if self.features is None:
            return clip
        features = pinned(self.feature_store.read(self.features[self.keys[row]]), self.pin)
        return dataclasses.replace(clip, features_ThwD=features["features"])

    def _clip(self, row: int, key: str, caption: str) -> Clip:
        tensors = pinned(self.store.read(self.places[row]), self.pin)
        return Clip(
            key,
            tensors["mean"],
            tensors["logvar"],
            tensors.get("first_mean"),
            tensors.get("first_logvar"),
            self.texts.get(caption),
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


def _selected(table: pa.Table, plan: RunPlan) -> tuple[pa.Table, pa.Table]:
    """The run's samples: their rows of the cache's index and of the run's own list, both sorted by key."""
    uri = storage.join(plan.run_uri, layout.SELECTION)
    if not storage.exists(uri):
        rule = "the run has no list of its samples"
        raise ConfigError("stages", list(plan.config.stages), rule, "run with precache among the stages")
    selected = layout.read_selected(uri)
    table = table.filter(pc.field("key").isin(selected.column("key")))
    missing = selected.num_rows - table.num_rows
    if missing:
        rule = f"{missing} of the run's {selected.num_rows} samples are not in its cache {plan.cache_uri}"
        raise ConfigError("stages", list(plan.config.stages), rule, "run with precache among the stages")
    return table, selected


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
    ) -> None:
        self.dataset, self.seed, self.batch_size = dataset, seed, batch_size
        self.rank, self.size, self.ahead = rank, size, ahead
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
                yield epoch, at, at == len(batches) - 1, batches[at]
            epoch, first = epoch + 1, 0

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
            yield Step(epoch, at, last, clips, batch.num_real, time.perf_counter() - started)


def padded_share(items: Sequence, rank: int, size: int) -> Iterable[tuple[int, bool]]:
    """Positions of `items` that this of `size` workers handles, as many on each: (position, real or repeated)."""
    if not items:
        return []
    rounds = -(-len(items) // size)
    mine = [r * size + rank for r in range(rounds)]
    return [(at, True) if at < len(items) else (len(items) - 1, False) for at in mine]
