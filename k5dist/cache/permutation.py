"""Keyed permutations that are computed a position at a time: a shuffle of any length needs no memory."""

from __future__ import annotations

import math

import numpy as np

from k5dist.cache.keys import seed_of

LISTED = 1 << 16  # up to so many are shuffled as a list: a network over a few bits is no good shuffle
_ROUNDS = 6  # four make a strong pseudo-random permutation of a good round function (Luby and Rackoff, 1988)
_MASK = (1 << 64) - 1


class Permutation:
    """A permutation of 0 … size − 1 that is a pure function of `parts`.

    A Feistel network over the next power of four that holds them; what falls outside goes through again (cycle
    walking: Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002).
    """

    def __init__(self, size: int, *parts: object) -> None:
        self.size = size
        self._listed: np.ndarray | None = None
        if size <= LISTED:
            self._listed = np.random.Generator(np.random.Philox(seed_of(*parts))).permutation(size)
            return
        self._half = math.ceil((size - 1).bit_length() / 2)
        self._keys = [seed_of(*parts, "round", number) for number in range(_ROUNDS)]

    def __call__(self, at: int) -> int:
        assert 0 <= at < self.size, f"{at} of {self.size}"
        if self._listed is not None:
            return int(self._listed[at])
        at = self._network(at)
        while at >= self.size:
            at = self._network(at)
        return at

    def _network(self, at: int) -> int:
        low = (1 << self._half) - 1
        left, right = at >> self._half, at & low
        for key in self._keys:
            left, right = right, left ^ (_mixed(right ^ key) & low)
        return left << self._half | right


def _mixed(x: int) -> int:
    """MurmurHash3's 64-bit finaliser: every bit of `x` moves every bit of the result."""
    x = ((x ^ x >> 33) * 0xFF51AFD7ED558CCD) & _MASK
    x = ((x ^ x >> 33) * 0xC4CEB9FE1A85EC53) & _MASK
    return x ^ x >> 33
