"""Work orders: which records lie together in a shard is decided, and published, before any of them is encoded.

A shard's name comes from the keys and checksums in it, so jobs that encode the same groups write the same files. An
order holds the groups of one job; whoever works on the cache at the same time, or after a crash, keeps its groups for
what is not there yet, and orders only what no order names. An order goes when all that it names is there or has failed.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import random
import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from k5dist import storage
from k5dist.cache.shards import ShardStore, read_parquet

Group = tuple[str | None, ...]  # the keys of one shard in their order; None: nothing to be done at this place
FOLDER = "orders"
_ATTEMPTS = 20


@dataclass(frozen=True)
class Order:
    """Groups of keys, each the content of one shard."""

    groups: tuple[tuple[str, ...], ...]

    @property
    def id(self) -> str:
        return hashlib.sha256("\n".join(" ".join(group) for group in self.groups).encode()).hexdigest()[:24]

    @property
    def keys(self) -> set[str]:
        return {key for group in self.groups for key in group}


def cut(keys: Sequence[str], size: int) -> Order:
    """An order of `keys` in their order, `size` of them a shard."""
    return Order(tuple(tuple(keys[at : at + size]) for at in range(0, len(keys), size)))


def assign(missing: Collection[str], orders: Iterable[Order]) -> list[Group]:
    """The orders' groups with what is `missing` in its place, a key in the first order that names it."""
    left, groups = set(missing), []
    for order in sorted(orders, key=lambda order: order.id):
        for group in order.groups:
            places = tuple(key if key in left else None for key in group)
            left.difference_update(group)
            if any(places):
                groups.append(places)
    assert not left, "every missing key is named by an order"
    return groups


def settle(store: ShardStore, wanted: Sequence[str], size: int) -> tuple[set[str], list[Group]]:
    """The keys that `store` holds, and the groups of those that it does not; their orders are published.

    Another job may publish, work and finish all the while. Orders are read before and after the index: as long as they
    are the same, no group can have been finished between the two unseen. An order that overlaps with one that was
    published at the same moment is withdrawn and made again. Whatever slips through all this is encoded twice and read
    once, for the index keeps one row a key.
    """
    for _ in range(_ATTEMPTS):
        before = read(store)
        known = store.keys()
        found = read(store)
        if before != found:
            continue
        missing = [key for key in dict.fromkeys(wanted) if key not in known]
        named = {key for order in found for key in order.keys}
        unnamed = [key for key in missing if key not in named]
        if not unnamed:
            return known, assign(missing, found)
        mine = cut(unnamed, size)
        publish(store, mine)
        others = [order for order in read(store) if order != mine]
        if not any(order.keys & mine.keys for order in others):
            return known, assign(missing, [*found, mine])
        withdraw(store, mine)
        time.sleep(random.uniform(0.05, 1.0))
    raise TimeoutError(f"{store.uri}: other jobs keep changing the orders of this cache")


def finish(store: ShardStore, done: Collection[str]) -> None:
    """Remove the orders of which every key is among `done`: in the cache, or failed."""
    for order in read(store):
        if order.keys <= set(done):
            withdraw(store, order)


def publish(store: ShardStore, order: Order) -> None:
    rows = [(key, number) for number, group in enumerate(order.groups) for key in group]
    table = pa.table(
        {"key": pa.array([key for key, _ in rows], pa.string()), "group": pa.array([n for _, n in rows], pa.int32())}
    )
    data = io.BytesIO()
    pq.write_table(table, data, compression="zstd")
    storage.publish_bytes(_uri(store, order), data.getvalue())


def withdraw(store: ShardStore, order: Order) -> None:
    storage.remove(_uri(store, order))


def read(store: ShardStore) -> list[Order]:
    """The orders that are there, one after another by their ids."""
    folder = storage.join(store.uri, FOLDER)
    orders = []
    for name in storage.list_folder(folder):
        with contextlib.suppress(FileNotFoundError):  # its job has just finished it
            orders.append(_from_table(read_parquet(storage.join(folder, name))))
    return orders


def _from_table(table: pa.Table) -> Order:
    groups: dict[int, list[str]] = {}
    for key, group in zip(table.column("key").to_pylist(), table.column("group").to_pylist(), strict=True):
        groups.setdefault(group, []).append(key)
    return Order(tuple(tuple(groups[number]) for number in sorted(groups)))


def _uri(store: ShardStore, order: Order) -> str:
    return storage.join(store.uri, FOLDER, f"{order.id}.parquet")
