"""Embeddings of a whole dataset in a file, and batches that are composed from them."""

import sys
import threading
from collections import OrderedDict, UserDict, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from parts import Data, Model, Points, fit, pool_order, same_cluster_share, walker

from bs_lightning import (
    BatchSamplerCallback,
    ExactGraph,
    RandomCandidateGraph,
    RWRComposer,
    encode_dataset,
    reference,
)


class Indexed(torch.utils.data.Dataset):
    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return {"row": self.rows[index], "names": (str(index),)}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("two_sided", [False, True])
def test_writes_each_instance_in_order(tmp_path, monkeypatch, workers, two_sided):
    monkeypatch.setattr(reference, "_BATCHES_PER_WRITE", 2)
    rows = torch.randn(50, 6)
    module = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.Dropout(0.9))

    def embed(batch):
        assert len(batch["names"][0]) <= 7
        return (module(batch["row"]), -module(batch["row"])) if two_sided else module(batch["row"])

    path = tmp_path / "reference.npy"
    file = encode_dataset(module, Indexed(rows), path, embed=embed, batch_size=7, num_workers=workers, progress=False)
    assert isinstance(file, np.memmap)
    assert not file.flags.writeable
    assert file.dtype == np.float16
    expected = torch.nn.functional.normalize(module[0](rows), dim=1).detach()
    expected = torch.stack([expected, -expected], dim=1) if two_sided else expected
    assert np.allclose(file, expected, atol=1e-3)
    assert list(tmp_path.iterdir()) == [path]
    assert module.training


def test_takes_the_modules_embed_and_says_how_far_it_is(tmp_path, capsys):
    class Embeds(torch.nn.Module):
        def embed(self, batch):
            return batch[1] * 2

    encode_dataset(Embeds(), Points(30), tmp_path / "r.npy", batch_size=8)
    assert "Encoding: 100%" in capsys.readouterr().err


def test_the_function_goes_before_the_modules_embed(tmp_path):
    class Embeds(torch.nn.Linear):
        def embed(self, batch):
            raise AssertionError

    embed = Embeds(4, 2).forward
    encode_dataset(Embeds(4, 2), torch.randn(9, 4), tmp_path / "r.npy", embed=embed, batch_size=8, progress=False)


class OnlyToDevice:
    """A batch that Lightning can move, too."""

    def __init__(self, values):
        self.values = values

    def to(self, device):
        return OnlyToDevice(self.values.to(device))


def test_moves_a_batch_that_takes_only_a_device(tmp_path):
    data = torch.randn(20, 8)
    rows = encode_dataset(
        torch.nn.Linear(8, 2),
        data,
        tmp_path / "rows.npy",
        batch_size=4,
        embed=lambda batch: batch.values,
        collate_fn=lambda items: OnlyToDevice(torch.stack(items)),
    )
    np.testing.assert_allclose(rows, torch.nn.functional.normalize(data, dim=1), atol=1e-3)


def test_a_named_tuple_keeps_its_names(tmp_path):
    class Item(NamedTuple):
        row: torch.Tensor
        name: str

    data = [Item(row, "row") for row in torch.eye(4)]
    rows = encode_dataset(
        torch.nn.Identity(), data, tmp_path / "r.npy", batch_size=2, embed=lambda batch: batch.row, progress=False
    )
    assert np.array_equal(rows, np.eye(4))


@dataclass(frozen=True)
class Frozen:
    row: torch.Tensor
    name: str


@pytest.mark.parametrize(
    "collect",
    [
        lambda row: Frozen(row, "row"),
        lambda row: UserDict(row=row),
        lambda row: OrderedDict(row=row),
        lambda row: defaultdict(list, row=row),
        lambda row: MappingProxyType({"row": row}),
        lambda row: {"row": row},
    ],
)
def test_moves_what_lightning_moves(tmp_path, collect):
    seen = []

    def embed(batch):
        row = batch.row if isinstance(batch, Frozen) else batch["row"]
        seen.append((type(batch), row.device.type))
        return torch.randn(len(row), 2)

    def collate(items):
        batches.append(collect(torch.stack(items)))
        return batches[-1]

    batches = []
    settings = {"batch_size": 2, "device": "meta", "progress": False, "collate_fn": collate}
    encode_dataset(torch.nn.Identity(), torch.eye(4), tmp_path / "r.npy", embed=embed, **settings)
    assert seen == [(type(collect(torch.ones(1))), "meta")] * 2
    left = [batch.row if isinstance(batch, Frozen) else batch["row"] for batch in batches]
    assert {row.device.type for row in left} == {"cpu"}  # the user's own batches stay as they were


def test_a_failure_leaves_an_earlier_file_and_nothing_else(tmp_path):
    path = tmp_path / "reference.npy"
    encode_dataset(torch.nn.Identity(), torch.eye(4), path, progress=False)
    bad = torch.eye(4)
    bad[2, 1] = torch.nan
    with pytest.raises(ValueError, match="embedding of dataset index 2 is not finite"):
        encode_dataset(torch.nn.Identity(), bad, path, progress=False)
    assert list(tmp_path.iterdir()) == [path]
    assert np.array_equal(np.load(path), np.eye(4))


def test_the_width_may_not_change_between_two_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(reference, "_BATCHES_PER_WRITE", 2)
    rows = torch.randn(40, 3)

    def embed(batch):
        return batch if (batch[0] == rows[0]).all() or (batch[0] == rows[4]).all() else batch[:, :1]

    with pytest.raises(ValueError, match=r"embed must return embeddings of one width, got \[3\] and then \[1\]"):
        encode_dataset(torch.nn.Identity(), rows, tmp_path / "r.npy", embed=embed, batch_size=4, progress=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit of a file's size")
def test_nothing_is_left_where_the_file_finds_no_room(tmp_path):
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            encode_dataset(torch.nn.Identity(), torch.randn(900, 8), tmp_path / "reference.npy", progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())


def test_two_threads_may_write_one_file(tmp_path, monkeypatch):
    monkeypatch.setattr(reference, "_BATCHES_PER_WRITE", 1)
    started = threading.Barrier(2)

    def encode(seed):
        def embed(batch):
            started.wait(timeout=60)
            return batch

        rows = torch.eye(4)[torch.randperm(4, generator=torch.Generator().manual_seed(seed))]
        encode_dataset(torch.nn.Identity(), rows, tmp_path / "r.npy", embed=embed, batch_size=2, progress=False)

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(encode, range(2)))
    assert np.load(tmp_path / "r.npy").sum() == 4
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"path": "reference.bin"}, ValueError, r"path must end in .npy, the format of numpy.save, got reference.bin"),
        ({"path": "nowhere/reference.npy"}, ValueError, "path must lie in a folder that exists"),
        ({"dataset": torch.empty(0, 4)}, ValueError, "dataset must hold at least one instance"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
        ({"dataset": iter([])}, TypeError, "dataset"),
        ({"shuffle": True}, ValueError, "shuffle"),
    ],
)
def test_refuses(tmp_path, change, error, words):
    given = {"module": torch.nn.Identity(), "dataset": torch.eye(4), "path": tmp_path / "r.npy"} | change
    with pytest.raises(error, match=words):
        encode_dataset(given.pop("module"), given.pop("dataset"), given.pop("path"), **given)


def test_swapped_arguments_are_named(tmp_path):
    with pytest.raises(TypeError, match=r"got Linear\. That is a model: are the arguments swapped\?"):
        encode_dataset(torch.eye(4), torch.nn.Linear(4, 2), tmp_path / "r.npy")


def test_refuses_a_folder_before_it_encodes(tmp_path):
    (tmp_path / "r.npy").mkdir()
    with pytest.raises(ValueError, match="path must be a file, got the folder"):
        encode_dataset(torch.nn.Identity(), torch.eye(4), tmp_path / "r.npy", embed=None)


# Batches composed from a reference


class Guided(Data):
    def reference_embeddings(self):
        return Points(self.n).points.numpy().astype(np.float16)


class Unasked(Model):
    def embed(self, batch):
        pytest.fail("nothing is to be encoded")


@pytest.mark.parametrize(
    "kind", [{"pool_size": 32}, {"pool_size": "all"}, {"pool_size": 48, "per_rank": True}], ids=str
)
def test_composes_from_the_reference_and_encodes_nothing(kind):
    model = Unasked()
    fit(model, Guided(8, 100), walker(**kind, from_reference=True, warmup_epochs=1), max_epochs=3)
    for batches in model.epochs.values():
        assert len({index for batch in batches for index in batch}) == 96
    assert same_cluster_share(model.epochs[0]) < 0.2
    assert same_cluster_share(model.epochs[2]) > 0.25


def test_composers_get_rows_of_length_one():
    class Scaled(Data):
        def reference_embeddings(self):
            return torch.randn(self.n, 4) * torch.logspace(-3, 3, self.n)[:, None]

    def compose(embeddings, batch_size, *, seed, epoch):
        lengths.extend(embeddings.norm(dim=1).tolist())
        return pool_order(embeddings, batch_size, seed=seed, epoch=epoch)

    lengths = []
    fit(Unasked(), Scaled(8, 96), walker(from_reference=True, composer=compose), max_epochs=1)
    assert lengths == pytest.approx(96 * [1])


def test_one_graph_of_all_data_serves_all_epochs():
    sizes = []

    class Counts(ExactGraph):
        def __call__(self, embeddings, *, seed=0):
            sizes.append(len(embeddings))
            return super().__call__(embeddings, seed=seed)

    model = Unasked()
    callback = walker("all", composer=RWRComposer(Counts(5)), from_reference=True, warmup_epochs=1)
    fit(model, Guided(8, 100), callback, max_epochs=4)
    assert sizes == [96, 100]  # the rehearsal of random embeddings, and the one graph
    del model.epochs[0]
    assert len({tuple(batch) for batch in model.batches}) == 36  # other walks each epoch
    assert same_cluster_share(model.epochs[3]) > 0.5


def test_a_resumed_run_builds_the_same_graph(tmp_path):
    def run(**kwargs):
        model = Unasked()
        composer = RWRComposer(RandomCandidateGraph(20, 5))  # random, by its seed
        saves = ModelCheckpoint(tmp_path, every_n_train_steps=14, save_top_k=-1, filename="{step}")
        callback = walker("all", composer=composer, from_reference=True, warmup_epochs=1)
        fit(model, Guided(8, 100, seed=3), callback, saves, enable_checkpointing=True, max_epochs=4, **kwargs)
        return model.batches

    assert run(ckpt_path=tmp_path / "step=14.ckpt" if (whole := run()) else None) == whole[14:]


def test_new_data_get_a_new_graph():
    class Growing(Guided):
        def train_dataset(self):
            self.n += 8
            return Points(self.n)

    model = Unasked()
    callback = walker("all", from_reference=True)
    fit(model, Growing(8, 92), callback, max_epochs=3, reload_dataloaders_every_n_epochs=1)
    assert max(index for batch in model.epochs[2] for index in batch) > 105


def test_masks_from_the_fixed_graph_name_the_right_instances():
    class Asks(Unasked):
        def training_step(self, batch, batch_idx):
            data = self.trainer.datamodule
            for row, column in data.likely_false_negatives().nonzero().tolist():
                trained = data.trained_batch()
                self.marked = [*getattr(self, "marked", []), (trained[row] % 10, trained[column] % 10)]
            return super().training_step(batch, batch_idx)

    model = Asks()
    fit(model, Guided(8, 100), walker("all", from_reference=True, mask_nearest=3))
    assert len(model.marked) > 50
    assert np.mean([a == b for a, b in model.marked]) > 0.9


@pytest.mark.parametrize(
    ("kwargs", "error", "words"),
    [
        ({"recycle": True}, ValueError, "name two sources of embeddings"),
        ({"embed": lambda module, batch: batch}, ValueError, "from_reference=True encodes nothing"),
        ({"encode_batch_size": 8}, ValueError, "from_reference=True encodes nothing"),
    ],
)
def test_the_callback_refuses(kwargs, error, words):
    with pytest.raises(error, match=words):
        BatchSamplerCallback(from_reference=True, **kwargs)


def test_needs_a_reference():
    with pytest.raises(
        TypeError, match=r"needs Data to override reference_embeddings\(\). bs_lightning.encode_dataset"
    ):
        fit(Model(), Data(), walker(from_reference=True))
