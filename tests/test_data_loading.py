"""Every kind of batch, dataset and loader setting a user may bring, in real training."""

import dataclasses
import multiprocessing
import os
import time

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, seed_everything
from parts import Data, Model, Points, fit, pool_order, walker
from torch.utils.data import default_collate, get_worker_info

from bs_lightning import BatchSamplerCallback

SETTINGS = [
    {"num_workers": 1, "prefetch_factor": 1},
    {"num_workers": 1, "prefetch_factor": 8},
    {"num_workers": 4, "prefetch_factor": 1},
    {"num_workers": 4, "prefetch_factor": 8, "persistent_workers": False},
    {"num_workers": 2, "multiprocessing_context": "fork"},
    pytest.param({"num_workers": 2, "multiprocessing_context": "spawn"}, marks=pytest.mark.slow),
    pytest.param({"num_workers": 2, "multiprocessing_context": "forkserver"}, marks=pytest.mark.slow),
]


def train(data, make_model=Model, callbacks=None):
    """A uniform epoch and two walked ones."""
    seed_everything(0, verbose=False)
    model = make_model()
    fit(model, data, *([walker(warmup_epochs=1)] if callbacks is None else callbacks), max_epochs=3)
    return model.epochs


@pytest.fixture(scope="module")
def expected():
    """The batches without workers, batches as tuples."""
    return train(Data(8, 100, seed=5))


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_loader_settings_do_not_change_the_batches(settings, expected):
    assert train(Data(8, 100, seed=5, **settings)) == expected


def started_here():
    """The worker processes that are alive now."""
    return {worker.pid for worker in multiprocessing.active_children()}


class Workers(Callback):
    """Notes the worker processes that this fit has alive at the end of each epoch."""

    def __init__(self):
        self.before = started_here()
        self.alive = []

    def on_train_epoch_end(self, trainer, module):
        self.alive.append(started_here() - self.before)


def fails_in_composer(embeddings, batch_size, *, seed, epoch):
    if epoch == 2:
        raise ValueError("it fails")
    return pool_order(embeddings, batch_size, seed=seed, epoch=epoch)


class FailsInStep(Model):
    def training_step(self, batch, batch_idx):
        if self.current_epoch == 2 and batch_idx == 5:
            raise ValueError("it fails")
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("settings", [{}, {"persistent_workers": True}], ids=str)
@pytest.mark.parametrize("fails_in", [None, "composer", "step"])
def test_workers_live_on_to_the_end_of_the_fit_and_no_longer(settings, fails_in):
    """If this fails with a new Lightning, see `LightningLoader._iterator`. Workers left alive cost ten seconds."""
    data = Data(8, 100, num_workers=2, **settings)
    make_model = FailsInStep if fails_in == "step" else Model
    for _ in range(2):
        workers = Workers()
        callbacks = [workers, walker(composer=fails_in_composer if fails_in == "composer" else pool_order)]
        if fails_in is None:
            train(data, callbacks=callbacks)
        else:
            with pytest.raises(ValueError, match="it fails"):
                train(data, make_model, callbacks=callbacks)
        assert started_here() <= workers.before
        first, second, *_ = workers.alive
        assert first == second
        assert len(first) == 4  # for training and for encoding


def test_persistent_workers_can_be_refused():
    workers = Workers()
    train(Data(8, 100, num_workers=2, persistent_workers=False), callbacks=[workers, walker()])
    assert started_here() <= workers.before
    first, second, third = workers.alive
    assert not first & second
    assert not second & third


def test_a_reloaded_loader_leaves_no_workers():
    workers = Workers()
    fit(Model(), Data(8, 100, num_workers=2), workers, walker(), max_epochs=4, reload_dataloaders_every_n_epochs=1)
    assert [len(alive) for alive in workers.alive] == [4] * 4
    assert not workers.alive[0] & workers.alive[1]
    assert started_here() <= workers.before


class Grows(Points):
    """Says how often it was told to grow."""

    times = 0

    def __getitem__(self, index):
        return (*super().__getitem__(index), self.times)


class GrowsEachEpoch(Callback):
    def on_train_epoch_start(self, trainer, module):
        trainer.train_dataloader.dataset.times += 1


class SeesGrowth(Model):
    def __init__(self):
        super().__init__()
        self.times = []

    def on_train_batch_start(self, batch, batch_idx):
        if batch_idx == 0:
            self.times.append(int(batch[2][0]))


@pytest.mark.parametrize(
    ("settings", "times"),
    [({}, [1, 2, 3]), ({"num_workers": 1}, [1, 1, 1]), ({"num_workers": 1, "persistent_workers": False}, [1, 2, 3])],
    ids=str,
)
def test_a_dataset_that_changes_between_epochs_needs_new_workers(settings, times):
    class Growing(Data):
        def train_dataset(self):
            return Grows(self.n)

    model = SeesGrowth()
    fit(model, Growing(8, 100, **settings), GrowsEachEpoch(), max_epochs=3)
    assert model.times == times


class Related(Data):
    """Gives workers its own methods, and a dataset that knows the DataModule and the LightningModule."""

    def __init__(self, **settings):
        super().__init__(8, 100, seed=5, collate_fn=self.collate, worker_init_fn=self.begin_worker, **settings)

    def collate(self, items):
        assert self.n_begun == 1
        return default_collate(items)

    def begin_worker(self, worker_id):
        self.n_begun = 1

    def train_dataset(self):
        dataset = Points(self.n)
        dataset.data, dataset.module = self, self.trainer.lightning_module
        return dataset


@pytest.mark.parametrize(
    "start_method",
    ["fork", pytest.param("forkserver", marks=pytest.mark.slow), pytest.param("spawn", marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("settings", [{}, pytest.param({"persistent_workers": False}, marks=pytest.mark.slow)], ids=str)
def test_what_workers_get_may_reach_the_trainer(start_method, settings, expected):
    """Under spawn and forkserver it is pickled in the middle of the fit, while other workers are alive."""
    assert train(Related(num_workers=1, multiprocessing_context=start_method, **settings)) == expected


@dataclasses.dataclass
class Batch:
    index: torch.Tensor
    point: torch.Tensor


def as_dict(items):
    index, point = default_collate(items)
    return {"index": index, "point": point}


def as_dataclass(items):
    return Batch(*default_collate(items))


KINDS = {
    "dict": (as_dict, lambda batch: (batch["index"], batch["point"])),
    "dataclass": (as_dataclass, lambda batch: (batch.index, batch.point)),
}


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_batches(kind, num_workers, expected):
    collate, unpack = KINDS[kind]

    class Unpacks(Model):
        def forward(self, batch):
            return super().forward(unpack(batch))

        def training_step(self, batch, batch_idx):
            return super().training_step(unpack(batch), batch_idx)

    assert train(Data(8, 100, seed=5, collate_fn=collate, num_workers=num_workers), Unpacks) == expected


class Fetches(Points):
    """Fetches a batch in one call, and only so."""

    def __getitem__(self, index):
        raise AssertionError("__getitems__ is there to be used")

    def __getitems__(self, indices):
        return [Points.__getitem__(self, index) for index in indices]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_data_that_is_fetched_batch_by_batch(num_workers, expected):
    class Batched(Data):
        def train_dataset(self):
            return Fetches(self.n)

    assert train(Batched(8, 100, seed=5, num_workers=num_workers)) == expected


def name_worker(worker_id):
    os.environ["NAMED_WORKER"] = str(worker_id)


class Asks(Points):
    """Works only where ``worker_init_fn`` has run."""

    def __getitem__(self, index):
        assert os.environ.get("NAMED_WORKER") == str(get_worker_info().id)
        return super().__getitem__(index)


@pytest.mark.parametrize("persistent_workers", [False, True])
def test_the_users_worker_init_fn_runs_in_training_and_in_encoding(persistent_workers, expected):
    class Asking(Data):
        def train_dataset(self):
            return Asks(self.n)

    settings = {"num_workers": 2, "worker_init_fn": name_worker, "persistent_workers": persistent_workers}
    assert train(Asking(8, 100, seed=5, **settings)) == expected


def test_encoding_draws_nothing_from_the_users_generator(expected):
    states = []
    for callbacks in ([], None):
        generator = torch.Generator().manual_seed(3)
        served = train(Data(8, 100, seed=5, num_workers=1, generator=generator), callbacks=callbacks)
        states.append(generator.get_state())
    assert served == expected
    assert torch.equal(*states)
    assert not torch.equal(states[0], torch.Generator().manual_seed(3).get_state())


class Reads(Points):
    """Counts, over all worker processes, how often each instance was read."""

    def __init__(self, n):
        super().__init__(n)
        self.n_reads = torch.zeros(n, dtype=torch.int64).share_memory_()

    def __getitem__(self, index):
        self.n_reads[index] += 1
        return super().__getitem__(index)


class ReadData(Data):
    """Counts how often the instances are read for encoding."""

    def pool_dataset(self):
        self.reads = Reads(self.n)
        return self.reads


class ReadAhead(Callback):
    """Notes, while each batch trains, how many instances of later pools have been read. Waits for as many as hoped."""

    def __init__(self, hoped):
        self.hoped = hoped
        self.n_read = []
        self.trained = []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        data = trainer.datamodule
        self.trained += data.trained_batch().tolist()
        later = torch.ones(len(data.reads.n_reads), dtype=torch.bool)
        later[torch.from_numpy(data.train_sampler._plan.pool.batches).flatten()] = False
        later[self.trained] = False
        end = time.monotonic() + 20
        hoped = min(self.hoped, int(later.sum()))
        while int(data.reads.n_reads[later].sum()) < hoped and time.monotonic() < end:
            time.sleep(0.01)
        time.sleep(0.02)  # so that a worker that reads too much is seen
        self.n_read.append(int(data.reads.n_reads[later].sum()))


def test_workers_read_the_next_pool_while_this_one_trains():
    ahead = ReadAhead(hoped=2 * 1 * 10)
    data = ReadData(8, 96, num_workers=1, prefetch_factor=2)
    fit(Model(), data, walker(32, encode_batch_size=10), ahead, max_epochs=1)
    assert ahead.n_read == [20] * 4 + [20] * 4 + [0] * 4  # two batches of ten in the one worker; nothing after the end
    assert (data.reads.n_reads == 1).all()  # what was read ahead is not read again


def test_a_pool_that_was_expected_in_vain_is_not_embedded_in_place_of_another(expected):
    class Expects(BatchSamplerCallback):
        def on_train_epoch_start(self, trainer, module):
            super().on_train_epoch_start(trainer, module)
            self._planner.source.expect(np.arange(32))

    callback = Expects(32, walker().composer)
    assert train(Data(8, 100, seed=5, num_workers=1), callbacks=[callback]) == expected


@pytest.mark.parametrize("settings", [{"num_workers": 0}, {"num_workers": 1, "pool_size": "auto"}], ids=str)
def test_nothing_is_read_ahead_without_workers_or_where_the_next_pool_is_not_known(settings):
    ahead = ReadAhead(hoped=0)
    pool_size = settings.pop("pool_size", 32)
    callback = BatchSamplerCallback(pool_size, warmup_epochs=0, composer=walker().composer)
    fit(Model(), ReadData(8, 96, **settings), callback, ahead, max_epochs=1)
    assert ahead.n_read == [0] * 12


@pytest.mark.parametrize("num_workers", [0, 1])  # the last digits depend on the size, and batches on these
@pytest.mark.parametrize(("batch_size", "expected"), [(8, [32] * 15), (100, [64] * 6 + [16]), (480, [64] * 7 + [32])])
def test_a_cpu_embeds_at_most_64_instances_or_four_training_batches_at_a_time(batch_size, expected, num_workers):
    sizes = []

    def embed(module, batch):
        sizes.append(len(batch[0]))
        return module(batch)

    data = Data(batch_size, 480, num_workers=num_workers)
    fit(Model(), data, walker(480, embed=embed), max_epochs=1)
    assert sizes == expected
