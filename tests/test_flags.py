"""Every flag of the Trainer keeps the number of steps and each index at most once an epoch, without unused encoding."""

import parts
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback, LightningDataModule, seed_everything
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.tuner import Tuner
from parts import Data, Model, Records, assert_equal, fit, pool_order, rng_states, same_cluster_share, trainer, walker
from stream_parts import StreamData
from torch.utils.data import DataLoader

from bs_lightning import BatchSamplerCallback, BatchSamplerDataModule


class Counts(Callback):
    """Counts the instances that are encoded."""

    def __init__(self):
        self.encoded = 0

    def embed(self, module, batch):
        self.encoded += len(batch[0])
        return module(batch)


class Validated(Model):
    """A model with validation, test and prediction steps."""

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self(batch).pow(2).mean())

    test_step = validation_step

    def predict_step(self, batch, batch_idx):
        return self(batch)


class Manual(Model):
    def __init__(self, dropout=0.0):
        super().__init__(dropout)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()


class Tuned(Validated):
    lr = 0.1

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


class Estimates(Model):
    """Reads the number of steps before training, as one-cycle schedules do."""

    def configure_optimizers(self):
        self.estimated = self.trainer.estimated_stepping_batches
        return super().configure_optimizers()


class ValidatedData(Data):
    def val_dataloader(self):
        return DataLoader(self.train_dataset(), batch_size=10)

    test_dataloader = predict_dataloader = val_dataloader


def assert_each_index_at_most_once(model):
    for batches in model.epochs.values():
        indices = sum(batches, [])
        assert len(set(indices)) == len(indices)


# Each epoch has 12 batches of 8, in pools of 4 batches.
FLAGS = [
    # flags, batches per epoch, optimizer steps in two epochs
    ({}, 12, 24),
    ({"limit_train_batches": 5}, 5, 10),
    ({"limit_train_batches": 0.5}, 6, 12),
    ({"limit_train_batches": 1}, 1, 2),
    ({"accumulate_grad_batches": 5}, 12, 6),
    ({"val_check_interval": 5}, 12, 24),
    ({"val_check_interval": 0.25}, 12, 24),
    ({"check_val_every_n_epoch": 2}, 12, 24),
    ({"reload_dataloaders_every_n_epochs": 1}, 12, 24),
    ({"num_sanity_val_steps": 2}, 12, 24),
    ({"num_sanity_val_steps": 0}, 12, 24),
    ({"precision": "bf16-mixed"}, 12, 24),
    ({"precision": "bf16-true"}, 12, 24),
    ({"precision": "64-true"}, 12, 24),
    ({"gradient_clip_val": 0.1}, 12, 24),
    ({"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"}, 12, 24),
    ({"inference_mode": False}, 12, 24),
    ({"use_distributed_sampler": False}, 12, 24),
    ({"deterministic": True}, 12, 24),
    ({"detect_anomaly": True}, 12, 24),
    ({"profiler": "simple"}, 12, 24),
]


@pytest.mark.parametrize("loader", [{"num_workers": 0}, {"num_workers": 2}], ids=["0", "2"])
@pytest.mark.parametrize(("flags", "per_epoch", "steps"), FLAGS, ids=lambda value: str(value))
def test_flag(flags, per_epoch, steps, loader, tmp_path):
    if loader["num_workers"] and not flags.keys() & {"limit_train_batches", "reload_dataloaders_every_n_epochs"}:
        pytest.skip("has nothing to do with workers")

    class Module(Validated, Estimates):
        pass

    model, counts = Module(), Counts()
    made = fit(model, ValidatedData(**loader), walker(embed=counts.embed), default_root_dir=tmp_path, **flags)
    assert [len(batches) for batches in model.epochs.values()] == [per_epoch] * 2
    assert_each_index_at_most_once(model)
    assert made.global_step == model.estimated == steps
    assert counts.encoded == per_epoch * 8 * 2
    assert model.epochs[0] != model.epochs[1]


def averaging():
    from torch.optim.swa_utils import get_ema_avg_fn

    return [WeightAveraging(avg_fn=get_ema_avg_fn())]


def two_fits_and_other_loops(made, model, data):
    """Run two fits and the other loops, and prepare a third fit."""
    for epochs in (1, 2):
        made.fit_loop.max_epochs = epochs
        made.fit(model, datamodule=data)
    made.validate(model, datamodule=data, verbose=False)
    made.test(model, datamodule=data, verbose=False)
    made.predict(model, datamodule=data)
    made.fit_loop.max_epochs = 4


@pytest.mark.parametrize(
    "case",
    [
        *({"flags": flags} for flags, *_ in FLAGS),
        {"flags": {"overfit_batches": 3}},
        {"flags": {"max_steps": 16}},
        {"make": lambda: Manual(dropout=0.3)},
        {"beside": averaging},
        {"beside": lambda: [EarlyStopping("val_loss"), ModelCheckpoint(monitor="val_loss")]},
        {"beside": lambda: [StochasticWeightAveraging(0.05, swa_epoch_start=1)]},
        {"flags": {"fast_dev_run": True}},
        {"around": two_fits_and_other_loops},
        {"around": lambda made, model, data: Tuner(made).lr_find(model, datamodule=data, num_training=20)},
        {"around": lambda made, model, data: Tuner(made).scale_batch_size(model, datamodule=data, max_trials=2)},
        pytest.param({"compiled": True}, marks=pytest.mark.slow),
    ],
)
def test_no_trace(case, tmp_path):
    """After a warm-up epoch and an encoded epoch, every state is bit for bit the same as without the callback."""

    def run(*callbacks):
        seed_everything(7, verbose=False)
        model, data = case.get("make", lambda: Tuned(dropout=0.3))(), ValidatedData()
        callbacks += tuple(case.get("beside", list)())
        flags = case.get("flags", {}) | {"default_root_dir": tmp_path, "enable_checkpointing": True}
        made = trainer(*callbacks, **flags)
        if "around" in case:
            case["around"](made, model, data)
        made.fit(torch.compile(model) if "compiled" in case else model, datamodule=data)
        return model.state_dict(), made.optimizers[0].state_dict()["state"], rng_states(), model.epochs

    if "compiled" in case:
        run()  # compiling draws from torch's random state
    warmup_epochs = 0 if case.get("flags", {}).get("fast_dev_run") else 1
    assert_equal(run(walker(None, composer=pool_order, warmup_epochs=warmup_epochs)), run())


def test_fast_dev_run():
    model, counts = Model(), Counts()
    fit(model, Data(), walker(embed=counts.embed), fast_dev_run=True)
    assert [len(batch) for batch in model.batches] == [8]
    assert counts.encoded == 8
    with pytest.raises(TypeError, match="embed must return a float tensor"):  # even if all is warm-up
        fit(model, Data(), walker(embed=lambda module, batch: None, warmup_epochs=1), fast_dev_run=True)


def test_barebones_does_not_warn_of_logs_that_the_user_did_not_ask_for(recwarn):
    model = Model()
    fit(model, Data(), walker(), barebones=True)
    assert len(model.batches) == 24
    assert not [warning for warning in recwarn if "self.log" in str(warning.message)]


@pytest.mark.parametrize("overfit", [3, 0.25])
def test_overfit_batches_serves_the_same_batches_each_epoch(overfit, caplog):
    model, counts, records = Model(), Counts(), Records()
    fit(model, Data(num_workers=2), walker(embed=counts.embed), records, overfit_batches=overfit, max_epochs=3)
    assert len(model.epochs[0]) == 3
    assert model.epochs[0] == model.epochs[1] == model.epochs[2]
    assert records.epochs == model.epochs
    assert counts.encoded == 0
    assert "every epoch serves the same uniform batches" in caplog.text


@pytest.mark.parametrize("max_steps", [7, 12, 16, 30])
def test_max_steps(max_steps):
    model = Model()
    made = fit(model, Data(), walker(), max_epochs=-1, max_steps=max_steps)
    assert made.global_step == len(model.batches) == max_steps
    assert_each_index_at_most_once(model)


def test_max_time_and_min_epochs_do_not_matter():
    model = Model()
    fit(model, Data(), walker(), max_epochs=2, min_epochs=2, max_time="00:00:05:00")
    assert [len(batches) for batches in model.epochs.values()] == [12, 12]


def test_manual_optimization():
    model = Manual()
    made = fit(model, Data(), walker())
    assert made.global_step == 24
    assert_each_index_at_most_once(model)


@pytest.mark.slow
def test_a_compiled_module():
    model = Model()
    fit(torch.compile(model), Data(), walker())
    assert len(model.batches) == 24
    assert_each_index_at_most_once(model)


def test_beside_other_callbacks(tmp_path):
    from torch.optim.swa_utils import get_ema_avg_fn

    model = Validated()
    others = [
        WeightAveraging(avg_fn=get_ema_avg_fn()),
        ModelCheckpoint(tmp_path, monitor="val_loss", save_last=True),
        EarlyStopping("val_loss", patience=0, min_delta=1e9),
    ]
    fit(model, ValidatedData(), *others, walker(), max_epochs=5, enable_checkpointing=True)
    assert set(model.epochs) == {0, 1}  # EarlyStopping ends the fit: the second epoch was no better
    assert_each_index_at_most_once(model)
    assert (tmp_path / "last.ckpt").exists()


def test_averaged_weights_are_not_what_pools_are_encoded_with():
    from torch.optim.swa_utils import get_ema_avg_fn

    def run(*callbacks):
        seed_everything(0)
        model = Validated()
        fit(model, ValidatedData(), *callbacks, walker(), max_epochs=2, val_check_interval=3)
        return model.batches

    assert run(WeightAveraging(avg_fn=get_ema_avg_fn(0.5))) == run()


def test_two_fits_in_a_row_and_the_other_loops_after():
    model, data, callback = Validated(), ValidatedData(), walker()
    made = fit(model, data, callback, max_epochs=1)
    first = model.epochs.pop(0)
    made.fit_loop.max_epochs = 2
    made.fit(model, datamodule=data)
    assert list(model.epochs) == [1]
    assert_each_index_at_most_once(model)
    made.validate(model, datamodule=data, verbose=False)
    made.test(model, datamodule=data, verbose=False)
    assert sum(len(z) for z in made.predict(model, datamodule=data)) == 100
    model.epochs.clear()
    fit(model, data, callback, max_epochs=1)  # a new Trainer counts epochs from 0
    assert sorted(sum(model.epochs[0], [])) == sorted(sum(first, []))
    assert model.epochs[0] != first  # different weights give different walks
    model.epochs.clear()
    fit(model, data, max_epochs=1)  # also without the callback
    assert sorted(sum(model.epochs[0], [])) == sorted(sum(first, []))


def test_lr_find():
    model, data = Tuned(), Data()
    made = trainer(walker(), max_epochs=2)
    Tuner(made).lr_find(model, datamodule=data, num_training=20)
    model.epochs.clear()
    made.fit(model, datamodule=data)
    assert [len(batches) for batches in model.epochs.values()] == [12, 12]
    assert_each_index_at_most_once(model)


def test_scale_batch_size_is_read_late():
    model, data = Model(), Data(4, 1000)
    made = trainer(walker(pool_size=None), max_epochs=1)
    found = Tuner(made).scale_batch_size(model, datamodule=data, mode="power", init_val=8, max_trials=3)
    assert found == data.batch_size == 32
    model.epochs.clear()
    made.fit(model, datamodule=data)
    assert [len(batch) for batch in model.batches] == [32] * 31
    assert_each_index_at_most_once(model)


CONFIG = """
trainer:
  accelerator: cpu
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  max_epochs: 2
  callbacks:
    - class_path: bs_lightning.BatchSamplerCallback
      init_args:
        pool_size: 32
        warmup_epochs: 0
        composer:
          class_path: bs_lightning.RWRComposer
          init_args:
            restart_probability:
              class_path: bs_lightning.schedules.Staircase
              init_args:
                every: 1
            graph:
              class_path: bs_lightning.ExactGraph
              init_args:
                n_neighbors: 7
model:
  class_path: parts.Model
data:
  class_path: parts.Data
  init_args:
    batch_size: 8
  dict_kwargs:
    num_workers: 1
"""


def test_lightning_cli(tmp_path):
    (tmp_path / "config.yaml").write_text(CONFIG)
    cli = LightningCLI(args=["fit", "--config", str(tmp_path / "config.yaml")], save_config_callback=None)
    callback = next(c for c in cli.trainer.callbacks if type(c).__name__ == "BatchSamplerCallback")
    assert callback.composer.graph.n_neighbors == 7
    assert callback.composer.restart_probability(1) == 0.1
    assert cli.datamodule.dataloader_kwargs["num_workers"] == 1
    assert cli.datamodule.dataloader_kwargs["persistent_workers"] is True
    assert [len(batches) for batches in cli.model.epochs.values()] == [12, 12]
    assert_each_index_at_most_once(cli.model)


def test_the_help_of_lightning_cli_names_no_argument_of_streams(capsys):
    with pytest.raises(SystemExit):
        LightningCLI(Model, Data, args=["fit", "--help"], save_config_callback=None)
    help_of_data = capsys.readouterr().out
    assert "--data.num_workers" in help_of_data
    for name in ("pool_size", "plan_pool", "rank", "world_size"):
        assert f"--data.{name}" not in help_of_data


def test_iterating_the_loader_by_hand_disturbs_nothing():
    """A user may look at a batch without a Trainer, before training, and in a validation hook."""
    plain = Data()
    assert sum(len(batch[0]) for batch in plain.train_dataloader()) == 96

    class Peeks(Callback):
        def on_train_start(self, trainer, module):
            self.first = next(iter(trainer.train_dataloader))[0].tolist()

        def on_validation_end(self, trainer, module):
            self.seen = sum((batch[0].tolist() for batch in trainer.train_dataloader), [])

    peeks = Peeks()
    looked, model = Validated(), Validated()
    fit(model, ValidatedData(seed=1), walker(composer=pool_order), num_sanity_val_steps=0, val_check_interval=5)
    fit(looked, ValidatedData(seed=1), peeks, walker(composer=pool_order), num_sanity_val_steps=0, val_check_interval=5)
    assert looked.batches == model.batches
    assert peeks.first == model.epochs[0][0]
    assert len(set(peeks.seen)) == 96


@pytest.mark.parametrize("data", [Data, StreamData])
@pytest.mark.parametrize("hook", ["on_train_start", "on_train_epoch_start", "on_train_epoch_end", "on_train_end"])
def test_looking_into_the_loader_around_an_epoch_disturbs_nothing(hook, data):
    """Between two epochs, Lightning's counter of batches is still that of the last epoch."""
    sizes = []

    def look(self, trainer, module):
        assert len(next(iter(trainer.train_dataloader))[0]) == 8  # an empty loader would end training
        sizes.append(sum(len(batch[0]) for batch in trainer.train_dataloader))

    looks = type("Looks", (Callback,), {hook: look})()
    epochs = []
    for callbacks in ([], [looks]):
        torch.manual_seed(0)
        model = Model()
        fit(model, data(seed=1, drop_last=True), *callbacks, walker(warmup_epochs=1), max_epochs=3)
        epochs.append(model.epochs)
    assert epochs[0] == epochs[1]
    assert len(epochs[1]) == 3
    assert set(sizes) == {96}


@pytest.mark.parametrize("data", [Data, StreamData])
def test_a_loader_made_after_a_fit_serves_another_order_each_epoch(data):
    """A probe may be trained on it, by a Trainer of its own or by a loop."""
    fitted = data(seed=1)
    fit(Model(), fitted, walker())
    probe = Model()
    trainer(max_epochs=3).fit(probe, fitted.train_dataloader())
    fresh = Model()
    trainer(max_epochs=3).fit(fresh, data(seed=1).train_dataloader())
    assert probe.epochs == fresh.epochs
    assert probe.epochs[0] != probe.epochs[1] != probe.epochs[2]


class Evaluates(Callback):
    """Calls a method of a second Trainer, on the same DataModule, at the end of the second epoch."""

    def __init__(self, method, composes=False):
        self.method, self.composes, self.seen = method, composes, []

    def on_train_epoch_end(self, first, module):
        if first.current_epoch == 1:
            data = first.datamodule
            second = trainer(*([walker()] if self.composes else []), max_epochs=1)
            with torch.random.fork_rng():
                probe = Validated()
                probe.on_validation_batch_start = lambda *_: self.seen.append(data.trainer is second)
                getattr(second, self.method)(probe, datamodule=data)
            assert data.trainer is first


@pytest.mark.parametrize("composes", [False, True])
def test_a_second_trainer_may_evaluate_while_a_first_one_fits(composes):
    evaluates, epochs = Evaluates("validate", composes), []
    for callbacks in ([], [evaluates]):
        torch.manual_seed(0)
        model = Validated()
        settings = {"max_epochs": 4, "reload_dataloaders_every_n_epochs": 1, "num_sanity_val_steps": 0}
        fit(model, ValidatedData(seed=1), *callbacks, walker(), **settings)
        epochs.append(model.epochs)
    assert evaluates.seen
    assert all(evaluates.seen)
    assert epochs[0] == epochs[1]
    assert same_cluster_share(epochs[1][3]) > 0.2


def test_a_second_trainer_that_loads_a_checkpoint_does_not_change_where_a_fit_resumed(tmp_path):
    states = []

    class LoadsAnother(Callback):
        def on_train_epoch_end(self, first, module):
            trainer().validate(Validated(), datamodule=first.datamodule, ckpt_path=tmp_path / "step=5.ckpt")
            states.append(first.datamodule.restored_state())

    saves = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=5, save_top_k=-1)
    fit(Validated(), ValidatedData(seed=1), saves, walker(), max_epochs=1, enable_checkpointing=True)
    fit(Validated(), ValidatedData(seed=1), LoadsAnother(), walker(), ckpt_path=tmp_path / "step=10.ckpt", max_epochs=1)
    assert [state.served for state in states] == [10]


def test_lightning_cli_takes_a_function_that_embeds_two_sides():
    parser = ArgumentParser()
    parser.add_class_arguments(BatchSamplerCallback, "callback")
    made = parser.instantiate_classes(parser.parse_args(["--callback.embed=parts.two_sides"]))
    assert made.callback.embed is parts.two_sides


def test_a_datamodule_may_inherit_from_one_that_needs_arguments():
    class Theirs(LightningDataModule):
        def __init__(self, root):
            super().__init__()
            self.root = root

    class Mine(BatchSamplerDataModule, Theirs):
        def __init__(self, root, batch_size):
            Theirs.__init__(self, root)
            BatchSamplerDataModule.__init__(self, batch_size)

    data = Mine("images", 8)
    assert (data.root, data.batch_size, data.seed) == ("images", 8, None)


def test_a_second_fit_within_a_fit_is_refused():
    with pytest.raises(RuntimeError, match="Give the second fit a DataModule of its own"):
        fit(Model(), ValidatedData(seed=1), Evaluates("fit"), walker())


class EstimatesInSetup(Data):
    """A DataModule whose loader is made before the callback's ``setup``."""

    def setup(self, stage):
        self.n_steps = self.trainer.estimated_stepping_batches


@pytest.mark.parametrize("recycle", [False, True])
def test_a_datamodule_that_asks_for_the_number_of_steps_in_setup(recycle, tmp_path):
    class Returns(Model):
        def training_step(self, batch, batch_idx):
            self.epochs.setdefault(self.current_epoch, []).append(batch[0].tolist())
            z = self.encoder(batch[1])
            return {"loss": z.square().mean(), "embeddings": z}

    def fitted(data, **kwargs):
        seed_everything(0)
        model = Returns()
        saves = ModelCheckpoint(tmp_path / type(data).__name__, every_n_train_steps=5, save_top_k=-1)
        fit(model, data, walker(recycle=recycle), saves, max_epochs=3, enable_checkpointing=True, **kwargs)
        return model.batches

    early, plain = EstimatesInSetup(seed=3), Data(seed=3)
    whole = fitted(plain)
    assert fitted(early) == whole
    assert early.n_steps == 36
    assert recycle or same_cluster_share(whole) > 0.15
    checkpoint = tmp_path / "EstimatesInSetup" / "epoch=1-step=20.ckpt"
    assert fitted(EstimatesInSetup(seed=4), ckpt_path=checkpoint) == whole[20:]


def test_a_datamodule_forgets_the_callback_of_its_last_trainer():
    data, composed, uniform = Data(seed=1), Model(), Model()
    fit(composed, data, walker(), max_epochs=1)
    fit(uniform, data, max_epochs=1)
    assert same_cluster_share(composed.batches) > 0.2 > 0.15 > same_cluster_share(uniform.batches)


def test_a_subclass_decides_which_epochs_are_composed_and_from_how_large_pools():
    class EverySecond(BatchSamplerCallback):
        def should_plan(self, trainer):
            return trainer.current_epoch % 2 == 1

        def resolve_pool_size(self, trainer, layout):
            sizes.append(layout.global_batch_size)
            assert trainer.max_epochs == 4
            return 24

    sizes, pools = [], []

    def noting(embeddings, batch_size, *, seed, epoch):
        pools.append((epoch, len(embeddings)))
        return pool_order(embeddings, batch_size, seed=seed, epoch=epoch)

    fit(Model(), Data(), EverySecond(composer=noting, warmup_epochs=0), max_epochs=4)
    tried, *planned = pools
    assert tried == (0, 24)  # before the uniform epoch
    assert planned == [(epoch, 24) for epoch in (1, 3) for _ in range(4)]
    assert set(sizes) == {8}


def test_a_fit_after_one_that_failed_in_on_train_start_is_composed():
    class Fails(Callback):
        def on_train_start(self, trainer, module):
            raise RuntimeError("at the start")

    model = Model()
    with pytest.raises(RuntimeError, match="at the start"):
        fit(model, Data(), Fails(), walker(32))
    made = fit(model, Data(), walker(32), max_epochs=2)
    assert "batch_sampler/hardness" in made.callback_metrics
