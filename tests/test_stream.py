"""Streams: data that can only be read in order, served in composed batches from a buffer."""

import weakref
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from parts import (
    Exact,
    Model,
    Points,
    SavesAtBatchStart,
    SavesBefore,
    assert_equal,
    fit,
    pool_order,
    rng_states,
    same_cluster_share,
    trainer,
    walker,
)
from processes import batches_by_step, run, run_all
from stream_parts import STREAMS, Shuffled, Sized, SizedStateful, Stateful, Stream, StreamData
from torch.utils.data import IterableDataset

from bs_lightning import BatchFetcher, BatchSamplerCallback, PlannedPool, RWRComposer, StreamLoader, encode
from bs_lightning.graphs import ExactGraph
from bs_lightning.rules import AbovePositive


def served(loader):
    return [batch[0].tolist() for batch in loader]


# Without Lightning


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(4, 90),
    batch_size=st.integers(2, 9),
    n_pool_batches=st.integers(1, 5),
    drop_last=st.booleans(),
    kind=st.sampled_from([Stream, Sized, Shuffled, Stateful]),
    seed=st.integers(0, 9),
)
def test_each_instance_comes_once(n, batch_size, n_pool_batches, drop_last, kind, seed):
    batch_size = min(batch_size, n)
    assume(drop_last or n % batch_size != 1)  # a last batch of one is left out
    loader = StreamLoader(kind(n), batch_size, pool_size=n_pool_batches * batch_size, drop_last=drop_last, seed=seed)
    for epoch in range(2):
        loader.set_epoch(epoch)
        batches = served(loader)
        indices = sum(batches, [])
        assert len(set(indices)) == len(indices) == (n // batch_size * batch_size if drop_last else n)
        assert {len(batch) for batch in batches[:-1]} <= {batch_size}
        again = StreamLoader(kind(n), batch_size, pool_size=loader.pool_size, drop_last=drop_last, seed=seed)
        again.set_epoch(epoch)
        assert served(again) == batches
    if kind is Sized:
        assert len(loader) == len(batches)


def test_a_rehearsal_composes_as_many_instances_as_a_pool_has():
    sizes = []

    def compose(embeddings, batch_size, *, seed, epoch):
        sizes.append(len(embeddings))
        return pool_order(embeddings, batch_size, seed=seed, epoch=epoch)

    fit(Model(), StreamData(4, 24), walker(10, composer=compose, warmup_epochs=1), max_epochs=2)
    assert sizes == [12, 12, 12]  # 10 instances are two batches and a half, and the rehearsal comes first


WORKERS = [
    {},
    {"num_workers": 1},
    {"num_workers": 2, "prefetch_factor": 1},
    {"num_workers": 2, "persistent_workers": True},
    {"num_workers": 2, "persistent_workers": True, "prefetch_factor": 4},
]


@pytest.mark.parametrize("workers", WORKERS, ids=str)
@pytest.mark.parametrize("kind", [Stream, Shuffled])
def test_each_instance_comes_once_from_workers(workers, kind):
    loader = StreamLoader(kind(103), 8, pool_size=32, drop_last=False, **workers)
    epochs = []
    for epoch in range(3):
        loader.set_epoch(epoch)
        if epoch == 1:
            next(iter(loader))  # a pass that ends early leaves nothing behind
        epochs.append(served(loader))
        assert sorted(sum(epochs[-1], [])) == list(range(103))
    assert epochs[0] != epochs[1] != epochs[2]
    if kind is Shuffled:  # workers know the epoch
        assert sorted(epochs[0][0]) != sorted(epochs[1][0])
        assert any(min(epoch[0]) > 32 or max(epoch[0]) > 40 for epoch in epochs)
    if len(workers) == 1:
        assert epochs[0] == served(StreamLoader(kind(103), 8, pool_size=32, drop_last=False))
    loader.close()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_each_instance_comes_once_from_workers_that_are_not_forked(method):
    loader = StreamLoader(Stream(103), 8, pool_size=32, drop_last=False, num_workers=2, multiprocessing_context=method)
    assert sorted(sum(served(loader), [])) == list(range(103))


def test_random_batches_mix_a_pool_and_no_more():
    batches = served(StreamLoader(Stream(96), 8, pool_size=32))
    for start in range(0, 12, 4):
        pool = sum(batches[start : start + 4], [])
        assert sorted(pool) == list(range(start * 8, start * 8 + 32))
        assert pool != sorted(pool)


def test_a_known_length_makes_near_equal_pools():
    sizes = {Stream: [], Sized: []}
    for kind, seen in sizes.items():

        def plan(indices, *, seed, epoch, seen=seen):
            seen.append(len(indices))
            return PlannedPool(indices.reshape(-1, 8))

        list(StreamLoader(kind(104), 8, pool_size=40, plan_pool=plan))
    assert sizes == {Stream: [40, 40, 24], Sized: [40, 32, 32]}


def test_each_pool_of_each_pass_has_its_own_seed():
    seeds = []

    def plan(indices, *, seed, epoch):
        seeds.append(seed)
        return PlannedPool(indices.reshape(-1, 8))

    loader = StreamLoader(Stream(96), 8, pool_size=32, plan_pool=plan)
    for epoch in range(2):
        loader.set_epoch(epoch)
        list(loader)
    assert len(set(seeds)) == len(seeds) == 6


def test_workers_have_their_own_seed_in_each_pass_and_process(monkeypatch):
    class Seeds(IterableDataset):
        def __iter__(self):
            yield from [torch.initial_seed()] * 8

    monkeypatch.setattr(torch.distributed, "all_gather_object", lambda values, value: None)  # as if all were alike
    seeds = set()
    for rank in range(2):
        loader = StreamLoader(Seeds(), 4, pool_size=16, num_workers=1, rank=rank, world_size=2)
        for epoch in range(2):
            loader.set_epoch(epoch)
            seeds |= set(torch.cat(list(loader)).tolist())
    assert len(seeds) == 4


def test_the_memory_holds_one_pool():
    class Instance:
        pass

    alive, n_alive = weakref.WeakSet(), []

    class Instances(IterableDataset):
        def __iter__(self):
            for _ in range(50):
                instance = Instance()
                alive.add(instance)
                n_alive.append(len(alive))
                yield instance

    for _ in StreamLoader(Instances(), 5, pool_size=20, collate_fn=lambda batch: None):
        pass
    assert max(n_alive) == 20 + 5  # reading goes on by a batch before the pool is freed


def test_plans_when_a_pools_first_batch_is_due_and_reads_no_further():
    """A hand-written loop that encodes the buffer with the model of that moment."""
    events, stream = [], Stateful(96)

    def plan(indices, *, seed, epoch):
        events.append((steps, stream.n_yielded))
        embeddings = encode(indices, BatchFetcher(loader.buffer), lambda batch: batch[1], batch_size=16)
        return PlannedPool(RWRComposer(ExactGraph(5))(embeddings, 8, seed=seed, epoch=epoch))

    loader = StreamLoader(stream, 8, pool_size=32, plan_pool=plan)
    steps, batches = 0, []
    for steps, batch in enumerate(loader, 1):  # noqa: B007
        batches.append(batch[0].tolist())
    assert events == [(0, 32), (4, 64), (8, 96)]
    assert sorted(sum(batches, [])) == list(range(96))
    assert same_cluster_share(batches) > 2 * same_cluster_share(served(StreamLoader(Stateful(96), 8, pool_size=32)))


@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("kind", [Stateful, SizedStateful])
def test_resumes_anywhere(kind, drop_last):
    make = {"batch_size": 8, "pool_size": 32, "drop_last": drop_last}
    whole = StreamLoader(kind(103), **make)
    whole.set_epoch(1)
    expected = served(whole)
    for stop in range(1, len(expected) + 1):
        first, resumed = StreamLoader(kind(103), **make), StreamLoader(kind(103), **make)
        first.set_epoch(1)
        iterator = iter(first)
        for _ in range(stop):
            next(iterator)
        resumed.load_state_dict(first.state_dict())
        assert_equal(resumed.state_dict(), first.state_dict())  # until it serves, it may be saved again
        assert served(resumed) == expected[stop:]
        resumed.set_epoch(2)
        first.set_epoch(2)
        StreamLoader(kind(103), **make).load_state_dict(first.state_dict())  # between two passes
        assert served(resumed) == served(first)  # the state holds for one pass


def test_a_stream_without_state_starts_anew_with_a_warning():
    for kind, workers in ((Shuffled, {}), (Stateful, {"num_workers": 1})):
        first = StreamLoader(kind(50), 8, pool_size=16, **workers)
        next(iterator := iter(first))
        state = first.state_dict()
        del iterator
        resumed = StreamLoader(kind(50), 8, pool_size=16, **workers)
        resumed.load_state_dict(state)
        with pytest.warns(UserWarning, match=r"after 1 batches of epoch 0.*starts anew.*num_workers=0"):
            assert len(set(sum(served(resumed), []))) == 48


def test_nothing_is_drawn_from_the_global_random_states():
    before = rng_states()
    list(StreamLoader(Stream(50), 8))
    assert_equal(rng_states(), before)


def test_instances_of_any_kind_come_back_from_workers():
    class Kinds(torch.utils.data.IterableDataset):
        def __iter__(self):
            for i in range(4):
                yield {
                    "b": torch.full((2,), i, dtype=torch.bfloat16),
                    "zero": torch.tensor(i),
                    "array": np.full(3, i),
                    "text": str(i),
                    "learned": torch.full((1,), float(i), requires_grad=True).detach(),
                    "sparse": torch.eye(2).to_sparse(),
                }

    (here,) = StreamLoader(Kinds(), 4, collate_fn=list)
    (there,) = StreamLoader(Kinds(), 4, collate_fn=list, num_workers=1)
    for a, b in zip(here, there, strict=True):
        a["sparse"], b["sparse"] = a["sparse"].to_dense(), b["sparse"].to_dense()
        assert_equal(a, b)
        b["zero"] += 1  # memory of its own


@pytest.mark.parametrize(
    ("stream", "settings", "error", "words"),
    [
        (Points(), {}, TypeError, "stream must be a torch.utils.data.IterableDataset, got Points"),
        (Stream(), {"batch_size": 1}, ValueError, "batch_size must be at least 2"),
        (Stream(), {"pool_size": 4}, ValueError, "pool_size must be at least one global batch"),
        (Stream(), {"shuffle": True}, ValueError, "shuffle=True is no argument"),
        (Stream(), {"rank": 1}, ValueError, "rank must lie in"),
        (Stream(), {"plan_pool": 3}, TypeError, "plan_pool must be callable, such as a function of"),
        (Stream(), {"world_size": 2, "drop_last": False}, ValueError, "drop_last=False serves the last instances"),
        (Sized(5), {}, ValueError, "The stream has 5 instances, fewer than batch_size=8"),
    ],
)
def test_refuses(stream, settings, error, words):
    with pytest.raises(error, match=words):
        StreamLoader(stream, **{"batch_size": 8} | settings)


class Once(IterableDataset):
    """Can be read once only."""

    def __init__(self):
        self.rest = iter(range(16))

    def __iter__(self):
        return self.rest


def test_a_stream_that_breaks_its_promises():
    with pytest.raises(ValueError, match="ended within its first batch of batch_size=8"):
        list(StreamLoader(Stream(5), 8))
    once = Once()
    assert len(list(StreamLoader(once, 8))) == 2
    with pytest.raises(ValueError, match=r"iter\(\) starts it anew"):
        list(StreamLoader(once, 8))
    stream = Sized(80)
    loader = StreamLoader(stream, 8)
    del stream.order[50:]
    with pytest.warns(UserWarning, match=r"ended after 6 batches, but its len\(\) promised 10"):
        list(loader)
    with pytest.raises(TypeError, match="The length of Stream is not known"):
        len(StreamLoader(Stream(), 8))


def test_refuses_a_damaged_state():
    loader = StreamLoader(Stateful(50), 8, pool_size=16)
    next(iterator := iter(loader))
    state = loader.state_dict()
    del iterator
    for change, words in (
        ({"stream": 9}, "stream=9"),
        ({"served": -1}, "served=-1"),
        ({"served": 7}, "served=7"),
        ({"pool": 3}, "pool"),
    ):
        with pytest.raises((ValueError, TypeError), match=words):
            StreamLoader(Stateful(50), 8).load_state_dict(state | change)
    other = StreamLoader(Stateful(50), 4)
    other.load_state_dict(state)
    with pytest.raises(ValueError, match="global_batch_size=8, now it is 4"):
        list(other)


@pytest.mark.parametrize(
    ("planned", "error", "words"),
    [
        (np.arange(8).reshape(2, 4), TypeError, r"must return a PlannedPool\(batches\), got ndarray"),
        (PlannedPool(np.arange(8).reshape(2, 4), np.array([[0, 8]])), ValueError, r"positions in \[0, 8\)"),
    ],
    ids=["array", "pairs"],
)
def test_what_a_planner_returns_is_checked(planned, error, words):
    with pytest.raises(error, match=words):
        list(StreamLoader(Stream(8), 4, pool_size=8, plan_pool=lambda indices, *, seed, epoch: planned))


def test_pairs_of_other_integers_are_saved_and_restored():
    def plan(indices, *, seed, epoch):
        return PlannedPool(np.arange(len(indices)).reshape(-1, 4), np.array([[0, 1]], dtype=np.int32))

    loader = StreamLoader(Stream(16), 4, pool_size=8, plan_pool=plan)
    next(iter(loader))
    StreamLoader(Stream(16), 4, pool_size=8, plan_pool=plan).load_state_dict(loader.state_dict())


# With Lightning


@pytest.mark.parametrize("workers", [{}, {"num_workers": 2}, {"num_workers": 1, "persistent_workers": False}], ids=str)
@pytest.mark.parametrize("kind", ["Stream", "Sized", "Shuffled"])
@pytest.mark.parametrize("warmup_epochs", [0, 1])
def test_training_serves_each_instance_once(kind, workers, warmup_epochs):
    model = Model()
    data = StreamData(8, 103, kind, drop_last=False, **workers)
    made = fit(model, data, walker(40, warmup_epochs=warmup_epochs), max_epochs=3)
    for epoch in range(3):
        assert sorted(sum(model.epochs[epoch], [])) == list(range(103))
        assert (same_cluster_share(model.epochs[epoch]) > 0.125) == (epoch >= warmup_epochs)
    assert {"batch_sampler/hardness", "batch_sampler/walk_seconds"} <= made.callback_metrics.keys()
    assert made.global_step == 39


@pytest.mark.parametrize("kind", ["Stream", "Sized"])
def test_the_first_pool_is_logged(kind):
    """Lightning fetches the first batch of a stream without a length before the epoch starts."""
    made = fit(Model(), StreamData(8, 96, kind), walker(96), max_epochs=1)
    assert {"batch_sampler/hardness", "batch_sampler/walk_seconds"} <= made.callback_metrics.keys()


class SeesWeights(Model):
    """Notes at each encoding how many steps the weights have had."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def embed(self, batch):
        self.seen.append((self.trainer.global_step, len(batch[0])))
        return self(batch)


@pytest.mark.parametrize("kind", ["Stream", "Sized"])
@pytest.mark.parametrize("limit", [None, 9])
def test_when_pools_are_encoded(kind, limit):
    """Just before a pool's first step. Lightning fetches a batch ahead if nothing tells the epoch's length."""
    model = SeesWeights()
    limits = {} if limit is None else {"limit_train_batches": limit}
    fit(model, StreamData(8, 96, kind), walker(32), max_epochs=2, **limits)
    early = kind == "Stream" and limit is None
    if limit is None:
        assert model.seen == [(step, 32) for step in ((0, 3, 7, 12, 15, 19) if early else (0, 4, 8, 12, 16, 20))]
    else:
        assert sorted({step for step, _ in model.seen}) == [0, 5, 9, 14]
        assert sum(size for _, size in model.seen) == 2 * 8 * 9
    assert all(len(set(sum(epoch, []))) == 8 * (limit or 12) for epoch in model.epochs.values())


@pytest.mark.parametrize("kind", ["Stream", "Sized", "Shuffled"])
def test_overfit_batches_serves_the_same_batches_each_epoch(kind):
    model = Model()
    fit(model, StreamData(8, 96, kind), walker(), overfit_batches=3, max_epochs=3)
    assert len(model.epochs[0]) == 3
    assert model.epochs[0] == model.epochs[1] == model.epochs[2]


@pytest.mark.parametrize("kind", ["Stream", "Sized"])
def test_encoding_leaves_no_trace(kind):
    def trained(*callbacks):
        torch.manual_seed(0)
        model = Model(dropout=0.1)
        fit(model, StreamData(8, 100, kind, seed=3), *callbacks, max_epochs=3)
        return model.batches, model.state_dict(), rng_states()

    assert_equal(trained(walker(None, composer=pool_order, warmup_epochs=1)), trained())


@pytest.mark.parametrize("kind", ["Stateful", "SizedStateful"])
@pytest.mark.parametrize("flags", [{}, {"limit_train_batches": 7}], ids=str)
def test_resumed_batches_are_those_of_the_uninterrupted_run(kind, flags, tmp_path):
    def train(model, ckpt_path=None, *callbacks):
        seed = 11 if ckpt_path is None else 12  # that of the checkpoint goes before it
        data = StreamData(8, 103, kind, seed=seed, drop_last=False)
        settings = {"max_epochs": 3, "enable_checkpointing": True, "default_root_dir": tmp_path} | flags
        fit(model, data, walker(32, warmup_epochs=1), *callbacks, ckpt_path=ckpt_path, **settings)
        return model.batches

    torch.manual_seed(0)
    whole = train(Exact(), None, ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1))
    per_epoch = len(whole) // 3
    for step in (2, per_epoch - 1, per_epoch, per_epoch + 3, per_epoch + 4, 2 * per_epoch + 1):
        resumed = train(Exact(), tmp_path / f"step={step}.ckpt")
        if kind == "Stateful" and not flags and step == per_epoch:
            # Lightning fetches the next epoch's first batch before it has counted the warm-up that ended.
            assert [len(batch) for batch in resumed] == [len(batch) for batch in whole[step:]]
            assert [len(set(sum(resumed[start : start + per_epoch], []))) for start in (0, per_epoch)] == [103, 103]
        else:
            assert resumed == whole[step:], f"from step {step}"


@pytest.mark.parametrize("kind", ["Stateful", "SizedStateful"])
def test_resumes_where_the_optimizer_asks_for_the_number_of_steps(kind, tmp_path):
    """Lightning then fetches from a stream of unknown length before it has restored its position."""

    class Asks(Exact):
        def configure_optimizers(self):
            assert self.trainer.estimated_stepping_batches
            return super().configure_optimizers()

    def train(ckpt_path=None, *callbacks):
        torch.manual_seed(0)
        model, data = Asks(), StreamData(8, 96, kind, seed=7)
        settings = {"max_epochs": 3, "enable_checkpointing": True, "default_root_dir": tmp_path}
        fit(model, data, walker(32), *callbacks, ckpt_path=ckpt_path, **settings)
        return model.batches

    class Saves(Callback):
        def on_train_start(self, trainer, module):
            trainer.save_checkpoint(tmp_path / f"start={trainer.global_step}.ckpt")

        def on_train_epoch_end(self, trainer, module):
            trainer.save_checkpoint(tmp_path / f"end={trainer.global_step}.ckpt")

    whole = train(None, Saves(), ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1))
    for name, step in (("step", 5), ("step", 12), ("end", 12), ("step", 17), ("start", 17), ("end", 24)):
        assert train(tmp_path / f"{name}={step}.ckpt", Saves()) == whole[step:], name
    # A checkpoint that lacks the stream's state is resumed with fresh pools. A save before its first step keeps these.
    for step in (1, 17):
        lacking = torch.load(tmp_path / f"step={step}.ckpt", weights_only=True)
        del lacking["StreamData"]
        torch.save(lacking, tmp_path / "lacking.ckpt")
        with pytest.warns(UserWarning, match="not known: the stream starts anew"):
            resumed = train(tmp_path / "lacking.ckpt", Saves())
        with pytest.warns(UserWarning, match="not known: the stream starts anew"):
            assert train(tmp_path / f"start={step}.ckpt") == resumed


def test_saves_between_two_epochs_where_each_epoch_has_a_new_loader(tmp_path):
    def train(*callbacks, **more):
        model = Exact()
        data = StreamData(8, 96, "SizedStateful", seed=7)
        fit(model, data, walker(32), *callbacks, max_epochs=3, reload_dataloaders_every_n_epochs=1, **more)
        return model.epochs

    torch.manual_seed(0)
    whole = train(SavesBefore(tmp_path, "on_train_epoch_start"))
    torch.manual_seed(0)
    assert train(ckpt_path=tmp_path / "start=12.ckpt") == {epoch: whole[epoch] for epoch in (1, 2)}


def test_saves_at_the_start_of_a_second_fit(tmp_path):
    """The first one was ended by `max_steps` within an epoch. Lightning begins the next one."""

    def data():
        return StreamData(8, 96, "SizedStateful", seed=7)

    made = trainer(walker(32), SavesBefore(tmp_path, "on_train_start"), max_epochs=-1, max_steps=7)
    first, model, resumed = Exact(), Exact(), Exact()
    made.fit(first, datamodule=data())
    made.fit_loop.epoch_loop.max_steps = 20
    made.fit(model, datamodule=data())
    fit(resumed, data(), walker(32), ckpt_path=tmp_path / "start=7.ckpt", max_epochs=-1, max_steps=20)
    assert resumed.epochs == model.epochs


def test_the_position_is_not_lost_where_a_resumed_run_cannot_read(tmp_path, monkeypatch):
    def train(ckpt_path=None, *callbacks):
        torch.manual_seed(0)
        model, data = Exact(), StreamData(8, 96, "SizedStateful", seed=7)
        settings = {"max_epochs": 2, "enable_checkpointing": True, "default_root_dir": tmp_path}
        fit(model, data, walker(32), *callbacks, ckpt_path=ckpt_path, **settings)
        return model.batches

    def fail(stream, number):
        raise OSError("the network is down")

    whole = train(None, ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1))
    with monkeypatch.context() as patch:
        patch.setattr(Stream, "item", fail)
        with pytest.raises(OSError, match="network is down"):
            train(tmp_path / "step=17.ckpt", OnExceptionCheckpoint(tmp_path, "failed"))
    assert train(tmp_path / "failed.ckpt") == whole[17:]


def test_a_run_of_max_steps_goes_on_from_an_epochs_end(tmp_path):
    """Lightning would train one more batch of the epoch that has ended, and then begin the next."""

    def train(model, folder, ckpt_path=None):
        each_epoch = ModelCheckpoint(folder, filename="{step}", save_top_k=-1, save_on_train_epoch_end=True)
        within = ModelCheckpoint(folder, filename="{step}", save_top_k=-1, every_n_train_steps=30)
        saves = each_epoch, within
        settings = {"max_epochs": -1, "max_steps": 40, "enable_checkpointing": True, "default_root_dir": folder}
        data = StreamData(8, 96, "SizedStateful", seed=11)
        fit(model, data, walker(32, warmup_epochs=1), *saves, ckpt_path=ckpt_path, **settings)
        return model

    torch.manual_seed(0)
    whole = train(Exact(), tmp_path)
    for step in (12, 24):
        resumed = train(Exact(), tmp_path / f"from {step}", tmp_path / f"step={step}.ckpt")
        assert resumed.batches == whole.batches[step:]
        assert list(resumed.epochs) == list(range(step // 12, 4))
        for later in (30, 36):
            again = train(Exact(), tmp_path / "again", tmp_path / f"from {step}" / f"step={later}.ckpt")
            assert again.batches == whole.batches[later:]


def test_a_loader_that_nobody_needs_ends_at_once():
    """In a cycle it would wait for the garbage collector, and torch then ten seconds for its workers."""
    loader = StreamData().train_dataloader()
    alive = weakref.ref(loader)
    del loader
    assert alive() is None


class Masks(Exact):
    """Records the mask of each batch."""

    def __init__(self):
        super().__init__()
        self.masks = []

    def training_step(self, batch, batch_idx):
        self.masks.append(self.trainer.datamodule.likely_false_negatives().tolist())
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("kind", ["Stateful", "SizedStateful"])
@pytest.mark.parametrize("first", [5, 11, 12, 23])
def test_a_resumed_run_may_be_resumed_again(kind, first, tmp_path):
    """From each side of an epoch's last batch: Lightning says alike of both that the last batch was fetched."""

    def train(model, folder, ckpt_path=None):
        saves = ModelCheckpoint(folder / "after", filename="{step}", every_n_train_steps=1, save_top_k=-1)
        settings = {"max_epochs": 3, "enable_checkpointing": True, "default_root_dir": folder}
        callbacks = walker(32, mask_nearest=3), saves, SavesAtBatchStart(folder / "before")
        fit(model, StreamData(8, 96, kind, seed=11), *callbacks, ckpt_path=ckpt_path, **settings)
        return model

    torch.manual_seed(0)
    whole = train(Masks(), tmp_path)
    assert any(map(any, whole.masks[first]))
    for saved in ("before", "after"):
        resumed = train(Masks(), tmp_path / saved, tmp_path / saved / f"step={first}.ckpt")
        assert (resumed.batches, resumed.masks) == (whole.batches[first:], whole.masks[first:])
        for path in (f"before/step={first}", "before/step=23", "after/step=24", "before/step=35"):
            step = int(path.partition("=")[2])
            again = train(Masks(), tmp_path / "again", tmp_path / saved / f"{path}.ckpt")
            assert (again.batches, again.masks) == (whole.batches[step:], whole.masks[step:]), f"from {path}"


def test_resuming_a_stream_without_state_warns(tmp_path):
    save = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    for kind in ("Stream", "Sized"):
        settings = {"max_epochs": 2, "enable_checkpointing": True, "default_root_dir": tmp_path}
        fit(Exact(), StreamData(8, 96, kind), walker(32), save, **settings)
        model = Exact()
        with pytest.warns(UserWarning, match="the position in the stream is not known"):
            fit(model, StreamData(8, 96, kind), walker(32), ckpt_path=tmp_path / "step=14.ckpt", **settings)
        assert len(model.epochs[1]) == (10 if kind == "Sized" else 12)
        assert len(set(sum(model.epochs[1], []))) == 8 * len(model.epochs[1])
        for file in tmp_path.glob("*.ckpt"):
            file.unlink()


class Forgets(StreamData):
    def state_dict(self):
        return {}


def test_resuming_without_the_state_of_the_datamodule_warns(tmp_path):
    save = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    settings = {"max_epochs": 1, "enable_checkpointing": True, "default_root_dir": tmp_path}
    fit(Exact(), Forgets(8, 96, "SizedStateful"), walker(32), save, **settings)
    model = Exact()
    with pytest.warns(UserWarning, match="Resuming after 5 batches of epoch 0, but the position in the stream is not"):
        fit(model, Forgets(8, 96, "SizedStateful"), walker(32), ckpt_path=tmp_path / "step=5.ckpt", **settings)
    assert len(model.batches) == 12 - 5


def test_a_loader_without_a_trainer_serves_the_epoch_that_is_set():
    loader, expected = StreamData(8, 100, seed=1).train_dataloader(), StreamLoader(Stream(100), 8, seed=1)
    for epoch in (0, 1):
        for each in (loader, expected):
            each.set_epoch(epoch)
        assert served(loader) == served(expected)


@pytest.mark.parametrize("kind", ["Stream", "Sized"])
def test_the_mask_is_that_of_the_batch_being_trained(kind):
    class Masked(Model):
        def embed(self, batch):
            return batch[1][:, :4], batch[1][:, 4:]

        def training_step(self, batch, batch_idx):
            mask = self.trainer.datamodule.likely_false_negatives()
            assert mask.shape == (len(batch[0]), len(batch[0]))
            seen.append((batch[0][mask.nonzero()]).tolist())
            return super().training_step(batch, batch_idx)

    seen = []
    fit(Masked(), StreamData(8, 103, kind, drop_last=False), walker(32, own_rule=AbovePositive()), max_epochs=1)
    pairs = [pair for found in seen for pair in found]
    assert len(pairs) > 20
    sides = Points(103).points.reshape(103, 2, 4)
    q, d = torch.nn.functional.normalize(sides, dim=2).unbind(1)
    assert all(q[a] @ d[b] > q[a] @ d[a] - 1e-6 or q[b] @ d[a] > q[a] @ d[a] - 1e-6 for a, b in pairs)


@pytest.mark.parametrize("kind", ["Stream", "Stateful"])
def test_looking_into_the_loader_disturbs_nothing(kind):
    class Looks(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if batch_idx == 5:
                assert len(list(trainer.train_dataloader)) == 12
                assert len(list(trainer.datamodule.train_dataloader())) == 12

    class States(Callback):
        def __init__(self):
            self.states = []

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            self.states.append(trainer.datamodule.state_dict())

    def batches_and_states(*callbacks):
        torch.manual_seed(0)
        states = States()
        fit(model := Exact(), StreamData(8, 100, kind, seed=1), *callbacks, states, max_epochs=2)
        return model.batches, states.states

    looked, undisturbed = batches_and_states(Looks(), walker(32)), batches_and_states(walker(32))
    assert looked[0] == undisturbed[0]
    assert_equal(looked[1], undisturbed[1])


@pytest.mark.parametrize("kind", ["Stream", "Stateful", "Sized"])
def test_looking_at_some_batches_in_a_hook_disturbs_nothing(kind):
    """Also where no batch of the epoch has been trained yet, and in the midst of the first and the last."""

    class Notes(Exact):
        def training_step(self, batch, batch_idx):
            masks.append(self.trainer.datamodule.likely_false_negatives())
            return super().training_step(batch, batch_idx)

        def embed(self, batch):
            embedded.append(sorted(batch[0].tolist()))
            return self(batch)

    def look(self, trainer, *args):
        if not isinstance(args[-1], int) or args[-1] in (0, 3, 11):
            batches = iter(trainer.train_dataloader)
            assert all(len(next(batches)[0]) == 8 for _ in range(2))

    hooks = ("on_train_start", "on_train_epoch_start", "on_train_batch_start", "on_train_batch_end")
    runs = []
    for hook in (None, *hooks, "on_train_epoch_end"):
        torch.manual_seed(0)
        masks, embedded = [], []
        callbacks = [] if hook is None else [type("Looks", (Callback,), {hook: look})()]
        model = Notes()
        fit(model, StreamData(8, 96, kind, seed=1), walker(32, mask_nearest=3), *callbacks, max_epochs=2)
        runs.append((model.batches, torch.stack(masks).tolist(), [index for batch in embedded for index in batch]))
    assert all(run == runs[0] for run in runs)
    assert sorted(runs[0][2]) == sorted(2 * list(range(96)))


@pytest.mark.parametrize("stop", [1, 5])
def test_a_state_that_was_saved_with_workers_starts_anew_with_a_warning(stop):
    """Workers read in an order of their own, also in the first pool."""
    saved = StreamLoader(Stateful(96), 8, pool_size=32, num_workers=2)
    for _ in zip(saved, range(stop), strict=False):
        pass
    resumed = StreamLoader(Stateful(96), 8, pool_size=32)
    resumed.load_state_dict(saved.state_dict())
    with pytest.warns(UserWarning, match="the position in the stream is not known: the stream starts anew"):
        next(iter(resumed))


def test_a_stream_that_cannot_be_copied_says_why_it_must_be():
    stream = Stateful(32)
    stream.running = iter(stream)
    with pytest.raises(TypeError) as failed:
        StreamLoader._copied(stream)
    assert "Stateful has a state, so it is read from a copy" in failed.value.__notes__[0]


def test_no_last_batch_of_one_instance():
    with pytest.raises(ValueError, match="a last batch of one of the stream's 17 instances, which has no negatives"):
        StreamLoader(Sized(17), 8, drop_last=False)
    with pytest.warns(UserWarning, match="The stream's last batch would hold one instance"):
        assert len(list(StreamLoader(Stream(17), 8, drop_last=False))) == 2


def test_collate_functions_make_the_views():
    class Views(Model):
        def embed(self, batch):
            assert batch.shape[1:] == (8,)
            return self.encoder(batch)

        def training_step(self, batch, batch_idx):
            _, first, second = batch
            return (self.encoder(first) - self.encoder(second)).square().mean()

    def two_views(items):
        indices, points = torch.utils.data.default_collate(items)
        return indices, points + 0.1, points - 0.1

    def clean(items):
        return torch.stack([point for _, point in items])

    made = fit(Views(), StreamData(collate_fn=two_views, pool_collate_fn=clean, num_workers=1), walker(32))
    assert made.global_step == 24


class Labelled(StreamData):
    def train_labels(self):
        return [0] * 100


class Grouped(StreamData):
    def train_groups(self):
        return [0] * 100


class Referenced(StreamData):
    def reference_embeddings(self):
        return torch.randn(100, 4)


class Cleaned(StreamData):
    def pool_dataset(self):
        return Points()


def by_index(embeddings, batch_size, *, seed, epoch, indices):
    return indices.reshape(-1, batch_size)


@pytest.mark.parametrize(
    ("data", "callback", "words"),
    [
        (StreamData, {"pool_size": "all"}, "is a stream: pool_size='all' needs the length.*Give a number"),
        (StreamData, {"pool_size": 0.5}, "pool_size=0.5 needs the length"),
        (StreamData, {"pool_size": "auto"}, "pool_size='auto' needs the length"),
        (StreamData, {"composer": RWRComposer(replacement=True)}, "replacement=True serves instances more than once"),
        (
            StreamData,
            {"pool_size": None, "refresh_every": 5, "composer": RWRComposer(replacement=True)},
            "refresh_every=5 serves",
        ),
        (StreamData, {"recycle": True}, "recycle=True finds embeddings by the index"),
        (StreamData, {"from_reference": True}, "from_reference=True finds embeddings by the index"),
        (StreamData, {"composer": by_index}, "asks for dataset indices"),
        (Labelled, {}, r"train_labels\(\) gives one value for each index.*Return None"),
        (Grouped, {}, r"train_groups\(\) gives one value for each index"),
        (Referenced, {}, r"reference_embeddings\(\) gives one value for each index"),
        (Cleaned, {}, r"pool_dataset\(\) must not be overridden.*pool_collate_fn"),
        (partial(StreamData, separate_groups=True), {}, "separate_groups=True needs a map-style dataset"),
        (partial(StreamData, reference_rule=AbovePositive()), {}, "reference_rule=AbovePositive.*needs a map-style"),
    ],
)
def test_refuses_what_a_stream_cannot_do(data, callback, words):
    model = Model()
    with pytest.raises((TypeError, ValueError), match=words):
        fit(model, data(), BatchSamplerCallback(warmup_epochs=0, **{"composer": pool_order} | callback))
    assert not model.epochs


def test_a_stream_has_no_dataset_indices():
    class Asks(Model):
        def training_step(self, batch, batch_idx):
            return self.trainer.datamodule.trained_batch()

    with pytest.raises(TypeError, match="gives dataset indices, which a stream has not"):
        fit(Asks(), StreamData(), walker())


# Two processes

TWO = {"per_rank": True, "warmup_epochs": 1, "n": 60, "pool_size": 80, "num_sanity_val_steps": 0}


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    runs = {kind: TWO | {"stream": {"kind": kind, "more": 21}, "mask_nearest": 3} for kind in ("Stream", "Sized")}
    return run_all(tmp_path_factory.mktemp("runs"), runs)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Stream", "Sized"])
def test_two_processes(kind, two_processes):
    """Each reads its own part. Where one part is longer, both end with the shorter one."""
    ranks = two_processes[kind]
    for rank, seen in enumerate(ranks):
        own = range(60 * rank, 60 + rank * 81)
        for epoch in ("0", "1"):
            batches = seen["epochs"][epoch]
            indices = sum(batches, [])
            assert len(batches) == 15
            assert len(set(indices)) == len(indices) == 60
            assert set(indices) <= set(own)
    shares = [same_cluster_share(seen["epochs"][epoch]) for epoch in ("0", "1") for seen in ranks]
    assert max(shares[:2]) < 0.15 < min(shares[2:])
    assert any(mask for seen in ranks for mask in seen["masks"])
    assert all(max(pair) < 4 for seen in ranks for mask in seen["masks"] for pair in mask)
    assert ranks[0]["weights"] == ranks[1]["weights"]


@pytest.mark.slow
def test_two_processes_killed_and_resumed(tmp_path):
    settings = TWO | {"stream": {"kind": "SizedStateful"}, "save_every": 3}
    for kill_at in (8, 23):
        run(tmp_path / "killed", kill_at=kill_at, fails=True, **settings)
    killed, whole = run_all(tmp_path, {"killed": settings, "whole": settings}).values()
    assert batches_by_step(tmp_path / "killed", 2) == batches_by_step(tmp_path / "whole", 2)
    assert [rank["weights"] for rank in killed] == [rank["weights"] for rank in whole]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"per_rank": False}, "Use per_rank=True on 2 processes"),
        ({"stream": {"kind": "Broken"}}, "The process of rank 1 failed to read the stream. OSError: no shard"),
    ],
    ids=str,
)
def test_two_processes_refuse(how, words, tmp_path):
    assert words in run(tmp_path, fails=True, **TWO | {"stream": {"kind": "Stream"}} | how)


def test_no_length_is_promised_by_a_stream_without_one(recwarn):
    fit(Model(), StreamData(8, 96, "Stream"), overfit_batches=20, max_epochs=1)
    assert not [warning for warning in recwarn if "promised" in str(warning.message)]


class Undivided(Stream):
    """Each worker reads all."""

    def __iter__(self):
        return iter([self.item(number) for number in range(len(self.order))])


@pytest.mark.parametrize(
    ("kind", "workers", "warns"), [(Undivided, 2, True), (Undivided, 1, False), (Stream, 2, False)]
)
def test_a_warning_says_that_workers_read_the_same_instances(kind, workers, warns, monkeypatch, recwarn):
    monkeypatch.setitem(STREAMS, "Stream", kind)
    fit(Model(), StreamData(8, 96, num_workers=workers), walker(48, warmup_epochs=0), max_epochs=2)
    said = [each for each in recwarn if "Does each worker read a part of its own" in str(each.message)]
    assert len(said) == warns


def stateful_in_mid_pool():
    loader = StreamLoader(Stateful(64), 4, pool_size=16)
    batches = iter(loader)
    for _ in range(6):
        next(batches)
    return loader.state_dict(), [batch[0].tolist() for batch in batches]


def test_refuses_to_resume_a_stream_that_ends_within_the_pool():
    state, _ = stateful_in_mid_pool()
    resumed = StreamLoader(Stateful(26), 4, pool_size=16)
    resumed.load_state_dict(state)
    words = r"not that of the checkpoint: of its pool, the processes read \[16\] instances then, and \[10\] now"
    with pytest.raises(ValueError, match=words):
        next(iter(resumed))


def test_a_pool_that_cannot_be_read_after_a_resume_is_saved_again():
    state, rest = stateful_in_mid_pool()
    cannot = StreamLoader(Stateful(64), 4, pool_size=16)
    cannot.load_state_dict(state)
    cannot.stream.points = None
    with pytest.raises(TypeError):
        next(iter(cannot))
    resumed = StreamLoader(Stateful(64), 4, pool_size=16)
    resumed.load_state_dict(cannot.state_dict())
    assert served(resumed) == rest


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"batches": np.full((4, 4), 3)}, "each position of the pool once"),
        ({"readings": [[1]]}, "two counts and a state for each process"),
        ({"readings": [["a", "b", None]]}, "two counts and a state for each process"),
    ],
)
def test_refuses_a_damaged_pool(change, words):
    state, _ = stateful_in_mid_pool()
    if "batches" in change:
        change = {"batches": torch.from_numpy(change["batches"])}
    with pytest.raises(ValueError, match=words):
        StreamLoader(Stateful(64), 4, pool_size=16).load_state_dict(state | {"pool": state["pool"] | change})
