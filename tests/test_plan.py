import itertools

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from bs_lightning.layout import BatchLayout
from bs_lightning.permutation import KeyedPermutation, permutation
from bs_lightning.plan import EpochPlan, PlannedPool, Planning
from bs_lightning.pools import Pools, WholeData


@st.composite
def layouts(draw):
    batch_size, world_size, drop_last = draw(st.integers(2, 6)), draw(st.integers(1, 4)), draw(st.booleans())
    n_instances = draw(st.integers(batch_size * world_size, 200))
    assume(drop_last or not 0 < n_instances % (batch_size * world_size) < 2 * world_size)
    return BatchLayout(n_instances, batch_size, world_size, drop_last)


@st.composite
def plans(draw):
    """Draw a layout and arguments for a plan: uniform batches, or pools of any size."""
    layout = draw(layouts())
    arguments = {"seed": draw(st.integers(0, 2**64)), "epoch": draw(st.integers(0, 1000))}
    if draw(st.booleans()):
        cut = Pools(draw(st.integers(layout.global_batch_size, 300)))
        arguments["planning"] = Planning(Shuffle(layout), cut)
    return layout, arguments


class Shuffle:
    """A planner that shuffles its pools, calls neighbours in them likely false negatives, and records their lengths."""

    def __init__(self, layout):
        self.size = layout.global_batch_size
        self.lengths = []

    def __call__(self, indices, *, seed, epoch):
        self.lengths.append(len(indices))
        batches = np.random.default_rng([seed, epoch]).permutation(len(indices)).reshape(-1, self.size)
        return PlannedPool(batches, np.stack([np.arange(len(indices) - 1), np.arange(1, len(indices))], axis=1))


def batches(layout, **arguments):
    return [batch.tolist() for pool in EpochPlan(layout, **arguments) for batch in pool]


def flat(batches):
    return [index for batch in batches for index in batch]


@settings(deadline=None)
@given(plans())
def test_nothing_lost_or_doubled(plan):
    layout, arguments = plan
    served = batches(layout, **arguments)
    assert len(served) == layout.n_batches
    seen = flat(served)
    assert len(seen) == len(set(seen))
    assert set(seen) <= set(range(layout.n_instances))
    dropped = layout.n_instances - len(seen)
    assert dropped == (layout.n_instances % layout.global_batch_size if layout.drop_last else 0)
    assert all(len(batch) == layout.global_batch_size for batch in served[: layout.n_full])


@settings(deadline=None)
@given(layouts())
def test_ranks_share_each_batch(layout):
    for batch in next(iter(EpochPlan(layout, seed=0, epoch=0))):
        parts = [layout.slice(batch, rank).tolist() for rank in range(layout.world_size)]
        assert flat(parts) == batch.tolist()
        sizes = [len(part) for part in parts]
        assert sizes == [layout.batch_size] * layout.world_size or (len(batch) == layout.n_last and min(sizes) > 1)


@settings(deadline=None)
@given(plans(), st.data())
def test_goes_on_anywhere_with_the_same_batches(plan, data):
    layout, arguments = plan
    start = data.draw(st.integers(0, layout.n_batches))
    whole = EpochPlan(layout, **arguments)
    served, pool = [], None
    for part in map(list, whole):
        if pool is None and len(served) + len(part) >= start:
            pool = whole.pool  # the pool of a checkpoint that was taken after `start` batches
        served += [batch.tolist() for batch in part]
        whole.served = len(served)
    assert batches(layout, start=start, pool=pool, **arguments) == served[start:]


@settings(deadline=None)
@given(plans(), st.data())
def test_pools_that_are_planned_ahead_change_nothing(plan, data):
    """What is served and saved depends on training alone, not on how far ahead of it batches are asked for."""
    layout, arguments = plan
    plain, expected, pairs = EpochPlan(layout, **arguments), [], []
    for batch in (batch for pool in plain for batch in pool):
        plain.served += 1
        expected.append(batch.tolist())
        pairs.append(plain.pairs(plain.served - 1).tolist())
    ahead = EpochPlan(layout, **arguments)
    stream, asked = (batch for pool in ahead for batch in pool), []
    for number in range(layout.n_batches):
        most = data.draw(st.integers(number + 1, layout.n_batches))
        asked += [batch.tolist() for batch in itertools.islice(stream, max(0, most - len(asked)))]
        ahead.served = number + 1
        assert ahead.global_batch(number).tolist() == expected[number]
        assert ahead.pairs(number).tolist() == pairs[number]
        for start in (number, number + 1):  # a checkpoint may be taken before or after the batch is trained
            assert batches(layout, start=start, pool=ahead.pool, **arguments) == expected[start:]
            assert ahead.pool is None or ahead.pool.start <= number
    assert asked == expected


def test_a_later_pool_of_the_epoch_is_planned_anew():
    layout = BatchLayout(90, 10)
    shuffle = Shuffle(layout)
    plan = EpochPlan(layout, seed=0, epoch=0, planning=Planning(shuffle, Pools(30)))
    for pool in plan:
        plan.served += len(pool)
    assert plan.pool.start == 6
    shuffle.lengths.clear()
    batches(layout, seed=0, epoch=0, planning=Planning(shuffle, Pools(30)), pool=plan.pool)
    assert shuffle.lengths == [30, 30, 30]


def test_only_pools_may_be_planned_ahead():
    with pytest.raises(ValueError, match=r"ahead=True needs Pools, .* got WholeData\(every=3\)"):
        Planning(Shuffle(BatchLayout(90, 10)), WholeData(3), replacement=True, ahead=True)


def test_a_pool_of_another_epoch_is_not_served():
    layout = BatchLayout(90, 10)
    arguments = {"seed": 0, "planning": Planning(Shuffle(layout), Pools(30))}
    before = EpochPlan(layout, epoch=0, **arguments)
    next(iter(before))
    assert batches(layout, epoch=1, pool=before.pool, **arguments) == batches(layout, epoch=1, **arguments)


@settings(deadline=None)
@given(layouts(), st.integers(0, 300))
def test_pools_are_near_equal_multiples_of_the_batch(layout, extra):
    planner, size = Shuffle(layout), layout.global_batch_size
    list(EpochPlan(layout, seed=0, epoch=0, planning=Planning(planner, Pools(size + extra))))
    n_batches = np.divide(planner.lengths, size)
    assert np.array_equal(n_batches, n_batches.astype(int))
    assert n_batches.sum() == layout.n_full
    assert np.ptp(n_batches) <= 1
    assert max(planner.lengths) < 1.5 * (size + extra) + size


@settings(deadline=None)
@given(plans())
def test_identity_planner_serves_the_uniform_batches(plan):
    layout, arguments = plan
    uniform = {"seed": arguments["seed"], "epoch": arguments["epoch"]}

    def identity(indices, *, seed, epoch):
        return PlannedPool(np.arange(len(indices)).reshape(-1, layout.global_batch_size))

    pooled = batches(layout, **uniform, planning=Planning(identity, Pools(3 * layout.global_batch_size)))
    assert pooled == batches(layout, **uniform)
    order = permutation(layout.n_instances, **uniform).tolist()
    assert flat(pooled) == order[: layout.n_full * layout.global_batch_size + layout.n_last]


@settings(deadline=None)
@given(plans(), st.integers(0, 60))
def test_stop_ends_the_epoch_early(plan, stop):
    layout, arguments = plan
    served = batches(layout, stop=stop, **arguments)
    assert len(served) == min(stop, layout.n_batches)
    order = permutation(layout.n_instances, arguments["seed"], arguments["epoch"]).tolist()
    assert sorted(flat(served)) == sorted(order[: len(flat(served))])


@pytest.mark.parametrize("pool_size", [None, 40])
def test_every_epoch_is_another_and_drops_another_remainder(pool_size):
    layout = BatchLayout(109, 10)
    planning = None if pool_size is None else Planning(Shuffle(layout), Pools(pool_size))
    epochs = [batches(layout, seed=0, epoch=e, planning=planning) for e in range(4)]
    assert len({str(epoch) for epoch in epochs}) == 4
    assert len({frozenset(range(109)) - set(flat(epoch)) for epoch in epochs}) == 4
    assert batches(layout, seed=0, epoch=1) != batches(layout, seed=1, epoch=1)
    assert batches(layout, seed=0, epoch=1) == batches(layout, seed=0, epoch=1)


def test_pools_are_planned_when_asked_for_each_with_its_own_seed():
    calls = []

    def planner(indices, *, seed, epoch):
        calls.append((len(indices), seed, epoch))
        return PlannedPool(np.arange(len(indices)).reshape(-1, 10))

    pools = iter(EpochPlan(BatchLayout(90, 10), seed=1, epoch=5, planning=Planning(planner, Pools(30))))
    for n_planned in (1, 2, 3):
        next(pools)
        assert len(calls) == n_planned
    lengths, seeds, epochs = zip(*calls, strict=True)
    assert lengths == (30, 30, 30)
    assert len(set(seeds)) == 3
    assert max(seeds) < 2**32
    assert epochs == (5, 5, 5)
    next(iter(EpochPlan(BatchLayout(90, 10), seed=1, epoch=6, planning=Planning(planner, Pools(30)))))
    assert calls[-1][1] not in seeds


def test_pairs_are_looked_for_in_all_batches_that_may_share_instances(monkeypatch):
    monkeypatch.setattr("bs_lightning.plan._BATCHES_AT_ONCE", 2)
    pairs = np.array([[0, 1], [5, 4], [8, 9], [12, 13], [16, 17], [0, 4]])  # all but the last meet

    def planner(indices, *, seed, epoch):
        return PlannedPool(np.arange(20).reshape(5, 4), pairs)

    planning = Planning(planner, Pools(20), replacement=True)
    plan = EpochPlan(BatchLayout(20, 4), seed=0, epoch=0, planning=planning)
    next(iter(plan))
    assert np.array_equal(plan.pairs(0), permutation(20, 0, 0)[:][pairs[:5]])


def test_planned_batches_are_checked():
    def doubling(indices, *, seed, epoch):
        return PlannedPool(np.zeros((len(indices) // 10, 10), int))

    arguments = {"seed": 0, "epoch": 0}
    with pytest.raises(ValueError, match="position 0 twice"):
        next(iter(EpochPlan(BatchLayout(90, 10), planning=Planning(doubling, Pools(30)), **arguments)))
    with pytest.raises(ValueError, match="position 0 twice within one batch"):
        next(iter(EpochPlan(BatchLayout(90, 10), planning=Planning(doubling, Pools(30), True), **arguments)))


def test_with_replacement_batches_share_instances_of_their_pool():
    def same_batch(indices, *, seed, epoch):
        return PlannedPool(np.tile(np.arange(10), (len(indices) // 10, 1)))

    plan = EpochPlan(BatchLayout(90, 10), seed=0, epoch=0, planning=Planning(same_batch, Pools(30), replacement=True))
    pools = [[batch.tolist() for batch in pool] for pool in plan]
    assert all(pool == [pool[0]] * 3 for pool in pools)
    assert len(set(flat(flat(pools)))) == 30


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((10.0, 2), TypeError, "n_instances must be an integer, got 10.0"),
        ((10, 2.0), TypeError, "batch_size must be an integer, got 2.0"),
        ((10, True), TypeError, "batch_size must be an integer, got True"),
        ((10, [2]), TypeError, r"batch_size must be an integer, got \[2\]"),
        ((10, 2, 1.0), TypeError, "world_size must be an integer, got 1.0"),
        ((10, 2, True), TypeError, "world_size must be an integer, got True"),
        ((10, 2, 0), ValueError, "world_size must be at least 1, got 0"),
        ((10, 1), ValueError, "batch_size must be at least 2, got 1. In a batch of one there are no negatives"),
        ((7, 4, 2), ValueError, "has 7 instances, fewer than one global batch of batch_size 4 x 2 processes"),
        (
            (10, 2, 4, False),
            ValueError,
            "last batch of 2 instances for 4 processes, fewer than two for each. Use drop_last",
        ),
    ],
)
def test_layout_refuses(arguments, error, words):
    with pytest.raises(error, match=words):
        BatchLayout(*arguments)


def test_layout_takes_numpys_small_integers():
    """In uint8, 100 x 3 is 44."""
    layout = BatchLayout(np.int16(1000), np.uint8(100), np.uint8(3))
    assert layout == BatchLayout(1000, 100, 3)
    assert {type(value) for value in (layout.n_instances, layout.global_batch_size, layout.n_batches)} == {int}


@pytest.mark.parametrize(
    ("pairs", "error", "words"),
    [
        (
            [0, 1],
            ValueError,
            r"must return pairs of shape \[m, 2\] with positions in \[0, 30\), got shape \[2\] with 0 to 1",
        ),
        ([[0, 1, 2]], ValueError, r"must return pairs of shape \[m, 2\] .*, got shape \[1, 3\]"),
        ([[0, 30]], ValueError, r"positions in \[0, 30\), got shape \[1, 2\] with 0 to 30"),
        ([[-1, 0]], ValueError, r"positions in \[0, 30\), got shape \[1, 2\] with -1 to 0"),
        ([[0.0, 1.0]], TypeError, "pairs must hold integers, got dtype float64"),
        ([[True, False]], TypeError, "pairs must hold integers, got dtype bool"),
        ([[0, 1], [2]], TypeError, "pairs must be an array of integers, or be convertible to one: .*inhomogeneous"),
    ],
)
def test_refuses_a_planners_pairs(pairs, error, words):
    def planner(indices, *, seed, epoch):
        return PlannedPool(np.arange(len(indices)).reshape(-1, 10), pairs)

    with pytest.raises(error, match=words):
        next(iter(EpochPlan(BatchLayout(90, 10), seed=0, epoch=0, planning=Planning(planner, Pools(30)))))


def test_takes_a_planners_pairs_of_any_integers():
    def planner(indices, *, seed, epoch):
        return PlannedPool(np.arange(len(indices)).reshape(-1, 10), np.uint8([[0, 9], [0, 29]]))

    plan = EpochPlan(BatchLayout(30, 10), seed=0, epoch=0, planning=Planning(planner, Pools(30)))
    (batches,) = plan
    assert plan.pairs(0).tolist() == [[batches[0][0], batches[0][9]]]  # the others do not meet
    assert plan.pairs(2).shape == (0, 2)


def test_refuses_a_pool_smaller_than_a_global_batch():
    layout = BatchLayout(90, 4, 2)
    with pytest.raises(ValueError, match="at least one global batch, 8 = batch_size 4 x 2 processes, got 7"):
        EpochPlan(layout, seed=0, epoch=0, planning=Planning(Shuffle(layout), Pools(7)))


def test_refuses_a_planner_that_returns_bare_batches():
    def bare(indices, *, seed, epoch):
        return np.arange(len(indices)).reshape(-1, 10)

    with pytest.raises(TypeError, match=r"plan_pool must return a PlannedPool\(batches\), got ndarray"):
        next(iter(EpochPlan(BatchLayout(90, 10), seed=0, epoch=0, planning=Planning(bare, Pools(30)))))


def test_the_whole_dataset_is_planned_again_every_few_batches():
    planned = []

    def planner(indices, *, seed, epoch):
        batches = np.random.default_rng(seed).integers(0, 9, (9, 1)) * 10 + np.arange(10)
        planned.append(indices[batches].tolist())
        near = np.stack([np.arange(89), np.arange(1, 90)], axis=1)
        return PlannedPool(batches, near)

    plan = EpochPlan(BatchLayout(95, 10), seed=0, epoch=0, planning=Planning(planner, WholeData(4), replacement=True))
    for number, batches in enumerate(plan):
        assert [batch.tolist() for batch in batches] == planned[number][: len(batches)]
        assert len(batches) == (4, 4, 1)[number]
        assert len(plan.pool.batches) == len(batches)  # a checkpoint holds only the batches that are served
        assert set(plan.pool.pairs.ravel()) == set(np.ravel(batches))
        plan.served += len(batches)
    assert [sorted(sum(each, [])) == sorted(sum(planned[0], [])) for each in planned] == [True, False, False]


@pytest.mark.parametrize("every", [0, -1])
def test_the_whole_dataset_refuses(every):
    with pytest.raises(ValueError, match=f"refresh_every must be at least 1, got {every}"):
        WholeData(every)
    with pytest.raises(ValueError, match="refresh_every=5 needs a composer whose batches may share instances"):
        Planning(Shuffle(BatchLayout(90, 10)), WholeData(5))


def test_refuses_what_is_no_planning():
    with pytest.raises(TypeError, match=r"cut must be Pools\(size\), .*, got 640"):
        Planning(Shuffle(BatchLayout(90, 10)), 640)
    with pytest.raises(TypeError, match="plan_pool must be callable"):
        Planning(None, Pools(40))


@pytest.mark.parametrize("kind", [np.uint8, np.int8, np.uint64])
def test_cuts_take_integers_of_other_kinds(kind):
    layout = BatchLayout(2000, 10)
    assert WholeData(kind(100)).next_pool(180, 200, layout) == WholeData(100).next_pool(180, 200, layout)
    assert Pools(kind(100)).next_pool(180, 200, layout) == Pools(100).next_pool(180, 200, layout)


def test_uniform_batches_of_large_data_are_looked_up_together(monkeypatch):
    looked_up, look_up = [], KeyedPermutation.__getitem__

    def noting(order, places):
        looked_up.append(places)
        return look_up(order, places)

    plan = EpochPlan(BatchLayout(2**20 + 5, batch_size=3000), seed=0, epoch=1, start=7, stop=20)
    monkeypatch.setattr(KeyedPermutation, "__getitem__", noting)
    batches = [batch for pool in plan for batch in pool]
    assert len(looked_up) == 3  # of five batches each, but the last
    for number, batch in enumerate(batches, 7):
        np.testing.assert_array_equal(batch, plan.global_batch(number))
    assert len(batches) == 13
