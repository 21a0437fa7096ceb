"""The order of batches: a function of keys, seed and epoch alone, the same on every number of workers."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

import pytest

from k5dist.cache.keys import key_of
from k5dist.cache.order import Batch, EpochOrder, Stratum, draw_caption, draw_key, split_held_out

SMALL, LARGE = (49, 64, 96), (121, 64, 96)


def strata(*parts: tuple[tuple[int, int, int], int, int, float | None]) -> list[Stratum]:
    """Side by side, from (bucket, clips, repeats, probability); then a clip that is held out."""
    found: list[Stratum] = []
    for at, (bucket, count, repeats, probability) in enumerate(parts):
        first = found[-1].rows.stop if found else 0
        found.append(Stratum(bucket, f"set-{at}", repeats, probability, held_out=False, first=first, count=count))
    first = found[-1].rows.stop
    return [*found, Stratum(SMALL, "set-0", 1, None, held_out=True, first=first, count=1)]


def dataset(small: int, large: int) -> list[Stratum]:
    return [part for part in strata((SMALL, small, 1, None), (LARGE, large, 1, None)) if part.count]


def order(parts: Sequence[Stratum], seed: int = 0, epoch: int = 0, size: int = 4) -> list[Batch]:
    return list(EpochOrder(parts, seed=seed, epoch=epoch, batch_size=size).batches())


def seen(batches: Sequence[Batch]) -> Counter[tuple[int, int]]:
    """How often each copy of a row counts."""
    drawn = (triple for batch in batches for triple in zip(batch.rows, batch.copies, batch.weights, strict=True))
    return Counter((row, copy) for row, copy, weight in drawn if weight)


@pytest.mark.parametrize(("small", "large"), [(23, 9), (4, 0), (1, 1), (0, 3), (0, 0), (70_000, 3)])
@pytest.mark.parametrize("size", [1, 4, 16])
def test_every_clip_counts_once_an_epoch_and_buckets_never_mix(small: int, large: int, size: int) -> None:
    batches = order(dataset(small, large), size=size)
    for batch in batches:
        assert len(batch.rows) == len(batch.weights) == size
        assert len({row < small for row in batch.rows}) == 1
        assert 0 < batch.num_real == sum(batch.weights)
    assert seen(batches) == Counter((row, 0) for row in range(small + large))
    assert len(batches) == -(-small // size) - (-large // size)


def test_another_epoch_or_seed_is_another_order() -> None:
    parts = dataset(23, 9)
    orders = [order(parts, seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])
    assert order(parts) == orders[0]


@pytest.mark.parametrize("parts", [dataset(23, 9), dataset(400, 3), dataset(0, 5), dataset(1, 1)])
@pytest.mark.parametrize("size", [1, 4])
def test_any_batch_is_found_without_those_before(parts: list[Stratum], size: int) -> None:
    found = EpochOrder(parts, seed=3, epoch=2, batch_size=size)
    batches = list(found.batches())
    assert len(found) == len(batches)
    for first in range(len(batches) + 2):
        assert list(found.batches(first)) == batches[first:]


def test_many_buckets_meet_in_one_order() -> None:
    shapes = [(17, 64, 32 * at) for at in range(1, 12)]
    parts = strata(*((shape, 7 * at + 1, 1, None) for at, shape in enumerate(shapes)))
    found = EpochOrder(parts, seed=0, epoch=0, batch_size=2)
    batches = list(found.batches())
    assert seen(batches) == Counter((row, 0) for part in parts if not part.held_out for row in part.rows)
    for first in (1, 17, 60, len(batches) - 1):
        assert list(found.batches(first)) == batches[first:]


@pytest.mark.parametrize(("small", "large"), [(400, 400), (400, 80), (40, 400)])
def test_buckets_are_spread_by_their_share(small: int, large: int) -> None:
    count = 0
    for done, batch in enumerate(order(dataset(small, large)), start=1):
        count += batch.rows[0] >= small
        assert abs(count - done * large / (small + large)) <= 2


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_workers_of_any_number_share_the_same_batch(size: int) -> None:
    for batch in order(dataset(13, 0), size=8):
        shares = [batch.of_worker(rank, size) for rank in range(size)]
        assert {len(share) for share in shares} == {8 // size}
        union = Counter(pair for share in shares for pair in share)
        assert union == Counter(zip(batch.rows, batch.copies, batch.weights, strict=True))


def test_every_clip_counts_as_its_dataset_says() -> None:
    parts = strata((SMALL, 100, 1, None), (SMALL, 100, 3, None), (LARGE, 40, 3, 0.5), (LARGE, 1, 1, 0.25))
    epochs = [seen(order(parts, epoch=at, size=8)) for at in range(8)]
    for counted in epochs:
        assert set(counted.values()) == {1}, "no copy counts twice"
        counts = Counter(row for row, _ in counted)
        assert [counts[row] for row in range(200)] == [1] * 100 + [3] * 100
        assert sum(counts[row] for row in range(200, 240)) == 60
    together = Counter(row for counted in epochs for row, _ in counted)
    assert {together[row] for row in range(200, 240)} == {12}, "a share of them, and all as often in the end"
    assert together[240] == 2, "every fourth epoch sees the only clip"
    drawn = [{row for row, _ in counted if 200 <= row < 240} for counted in epochs]
    assert drawn[0] != drawn[2], "another share in the next lap"


def test_a_clip_that_an_epoch_meets_twice_has_two_copies() -> None:
    parts = strata((SMALL, 10, 1, 0.7))
    epochs = [seen(order(parts, epoch=at)) for at in range(10)]
    assert all(set(counted.values()) == {1} for counted in epochs)
    assert any(copy for counted in epochs for _, copy in counted)
    assert Counter(row for counted in epochs for row, _ in counted) == Counter(dict.fromkeys(range(10), 7))


def test_copies_and_captions_are_drawn_by_key() -> None:
    assert draw_key("a", 0) == "a", "a clip that counts once draws as it always did"
    assert len({draw_key("a", copy) for copy in range(5)}) == 5
    captions = ["one", "two", "three"]
    drawn = [draw_caption(captions, seed=0, epoch=epoch, key="a") for epoch in range(300)]
    assert min(Counter(drawn).values()) > 60
    assert drawn == [draw_caption(captions, seed=0, epoch=epoch, key="a") for epoch in range(300)]
    assert drawn != [draw_caption(captions, seed=1, epoch=epoch, key="a") for epoch in range(300)]
    assert drawn != [draw_caption(captions, seed=0, epoch=epoch, key="b") for epoch in range(300)]


def test_a_batch_that_cannot_be_split_is_an_error() -> None:
    with pytest.raises(ValueError, match="3 workers"):
        Batch((0, 1, 2, 3), (1.0,) * 4, (0,) * 4).of_worker(0, 3)


def named(count: int) -> list[str]:
    return [key_of({"clip": at}) for at in range(count)]


def test_clips_held_out_are_a_share_of_their_own() -> None:
    keys = named(100)
    train, held_out = split_held_out(keys, 0.1)
    assert len(held_out) == 10
    assert sorted(train + held_out) == list(range(100))
    assert split_held_out(keys, 0.0) == (list(range(100)), [])
    assert len(split_held_out(keys, 0.001)[1]) == 1
    assert len(split_held_out(keys[:2], 0.9)[0]) == 1
    assert split_held_out(keys[:1], 0.5) == ([0], [])
    shuffled = random.Random(0).sample(keys, 100)
    assert {shuffled[row] for row in split_held_out(shuffled, 0.1)[1]} == {keys[row] for row in held_out}


def test_clips_held_out_stay_when_others_join() -> None:
    keys = named(220)
    before = {keys[row] for row in split_held_out(keys[:200], 0.1)[1]}
    after = {keys[row] for row in split_held_out(keys, 0.1)[1]}
    assert len(after) == 22
    assert len(before - after) <= 2
    assert len(after & set(keys[:200]) - before) <= 2


def test_every_stratum_gives_its_share() -> None:
    keys = [key_of({"clip": i}) for i in range(130)]
    strata = ["a"] * 80 + ["b"] * 40 + ["c"] * 9 + ["d"]
    train, held_out = split_held_out(keys, 0.1, strata)
    assert sorted(train + held_out) == list(range(130))
    # 8, 4, 0.9 and 0.1 of them: thirteen in all, the last to the largest remainder; the only clip of d is not taken.
    assert Counter(strata[row] for row in held_out) == {"a": 8, "b": 4, "c": 1}
    alone, _ = split_held_out(keys[:80], 0.1)
    assert {row for row in held_out if row < 80} == set(range(80)) - set(alone), "the smallest hashes of each"
    assert len(split_held_out(keys[:4], 0.1, ["a", "b", "c", "d"])[1]) == 1
    assert len(split_held_out(keys[:3], 0.9, ["a", "a", "b"])[0]) == 2
