"""The rehearsal before training, messages between processes, and errors that new users meet."""

import pickle
import re
import threading
import time
from functools import partial

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping
from parts import Data, Model, Points, assert_equal, fit, pool_order, rng_states, same_cluster_share, walker
from processes import run
from stream_parts import StreamData

from bs_lightning import BatchSamplerDataModule, Composer, ExactGraph, RWRComposer
from bs_lightning.compose import as_composer
from bs_lightning.plugin import callback, planner


class Trained(Callback):
    """Counts the steps that were trained."""

    steps = 0

    def on_train_batch_end(self, *_):
        self.steps += 1


def wrong_signature(embeddings, batch_size):
    return pool_order(embeddings, batch_size, seed=0, epoch=0)


def failing_graph(embeddings, *, seed=0):
    raise ValueError("no graph")


def no_batches(embeddings, batch_size, *, seed, epoch):
    return np.zeros((1, batch_size), dtype=int)


@pytest.mark.parametrize(
    ("composer", "error", "words"),
    [
        (wrong_signature, TypeError, "unexpected keyword argument 'seed'"),
        (RWRComposer(failing_graph), ValueError, "no graph"),
        (
            RWRComposer(ExactGraph(5), lambda epoch: 2.0),
            ValueError,
            r"must lie in \(0, 1\], got 2.0",
        ),
        (no_batches, ValueError, "must return batches of shape"),
    ],
    ids=["signature", "graph", "walk", "batches"],
)
@pytest.mark.parametrize(
    "more",
    [{"warmup_epochs": 1}, {"warmup_epochs": 1, "recycle": True}, {"pool_size": "auto"}],
    ids=str,
)
def test_what_cannot_work_fails_before_uniform_batches(composer, error, words, more):
    trained = Trained()
    with pytest.raises(error, match=words):
        fit(Model(), Data(8, 96), walker(composer=composer, **more), trained, max_epochs=3)
    assert trained.steps == 0


def test_a_mask_that_cannot_work_fails_before_the_warm_up():
    class Forgets(Composer):
        finds_nearest = True
        neighbors = np.zeros(5, dtype=np.int32)

        def __call__(self, embeddings, batch_size, *, seed, epoch):
            return pool_order(embeddings, batch_size, seed=seed, epoch=epoch)

    trained = Trained()
    with pytest.raises(ValueError, match=r"neighbors must have shape \[P, K\]"):
        fit(Model(), Data(8, 96), walker(composer=Forgets(), warmup_epochs=1, mask_nearest=2), trained)
    assert trained.steps == 0


def test_the_rehearsal_leaves_no_trace_and_is_short():
    class States(Callback):
        def on_train_start(self, trainer, module):
            self.seconds = time.perf_counter() - before
            self.states = [rng_states(), module.state_dict(), module.training]

    def states(*callbacks):
        nonlocal before
        torch.manual_seed(3)
        noted, before = States(), time.perf_counter()
        fit(Model(dropout=0.3), Data(8, 3000), *callbacks, noted, max_epochs=1, limit_train_batches=1)
        return noted

    before = 0.0
    with_callback = states(walker(2560, warmup_epochs=1))
    assert_equal(with_callback.states, states().states)
    assert with_callback.seconds < 20


def test_without_a_warm_up_nothing_is_tried_twice():
    calls = []

    def noting(embeddings, batch_size, *, seed, epoch):
        calls.append(len(embeddings))
        return pool_order(embeddings, batch_size, seed=seed, epoch=epoch)

    fit(Model(), Data(8, 96), walker(32, composer=noting), max_epochs=1)
    assert calls == [32, 32, 32]


def test_the_warm_up_logs_the_hardness_of_uniform_batches():
    class Logs(Callback):
        def __init__(self):
            self.hardness, self.rates = [], []

        def on_train_epoch_end(self, trainer, module):
            self.hardness.append(float(trainer.callback_metrics["batch_sampler/hardness"]))
            self.rates.append(float(trainer.callback_metrics["batch_sampler/false_negative_rate"]))

    logs, model = Logs(), Model()
    stops = EarlyStopping("batch_sampler/hardness", patience=10)
    fit(model, Data(16, 960), walker(320, warmup_epochs=2), stops, logs, max_epochs=3)
    assert len(set(logs.hardness)) == 3  # the weights differ, and the batches
    assert logs.rates[:2] == pytest.approx([0.1, 0.1], abs=0.04)
    assert logs.rates[2] == pytest.approx(same_cluster_share(model.epochs[2]), abs=1e-5)


def test_composers_that_only_work_later_or_in_large_pools_are_not_refused():
    def graph(embeddings, *, seed=0):
        assert len(embeddings) == 4000  # no smaller pool is tried
        return ExactGraph(5)(embeddings, seed=seed)

    composer = RWRComposer(graph, restart_probability=lambda epoch: 0.2 / epoch)
    fit(Model(), Data(8, 4000), walker(4000, composer=composer, warmup_epochs=1), max_epochs=2, limit_train_batches=500)


def test_pools_are_tried_at_their_size():
    """Of a stream a pool and not a batch; where the size follows the loss, the smallest pool that is composed."""

    def noting(embeddings, batch_size, *, seed, epoch):
        sizes.append(len(embeddings))
        return pool_order(embeddings, batch_size, seed=seed, epoch=epoch)

    def tried(pool_size, data):
        sizes.clear()
        fit(Model(), data, walker(pool_size, composer=noting, warmup_epochs=1), max_steps=1)
        return list(sizes)

    sizes = []
    assert tried(32, StreamData(8, 100)) == [32]
    assert tried(50, Data(8, 100)) == [48]
    assert tried("auto", Data(8, 100)) == [16]
    assert tried("all", Data(8, 5000)) == []  # it may need the whole pool, and much time


def test_the_largest_pool_is_prepared_for():
    class Prepares(Composer):
        def prepare(self, pool_size, example):
            prepared.append(pool_size)

        def __call__(self, embeddings, batch_size, *, seed, epoch):
            return pool_order(embeddings, batch_size, seed=seed, epoch=epoch)

    def prepared_for(pool_size, data, **flags):
        prepared.clear()
        fit(Model(), data, walker(pool_size, composer=Prepares(), warmup_epochs=1), max_steps=1, **flags)
        return list(prepared)

    prepared = []
    assert prepared_for(64, StreamData(8, 100)) == [64]
    assert prepared_for(64, Data(8, 95)) == [88]
    assert prepared_for("auto", Data(8, 100)) == [96]


@pytest.mark.parametrize(("n_batches", "flags"), [(33, {}), (32, {"limit_train_batches": 17})], ids=str)
@pytest.mark.parametrize("make", [Data, partial(StreamData, kind="Sized")], ids=["data", "stream"])
def test_the_largest_pool_of_an_epoch_may_be_a_later_one(make, n_batches, flags):
    class Prepares(Composer):
        def prepare(self, pool_size, example):
            prepared.append(pool_size)

        def __call__(self, embeddings, batch_size, *, seed, epoch):
            composed.append(len(embeddings))
            return pool_order(embeddings, batch_size, seed=seed, epoch=epoch)

    prepared, composed = [], []
    data = make(8, n_batches * 8)
    fit(Model(), data, walker(30, composer=Prepares(), warmup_epochs=1), max_epochs=2, **flags)
    pools = composed[1:]  # after the rehearsal
    assert prepared == [max(pools)] == [40]
    assert pools[0] == 32


def test_processes_describe_uniform_batches_only_together(monkeypatch):
    """Else one process would log a value that another does not log, and both would wait forever."""
    for others, logged in ((True, True), (False, False)):
        monkeypatch.setattr(planner, "gather", lambda trainer, own, others=others: [own, others])
        made = fit(Model(), Data(8, 96), walker(warmup_epochs=1, per_rank=True), max_epochs=1)
        assert ("batch_sampler/hardness" in made.callback_metrics) == logged


def test_composers_are_told_apart_by_what_can_be_sent():
    class Local(Composer):
        def __call__(self, embeddings, batch_size, *, seed, epoch):
            return pool_order(embeddings, batch_size, seed=seed, epoch=epoch)

    names = [callback._name(each) for each in (Local(), RWRComposer(), as_composer(pool_order))]
    assert pickle.loads(pickle.dumps(names)) == names
    assert len(set(names)) == 3


def test_a_composer_keeps_its_state_in_the_rehearsal():
    class Remembers(Composer):
        def __init__(self):
            self.epochs = []

        def __call__(self, embeddings, batch_size, *, seed, epoch):
            self.epochs.append(epoch)
            return pool_order(embeddings, batch_size, seed=seed, epoch=epoch)

    class Locked(Remembers):
        def __init__(self):
            super().__init__()
            self.lock = threading.Lock()  # cannot be copied

    for composer in (Remembers(), Locked()):
        fit(Model(), Data(8, 96), walker(96, composer=composer, warmup_epochs=1), max_epochs=2)
        assert composer.epochs == [1]


def test_embed_may_need_what_the_start_of_training_makes():
    class Late(Model):
        def on_train_start(self):
            self.scale = 2.0

        def embed(self, batch):
            return self.encoder(batch[1]) * self.scale

    fit(Late(), Data(8, 96), walker(96, warmup_epochs=1), max_epochs=2)


# Processes that differ


@pytest.mark.slow
@pytest.mark.parametrize(
    ("differs", "words"),
    [
        ("n", "same n_instances, got 203 on rank 0, 211 on rank 1"),
        ("labels", r"same checksum_of_labels, got \d+ on rank 0, \d+ on rank 1"),
        ("seed", "same seed, got 0 on rank 0, 1 on rank 1"),
        ("width", r"same shape_of_an_embedding, got \[4\] on rank 0, \[3\] on rank 1"),
        ("recycled width", r"same shape_of_an_embedding, got \[4\] on"),
        ("composer", "same composer, got .* on rank 0, 'pool_order' on rank 1"),
        ("recycled num_workers", "same num_workers, got 0 on rank 0, 1 on rank 1"),
    ],
)
def test_processes_that_differ_are_refused_in_all(differs, words, tmp_path):
    stderr = run(tmp_path, fails=True, differs=differs, recycle=differs.startswith("recycled"))
    assert len(re.findall(f"ValueError: All processes must have the {words}", stderr)) == 2


# New users


class Items(Points):
    """Item ``i`` is an input and its label, as in most datasets."""

    def __getitem__(self, index):
        return self.points[index], int(self.targets[index])


class Plain(Model):
    def forward(self, x):
        return self.encoder(x)

    def training_step(self, batch, batch_idx):
        return self(batch[0]).square().mean()


class Labelled(BatchSamplerDataModule):
    def train_dataset(self):
        return Items(96)


def test_a_batch_of_inputs_and_labels_says_what_to_do_first():
    with pytest.raises(TypeError) as raised:
        fit(Plain(), Labelled(8), walker())
    note = raised.value.__notes__[0]
    assert "a training batch of 2 parts" in note
    assert note.index("def embed(self, batch): return self(batch[0])") < note.index("Otherwise override pool_dataset()")

    class Embeds(Plain):
        def embed(self, batch):
            return self(batch[0])

    fit(Embeds(), Labelled(8), walker())


def test_pool_items_have_a_collate_function_of_their_own():
    """Training items are pairs of views, and pool items are single views."""

    class Views(Items):
        def __getitem__(self, index):
            return self.points[index], self.points[index] + 1

    class Single(Items):
        def __getitem__(self, index):
            return self.points[index]

    class Pairs(BatchSamplerDataModule):
        def __init__(self, **kwargs):
            super().__init__(8, collate_fn=stack_pairs, **kwargs)

        def train_dataset(self):
            return Views(96)

        def pool_dataset(self):
            return Single(96)

    class Trains(Plain):
        def training_step(self, batch, batch_idx):
            assert batch.shape == (2, 8, 8)
            return self(batch[0]).square().mean()

    fit(Trains(), Pairs(pool_collate_fn=torch.stack), walker())
    with pytest.raises(ValueError, match="values to unpack"):
        fit(Trains(), Pairs(), walker())


def stack_pairs(items):
    first, second = zip(*((a, b) for a, b in items), strict=True)
    return torch.stack([torch.stack(first), torch.stack(second)])


@pytest.mark.parametrize(
    ("y", "known"),
    [
        (torch.arange(96) % 10, True),
        (torch.rand(96), False),
        (torch.arange(96).reshape(96, 1), False),
        (torch.arange(300), False),
        ("a name", False),
    ],
    ids=["integers", "floats", "columns", "of nodes", "text"],
)
def test_the_y_of_a_graph_dataset_is_taken_as_labels(y, known):
    class Graphs(Points):
        def __init__(self):
            super().__init__(96)
            del self.targets
            self.y = y

    class GraphData(BatchSamplerDataModule):
        def train_dataset(self):
            return Graphs()

    made = fit(Model(), GraphData(8), walker(), max_epochs=1)
    assert ("batch_sampler/false_negative_rate" in made.callback_metrics) == known


@pytest.mark.parametrize("how", ["function", "composer"])
def test_composers_get_indices_and_labels_if_they_ask(how):
    seen = []

    def by_class(embeddings, batch_size, *, seed, epoch, indices, labels):
        seen.append((indices, labels))
        return np.argsort(labels.numpy(), kind="stable").reshape(-1, batch_size)

    class ByClass(Composer):
        def __call__(self, embeddings, batch_size, *, seed, epoch, labels, indices):
            return by_class(embeddings, batch_size, seed=seed, epoch=epoch, indices=indices, labels=labels)

    model = Model()
    composer = by_class if how == "function" else ByClass()
    fit(model, Data(8, 96), walker(96, composer=composer), max_epochs=1)
    assert same_cluster_share(model.batches) > 0.6
    ((indices, labels),) = seen
    assert sorted(indices.tolist()) == list(range(96))
    assert torch.equal(labels, torch.from_numpy(indices) % 10)


def test_composers_that_ask_for_labels_get_none_where_there_are_none():
    class Unlabelled(Data):
        def train_labels(self):
            return None

    def composer(embeddings, batch_size, *, seed, epoch, labels=3):
        assert labels is None
        return pool_order(embeddings, batch_size, seed=seed, epoch=epoch)

    fit(Model(), Unlabelled(8, 96), walker(composer=composer), max_epochs=1)
