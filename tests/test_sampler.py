import io

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from bs_lightning import PlannedPool, Planning, PoolBatchSampler, PoolLoader, Pools


def planner(batch_size):
    """Return a planner that shuffles pools into batches of ``batch_size``."""

    def plan_pool(indices, *, seed, epoch):
        return PlannedPool(np.random.default_rng([seed, epoch]).permutation(len(indices)).reshape(-1, batch_size))

    return plan_pool


def sampler(n_instances=100, batch_size=4, pool_size=16, world_size=1, **kwargs):
    planning = Planning(planner(batch_size * world_size), Pools(pool_size))
    return PoolBatchSampler(n_instances, batch_size, planning=planning, world_size=world_size, **kwargs)


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def resumed(made, state):
    made.load_state_dict(through_a_file(state))
    return made


@settings(deadline=None)
@given(st.integers(2, 6), st.integers(1, 4), st.integers(0, 150), st.booleans(), st.booleans())
def test_ranks_serve_slices_of_the_same_batches(batch_size, world_size, extra, drop_last, uniform):
    size = batch_size * world_size
    n_instances = size + extra
    assume(drop_last or not 0 < n_instances % size < 2 * world_size)

    def make(batch_size, **ranks):
        planning = None if uniform else Planning(planner(size), Pools(3 * size))
        return PoolBatchSampler(n_instances, batch_size, planning=planning, drop_last=drop_last, seed=3, **ranks)

    whole = make(size)
    ranks = [make(batch_size, rank=rank, world_size=world_size) for rank in range(world_size)]
    seen = []
    for epoch in range(2):
        for each in [whole, *ranks]:
            each.set_epoch(epoch)
        served = list(whole)
        parts = [list(each) for each in ranks]
        assert len(served) == len(whole) == n_instances // size + (not drop_last and n_instances % size > 0)
        assert {len(part) for part in parts} == {len(each) for each in ranks} == {len(served)}
        assert [sum(slices, []) for slices in zip(*parts, strict=True)] == served
        seen.append(sum(served, []))
        assert len(seen[-1]) == len(set(seen[-1])) == (n_instances - n_instances % size if drop_last else n_instances)
    assert seen[0] != seen[1] or n_instances < 8  # two epochs may draw the same small permutation


def test_set_epoch_chooses_the_epoch():
    made = sampler()
    first = list(made)
    assert list(made) == first
    made.set_epoch(1)
    assert list(made) != first
    made.set_epoch(0)
    assert list(made) == first
    assert all(isinstance(index, int) for index in first[0])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_serves_a_plain_data_loader(num_workers):
    loader = DataLoader(torch.arange(100), batch_sampler=sampler(), num_workers=num_workers)
    assert [batch.tolist() for batch in loader] == list(sampler())


@pytest.mark.parametrize("pool_size", [16, None])
@pytest.mark.parametrize("served", [0, 1, 4, 6, 24, 25])  # 4 is a pool's end, 25 is the epoch's end
def test_resumes_where_the_state_was_taken(served, pool_size):
    def make():
        return sampler(103) if pool_size else PoolBatchSampler(103, 4)

    made = make()
    made.set_epoch(2)
    batches = iter(made)
    first = [next(batches) for _ in range(served)]
    restored = resumed(make(), made.state_dict())
    assert first + list(restored) == [*first, *batches]
    assert restored.epoch == 2
    assert len(restored) == 25
    # Later iterations serve whole epochs, in the resumed sampler as in the first.
    for epoch in (2, 3):
        for each in (made, restored):
            each.set_epoch(epoch)
        assert list(restored) == list(made)
        assert len(list(restored)) == 25


def test_a_state_taken_before_the_first_batch_is_the_one_loaded():
    first = sampler()
    iterator = iter(first)
    for _ in range(3):
        next(iterator)
    state = first.state_dict()
    torch.testing.assert_close(resumed(sampler(), state).state_dict(), state)


def test_a_restored_pool_is_not_planned_again():
    calls = []

    def plan_pool(indices, *, seed, epoch):
        calls.append(len(indices))
        return planner(4)(indices, seed=seed, epoch=epoch)

    made = PoolBatchSampler(96, 4, planning=Planning(plan_pool, Pools(32)))
    batches = iter(made)
    for _ in range(11):
        next(batches)
    state = made.state_dict()
    calls.clear()
    restored = resumed(PoolBatchSampler(96, 4, planning=Planning(plan_pool, Pools(32))), state)
    assert next(iter(restored)) == next(batches)
    assert calls == []


def test_state_grows_with_the_pool_not_with_the_data():
    made = sampler(1_000_000, pool_size=16)
    next(iter(made))
    file = io.BytesIO()
    torch.save(made.state_dict(), file)
    assert file.tell() < 3000


def test_the_states_seed_goes_before_ones_own():
    made = sampler(seed=5)
    batches = iter(made)
    next(batches)
    assert list(resumed(sampler(seed=6), made.state_dict())) == list(batches)


def test_resumes_with_other_processes_of_the_same_global_batch():
    made = sampler(batch_size=4)
    batches = iter(made)
    next(batches)
    state, rest = made.state_dict(), list(batches)
    halves = [list(resumed(sampler(batch_size=2, world_size=2, rank=rank), state)) for rank in (0, 1)]
    assert [one + other for one, other in zip(*halves, strict=True)] == rest


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"n_instances": 104}, "n_instances=100, now it is 104"),
        ({"batch_size": 8}, "global_batch_size=4, now it is 8"),
        ({"world_size": 2}, "global_batch_size=4, now it is 8"),
        ({"batch_size": 20}, "global_batch_size=4, now it is 20"),
    ],
)
def test_refuses_to_go_on_in_mid_epoch_over_other_batches(other, words):
    made = sampler()
    batches = iter(made)
    for _ in range(6):
        next(batches)
    with pytest.raises(ValueError, match=f"middle of an epoch with {words}.* Resume with"):
        resumed(sampler(**{"pool_size": 32} | other), made.state_dict())


@pytest.mark.parametrize("n_instances", [48, 200])
def test_goes_on_after_an_epochs_end_with_other_data(n_instances):
    made = sampler(100)
    list(made)
    restored = resumed(sampler(n_instances), made.state_dict())
    restored.set_epoch(1)
    assert len(list(restored)) == n_instances // 4


def test_an_epoch_that_has_ended_goes_on_with_no_batch_of_other_data():
    made = PoolBatchSampler(96, 4)
    list(made)
    assert list(resumed(PoolBatchSampler(200, 4), made.state_dict())) == []


def test_a_state_taken_before_an_epoch_begins_is_at_its_start():
    made = sampler()
    list(made)
    made.set_epoch(1)
    assert list(resumed(sampler(), made.state_dict())) == list(made)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"batch_size": 1}, ValueError, "batch_size must be at least 2, got 1"),
        ({"batch_size": 4.0}, TypeError, "batch_size must be an integer, got 4.0"),
        ({"n_instances": 3}, ValueError, "has 3 instances, fewer than one global batch of batch_size 4 x 1"),
        ({"n_instances": 7, "world_size": 2}, ValueError, "fewer than one global batch of batch_size 4 x 2"),
        (
            {"planning": Planning(planner(4), Pools(3))},
            ValueError,
            "pool_size must be at least one global batch, 4 = batch_size 4 x 1 processes, got 3",
        ),
        (
            {"n_instances": 11, "world_size": 2, "drop_last": False},
            ValueError,
            "a last batch of 3 instances for 2 processes, fewer than two for each",
        ),
        ({"seed": -1}, ValueError, "seed must be at least 0, got -1"),
        ({"seed": True}, TypeError, "seed must be an integer, got True"),
        ({"seed": 1.5}, TypeError, "seed must be an integer, got 1.5"),
        ({"n_instances": 100.0}, TypeError, "n_instances must be an integer, got 100.0"),
        ({"planning": planner(4)}, TypeError, r"planning must be Planning\(plan_pool, Pools\(size\)\) or None, got <"),
        ({"rank": 1}, ValueError, "rank must"),
        ({"rank": 0.0}, TypeError, "rank must be an integer, got 0.0"),
        ({"world_size": 0}, ValueError, "world_size must"),
    ],
)
def test_refuses_bad_arguments(arguments, error, words):
    planning = Planning(planner(4), Pools(16))
    with pytest.raises(error, match=words):
        PoolBatchSampler(**{"n_instances": 100, "batch_size": 4, "planning": planning} | arguments)


def test_takes_numpys_small_integers():
    """In uint8, 100 x 3 is 44."""
    small = PoolBatchSampler(np.int16(1000), np.uint8(100), rank=np.uint8(2), world_size=np.uint8(3))
    assert list(small) == list(PoolBatchSampler(1000, 100, rank=2, world_size=3))
    assert [type(value) for value in (small.batch_size, small.rank, len(small))] == [int, int, int]


@pytest.mark.parametrize(
    ("epoch", "error", "words"),
    [
        (-1, ValueError, "epoch must be at least 0, got -1"),
        (0.5, TypeError, "epoch must be an integer, got 0.5"),
        (True, TypeError, "epoch must be an integer, got True"),
        (float("nan"), TypeError, "epoch must be an integer, got nan"),
    ],
)
def test_set_epoch_refuses(epoch, error, words):
    with pytest.raises(error, match=words):
        PoolBatchSampler(100, 4).set_epoch(epoch)


def test_a_sampler_that_was_loaded_has_trained_no_batch():
    made = PoolBatchSampler(100, 4)
    batches = iter(made)
    next(batches)
    state = made.state_dict()
    next(batches)
    assert made.trained_batch() is not None
    made.load_state_dict(state)
    assert made.trained_batch() is None
    assert made.likely_false_negatives() is None


def test_the_mask_of_a_hand_written_loop():
    """A pool's pairs reach all its batches and come back from a checkpoint. They do not reach other pools."""

    def plan_pool(indices, *, seed, epoch):
        batches = np.random.default_rng(seed).permutation(len(indices)).reshape(-1, 4)
        near = np.stack([np.arange(0, len(indices), 2), np.arange(1, len(indices), 2)], axis=1)
        pairs.extend(tuple(pair) for pair in indices[near].tolist())
        return PlannedPool(batches, near)

    def served(made, batches):
        for batch in batches:
            assert made.trained_batch().tolist() == batch.tolist()
            mask = made.likely_false_negatives()
            assert mask.tolist() == [[(a, b) in pairs for b in batch.tolist()] for a in batch.tolist()]
            yield mask.any().item()

    def make():
        return PoolBatchSampler(98, 4, planning=Planning(plan_pool, Pools(32)), drop_last=False)

    pairs = []
    made = make()
    assert made.trained_batch() is None
    assert made.likely_false_negatives() is None
    masks = list(served(made, PoolLoader(torch.arange(98), made)))
    assert len(masks) == 25
    assert any(masks)

    batches = served(made, PoolLoader(torch.arange(98), made))
    for _ in range(10):
        next(batches)
    restored = resumed(make(), made.state_dict())
    restored.plan()
    assert restored.trained_batch() is None  # since it was resumed, it has served none
    assert restored.likely_false_negatives() is None
    restored = resumed(make(), made.state_dict())
    assert list(served(restored, PoolLoader(torch.arange(98), restored))) == masks[10:]
    uniform = PoolBatchSampler(98, 4)
    next(iter(PoolLoader(torch.arange(98), uniform)))
    assert not uniform.likely_false_negatives().any()
