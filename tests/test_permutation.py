"""The random order of a dataset in one epoch, shuffled in memory or computed from a key."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from bs_lightning import PlannedPool, Planning, PoolBatchSampler, Pools
from bs_lightning import permutation as module
from bs_lightning.permutation import KeyedPermutation, permutation

# False alarms: each statistical test fails by chance once in a million runs, and its seeds are fixed.
ALARM = 1e-6


@settings(deadline=None)
@given(st.integers(1, 3000), st.integers(0, 2**32), st.integers(0, 100))
def test_a_keyed_order_holds_each_number_once(n, seed, epoch):
    order = KeyedPermutation(n, [seed, epoch])
    assert sorted(order[:].tolist()) == list(range(n))


@settings(deadline=None)
@given(st.integers(1, 10**13), st.integers(0, 2**32), st.data())
def test_parts_of_a_keyed_order_are_parts_of_one_order(n, seed, data):
    order = KeyedPermutation(n, [seed])
    start = data.draw(st.integers(0, n - 1))
    stop = data.draw(st.integers(start, min(n, start + 50)))
    part = order[start:stop]
    assert part.dtype == np.int64
    assert len(part) == stop - start
    assert ((part >= 0) & (part < n)).all()
    assert part.tolist() == [int(order[place : place + 1][0]) for place in range(start, stop)]


def keyed_orders(n, n_orders):
    return np.array([KeyedPermutation(n, [seed, 0])[:] for seed in range(n_orders)])


@pytest.mark.parametrize("n", [5, 12, 17])
def test_each_number_is_equally_often_at_each_place(n):
    orders = keyed_orders(n, 4000)
    counts = np.array([np.bincount(orders[:, place], minlength=n) for place in range(n)])
    statistic = ((counts - 4000 / n) ** 2 / (4000 / n)).sum()
    # Rows and columns of the table have fixed sums: (n - 1)^2 degrees of freedom, and a variance of n / (n - 1).
    assert stats.chi2.sf(statistic * (n - 1) / n, (n - 1) ** 2) > ALARM


def test_pairs_of_places_are_independent():
    n = 12
    orders = keyed_orders(n, 6000)
    for first, second in ((0, 1), (0, 6), (3, 11)):
        ahead = (orders[:, second] - orders[:, first]) % n
        assert stats.chisquare(np.bincount(ahead, minlength=n)[1:]).pvalue > ALARM


def test_neighbours_in_a_long_order_are_far_apart():
    n = 10**9 + 7
    part = KeyedPermutation(n, [0, 0])[10**8 : 10**8 + 20_000]
    steps = np.diff(part) % n
    assert stats.kstest(part / n, "uniform").pvalue > ALARM
    assert stats.kstest(steps / n, "uniform").pvalue > ALARM
    other_epoch = KeyedPermutation(n, [0, 1])[10**8 : 10**8 + 20_000]
    assert stats.kstest((part - other_epoch) % n / n, "uniform").pvalue > ALARM


def test_long_orders_are_keyed_and_short_ones_shuffled():
    assert isinstance(permutation(2**20, 0, 0), np.ndarray)
    assert isinstance(permutation(2**20 + 1, 0, 0), KeyedPermutation)


@pytest.mark.parametrize("shuffled", [0, 101])
def test_each_seed_and_each_epoch_has_its_own_order(monkeypatch, shuffled):
    monkeypatch.setattr(module, "_SHUFFLED", shuffled)
    places = [(seed, epoch) for seed in range(3) for epoch in range(3)]
    assert len({tuple(permutation(101, *place)[:].tolist()) for place in places}) == 9


@pytest.mark.parametrize("planned", [False, True])
@pytest.mark.parametrize("drop_last", [False, True])
def test_a_sampler_serves_a_keyed_order_as_a_shuffled_one(monkeypatch, planned, drop_last):
    def keep_order(indices, *, seed, epoch):
        return PlannedPool(np.arange(len(indices)).reshape(-1, 8))

    monkeypatch.setattr(module, "_SHUFFLED", 0)
    sampler = PoolBatchSampler(
        101, 8, planning=Planning(keep_order, Pools(24)) if planned else None, drop_last=drop_last, seed=3
    )
    served = [index for batch in sampler for index in batch]
    assert served == KeyedPermutation(101, [3, 0])[: 96 if drop_last else 101].tolist()
    state = sampler.state_dict()
    resumed = PoolBatchSampler(101, 8, planning=sampler.planning, drop_last=drop_last, seed=3)
    iterator = iter(sampler)
    first = [next(iterator) for _ in range(4)]
    state = sampler.state_dict()
    resumed.load_state_dict(state)
    assert [index for batch in [*first, *resumed] for index in batch] == served


def test_memory_does_not_grow_with_the_dataset():
    tracemalloc.start()
    batches = iter(PoolBatchSampler(10**10, 256))
    assert len({index for _ in range(20) for index in next(batches)}) == 20 * 256
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20
