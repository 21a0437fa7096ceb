"""Clips from the cache to the step: reads run ahead on threads, so that a step finds its clips in memory."""

from __future__ import annotations

import collections
import dataclasses
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from k5dist import storage
from k5dist.cache import layout
from k5dist.cache.order import Batch, EpochOrder, Stratum, draw_caption, draw_key
from k5dist.cache.places import ORDER, TEXTS, Order, Places, Stores
from k5dist.cache.rows import Rows
from k5dist.cache.shards import ShardStore, place
from k5dist.config import ConfigError
from k5dist.model.forward import Text
from k5dist.plan import RunPlan
from k5dist.train.objective import Clip
from k5dist.train.rollout import rollout_draw

_READERS = 4
_PLACE = ["shard", "offset", "length", "tensors"]
_FIX = "run with precache among the stages"
_KEPT_TEXTS = 128  # up to 1.8 MB each, page-locked where there is a GPU


class TextStore:
    """Encoded captions by text; the few that are in use are kept in memory. `prompts` says where those lie that are
    no sample's caption."""

    def __init__(self, cache_uri: str, encoding: layout.TextEncoding, prompts: Rows, *, pin: bool) -> None:
        self.pin = pin
        self.store = layout.captions(cache_uri, encoding)
        self.prompts = prompts
        self._kept: dict[str, Text] = {}

    def get(self, caption: str, row: Mapping[str, Any] | None = None) -> Text:
        """`row` is the place of a sample's caption.

        Raises ConfigError when the caption was never encoded with this encoding.
        """
        kept = self._kept.get(caption)  # one look-up: other threads fill and empty it meanwhile
        if kept is not None:
            return kept
        row = row or self.prompts.find(layout.caption_key(caption))
        if row is None:
            rule = (
                f"the cache holds no text features of {caption[:60]!r} (encoding {self.store.uri.rsplit('/', 1)[-1]})"
            )
            raise ConfigError("stages", caption[:60], rule, _FIX)
        tensors = pinned(self.store.read(place(row)), self.pin)
        text = Text(tensors["qwen"][None], tensors["clip"][None])
        self._kept[caption] = text
        if len(self._kept) > _KEPT_TEXTS:
            self._kept.clear()
        return text


@dataclass
class Dataset:
    """The committed samples of a run: order and reading. Rows are numbers; none is held but those in use."""

    store: ShardStore
    feature_store: ShardStore
    order: Order
    places: Places
    texts: TextStore
    pin: bool  # tensors in page-locked memory, from where a GPU takes them while it computes

    @classmethod
    def open(cls, plan: RunPlan, encoding: layout.TextEncoding) -> Dataset:
        """The run's samples that the plan's cache holds.

        Raises:
            ConfigError: when there is no such cache, it was made for another plan, or it lost samples of the run.
        """
        layout.check_header(plan.cache_uri, plan.cache_fingerprint)
        stores = Stores.of(plan.cache_uri, encoding, plan.features_id)
        order = _order_of(plan, stores)
        pin = plan.world.device == "cuda"
        return cls(
            store=stores.samples,
            feature_store=stores.features or layout.features(plan.cache_uri, "none"),
            order=order,
            places=Places(plan.run_uri, order),
            texts=TextStore(plan.cache_uri, encoding, Rows(storage.join(plan.run_uri, TEXTS), _PLACE), pin=pin),
            pin=pin,
        )

    @property
    def feature_dim(self) -> int:
        """Width of CREPA's features; 0 where it is off."""
        return self.order.feature_dim

    @property
    def strata(self) -> Sequence[Stratum]:
        return self.order.strata

    @property
    def held_out_rows(self) -> list[int]:
        return [row for stratum in self.strata if stratum.held_out for row in stratum.rows]

    def stratum(self, row: int) -> Stratum:
        return self.places.stratum(row)

    def read(self, row: int) -> Clip:
        """A clip as validation sees it: with the first of its captions."""
        found = self.places.row(row)
        return self._clip(found, found["key"], found["captions"][0])

    def read_drawn(self, row: int, copy: int, *, seed: int, epoch: int) -> Clip:
        """One of a clip's copies as training sees it in an epoch: with the caption that is drawn for it."""
        found = self.places.row(row)
        key = draw_key(found["key"], copy)
        captions = {entry["text"]: entry for entry in found["captions"]}
        clip = self._clip(found, key, captions[draw_caption(list(captions), seed=seed, epoch=epoch, key=key)])
        if not self.feature_dim:
            return clip
        features = pinned(self.feature_store.read(place(found["features"])), self.pin)
        return dataclasses.replace(clip, features_ThwD=features["features"])

    def _clip(self, row: Mapping[str, Any], key: str, caption: Mapping[str, Any]) -> Clip:
        tensors = pinned(self.store.read(place(row)), self.pin)
        return Clip(
            key,
            tensors["mean"],
            tensors["logvar"],
            tensors.get("first_mean"),
            tensors.get("first_logvar"),
            self.texts.get(caption["text"], caption["place"]),
            tensors.get("mask"),
        )

    def epoch(self, epoch: int, seed: int, batch_size: int) -> EpochOrder:
        """The epoch's batches over training rows."""
        return EpochOrder(self.strata, seed=seed, epoch=epoch, batch_size=batch_size)

    def check_batch(self, batch_size: int) -> None:
        """Raises ConfigError when no bucket has enough training clips for one whole batch, counted as an epoch does."""
        expected: collections.Counter[tuple[int, int, int]] = collections.Counter()
        for stratum in self.strata:
            if not stratum.held_out:
                expected[stratum.bucket] += stratum.expected  # type: ignore[assignment]
        if not expected:
            raise ConfigError("data.source", None, "the cache holds no clip to train on", "see failures.parquet")
        bucket, share = expected.most_common(1)[0]
        count = max(1, int(share + 1e-6))
        if count < batch_size:
            name = "×".join(map(str, bucket))
            rule = f"a batch holds clips of one bucket, and the largest ({name}) has {count} training clips an epoch"
            raise ConfigError("train.batch_size", batch_size, rule, f"train.batch_size={count} or less, or more clips")


def _order_of(plan: RunPlan, stores: Stores) -> Order:
    """What the run noted, if it still holds; raises ConfigError where it does not."""
    order, stages = Order.read(plan.run_uri), list(plan.config.stages)
    if order is None:
        raise ConfigError("stages", stages, "the run has no list of its samples", _FIX)
    _check_features(plan, order)
    if list(order.generations) != stores.generations:
        rule = f"records were taken out of the cache since the run noted where its samples lie ({ORDER})"
        raise ConfigError("stages", stages, rule, _FIX)
    if order.missing:
        rule = f"{order.missing} of the run's {order.rows} samples are not in its cache {plan.cache_uri}"
        raise ConfigError("stages", stages, rule, _FIX)
    return order


def refuse_featureless(plan: RunPlan) -> None:
    """Raises ConfigError, before anything starts, where CREPA would find no features and no stage adds them."""
    order = None if plan.config.prepares or "train" not in plan.config.stages else Order.read(plan.run_uri)
    if order is not None:
        _check_features(plan, order)


def _check_features(plan: RunPlan, order: Order) -> None:
    featureless = order.featureless if order.feature_dim else order.rows
    if plan.features_id and featureless:
        encoder = f"{plan.config.crepa.encoder} at {plan.config.crepa.encoder_size}"
        rule = f"{featureless} of the run's {order.rows} samples have no features of {encoder} in the cache"
        fix = "run with precache among the stages: it adds features alone; or crepa.enabled=false"
        raise ConfigError("crepa.enabled", True, rule, fix)


def pinned(tensors: dict[str, Tensor], pin: bool) -> dict[str, Tensor]:
    return {name: tensor.pin_memory() for name, tensor in tensors.items()} if pin else tensors


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
            order = self.dataset.epoch(epoch, self.seed, self.batch_size)
            for at, batch in enumerate(order.batches(first), start=first):
                yield epoch, at, at == len(order) - 1, batch
            epoch, first = epoch + 1, 0

    def _drawn(self) -> Iterator[tuple[int, int, bool, Batch, list[float]]]:
        """Batches with the draws of their clips, and sorted by them, where any are rolled out. A draw is by its clip's
        key, which has to be read for all of the batch: that is done ahead, beside the training."""
        drawing: collections.deque[tuple[int, int, bool, Batch, Future[list[float]]]] = collections.deque()
        for epoch, at, last, batch in self._order():
            if not self.rolls_out:
                yield epoch, at, last, batch, []
                continue
            drawing.append((epoch, at, last, batch, self._pool.submit(self._draws, epoch, batch)))
            if len(drawing) > self.ahead:
                epoch_of, at_of, last_of, oldest, draws = drawing.popleft()
                yield epoch_of, at_of, last_of, oldest.sorted_by(draws.result()), sorted(draws.result())

    def _draws(self, epoch: int, batch: Batch) -> list[float]:
        """By which clips are rolled out; fillings come last, they count for nothing."""
        found = [self.dataset.places.row(row)["key"] for row in batch.rows]
        keys = [draw_key(key, copy) for key, copy in zip(found, batch.copies, strict=True)]
        draws = [rollout_draw(self.seed, epoch, key) for key in keys]
        return [draw if weight else 1.0 for draw, weight in zip(draws, batch.weights, strict=True)]

    def __iter__(self) -> Iterator[Step]:
        order = self._drawn()
        waiting: collections.deque[tuple[int, int, bool, Batch, list[float], list[tuple[Future[Clip], float]]]] = (
            collections.deque()
        )

        def request() -> None:
            epoch, at, last, batch, draws = next(order)
            mine = batch.of_worker(self.rank, self.size)
            reads = [(self._pool.submit(self._read, epoch, row, copy), weight) for row, copy, weight in mine]
            waiting.append((epoch, at, last, batch, draws, reads))

        for _ in range(self.ahead):
            request()
        while True:
            epoch, at, last, batch, draws, reads = waiting.popleft()
            request()
            started = time.perf_counter()
            clips = [(read.result(), weight) for read, weight in reads]
            waited = time.perf_counter() - started
            of_row = {row: self.dataset.stratum(row).dataset for row in batch.rows}
            names = [of_row[row] for row, _, _ in batch.of_worker(self.rank, self.size)]
            counts = collections.Counter(
                of_row[row] for row, weight in zip(batch.rows, batch.weights, strict=True) if weight
            )
            yield Step(epoch, at, last, clips, batch.num_real, waited, names, dict(counts), draws[:: self.size])


def padded_share(items: Sequence, rank: int, size: int) -> Iterable[tuple[int, bool]]:
    """Positions of `items` that this of `size` workers handles, as many on each: (position, real or repeated)."""
    if not items:
        return []
    rounds = -(-len(items) // size)
    mine = [r * size + rank for r in range(rounds)]
    return [(at, True) if at < len(items) else (len(items) - 1, False) for at in mine]
