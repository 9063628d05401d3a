"""Pools that follow the training loss: the rule by itself, and in training."""

import logging
import math
import re

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from parts import Data, Model, assert_equal, fit, walker

from bs_lightning import BatchSamplerCallback
from bs_lightning.layout import BatchLayout
from bs_lightning.pools import AdaptivePools

LAYOUT = BatchLayout(4000, batch_size=4)


def sizes(losses, target=0.1):
    """Return the pool sizes in batches that follow from one loss for each pool."""
    pools, start, chosen = AdaptivePools(target), 0, []
    for loss in losses:
        pools.observe(torch.tensor(loss))
        _, end = pools.next_pool(start, 1000, LAYOUT)
        chosen.append(end - start if pools.composes else 0)
        start = end
    return chosen


def test_pools_grow_while_the_loss_is_low_and_shrink_while_it_is_high():
    assert sizes([0.001, 0.001, 0.05, 0.1, 0.2, 0.2]) == [4, 16, 64, 64, 16, 4]
    assert sizes([0.5, 0.5]) == [0, 0]
    assert sizes([0.01, 1.0]) == [4, 0]
    assert sizes([0.08]) == [0]  # 1.6 batches are one


def test_a_pool_is_never_larger_than_the_data():
    assert sizes([1e-9] * 6) == [4, 16, 64, 256, 660, 0]  # the last begins where the epoch has ended


def test_a_loss_that_is_not_finite_changes_nothing():
    assert sizes([0.01, math.nan, math.inf]) == [4, 4, 4]
    assert sizes([math.nan, math.nan]) == [0, 0]
    assert sizes([0.01, math.nan, 5.0]) == [4, 4, 0]


@pytest.mark.parametrize("losses", [[1.0, math.nan, 3.0], [math.inf, 1.0, 3.0], [math.nan] * 25 + [2.0]])
def test_a_loss_that_is_not_finite_is_not_counted(losses):
    pools = AdaptivePools(0.1)
    pools.observe(torch.tensor(0.01))
    pools.next_pool(0, 1000, LAYOUT)
    for loss in losses:
        pools.observe(torch.tensor(loss))
    assert pools.loss == pytest.approx(2.0)


def test_without_a_loss_nothing_changes():
    pools = AdaptivePools(0.1)
    assert pools.next_pool(0, 1000, LAYOUT) == (slice(0, 10), 10)
    assert not pools.composes


def test_the_loss_is_a_mean_over_the_last_batches():
    pools = AdaptivePools(0.1)
    for loss in [100.0] * 3 + [0.1] * 400:
        pools.observe(torch.tensor(loss))
    assert pools.loss == pytest.approx(0.1, rel=1e-3)


def test_a_restored_state_goes_on_with_the_mean_and_the_size():
    pools, restored = AdaptivePools(0.1), AdaptivePools(0.1)
    pools.n_batches = 8
    pools.next_pool(0, 1000, LAYOUT)
    for loss in (1.0, 0.0):
        pools.observe(torch.tensor(loss))
    restored.load_state_dict(pools.state_dict())
    for each in (pools, restored):
        each.observe(torch.tensor(2.0))
        assert each.loss == 1
        assert each.next_pool(8, 1000, LAYOUT) == (slice(8, 10), 10)


def test_a_loss_is_one_number():
    pools = AdaptivePools(0.1)
    for loss in (1.0, np.float32(2.0), torch.tensor([3.0])):
        pools.observe(loss)
    assert_equal(pools.state_dict()["loss"], torch.tensor(2.0))
    with pytest.raises(ValueError, match=r"loss must be one number, got shape \[3\]. Take the mean"):
        pools.observe(torch.ones(3))
    with pytest.raises(TypeError, match="loss must be a number, got None"):
        pools.observe(None)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"n_batches": -5.0}, ValueError, "n_batches=-5.0, but it must be finite and at least 1"),
        ({"n_batches": math.nan}, ValueError, "n_batches=nan, but it must be finite and at least 1"),
        ({"n_batches": math.inf}, ValueError, "n_batches=inf, but it must be finite and at least 1"),
        ({"loss": torch.ones(3)}, ValueError, "but it must be one number"),
        ({"loss": "x"}, TypeError, "must hold Tensor as loss, got 'x'"),
        ({"n_observed": -1}, ValueError, "n_observed=-1, but it must be at least 0"),
        (None, ValueError, "lacks 'n_batches'"),
    ],
)
def test_a_damaged_state_is_refused_and_changes_nothing(change, error, words):
    pools = AdaptivePools(0.1)
    pools.observe(1.0)
    before = pools.state_dict()
    with pytest.raises(error, match=words):
        pools.load_state_dict({} if change is None else before | {"n_batches": 9.0} | change)
    assert_equal(pools.state_dict(), before)


def test_the_end_of_an_epoch_makes_no_small_pool():
    pools = AdaptivePools(0.1)
    pools.n_batches = 10.0
    assert pools.next_pool(0, 14, LAYOUT) == (slice(0, 14), 14)
    assert pools.next_pool(0, 15, LAYOUT) == (slice(0, 10), 10)
    assert pools.next_pool(10, 15, LAYOUT) == (slice(10, 15), 15)


def test_a_pool_that_the_epochs_end_made_small_says_nothing():
    pools = AdaptivePools(0.1)
    pools.n_batches = 64.0
    pools.next_pool(0, 10, LAYOUT)  # ten batches are left
    pools.observe(torch.tensor(0.001))
    pools.next_pool(0, 1000, LAYOUT)
    assert pools.n_batches == 64


def test_a_pool_is_never_larger_than_the_epoch():
    pools = AdaptivePools(0.1)
    for _ in range(9):
        pools.observe(torch.tensor(1e-6))
        pools.next_pool(0, 10, LAYOUT)  # limit_train_batches=10
    assert pools.n_batches == 10


def test_pools_shrink_though_a_resumed_runs_epochs_are_shorter():
    pools = AdaptivePools(0.1)
    pools.n_batches = 64.0  # as load_state_dict sets it
    for _ in range(2):
        pools.next_pool(0, 10, LAYOUT)
        pools.observe(torch.tensor(5.0))
    assert pools.next_pool(0, 10, LAYOUT) == (slice(0, 2), 2)  # 64, 10, 2.5


@pytest.mark.parametrize(
    ("target", "error", "words"),
    [
        (0, ValueError, "target_loss must be finite and above 0, got 0. Try 0.05."),
        (math.inf, ValueError, "target_loss must be finite and above 0"),
        ("low", TypeError, "target_loss must be a number, got 'low'"),
    ],
)
def test_refuses(target, error, words):
    with pytest.raises(error, match=re.escape(words)):
        BatchSamplerCallback("auto", target_loss=target)


# In training


class Settles(Model):
    """Trains without randomness of its own, and returns a loss that a test chooses."""

    def __init__(self, losses):
        super().__init__()
        self.losses = losses
        self.sizes = []

    def training_step(self, batch, batch_idx):
        torch.manual_seed(self.global_step)
        loss = super().training_step(batch, batch_idx)
        self.sizes.append(self.trainer.callback_metrics.get("batch_sampler/pool_size"))
        return {"loss": loss * 0 + self.losses(self.global_step)}


def auto(**kwargs):
    return walker("auto", target_loss=0.1, warmup_epochs=1, **kwargs)


def composed(model, epoch):
    """Return the share of an epoch's batches that a walk composed, by the share of pairs of one cluster."""
    share = [sum(a % 10 == b % 10 for a in batch for b in batch) - len(batch) for batch in model.epochs[epoch]]
    return sum(share) / len(share) / 56


def test_batches_become_harder_where_the_loss_is_low_and_stay_uniform_where_it_is_high():
    easy, tough = Settles(lambda step: 0.001), Settles(lambda step: 3.0)
    for model in (easy, tough):
        fit(model, Data(8, 400), auto(), max_epochs=4)
        for batches in model.epochs.values():
            assert sorted(index for batch in batches for index in batch) == list(range(400))
    assert composed(easy, 3) > 0.5
    assert composed(tough, 3) < 0.2


def test_uniform_batches_are_not_embedded():
    class Counts(Settles):
        embedded = 0

        def embed(self, batch):
            Counts.embedded += len(batch[0])
            return self(batch)

    fit(Counts(lambda step: 3.0), Data(8, 400), auto(), max_epochs=3)
    assert Counts.embedded <= 32  # two batches to rehearse, and two to describe the uniform epoch


def test_logs_the_pool_size():
    made = fit(Settles(lambda step: 0.001), Data(8, 400), auto(), max_epochs=3)
    assert made.callback_metrics["batch_sampler/pool_size"] > 100


@pytest.mark.parametrize("accumulate", [1, 2])
def test_takes_the_loss_as_the_model_computed_it(accumulate, monkeypatch):
    seen = []
    monkeypatch.setattr(AdaptivePools, "observe", lambda self, loss: seen.append(float(loss)))
    fit(Settles(lambda step: 2.0), Data(8, 100), auto(), accumulate_grad_batches=accumulate)
    assert seen == [2.0] * 24


def test_a_resumed_run_goes_on_exactly(tmp_path):
    def losses(step):
        return 0.001 if step < 70 else 0.3

    def run(**kwargs):
        model = Settles(losses)
        callback = auto()
        saves = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
        fit(model, Data(8, 400, seed=2), callback, saves, enable_checkpointing=True, max_epochs=3, **kwargs)
        return model.batches, callback._adaptive.n_batches

    whole, size = run()
    for step in (55, 64, 90, 120):
        assert run(ckpt_path=tmp_path / f"step={step}.ckpt") == (whole[step:], size)


def test_a_second_fit_starts_with_uniform_batches():
    callback = auto()
    fit(Settles(lambda step: 0.001), Data(8, 400), callback, max_epochs=3)
    assert callback._adaptive.n_batches > 10
    again = Settles(lambda step: 3.0)
    fit(again, Data(8, 400), callback, max_epochs=2)
    assert composed(again, 1) < 0.2


def test_a_state_without_recycled_rows_is_no_state_of_recycled_rows(tmp_path):
    saves = ModelCheckpoint(tmp_path, every_n_train_steps=5, save_top_k=-1, filename="{step}")
    fit(Settles(lambda step: 1.0), Data(8, 100), auto(), saves, enable_checkpointing=True, max_epochs=1)

    class Returns(Settles):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) | {"embeddings": self(batch).detach()}

    fit(Returns(lambda step: 1.0), Data(8, 100), auto(recycle=True), ckpt_path=tmp_path / "step=5.ckpt")


def test_needs_a_loss():
    class ByHand(Model):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            return {"loss_of_mine": super().training_step(batch, batch_idx)}

    with pytest.raises(TypeError, match=r'pool_size="auto" needs each training_step to return the loss.*loss_of_mine'):
        fit(ByHand(), Data(8, 100), auto())


def test_without_a_rule_batches_become_harder_only_where_nothing_is_left_to_learn():
    class Grouped(Data):
        def train_groups(self):
            return list(range(self.n))

    for data, expected in ((Data(8, 100), 0.05), (Grouped(8, 100), 0.3)):
        callback = walker("auto")
        fit(Settles(lambda step: 1.0), data, callback, max_epochs=1)
        assert callback._adaptive.target_loss == expected


def test_a_target_is_for_auto():
    with pytest.raises(ValueError, match=r"target_loss=0\.1 is for"):
        BatchSamplerCallback(32, target_loss=0.1)


def test_a_pool_is_cut_when_it_is_due_and_only_then(monkeypatch):
    """Other pools are read ahead. An adaptive one depends on the loss until then."""
    starts = []
    cut = AdaptivePools.next_pool

    def noted(self, start, *others):
        starts.append(start)
        return cut(self, start, *others)

    monkeypatch.setattr(AdaptivePools, "next_pool", noted)
    fit(Settles(lambda step: 0.001), Data(8, 400), walker("auto", target_loss=0.1), max_epochs=1)
    assert len(starts) == len(set(starts)) > 1


@pytest.mark.parametrize("returns", [None, {"other": 1}])
def test_manual_optimization_must_return_the_loss(returns):
    class Manual(Model):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)
            return returns

    with pytest.raises(
        TypeError, match="needs each training_step to return the loss, also with manual optimization, got "
    ):
        fit(Manual(), Data(8, 100), auto())


def test_the_log_says_when_composing_begins_and_that_it_never_did(caplog):
    caplog.set_level(logging.INFO, logger="lightning.pytorch")
    fit(Settles(lambda step: 0.001), Data(8, 400), auto(), max_epochs=3)
    (line,) = [record.message for record in caplog.records if "pool_size=" in record.message]
    assert re.search(r"goes on with pools of \d+ batches. The loss is 0.001, and target_loss is 0.1", line)
    caplog.clear()
    fit(Settles(lambda step: 3.0), Data(8, 400), auto(), max_epochs=3)
    (line,) = [record.message for record in caplog.records if "pool_size=" in record.message]
    assert "ended with uniform batches. The loss was 3, and target_loss is 0.1. Batches are composed once" in line
