"""Permutation: the random order of a dataset in one epoch, in memory that does not grow with the dataset."""

import math

import numpy as np
from numpy.typing import NDArray

from bs_lightning._types import Indices, Order

_SHUFFLED = 2**20  # instances up to which an order is shuffled in memory, 4 MB
_N_ROUNDS = 6


def permutation(n_instances: int, seed: int, epoch: int) -> "Order | KeyedPermutation":
    """Return the random order of the dataset in one epoch.

    Args:
        n_instances: Length of the dataset.
        seed: The sampler's seed.
        epoch: The epoch's number.

    Returns:
        Dataset indices: a shuffled array, int32 ``[n_instances]``. For more than about a million instances, a
        :class:`KeyedPermutation`, which holds no array.

    Example:
        >>> from bs_lightning.permutation import permutation
        >>> sorted(permutation(4, seed=0, epoch=0)[:].tolist())
        [0, 1, 2, 3]
    """
    if n_instances > _SHUFFLED:
        return KeyedPermutation(n_instances, [seed, epoch])
    order: Order = np.arange(n_instances, dtype=np.int32)
    np.random.default_rng([seed, epoch]).shuffle(order)
    return order


class KeyedPermutation:
    """A random order of the numbers below ``n_instances`` that is computed where it is looked at.

    A number is written as two digits of a base whose square is at least ``n_instances``. Each round adds a hash of one
    digit to the other, which can be undone. So the rounds permute all numbers of two digits. A result that is too large
    goes through the rounds again, until it is small enough.

    Args:
        n_instances: Length of the order, at least 1.
        key: Seeds of the hashes.

    Example:
        >>> from bs_lightning.permutation import KeyedPermutation
        >>> order = KeyedPermutation(10**12, key=[0, 1])
        >>> len(order), len(set(order[5:1000].tolist()))
        (1000000000000, 995)

    Source: Luby and Rackoff, "How to construct pseudorandom permutations from pseudorandom functions", 1988; for any
    length: Black and Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002, "generalized Feistel" and "cycle
    walking".
    """

    def __init__(self, n_instances: int, key: list[int]) -> None:
        self._n_instances = n_instances
        self._base = np.uint64(math.isqrt(n_instances - 1) + 1)
        rng = np.random.default_rng(key)
        self._keys = rng.integers(0, 2**64, size=(_N_ROUNDS, 2), dtype=np.uint64) | np.uint64(1)

    def __len__(self) -> int:
        return self._n_instances

    def __getitem__(self, places: slice) -> Indices:
        """Return a part of the order.

        Args:
            places: Which part, without a step.

        Returns:
            Numbers below ``n_instances``, int64.
        """
        numbers = self._rounds(np.arange(*places.indices(self._n_instances), dtype=np.uint64))
        while (too_large := numbers >= self._n_instances).any():
            numbers[too_large] = self._rounds(numbers[too_large])
        return numbers.astype(np.int64)

    def _rounds(self, numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
        high, low = np.divmod(numbers, self._base)
        for first, second in self._keys:
            high, low = low, (high + _hash(low, first, second) % self._base) % self._base
        return high * self._base + low


def _hash(numbers: NDArray[np.uint64], first: np.uint64, second: np.uint64) -> NDArray[np.uint64]:
    """Mix the bits of each number. Products of 64 bits wrap around."""
    mixed = (numbers ^ first) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(32))) * second
    return mixed ^ (mixed >> np.uint64(29))
