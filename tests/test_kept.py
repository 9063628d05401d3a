"""Embeddings of the whole dataset that are kept for some epochs: ``BatchSamplerCallback(encode_every=...)``."""

import time

import pytest
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import Callback, LearningRateFinder, ModelCheckpoint
from parts import (
    Data,
    Exact,
    Model,
    Points,
    Returns,
    TooFewRows,
    fit,
    pool_order,
    resumed_exactly,
    same_cluster_share,
    trainer,
    walker,
)

from bs_lightning import BatchSamplerCallback, ExactGraph, RandomCandidateGraph, RWRComposer
from bs_lightning.rules import AbovePositive

POOLS = [{"pool_size": 32}, {"pool_size": "all"}, {"pool_size": 48, "per_rank": True}]


class Counts(Exact):
    """Counts the instances that are embedded in each epoch."""

    def __init__(self):
        super().__init__()
        self.embedded = {}

    def embed(self, batch):
        epoch = self.current_epoch
        self.embedded[epoch] = self.embedded.get(epoch, 0) + len(batch[0])
        return self.encoder(batch[1])


@pytest.mark.parametrize("loader", [{}, {"num_workers": 2, "prefetch_factor": 8}], ids=str)
@pytest.mark.parametrize("pools", POOLS, ids=str)
def test_embeds_all_data_once_in_some_epochs(pools, loader):
    model = Counts()
    fit(model, Data(8, 101, **loader), walker(**pools, encode_every=3, warmup_epochs=1), max_epochs=8)
    # The warm-up embeds two batches to try everything, and two more to describe them.
    assert model.embedded == {0: 32, 1: 101, 4: 101, 7: 101}
    for batches in model.epochs.values():
        assert len({index for batch in batches for index in batch}) == 96
    assert same_cluster_share(sum((model.epochs[epoch] for epoch in range(1, 8)), [])) > 0.17
    assert len({tuple(batch) for batch in model.batches}) == 8 * 12  # other batches in each epoch


@pytest.mark.parametrize("pools", [{"pool_size": 32}, {"pool_size": "all"}], ids=str)
def test_pools_have_the_embeddings_of_the_epoch_that_encoded(pools):
    kept = {}

    class Watches(RWRComposer):
        def __call__(self, embeddings, batch_size, *, seed, epoch, indices, neighbors=None):
            if epoch % 2 == 0 and epoch not in kept:
                with torch.no_grad():
                    rows = model.eval().encoder(Points(100).points)
                model.train()
                kept[epoch] = kept[epoch + 1] = torch.nn.functional.normalize(rows, dim=1)
            torch.testing.assert_close(embeddings, kept[epoch][indices], atol=1e-3, rtol=0)
            assert (neighbors is None) == (len(embeddings) < 96)
            return super().__call__(embeddings, batch_size, seed=seed, epoch=epoch, neighbors=neighbors)

    model = Counts()
    fit(model, Data(8, 100), walker(**pools, composer=Watches(ExactGraph(5)), encode_every=2), max_epochs=4)
    assert not torch.allclose(kept[0], kept[2], atol=1e-2)


def test_the_graph_of_all_data_is_kept_as_long():
    sizes = []

    class Notes(ExactGraph):
        def __call__(self, embeddings, *, seed=0):
            sizes.append(len(embeddings))
            return super().__call__(embeddings, seed=seed)

    composer = RWRComposer(Notes(5))
    fit(Counts(), Data(8, 100), walker("all", composer=composer, encode_every=2), max_epochs=5)
    assert sizes == [100] * 3  # the four instances that an epoch drops are another four in the next epoch
    sizes.clear()
    fit(Counts(), Data(8, 100), walker(48, composer=composer, encode_every=2), max_epochs=3)
    assert sizes == [48] * 6


def test_the_log_says_how_long_the_graph_of_all_data_took():
    class Slow(ExactGraph):
        def __call__(self, embeddings, *, seed=0):
            time.sleep(0.05)
            return super().__call__(embeddings, seed=seed)

    made = fit(Counts(), Data(8, 100), walker("all", composer=RWRComposer(Slow(5)), encode_every=2), max_epochs=1)
    assert made.callback_metrics["batch_sampler/graph_seconds"] >= 0.05


@pytest.mark.parametrize("loader", [{}, {"num_workers": 2, "prefetch_factor": 8}], ids=str)
@pytest.mark.parametrize("pools", POOLS, ids=str)
def test_a_resumed_run_goes_on_exactly(pools, loader, tmp_path):
    def train(model, *callbacks, **kwargs):
        seed_everything(0, verbose=False)
        # The graph is random, by its seed.
        composer = RWRComposer(RandomCandidateGraph(20, 5))
        callbacks = [walker(**pools, composer=composer, encode_every=2, warmup_epochs=1), *callbacks]
        data = Data(8, 100, seed=3, **loader)
        return fit(model, data, *callbacks, max_epochs=4, default_root_dir=tmp_path, **kwargs)

    for saved, step, resumed in resumed_exactly(train, Counts, tmp_path, (5, 12, 14, 24, 30, 36, 40)):
        if saved == "after" and step in (14, 24, 30):
            assert sum(resumed.embedded.values()) == 100  # in epoch 3 only


def test_workers_change_nothing():
    def train(**loader):
        seed_everything(0, verbose=False)
        model = Counts()
        fit(model, Data(8, 100, seed=3, **loader), walker(encode_every=2), max_epochs=3)
        return model.batches

    assert train() == train(num_workers=2, prefetch_factor=8)


def test_a_checkpoint_without_kept_embeddings_is_embedded_anew(tmp_path):
    saves = ModelCheckpoint(tmp_path, filename="first", every_n_epochs=1)
    fit(Counts(), Data(8, 96), walker(), saves, max_epochs=1, enable_checkpointing=True)
    model = Counts()
    fit(model, Data(8, 96), walker(encode_every=5), max_epochs=3, ckpt_path=tmp_path / "first.ckpt")
    assert model.embedded == {1: 96}


@pytest.mark.parametrize("pools", [{"pool_size": 32}, {"pool_size": "all"}], ids=str)
def test_a_graph_fits_its_embeddings_after_a_trial(pools):
    """The finder trains for some steps, and loads the state from before them: the embeddings are from another model."""
    kept = []

    class Watches(RWRComposer):
        def __call__(self, embeddings, batch_size, *, seed, epoch, neighbors=None):
            if epoch == 1:
                found = self.graph(embeddings) if neighbors is None else neighbors
                kept.append((found, ExactGraph(5)(embeddings)))
            return super().__call__(embeddings, batch_size, seed=seed, epoch=epoch, neighbors=neighbors)

    class Tunable(Counts):
        lr = 0.05

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=self.lr)

    model = Tunable()
    callback = walker(**pools, composer=Watches(ExactGraph(5)), encode_every=2, warmup_epochs=1)
    fit(model, Data(8, 96), LearningRateFinder(num_training_steps=20, min_lr=0.1), callback, max_epochs=3)
    assert len(kept) >= 2  # in the trial, and in training
    assert all((found == exact).all() for found, exact in kept)
    assert model.embedded[1] == 2 * 96


@pytest.mark.parametrize("recycles", [False, True])
def test_a_checkpoint_from_before_anything_was_embedded(recycles, tmp_path):
    class Saves(Callback):
        def on_fit_start(self, trainer, module):
            trainer.save_checkpoint(tmp_path / "first.ckpt")

    fit(Counts(), Data(8, 96), walker(encode_every=2), Saves(), max_epochs=1)
    model = Returns() if recycles else Counts()
    how = {"recycle": True} if recycles else {"encode_every": 2}
    fit(model, Data(8, 96), walker(**how), max_epochs=2, ckpt_path=tmp_path / "first.ckpt")
    assert len(model.batches) == 24


def test_a_checkpoint_of_kept_embeddings_holds_no_recycled_ones(tmp_path):
    class Wide(Counts):
        def embed(self, batch):
            return super().embed(batch).repeat(1, 2)

    saves = ModelCheckpoint(tmp_path, filename="first", every_n_epochs=1)
    fit(Wide(), Data(8, 96), walker(encode_every=2), saves, max_epochs=1, enable_checkpointing=True)
    model = Returns()
    fit(model, Data(8, 96), walker(recycle=True), max_epochs=3, ckpt_path=tmp_path / "first.ckpt")
    assert len(model.batches) == 24


@pytest.mark.parametrize("pools", [{"pool_size": 32}, {"pool_size": "all"}], ids=str)
def test_a_run_may_be_resumed_with_more_data(pools, tmp_path):
    saves = ModelCheckpoint(tmp_path, filename="first", every_n_epochs=1)
    fit(Counts(), Data(8, 96), walker(**pools, encode_every=9), saves, max_epochs=1, enable_checkpointing=True)
    model = Counts()
    fit(model, Data(8, 104), walker(**pools, encode_every=9), max_epochs=3, ckpt_path=tmp_path / "first.ckpt")
    assert model.embedded == {1: 104}
    assert sorted(sum(model.epochs[2], [])) == list(range(104))


def test_data_of_a_different_length_are_embedded_anew():
    class Grows(Counts):
        def on_train_epoch_end(self):
            if self.current_epoch == 0:
                self.trainer.datamodule.n = 112
                self.trainer.datamodule.train_dataloader()

    model = Grows()
    fit(model, Data(8, 96), walker(encode_every=9), max_epochs=2)
    assert model.embedded == {0: 96, 1: 112}


def test_a_graph_that_lacks_rows_is_refused():
    callback = walker("all", composer=RWRComposer(TooFewRows(5)), encode_every=2)
    with pytest.raises(ValueError, match="a row of neighbours for each of 100 embeddings, got 99 rows"):
        fit(Counts(), Data(8, 100), callback)


@pytest.mark.parametrize("kept", [{"encode_every": 9}, {"recycle": True}], ids=str)
def test_a_checkpoint_that_is_saved_before_training_starts_holds_what_was_restored(kept, tmp_path):
    class SavesEarly(Callback):
        def on_fit_start(self, trainer, module):
            trainer.save_checkpoint(tmp_path / "early.ckpt")

    settings = {"max_epochs": 2, "enable_checkpointing": True, "default_root_dir": tmp_path}
    fit(Returns(), Data(8, 96), walker(**kept), ModelCheckpoint(tmp_path, save_last=True), **settings)
    resumed = walker(**kept)
    fit(Returns(), Data(8, 96), resumed, SavesEarly(), ckpt_path=tmp_path / "last.ckpt", max_epochs=3)
    saved, early = (torch.load(tmp_path / f"{name}.ckpt")["callbacks"] for name in ("last", "early"))
    assert torch.equal(early[resumed.state_key]["rows"], saved[resumed.state_key]["rows"])


def test_another_fit_embeds_anew():
    callback = walker(encode_every=9)
    for _ in range(2):
        model = Counts()
        fit(model, Data(8, 96), callback)
        assert model.embedded == {0: 96}


@pytest.mark.parametrize("more", [8, 0])
@pytest.mark.parametrize("pools", [{"pool_size": 32}, {"pool_size": "all"}], ids=str)
def test_data_that_are_loaded_anew_are_embedded_anew(pools, more):
    class Growing(Data):
        def train_dataset(self):
            self.n += more
            return Points(self.n)

    model = Counts()
    data = Growing(8, 96 - more)
    fit(model, data, walker(**pools, encode_every=9), max_epochs=4, reload_dataloaders_every_n_epochs=2)
    assert model.embedded == {0: 96, 2: 96 + more}
    assert (max(index for batch in model.epochs[3] for index in batch) > 95) == (more > 0)


def test_looking_into_a_loader_embeds_nothing():
    class Looks(Counts):
        def on_train_epoch_end(self):
            list(self.trainer.datamodule.train_dataloader())

    model = Looks()
    fit(model, Data(8, 96), walker("all", encode_every=3), max_epochs=3)
    assert model.embedded == {0: 96}


def test_embedding_leaves_no_trace():
    def run(*callbacks):
        seed_everything(0, verbose=False)
        model = Model(dropout=0.5)
        fit(model, Data(8, 100), *callbacks, max_epochs=3)
        return model.state_dict(), torch.get_rng_state()

    torch.testing.assert_close(run(walker(composer=pool_order, encode_every=2)), run(), rtol=0, atol=0)


def test_two_sides_and_their_rule():
    class Sides(Counts):
        def embed(self, batch):
            z = super().embed(batch)
            return z, z.roll(1, dims=0)  # another instance is the nearest

        def training_step(self, batch, batch_idx):
            self.marked += int(self.trainer.datamodule.likely_false_negatives().sum())
            return super().training_step(batch, batch_idx)

    model = Sides()
    model.marked = 0
    made = fit(model, Data(8, 96), walker("all", own_rule=AbovePositive(), encode_every=2), max_epochs=2)
    assert model.embedded == {0: 96}
    assert model.marked > 50
    assert made.callback_metrics["batch_sampler/accuracy"] < 0.9


def test_pools_that_follow_the_loss():
    model = Counts()
    callback = walker("auto", target_loss=100.0, encode_every=2)
    fit(model, Data(8, 96), callback, max_epochs=4)
    assert [count for epoch, count in model.embedded.items() if count >= 96] == [96, 96]
    assert all(sorted(sum(batches, [])) == list(range(96)) for batches in model.epochs.values())


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"encode_every": 0}, ValueError, "encode_every must be at least 1, got 0"),
        ({"encode_every": 1.5}, TypeError, "encode_every must be an integer, got 1.5"),
        ({"encode_every": 2, "recycle": True}, ValueError, "recycle=True encodes nothing: leave out .* encode_every"),
        ({"encode_every": 2, "from_reference": True}, ValueError, "from_reference=True encodes nothing"),
        (
            {"encode_every": 2, "refresh_every": 5, "composer": RWRComposer(replacement=True)},
            ValueError,
            "encode_every=2 keeps embeddings for epochs, refresh_every=5 renews them every few steps. Give one",
        ),
    ],
)
def test_refuses(arguments, error, words):
    with pytest.raises(error, match=words):
        BatchSamplerCallback(**arguments)


def test_a_checkpoint_holds_two_bytes_a_number(tmp_path):
    made = trainer(walker(encode_every=2))
    made.fit(Counts(), datamodule=Data(8, 96))
    made.save_checkpoint(tmp_path / "last.ckpt")
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"]["BatchSamplerCallback"]
    assert state["rows"].dtype == torch.float16
    assert state["rows"].shape == (96, 4)
    assert (state["n_instances"], state["version"]) == (96, 0)
