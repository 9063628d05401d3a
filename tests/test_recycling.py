"""Embeddings that training computes anyway, and graphs over the whole dataset that are refreshed every few steps."""

import pytest
import torch
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from parts import Data, Model, fit, pool_order, resumed_exactly, same_cluster_share, trainer, walker

from bs_lightning import BatchSamplerCallback, Composer, ExactGraph, RWRComposer
from bs_lightning.bank import EmbeddingBank
from bs_lightning.presets import public_code
from bs_lightning.rules import AbovePositive

PAPERS = {"pool_size": None, "refresh_every": 5, "composer": RWRComposer(ExactGraph(5), replacement=True)}


class Returns(Model):
    """Trains without randomness of its own and returns its embeddings. Its ``embed`` fails."""

    def __init__(self):
        super().__init__()
        self.returned = {}

    def embed(self, batch):
        raise AssertionError("nothing is to be encoded")

    def training_step(self, batch, batch_idx):
        self.epochs.setdefault(self.current_epoch, []).append(batch[0].tolist())
        embeddings = self.encoder(batch[1])
        z = torch.nn.functional.normalize(embeddings, dim=1)
        self.returned |= dict(zip(batch[0].tolist(), z.detach(), strict=True))
        loss = torch.nn.functional.cross_entropy(z @ z.T / 0.5, torch.arange(len(z)))
        return {"loss": loss, "embeddings": embeddings}


# The bank


def test_the_bank_keeps_the_last_embedding_of_each():
    bank = EmbeddingBank(5)
    assert bank.read(torch.arange(5)).abs().sum() == 0
    bank.write(torch.tensor([3, 1]), torch.tensor([[3.0, 4.0], [1e20, 0.0]]))
    bank.write(torch.tensor([1]), torch.tensor([[0.0, -2.0]], requires_grad=True))
    expected = torch.tensor([[0.0, 0.0], [0.0, -1.0], [0.6, 0.8]])
    torch.testing.assert_close(bank.read(torch.tensor([0, 1, 3])), expected, atol=1e-3, rtol=0)
    assert bank.state_dict()["rows"].dtype == torch.float16
    other = EmbeddingBank(5)
    other.load_state_dict(bank.state_dict())
    assert torch.equal(other.read(torch.arange(5)), bank.read(torch.arange(5)))


@pytest.mark.parametrize("look_after_each", [True, False])
def test_the_bank_equals_a_plain_assignment_for_each_batch(look_after_each, monkeypatch):
    monkeypatch.setattr("bs_lightning.bank._WRITTEN_TOGETHER", 7 * 8 * 2 * 4)  # seven batches
    generator = torch.Generator().manual_seed(0)
    bank, expected = EmbeddingBank(30), torch.zeros(30, 2, 4)
    for _ in range(50):
        indices = torch.randperm(30, generator=generator)[:8]  # instances come again in nearby batches
        rows = torch.randn(8, 2, 4, generator=generator)
        bank.write(indices, rows)
        expected[indices] = torch.nn.functional.normalize(rows, dim=-1)
        for tensor in (indices, rows):
            tensor.zero_()  # the caller goes on to use its tensor
        if look_after_each:
            torch.testing.assert_close(bank.state_dict()["rows"].float(), expected, atol=1e-3, rtol=0)
    torch.testing.assert_close(bank.read(torch.arange(30)), expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("restores", [True, False])
def test_what_replaces_all_of_the_bank_replaces_what_waits_to_be_written(restores):
    bank, rows = EmbeddingBank(3), torch.eye(3)
    bank.write(torch.arange(3), -rows)
    if restores:
        bank.load_state_dict({"n_instances": 3, "rows": rows.half()})
    else:
        bank.fill(rows)
    assert torch.equal(bank.read(torch.arange(3)), rows)


def test_the_bank_refuses():
    bank = EmbeddingBank(5)
    with pytest.raises(ValueError, match=r"one row for each of the batch's 2 instances, got shape \[3, 4\]"):
        bank.write(torch.tensor([0, 1]), torch.ones(3, 4))
    bank.write(torch.tensor([0, 1]), torch.ones(2, 4))
    for _ in range(2):  # before and after the rows are written together
        with pytest.raises(ValueError, match=r"embeddings must keep their shape, \['b', 4\], got \[2, 3\]"):
            bank.write(torch.tensor([0, 1]), torch.ones(2, 3))
        bank.read(torch.tensor([0]))
    bank.write(torch.tensor([4]), torch.full((1, 4), torch.nan))
    with pytest.raises(ValueError, match="embedding of dataset index 4 is not finite"):
        bank.read(torch.tensor([1, 4]))
    with pytest.raises(ValueError, match="embeddings of 5 instances, but the dataset now has 6"):
        EmbeddingBank(6).load_state_dict(bank.state_dict())


# In training


@pytest.mark.parametrize("loader", [{}, {"num_workers": 2, "prefetch_factor": 8}], ids=str)
@pytest.mark.parametrize("kind", [{"pool_size": 32}, PAPERS], ids=["pools", "refresh"])
def test_composes_from_what_training_computed(kind, loader):
    model, seen = Returns(), []
    compose = kind.get("composer", RWRComposer(ExactGraph(5)))

    class Watches(Composer):
        replacement = compose.replacement

        def __call__(self, embeddings, batch_size, *, seed, epoch):
            known = [*model.returned.values(), torch.zeros(4)]
            if model.returned:
                assert all((torch.stack(known) - row).abs().amax(dim=1).min() < 2e-3 for row in embeddings)
            assert (embeddings.norm(dim=1) > 0.5).sum() <= len(model.returned)
            seen.append((epoch, len(embeddings)))
            return compose(embeddings, batch_size, seed=seed, epoch=epoch)

    fit(model, Data(8, 100, **loader), walker(**kind | {"composer": Watches()}, recycle=True), max_epochs=3)
    pools = [(e, 32) for e in range(3) for _ in range(3)]
    assert seen == (pools if kind is not PAPERS else [(e, 96) for e in range(3) for _ in range(3)])
    assert [len(batches) for batches in model.epochs.values()] == [12] * 3
    assert all(len(set(batch)) == 8 for batch in model.batches)


def test_walks_are_hard_once_there_are_embeddings():
    model = Returns()
    made = fit(model, Data(8, 1000), walker(200, recycle=True), max_epochs=3)
    shares = [same_cluster_share(model.epochs[epoch]) for epoch in range(3)]
    assert shares[0] < 0.12  # no instance had an embedding
    assert shares[1] > 0.25
    # Batch norm removes each batch's mean from the recycled embeddings, most where a batch's instances are alike.
    assert shares[2] > 0.13
    for batches in model.epochs.values():
        assert len(set(sum(batches, []))) == 1000
    assert made.callback_metrics["batch_sampler/encode_seconds"] < 0.1


def test_refreshing_composes_the_whole_data_anew_every_few_steps():
    model, plans = Returns(), []

    class Watches(Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            plans.append(trainer.datamodule.state_dict()["pool"])

    kind = PAPERS | {"composer": RWRComposer(ExactGraph(5), replacement=True)}
    fit(model, Data(8, 403), walker(**kind, recycle=True, warmup_epochs=1), Watches(), max_epochs=2)
    assert plans[0] is None
    walked = plans[50:]
    assert [pool["start"] for pool in walked] == [i // 5 * 5 for i in range(50)]
    assert {tuple(pool["batches"].shape) for pool in walked} == {(5, 8)}  # the state is as large as its batches
    served = sum(model.epochs[1], [])
    assert 160 < len(set(served)) < 360  # walks may take instances that earlier batches took
    assert same_cluster_share(model.epochs[1]) > 0.25


def test_refreshing_works_with_encoding_too():
    model = Model()
    fit(model, Data(8, 203), walker(**PAPERS), max_epochs=1)
    assert len(model.batches) == 25
    assert same_cluster_share(model.batches) > 0.2


def test_pools_are_planned_ahead_so_that_loading_never_stops():
    """With workers the next pools are planned while a pool is being trained, from the same embeddings."""

    def train(make=Data, **loader):
        class Notes(RWRComposer):
            def __call__(self, *args, **kwargs):
                planned.append(len(model.batches))
                return super().__call__(*args, **kwargs)

        seed_everything(0, verbose=False)
        model, planned = Returns(), []
        how = {"from_reference": True} if make is Guided else {"recycle": True}
        fit(model, make(8, 100, **loader), walker(32, composer=Notes(ExactGraph(5)), **how), max_epochs=3)
        return model.batches, planned

    class Guided(Data):
        def reference_embeddings(self):
            return self.train_dataset().points

    for make in (Data, Guided):
        batches, planned = train(make)
        assert planned == [*range(0, 36, 4)]
        ahead, planned_ahead = train(make, num_workers=2, prefetch_factor=3)
        assert ahead == batches
        assert planned_ahead == [0, 0, 2, 12, 12, 14, 24, 24, 26]


@pytest.mark.parametrize("loader", [{}, {"num_workers": 2, "prefetch_factor": 8}], ids=str)
@pytest.mark.parametrize("kind", [{"pool_size": 32}, PAPERS], ids=["pools", "refresh"])
def test_a_resumed_run_goes_on_exactly(kind, loader, tmp_path):
    def train(model, *callbacks, **kwargs):
        seed_everything(0, verbose=False)
        data = Data(8, 100, seed=3, **loader)
        callbacks = [walker(**kind, recycle=True, warmup_epochs=1), *callbacks]
        return fit(model, data, *callbacks, max_epochs=3, default_root_dir=tmp_path, **kwargs)

    seed_everything(0, verbose=False)
    assert len([*resumed_exactly(train, Returns, tmp_path, (5, 12, 14, 15, 17, 24, 30))]) == 14


def test_another_fit_starts_without_embeddings():
    callback = walker(200, recycle=True)
    for _ in range(2):
        model = Returns()
        fit(model, Data(8, 600), callback, max_epochs=1)
        assert same_cluster_share(model.batches) < 0.12


def test_recycling_leaves_no_trace():
    def run(*callbacks):
        seed_everything(0, verbose=False)
        model = Returns()
        fit(model, Data(8, 100), *callbacks)
        return model.state_dict(), torch.get_rng_state()

    torch.testing.assert_close(run(walker(composer=pool_order, recycle=True)), run(), rtol=0, atol=0)


class SkipsOne(Returns):
    def training_step(self, batch, batch_idx):
        step = super().training_step(batch, batch_idx)
        return None if batch_idx == 3 else step


def test_instances_without_a_row_are_no_sign_of_a_collapsed_model(recwarn):
    fit(Returns(), Data(8, 96), walker(48, recycle=True), max_epochs=2)
    assert not any("the model has collapsed" in str(each.message) for each in recwarn)


def test_a_skipped_step_is_not_recycled():
    model = SkipsOne()
    fit(model, Data(8, 100), walker(recycle=True), max_epochs=2)
    assert len(model.batches) == 24


def test_manual_optimization_needs_no_loss():
    model = Manual("embeddings")
    fit(model, Data(8, 96), walker(48, recycle=True), max_epochs=3)
    assert same_cluster_share(model.epochs[2]) > 0.15


def test_a_dataset_of_another_length_begins_anew(tmp_path):
    saves = ModelCheckpoint(tmp_path, save_last=True, save_on_train_epoch_end=True)
    fit(Returns(), Data(8, 100), walker(recycle=True), saves, enable_checkpointing=True)
    model = Returns()
    with pytest.warns(UserWarning, match="has no embedding of a pool yet"):
        fit(model, Data(8, 120), walker(recycle=True), ckpt_path=tmp_path / "last.ckpt", max_epochs=4)
    assert [len(batches) for batches in model.epochs.values()] == [15, 15]
    assert same_cluster_share(model.epochs[3]) > 0.15


# Refusals


def test_one_side_is_refused_at_the_first_step_where_a_rule_needs_two():
    model = Returns()
    with pytest.raises(ValueError, match=r"own_rule needs embeddings with two sides.* returned \[8, 4\]"):
        fit(model, Data(8, 100), walker(recycle=True, own_rule=AbovePositive(), warmup_epochs=1))
    assert len(model.batches) == 1


class TwoViews(Returns):
    def training_step(self, batch, batch_idx):
        step = super().training_step(batch, batch_idx)
        return step | {"embeddings": step["embeddings"].repeat(2, 1)}


class OnlyLoss(Returns):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx)["loss"]


class Manual(Returns):
    def __init__(self, *names):
        super().__init__()
        self.automatic_optimization = False
        self.names = names

    def training_step(self, batch, batch_idx):
        step = super().training_step(batch, batch_idx)
        return {name: step[name] for name in self.names} or None


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (TwoViews, ValueError, r"one row for each of the batch's 8 instances, got shape \[16, 4\]"),
        (
            OnlyLoss,
            TypeError,
            r"recycle=True needs training_step to return .*'embeddings'.*or a pair of them.*got \['loss'\]",
        ),
        (Manual, TypeError, "recycle=True needs .* got nothing. With manual optimization it may leave out the loss."),
    ],
)
def test_refuses_other_outputs(make, error, words):
    with pytest.raises(error, match=words):
        fit(make(), Data(8, 100), walker(recycle=True, warmup_epochs=1))


REPLACES = RWRComposer(ExactGraph(5), replacement=True)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"refresh_every": 0, "composer": REPLACES}, "refresh_every must be at least 1, got 0"),
        ({"refresh_every": 10}, "refresh_every=10 needs a composer whose batches may share instances"),
        ({"refresh_every": 10, "pool_size": 64, "composer": REPLACES}, "pool_size must be left out, got 64"),
        ({"recycle": True, "embed": lambda module, batch: batch}, "recycle=True encodes nothing: leave out embed"),
        ({"recycle": True, "encode_batch_size": 8}, "recycle=True encodes nothing"),
    ],
)
def test_refuses_arguments_that_exclude_each_other(arguments, words):
    with pytest.raises(ValueError, match=words):
        BatchSamplerCallback(**arguments)


# The preset


def test_the_public_codes_settings_train():
    callback = public_code()
    graph, composer = callback.composer.graph, callback.composer
    assert (graph.n_candidates, graph.n_neighbors, composer.replacement) == (1000, 100, True)
    assert (callback.refresh_every, callback.recycle, callback.warmup_epochs) == (100, True, 1)
    model = Returns()
    fit(model, Data(16, 1600), callback, max_epochs=2)
    assert same_cluster_share(model.epochs[0]) < 0.12
    assert same_cluster_share(model.epochs[1]) > 0.15


def test_a_second_fit_says_that_it_has_no_embeddings_yet():
    made, model = trainer(walker(48, recycle=True)), Returns()
    made.fit(model, datamodule=Data(8, 96))
    made.fit_loop.max_epochs = 4
    with pytest.warns(UserWarning, match="has no embedding of a pool yet, as after a checkpoint without them or in a"):
        made.fit(model, datamodule=Data(8, 96))
    assert [sorted(sum(batches, [])) for batches in model.epochs.values()] == [list(range(96))] * 4
