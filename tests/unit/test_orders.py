"""Work orders: the same groups for everyone, whatever is there already; and groups through a batch as they are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from k5dist.cache import orders
from k5dist.cache.orders import Order, assign, cut
from k5dist.cache.shards import Record, ShardStore
from k5dist.precache.stream import grouped, one_group

KEYS = [f"{number:032x}" for number in range(10)]


@pytest.fixture
def store(tmp_path: Path) -> ShardStore:
    return ShardStore(str(tmp_path / "cache"), {})


def write(store: ShardStore, *keys: str) -> None:
    store.write([Record(key, {"mean": np.zeros(4, np.uint16)}) for key in keys])


def test_an_order_is_a_function_of_the_work() -> None:
    order = cut(KEYS, 4)
    assert [len(group) for group in order.groups] == [4, 4, 2]
    assert order.id == cut(KEYS, 4).id != cut(KEYS, 5).id
    assert assign(KEYS, [order]) == list(order.groups)


def test_what_is_there_leaves_its_place_empty() -> None:
    groups = assign({KEYS[1], KEYS[8], KEYS[9]}, [cut(KEYS, 4)])
    assert groups == [(None, KEYS[1], None, None), (KEYS[8], KEYS[9])]


def test_a_key_of_two_orders_is_encoded_once() -> None:
    both = [cut(KEYS[:6], 3), cut(KEYS[4:], 3)]
    found = [key for group in assign(KEYS, both) for key in group if key]
    assert sorted(found) == KEYS
    assert assign(KEYS, both) == assign(KEYS, both[::-1])


def test_a_later_job_keeps_the_groups_it_finds(store: ShardStore) -> None:
    known, groups = orders.settle(store, KEYS[:8], 3)
    assert (known, [len(group) for group in groups]) == (set(), [3, 3, 2])
    write(store, *KEYS[:3])
    known, again = orders.settle(store, KEYS, 5)
    assert known == set(KEYS[:3])
    assert sorted(map(len, again)) == [2, 2, 3]
    assert groups[1] in again and groups[2] in again and (KEYS[8], KEYS[9]) in again
    orders.finish(store, KEYS[:8])
    assert orders.read(store) == [Order(((KEYS[8], KEYS[9]),))]
    orders.finish(store, KEYS)
    assert orders.read(store) == []


def test_overlapping_orders_of_one_moment_are_made_again(store: ShardStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another job publishes between our look at the orders and our own order."""
    publish, other = orders.publish, cut(KEYS[2:7], 2)

    def late(store: ShardStore, order: Order) -> None:
        publish(store, order)
        if order == cut(KEYS, 4):
            publish(store, other)

    monkeypatch.setattr(orders, "publish", late)
    _, groups = orders.settle(store, KEYS, 4)
    assert set(other.groups) <= set(groups)
    found = orders.read(store)
    assert len(found) == 2 and other in found
    assert sorted(key for order in found for key in order.keys) == KEYS


def test_a_group_finished_while_the_index_is_read_is_seen(store: ShardStore, monkeypatch: pytest.MonkeyPatch) -> None:
    orders.publish(store, cut(KEYS[:4], 4))
    keys = store.keys

    def slow() -> set[str]:
        known = keys()
        if orders.read(store):  # the other job is done by the time that we have read the index
            write(store, *KEYS[:4])
            orders.finish(store, KEYS[:4])
        return known

    monkeypatch.setattr(store, "keys", slow)
    known, groups = orders.settle(store, KEYS, 10)
    assert known == set(KEYS[:4])
    assert groups == [tuple(KEYS[4:])]


def test_groups_are_padded_to_one_length_and_come_out_whole() -> None:
    rows = {key: {"key": key, "uri": f"{key}.mp4", "start": 0.5, "frames": 17} for key in KEYS}
    table, length = grouped(rows, [(KEYS[0], None, KEYS[2]), (KEYS[3],)], multiple=2)
    assert (length, table.num_rows) == (4, 8)
    first, second = one_group(table.slice(0, 4)), one_group(table.slice(4, 4))
    assert first.column("key").to_pylist() == [KEYS[0], KEYS[2]]
    assert second.to_pylist() == [{**rows[KEYS[3]], "group": 1}]
    with pytest.raises(RuntimeError, match="across two groups"):
        one_group(table.slice(2, 4))


def test_a_shard_that_is_there_is_not_written_again(store: ShardStore) -> None:
    write(store, *KEYS[:2])
    shard = next(Path(store.uri, "shards").iterdir())
    before = shard.stat().st_ino
    write(store, *KEYS[:2])
    assert shard.stat().st_ino == before
