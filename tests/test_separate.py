"""Groups are kept out of each other's batches, in uniform and in composed epochs."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from parts import Data, Model, fit, pool_order, walker

from bs_lightning import ExactGraph, PoolBatchSampler, RWRComposer
from bs_lightning.separate import separate, separate_order


def repetitions(batches, groups):
    return sum(len(batch) - len(set(groups[list(batch)].tolist())) for batch in batches)


@st.composite
def grouped_batches(draw):
    n, size = draw(st.integers(1, 8)), draw(st.integers(1, 8))
    groups, group = [], 0
    while len(groups) < n * size:
        groups += [group] * draw(st.integers(1, n))
        group += 1
    return n, size, np.array(groups[: n * size])


@given(grouped_batches(), st.integers(0, 2**32 - 1))
def test_separates_whatever_can_be_separated(drawn, seed):
    n, size, groups = drawn
    batches = np.arange(n * size).reshape(n, size)  # groups stand together: as bad as can be
    result = separate(batches, groups, seed)
    assert repetitions(result, groups) == 0
    assert sorted(result.ravel().tolist()) == list(range(n * size))
    assert np.array_equal(result, separate(batches, groups, seed))
    assert np.array_equal(batches, np.arange(n * size).reshape(n, size))


@given(grouped_batches(), st.integers(0, 7), st.integers(0, 2**32 - 1))
def test_separates_the_remainder_too(drawn, rest, seed):
    n, size, groups = drawn
    rest = min(rest, size - 1)
    spare = np.arange(rest) + groups.max() + 1
    if n >= 2:
        spare[1:2] = spare[:1]  # two of a group
    groups = np.concatenate([groups, spare])
    order = np.arange(len(groups))
    result = separate_order(order, groups, size, seed)
    assert sorted(result.tolist()) == order.tolist()
    assert repetitions(np.array_split(result, range(size, len(result), size)), groups) == 0


def test_what_comes_into_the_remainder_shares_no_group_with_it():
    groups = np.array([1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 1])
    result = separate_order(np.arange(11), groups, 4, seed=0)
    assert repetitions(np.split(result, [4, 8]), groups) == 0


def test_exchanges_nothing_where_nothing_repeats():
    batches = np.arange(12).reshape(3, 4)
    assert separate(batches, np.arange(12), seed=0) is batches


def test_exchanges_no_more_than_it_must():
    batches = np.arange(400).reshape(40, 10)
    groups = np.arange(400)
    groups[1] = groups[0]
    assert (separate(batches, groups, seed=0) != batches).sum() == 2


class Grouped(Data):
    def train_groups(self):
        return np.arange(self.n) // 5


@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("composer", [None, pool_order], ids=["walk", "order"])
def test_no_batch_holds_two_of_a_group_and_each_instance_is_served(drop_last, composer):
    model = Model()
    composer = {} if composer is None else {"composer": composer}
    fit(
        model,
        Grouped(8, 102, drop_last=drop_last, separate_groups=True),
        walker(24, warmup_epochs=1, **composer),
        max_epochs=3,
    )
    for batches in model.epochs.values():
        assert repetitions([np.array(batch) for batch in batches], np.arange(102) // 5) == 0
        counts = Counter(index for batch in batches for index in batch)
        assert set(counts.values()) == {1}
        assert len(counts) == (96 if drop_last else 102)


def test_composed_batches_hold_groups_without_the_option():
    model = Model()
    fit(model, Grouped(8, 100), walker(32), max_epochs=1)
    assert repetitions([np.array(batch) for batch in model.batches], np.arange(100) // 5) > 0


def test_a_resumed_epoch_goes_on(tmp_path):
    def run(**kwargs):
        model = Model()
        saves = ModelCheckpoint(tmp_path, every_n_train_steps=5, save_top_k=-1, filename="{step}")
        data = Grouped(8, 100, separate_groups=True, seed=3)
        fit(model, data, walker(24, composer=pool_order), saves, enable_checkpointing=True, **kwargs)
        return model.batches

    whole = run()
    assert run(ckpt_path=tmp_path / "step=5.ckpt") == whole[5:]


@pytest.mark.parametrize("warmup_epochs", [0, 1])
def test_refuses_to_go_on_with_other_groups(tmp_path, warmup_epochs):
    def run(separate_groups, **kwargs):
        saves = ModelCheckpoint(tmp_path, every_n_train_steps=5, save_top_k=-1, filename="{step}")
        data = Grouped(8, 100, separate_groups=separate_groups, seed=3)
        callback = walker(24, warmup_epochs=warmup_epochs)
        fit(Model(), data, callback, saves, enable_checkpointing=True, max_epochs=1, **kwargs)

    run(False)
    with pytest.raises(ValueError, match="in the middle of an epoch with different groups"):
        run(True, ckpt_path=tmp_path / "step=5.ckpt")


def test_a_sampler_refuses_to_go_on_with_other_groups():
    made, other = (PoolBatchSampler(40, 4, groups=np.arange(40) // size) for size in (2, 3))
    next(iter(made))
    with pytest.raises(ValueError, match="in the middle of an epoch with different groups"):
        other.load_state_dict(made.state_dict())


def test_instances_that_were_exchanged_are_masked_too():
    class Asks(Model):
        marked = 0

        def training_step(self, batch, batch_idx):
            data = self.trainer.datamodule
            trained, mask = data.trained_batch(), data.likely_false_negatives()
            near = [pools[-1][index] for index in trained.tolist()]
            for row, i in enumerate(trained.tolist()):
                for column, j in enumerate(trained.tolist()):
                    expected = i != j and j in near[row] and i in near[column]
                    assert mask[row, column] == (expected or (i != j and i // 5 == j // 5))
                    Asks.marked += expected
            return super().training_step(batch, batch_idx)

    pools = []

    class Keeps(RWRComposer):
        def __call__(self, embeddings, batch_size, *, indices, **kwargs):
            batches = super().__call__(embeddings, batch_size, **kwargs)
            pools.append({int(i): set(indices[row].tolist()) for i, row in zip(indices, self.neighbors, strict=True)})
            return batches

    callback = walker(48, composer=Keeps(ExactGraph(5)), mask_nearest=5)
    fit(Asks(), Grouped(8, 96, separate_groups=True), callback, max_epochs=1)
    assert Asks.marked > 20


def test_who_looks_into_the_loader_sees_no_two_of_a_group():
    class Looks(Callback):
        def on_train_start(self, trainer, module):
            seen.extend(batch[0].tolist() for batch in trainer.train_dataloader)

    seen = []
    fit(Model(), Grouped(8, 96, separate_groups=True), Looks(), max_epochs=1)
    assert len(seen) == 12
    assert repetitions(seen, np.arange(96) // 5) == 0


class OneGroup(Data):
    def train_groups(self):
        return np.minimum(np.arange(self.n), 80)  # 20 instances of group 80


def test_refuses_a_group_that_is_too_large():
    with pytest.raises(
        ValueError, match="Cannot keep the 20 instances of group 80 apart: an epoch has 12 full batches"
    ):
        fit(Model(), OneGroup(8, 100, separate_groups=True), walker())


class TwoGroups(Data):
    def train_groups(self):
        return np.stack([np.arange(self.n), np.arange(self.n) // 5], axis=1)


def test_refuses_several_groups_of_an_instance():
    with pytest.raises(
        ValueError,
        match=r"give each instance one group, \[N\], got groups of shape \[100, 2\]",
    ):
        fit(Model(), TwoGroups(8, 100, separate_groups=True), walker())


def test_refuses_batches_that_share_instances():
    callback = walker(composer=RWRComposer(replacement=True), warmup_epochs=1)
    with pytest.raises(ValueError, match="separate_groups=True needs batches that share no instances"):
        fit(Model(), Grouped(8, 100, separate_groups=True), callback)


def test_refuses_groups_of_another_length():
    with pytest.raises(ValueError, match="groups must have length 20, got 19"):
        PoolBatchSampler(20, 5, groups=np.arange(19))
