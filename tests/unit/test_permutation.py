"""Keyed permutations, position by position."""

from __future__ import annotations

import numpy as np
import pytest

from k5dist.cache import permutation
from k5dist.cache.permutation import LISTED, Permutation


@pytest.mark.parametrize("size", [1, 2, 1000, LISTED, LISTED + 1, 100_003, 1 << 17])
def test_every_position_once(size: int) -> None:
    shuffled = Permutation(size, "a", 1)
    assert sorted(shuffled(at) for at in range(size)) == list(range(size))


def test_long_ones_hold_nothing_and_hang_on_their_key() -> None:
    size = 10**11
    first, again, other = Permutation(size, 0, 1), Permutation(size, 0, 1), Permutation(size, 0, 2)
    at = [0, 1, 2, 77, size // 2, size - 1]
    assert [first(i) for i in at] == [again(i) for i in at]
    assert not {first(i) for i in at} & {other(i) for i in at}
    assert first._listed is None


def test_a_network_shuffles_as_well_as_a_list(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where neighbours go, and from which part of the range, is what chance would say, within five deviations."""
    monkeypatch.setattr(permutation, "LISTED", 0)
    size, parts = 1 << 14, 16
    cells = np.zeros((parts, parts))
    near = 0
    for key in range(4):
        moved = np.array(list(map(Permutation(size, key), range(size))))
        np.add.at(cells, (np.arange(size) * parts // size, moved * parts // size), 1)
        near += int((np.abs(np.diff(moved)) < size // 10).sum())
    expected = 4 * size / parts**2
    assert np.abs(cells - expected).max() < 5 * expected**0.5
    share = 2 * (1 / 10) - (1 / 10) ** 2
    count = 4 * (size - 1)
    assert abs(near - share * count) < 5 * (share * (1 - share) * count) ** 0.5
