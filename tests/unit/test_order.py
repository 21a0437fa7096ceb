"""The order of batches: a function of keys, seed and epoch alone, the same on every number of workers."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

import pytest

from k5dist.cache.keys import key_of
from k5dist.cache.order import Batch, draw_caption, draw_key, epoch_batches, split_held_out

BucketKey = tuple[int, int, int]

SMALL, LARGE = (49, 64, 96), (121, 64, 96)


def dataset(small: int, large: int) -> tuple[list[str], list[BucketKey]]:
    keys = [key_of({"clip": i}) for i in range(small + large)]
    return keys, [SMALL] * small + [LARGE] * large


def as_keys(batches: Sequence[Batch], keys: Sequence[str]) -> list[list[tuple[str, float]]]:
    return [[(keys[row], weight) for row, weight in zip(b.rows, b.weights, strict=True)] for b in batches]


def order(keys: list[str], buckets: list[BucketKey], seed: int = 0, epoch: int = 0, size: int = 4) -> list[Batch]:
    return epoch_batches(keys, buckets, seed=seed, epoch=epoch, batch_size=size)


@pytest.mark.parametrize(("small", "large"), [(23, 9), (4, 0), (1, 1), (0, 3), (0, 0)])
@pytest.mark.parametrize("size", [1, 4, 16])
def test_every_clip_counts_once_an_epoch_and_buckets_never_mix(small: int, large: int, size: int) -> None:
    keys, buckets = dataset(small, large)
    batches = order(keys, buckets, size=size)
    counted: Counter[int] = Counter()
    for batch in batches:
        assert len(batch.rows) == len(batch.weights) == size
        assert len({buckets[row] for row in batch.rows}) == 1
        assert 0 < batch.num_real == sum(batch.weights)
        for row, weight in zip(batch.rows, batch.weights, strict=True):
            counted[row] += int(weight)
    assert counted == Counter(range(small + large))
    assert len(batches) == -(-small // size) - (-large // size)


def test_the_order_is_a_pure_function_of_the_clips() -> None:
    keys, buckets = dataset(23, 9)
    shuffled = random.Random(1).sample(range(len(keys)), len(keys))
    again = order([keys[i] for i in shuffled], [buckets[i] for i in shuffled])
    assert as_keys(again, [keys[i] for i in shuffled]) == as_keys(order(keys, buckets), keys)


def test_another_epoch_or_seed_is_another_order() -> None:
    keys, buckets = dataset(23, 9)
    orders = [order(keys, buckets, seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])


@pytest.mark.parametrize(("small", "large"), [(400, 400), (400, 80), (40, 400)])
def test_buckets_are_spread_by_their_share(small: int, large: int) -> None:
    keys, buckets = dataset(small, large)
    batches = order(keys, buckets)
    seen = 0
    for done, batch in enumerate(batches, start=1):
        seen += buckets[batch.rows[0]] == LARGE
        assert abs(seen - done * large / (small + large)) <= 2


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_workers_of_any_number_share_the_same_batch(size: int) -> None:
    keys, buckets = dataset(13, 0)
    for batch in order(keys, buckets, size=8):
        shares = [batch.of_worker(rank, size) for rank in range(size)]
        assert {len(share) for share in shares} == {8 // size}
        union = Counter(pair for share in shares for pair in share)
        assert union == Counter(zip(batch.rows, batch.copies, batch.weights, strict=True))


@pytest.mark.parametrize("size", [1, 2, 4])
def test_repeats_and_probability_hold_on_any_number_of_workers(size: int) -> None:
    """What the workers see together is one order, whose every clip counts as its dataset says."""
    keys, buckets = dataset(200, 40)
    repeats, probabilities = [1] * 100 + [3] * 140, [None] * 200 + [0.5] * 40

    def epoch(at: int, rows: list[int]) -> Counter[tuple[str, int]]:
        batches = epoch_batches(
            [keys[i] for i in rows],
            [buckets[i] for i in rows],
            seed=0,
            epoch=at,
            batch_size=8,
            repeats=[repeats[i] for i in rows],
            probabilities=[probabilities[i] for i in rows],
        )
        shares = (share for batch in batches for rank in range(size) for share in batch.of_worker(rank, size))
        return Counter((keys[rows[row]], copy) for row, copy, weight in shares if weight)

    seen = epoch(0, list(range(240)))
    assert set(seen.values()) == {1}, "no copy counts twice"
    counts = Counter(key for key, _ in seen)
    assert [counts[key] for key in keys[:200]] == repeats[:200]
    now_and_then = [counts[key] for key in keys[200:]]
    assert set(now_and_then) == {0, 3}
    assert 10 <= sum(map(bool, now_and_then)) <= 30
    assert epoch(0, random.Random(3).sample(range(240), 240)) == seen, "a function of the keys, not of their order"
    assert epoch(1, list(range(240))) != seen, "drawn anew each epoch"


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


def test_clips_held_out_are_a_share_of_their_own() -> None:
    keys, _ = dataset(100, 0)
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
    keys, _ = dataset(220, 0)
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
