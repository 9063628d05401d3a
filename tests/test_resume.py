"""Interrupted anywhere and resumed with default arguments, training goes on as if nothing had happened."""

import os
import signal
import warnings

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import LearningRateFinder, ModelCheckpoint
from parts import Data, Exact, SavesAtBatchStart, SavesBefore, fit, walker
from processes import batches_by_step, run, run_all
from stream_parts import StreamData
from torch.utils.data import DataLoader

# Each epoch has 12 batches of 8, in pools of 4 batches. The first epoch is uniform.
EPOCHS = 3


class Estimates(Exact):
    def configure_optimizers(self):
        assert self.trainer.estimated_stepping_batches == EPOCHS * 12
        return super().configure_optimizers()


class ValidatedData(Data):
    def val_dataloader(self):
        return DataLoader(self.train_dataset(), batch_size=50)


class SavesAtBatchEnd(Callback):
    """Saves before Lightning has counted the batch as completed."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_batch_end(self, trainer, *_):
        trainer.save_checkpoint(self.folder / f"step={trainer.global_step}.ckpt")


def every_step(folder):
    return ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)


def after_validation(folder):
    return ModelCheckpoint(folder, filename="{step}", save_top_k=-1, save_on_train_epoch_end=False)


def each_epoch(folder):
    return ModelCheckpoint(folder, filename="{step}", save_top_k=-1, every_n_epochs=1, save_on_train_epoch_end=True)


def at_train_start(folder):
    return SavesBefore(folder, "on_train_start")


def at_epoch_start(folder):
    return SavesBefore(folder, "on_train_epoch_start")


def train(model, folder, saves=None, ckpt_path=None, loader=None, data=ValidatedData, seed=11, **kwargs):
    callbacks = [walker(32, warmup_epochs=1)]
    if saves is not None:
        callbacks.insert(0 if saves is SavesAtBatchEnd else 1, saves(folder))
    settings = {
        "max_epochs": EPOCHS,
        "enable_checkpointing": True,
        "num_sanity_val_steps": 0,
        "default_root_dir": folder,
    }
    return fit(model, data(8, 100, seed=seed, **loader or {}), *callbacks, ckpt_path=ckpt_path, **settings | kwargs)


# The quick tests resume at epochs' last batches, and at a pool's middle, last and first batch.
STEPS = {11, 12, 14, 16, 24}


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["some", "every"])
@pytest.mark.parametrize("make", [Exact, Estimates])
@pytest.mark.parametrize(
    ("saves", "flags"),
    [
        (every_step, {}),
        (SavesAtBatchEnd, {}),
        (SavesAtBatchStart, {}),
        (after_validation, {"val_check_interval": 5}),
        (each_epoch, {}),
        (each_epoch, {"max_epochs": -1, "max_steps": EPOCHS * 12}),
        (every_step, {"limit_train_batches": 7}),
        (every_step, {"reload_dataloaders_every_n_epochs": 1}),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_resumed_batches_are_those_of_the_uninterrupted_run(saves, flags, make, every, tmp_path):
    if every and (make is Estimates or saves not in (every_step, SavesAtBatchEnd)):
        pytest.skip("some steps are enough")
    if make is Estimates and "limit_train_batches" in flags:
        pytest.skip("estimates other steps")
    torch.manual_seed(0)
    whole = make()
    train(whole, tmp_path, saves, **flags)
    checkpoints = sorted(tmp_path.glob("step=*.ckpt"), key=lambda path: int(path.stem[5:]))
    assert len(checkpoints) >= EPOCHS
    for path in checkpoints:
        step = int(path.stem[5:])
        if len(checkpoints) > 12 and not every and step not in STEPS:
            continue
        resumed = make()
        train(resumed, tmp_path / "resumed", ckpt_path=path, seed=11, **flags)
        assert resumed.batches == whole.batches[step:], f"from step {step}"


@pytest.mark.parametrize("first", [5, 12, 23])
def test_a_run_that_was_resumed_from_within_a_step_may_be_resumed_again(first, tmp_path):
    """Lightning goes on counting the batch that was begun when the first checkpoint was written."""
    torch.manual_seed(0)
    whole, resumed = Exact(), Exact()
    train(whole, tmp_path, SavesAtBatchStart)
    train(resumed, tmp_path / "resumed", every_step, ckpt_path=tmp_path / f"step={first}.ckpt")
    assert resumed.batches == whole.batches[first:]
    for step in (first + 1, 24, 30):
        again = Exact()
        train(again, tmp_path, ckpt_path=tmp_path / "resumed" / f"step={step}.ckpt")
        assert again.batches == whole.batches[step:], f"from step {step}"


def test_a_run_whose_epoch_was_skipped_may_be_resumed(tmp_path):
    class Skips(Exact):
        def on_train_batch_start(self, batch, batch_idx):
            return -1 if (self.current_epoch, batch_idx) == (0, 9) else None

    torch.manual_seed(0)
    whole = Skips()
    train(whole, tmp_path, every_step)
    assert [len(batches) for batches in whole.epochs.values()] == [9, 12, 12]
    for step in (9, 14, 21):
        resumed = Skips()
        train(resumed, tmp_path / "resumed", ckpt_path=tmp_path / f"step={step}.ckpt")
        assert resumed.batches == whole.batches[step:], f"from step {step}"


class SavesAtEpochStart(Callback):
    def __init__(self, folder):
        self.folder = folder

    def on_train_epoch_start(self, trainer, *_):
        trainer.save_checkpoint(self.folder / f"epoch={trainer.current_epoch}.ckpt")


@pytest.mark.parametrize("val_check_interval", [1.0, 5])
def test_a_checkpoint_may_be_written_at_an_epochs_start(val_check_interval, tmp_path):
    flags = {"val_check_interval": val_check_interval}
    torch.manual_seed(0)
    whole = Exact()
    train(whole, tmp_path, SavesAtEpochStart, **flags)
    for epoch in range(EPOCHS):
        resumed = Exact()
        path = tmp_path / f"epoch={epoch}.ckpt"
        train(resumed, tmp_path / "resumed", every_step, ckpt_path=path, **flags)
        assert resumed.batches == whole.batches[12 * epoch :]
        again = Exact()
        train(again, tmp_path, ckpt_path=tmp_path / "resumed" / "step=30.ckpt", **flags)
        assert again.batches == whole.batches[30:]


class SetsEpochs(Exact):
    """Tells the loader the epoch in each hook, as some loops must."""

    def tell(self, *_):
        self.trainer.train_dataloader.set_epoch(self.current_epoch)

    on_train_start = on_train_epoch_start = on_train_batch_start = on_train_batch_end = on_train_epoch_end = tell


@pytest.mark.parametrize("data", [ValidatedData, StreamData])
@pytest.mark.parametrize(
    "saves", [SavesAtBatchStart, SavesAtBatchEnd, SavesAtEpochStart], ids=lambda each: each.__name__
)
def test_setting_the_epoch_by_hand_disturbs_nothing(saves, data, tmp_path):
    kind = {"kind": "SizedStateful"} if data is StreamData else {}
    torch.manual_seed(0)
    whole = Exact()
    train(whole, tmp_path, saves, data=data, loader=kind)
    steps = {"epoch=1": 12, "epoch=2": 24} if saves is SavesAtEpochStart else {f"step={n}": n for n in (5, 12, 23, 24)}
    for name, step in steps.items():
        resumed, again = SetsEpochs(), SetsEpochs()
        train(resumed, tmp_path / "resumed", every_step, ckpt_path=tmp_path / f"{name}.ckpt", data=data, loader=kind)
        assert resumed.batches == whole.batches[step:], f"from {name}"
        train(again, tmp_path, ckpt_path=tmp_path / "resumed" / "step=30.ckpt", data=data, loader=kind)
        assert again.batches == whole.batches[30:], f"from {name}"


@pytest.mark.parametrize("kind", [None, "SizedStateful", "Stateful"])
@pytest.mark.parametrize("max_steps", [12, 14, 24])
def test_a_run_that_max_steps_ended_may_go_on(max_steps, kind, tmp_path):
    """It goes on with the next epoch's first batch, and may be resumed again."""
    torch.manual_seed(0)
    whole, begun, resumed, again = Exact(), Exact(), Exact(), Exact()
    begun.load_state_dict(whole.state_dict())
    source = {"data": StreamData, "loader": {"kind": kind}} if kind else {}
    train(whole, tmp_path, max_epochs=-1, max_steps=36, **source)
    made = train(begun, tmp_path, max_epochs=-1, max_steps=max_steps, **source)
    made.save_checkpoint(tmp_path / "ended.ckpt")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(resumed, tmp_path, every_step, ckpt_path=tmp_path / "ended.ckpt", max_epochs=-1, max_steps=36, **source)
    said = [str(warning.message) for warning in caught if "other batches are not served" in str(warning.message)]
    assert bool(said) == (max_steps == 14)
    assert begun.batches == whole.batches[:max_steps]
    assert len(resumed.batches) == 36 - max_steps
    if max_steps == 14:
        assert [len(batches) for batches in resumed.epochs.values()] == [12, 10]
        train(again, tmp_path, ckpt_path=tmp_path / "step=26.ckpt", max_epochs=-1, max_steps=36, **source)
        assert again.batches == resumed.batches[12:]
    else:
        assert resumed.batches == whole.batches[max_steps:]


def test_a_run_of_max_steps_that_goes_on_from_an_epochs_end_steps_its_schedule(tmp_path):
    """Lightning steps no plateau schedule at the end of an epoch that it takes for resumed in its middle."""

    class Plateaus(Exact):
        def configure_optimizers(self):
            self.stepped = []
            optimizer = torch.optim.SGD(self.parameters(), 0.1)
            schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "monitor": "value"}}

        def on_train_epoch_end(self):
            self.log("value", 1.0)

        def lr_scheduler_step(self, scheduler, metric):
            self.stepped.append(self.global_step)

    whole, resumed = Plateaus(), Plateaus()
    limits = {"max_epochs": -1, "max_steps": 36}
    train(whole, tmp_path, each_epoch, **limits)
    train(resumed, tmp_path / "resumed", ckpt_path=tmp_path / "step=12.ckpt", **limits)
    assert (whole.stepped, resumed.stepped) == ([12, 24, 36], [24, 36])


@pytest.mark.parametrize("step", [2, 5, 9])
def test_looking_into_the_loader_while_an_epoch_is_trained_disturbs_nothing(step, tmp_path):
    """Checkpoints, `trained_batch` and the number of encoded pools stay the same."""
    served, encoded = [], []

    class Looks(Callback):
        def on_train_batch_end(self, trainer, *_):
            served.append(trainer.datamodule.trained_batch().tolist())
            if trainer.global_step == step:
                assert len(list(trainer.train_dataloader)) == 12

    class Counts(Exact):
        def embed(self, batch):
            encoded.append(len(batch[0]))
            return self(batch)

    def run(model, saves, ckpt_path=None, *callbacks):
        data = ValidatedData(8, 100, seed=11)
        callbacks = [*callbacks, walker(32), saves(tmp_path)]
        settings = {"enable_checkpointing": True, "num_sanity_val_steps": 0, "default_root_dir": tmp_path}
        fit(model, data, *callbacks, max_epochs=1, ckpt_path=ckpt_path, **settings)
        return model.batches

    torch.manual_seed(0)
    whole = run(Counts(), every_step, None, Looks())
    assert served == whole
    assert encoded == [32] * 3
    for start in range(1, 12):
        assert run(Exact(), each_epoch, tmp_path / f"step={start}.ckpt") == whole[start:]


@pytest.mark.parametrize("hook", ["on_train_start", "on_train_epoch_start"])
@pytest.mark.parametrize("saves", [every_step, SavesAtBatchEnd, after_validation], ids=lambda saves: saves.__name__)
def test_looking_into_the_loader_before_the_first_step_of_a_resumed_run_disturbs_nothing(saves, hook, tmp_path):
    flags = {"val_check_interval": 6} if saves is after_validation else {}
    torch.manual_seed(0)
    whole = Exact()
    train(whole, tmp_path, saves, **flags)
    looks = type("Looks", (Exact,), {hook: lambda self: list(self.trainer.train_dataloader)})
    for step in (12, 18, 24) if flags else (12, 14, 17, 24):
        resumed = looks()
        train(resumed, tmp_path / "resumed", ckpt_path=tmp_path / f"step={step}.ckpt", **flags)
        assert resumed.batches == whole.batches[step:], f"from step {step}"


LOADERS = [
    {"num_workers": 2, "prefetch_factor": 2},
    {"num_workers": 2, "prefetch_factor": 8},
    {"num_workers": 2, "prefetch_factor": 8, "persistent_workers": True},
]


@pytest.mark.parametrize("loader", LOADERS, ids=str)
@pytest.mark.parametrize("step", [12, 14, 15, 16, 23, 24])
def test_workers_do_not_matter(step, loader, tmp_path):
    """A run resumes at the middle, last and first batch of a pool, and at the last batch of an epoch."""
    torch.manual_seed(0)
    whole = Exact()
    train(whole, tmp_path, every_step, loader=loader)
    resumed = Exact()
    train(resumed, tmp_path, ckpt_path=tmp_path / f"step={step}.ckpt", loader=loader)
    assert resumed.batches == whole.batches[step:]


def test_a_checkpoint_grows_by_the_pool_not_by_the_data(tmp_path):
    sizes = {}
    for n in (100, 20_000):
        path = tmp_path / f"{n}.ckpt"
        made = fit(Exact(), Data(8, n), walker(32), limit_train_batches=6, max_epochs=1)
        made.save_checkpoint(path)
        state = torch.load(path, weights_only=True)["Data"]
        assert state["pool"]["batches"].numel() <= 48
        sizes[n] = path.stat().st_size
    assert abs(sizes[20_000] - sizes[100]) < 200


def test_the_seed_is_that_of_the_checkpoint(tmp_path):
    torch.manual_seed(0)
    whole = Exact()
    train(whole, tmp_path, every_step, seed=None)
    torch.manual_seed(1)
    resumed = Exact()
    train(resumed, tmp_path, ckpt_path=tmp_path / "step=14.ckpt", seed=None, reload_dataloaders_every_n_epochs=1)
    assert resumed.batches == whole.batches[14:]


def test_the_seed_is_in_a_checkpoint_from_before_the_first_batch(tmp_path):
    def run(global_seed, *callbacks, **kwargs):
        seed_everything(global_seed, verbose=False)
        fit(model := Exact(), Data(), *callbacks, walker(), max_epochs=1, **kwargs)
        return sorted(model.batches[0])

    first = run(1, SavesAtEpochStart(tmp_path))
    assert run(2, ckpt_path=tmp_path / "epoch=0.ckpt") == first
    assert run(2) != first


def test_another_pool_size_finishes_the_pool_and_goes_on(tmp_path):
    whole, resumed = Exact(), Exact()
    train(whole, tmp_path, every_step)
    callbacks = [walker(48, warmup_epochs=1)]
    fit(resumed, ValidatedData(8, 100, seed=11), *callbacks, ckpt_path=tmp_path / "step=14.ckpt", max_epochs=EPOCHS)
    assert resumed.batches[:2] == whole.batches[14:16]
    epoch = whole.batches[12:14] + resumed.epochs[1]
    assert len(epoch) == 12
    assert len(set(sum(epoch, []))) == 96


@pytest.mark.parametrize(
    ("batch_size", "n", "words"),
    [
        (4, 100, "global_batch_size=8, now it is 4"),
        (8, 120, "n_instances=100, now it is 120"),
        # With fewer batches, Lightning believes that all of them have been trained.
        (16, 100, "global_batch_size=8, now it is 16"),
        (8, 60, "n_instances=100, now it is 60"),
    ],
)
def test_other_sizes_are_refused_in_mid_epoch_and_right_between_epochs(batch_size, n, words, tmp_path):
    train(Exact(), tmp_path, every_step)
    train(Exact(), tmp_path / "epochs", each_epoch)
    with pytest.raises(ValueError, match=f"in the middle of an epoch with {words}.*Resume with"):
        fit(Exact(), ValidatedData(batch_size, n), walker(), ckpt_path=tmp_path / "step=20.ckpt", max_epochs=EPOCHS)
    resumed = Exact()
    fit(
        resumed,
        ValidatedData(batch_size, n),
        walker(),
        ckpt_path=tmp_path / "epochs" / "step=24.ckpt",
        max_epochs=EPOCHS,
    )
    indices = sum(resumed.epochs[2], [])
    assert len(set(indices)) == len(indices) == n // batch_size * batch_size


class Forgets(ValidatedData):
    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


def test_a_checkpoint_without_our_state_warns(tmp_path):
    with pytest.warns(UserWarning, match="state_dict\\(\\) of Forgets leaves out the state of BatchSamplerDataModule"):
        train(Exact(), tmp_path, every_step, data=Forgets)
    resumed = Exact()
    with pytest.warns(UserWarning, match="checkpoint without the state of BatchSamplerDataModule"):
        train(resumed, tmp_path, ckpt_path=tmp_path / "step=14.ckpt", data=Forgets)
    for batches in resumed.epochs.values():
        assert len(set(sum(batches, []))) == sum(map(len, batches))
    assert [len(batches) for batches in resumed.epochs.values()] == [10, 12]


@pytest.mark.parametrize(
    ("step", "loader", "flags"), [(12, {"drop_last": True}, {}), (7, {}, {"limit_train_batches": 7})], ids=str
)
def test_an_epoch_that_lightning_begins_again_warns(tmp_path, step, loader, flags):
    train(Exact(), tmp_path, every_step, loader={"drop_last": False}, max_epochs=1)
    with pytest.warns(
        UserWarning, match=f"after {step} of 13 batches of epoch 0. Epochs have {step} now, as drop_last or limit"
    ):
        train(
            again := Exact(),
            tmp_path,
            ckpt_path=tmp_path / f"step={step}.ckpt",
            loader={"drop_last": False} | loader,
            **flags,
        )
    assert len(again.epochs[0]) == step


@pytest.mark.parametrize(
    ("saves", "step", "before", "after"),
    [
        (SavesAtBatchStart, 0, {}, {}),
        (SavesAtBatchStart, 12, {}, {}),
        (each_epoch, 7, {"overfit_batches": 5, "max_steps": 7}, {"overfit_batches": 5, "max_steps": 14}),
        (each_epoch, 8, {"overfit_batches": 5, "max_steps": 8}, {"overfit_batches": 3, "max_steps": 14}),
    ],
    ids=["first step", "first step of an epoch", "overfit", "overfit less"],
)
def test_an_epoch_that_is_not_begun_again_does_not_warn(tmp_path, saves, step, before, after):
    train(Exact(), tmp_path, saves, **before)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "The checkpoint was taken after")
        train(Exact(), tmp_path, ckpt_path=tmp_path / f"step={step}.ckpt", **after)


@pytest.mark.parametrize("kind", [None, "SizedStateful", "Stateful"])
def test_a_resumed_run_whose_epochs_have_new_loaders_leaves_its_checkpoint(tmp_path, kind):
    source = {"data": StreamData, "loader": {"kind": kind}} if kind else {}
    more = {"reload_dataloaders_every_n_epochs": 1} | source
    whole, resumed, again = Exact(), Exact(), Exact()
    train(whole, tmp_path, every_step, **more)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "The checkpoint was taken after")
        train(resumed, tmp_path, at_epoch_start, ckpt_path=tmp_path / "step=5.ckpt", **more)
        train(again, tmp_path, ckpt_path=tmp_path / "start=24.ckpt", **more)
    state = torch.load(tmp_path / "start=24.ckpt", weights_only=True)["StreamData" if kind else "ValidatedData"]
    assert (state["epoch"], state["served"], state["seed"]) == (2, 0, 11)
    assert resumed.batches == whole.batches[5:]
    assert again.batches == whole.batches[24:]


@pytest.mark.parametrize("step", [5, 12, 14, 24])
def test_a_run_without_our_state_saves_where_lightning_goes_on(step, tmp_path):
    with pytest.warns(UserWarning, match="leaves out the state of BatchSamplerDataModule"):
        train(Exact(), tmp_path, every_step, data=Forgets)
    resumed, again = Exact(), Exact()
    train(resumed, tmp_path, at_train_start, ckpt_path=tmp_path / f"step={step}.ckpt")
    train(again, tmp_path, ckpt_path=tmp_path / f"start={step}.ckpt")
    assert again.epochs == resumed.epochs


class Adds(ValidatedData):
    def state_dict(self):
        return super().state_dict() | {"mine": 1}


def test_a_checkpoint_that_validation_saves_without_our_state_warns(tmp_path):
    with pytest.warns(UserWarning, match="state_dict\\(\\) of Forgets leaves out"):
        train(Exact(), tmp_path, after_validation, data=Forgets, check_val_every_n_epoch=2, max_epochs=2)


@pytest.mark.filterwarnings("error:state_dict")
def test_no_state_is_missed_where_nothing_has_been_trained(tmp_path):
    saves_before_it_trains = LearningRateFinder(num_training_steps=5, update_attr=False)
    train(Exact(), tmp_path, lambda _: saves_before_it_trains, data=Adds, max_epochs=1)
    assert saves_before_it_trains.optimal_lr.results["loss"]
    validating = Trainer(accelerator="cpu", callbacks=[walker(32)], logger=False, enable_progress_bar=False)
    validating.validate(Exact(), DataLoader(torch.ones(8, 8)))  # without a DataModule
    validating.save_checkpoint(tmp_path / "validated.ckpt")


class SavesAtStart(Callback):
    def __init__(self, path):
        self.path = path

    def on_train_start(self, trainer, module):
        trainer.save_checkpoint(self.path)


def test_saved_again_before_the_first_batch(tmp_path):
    whole, resumed = Exact(), Exact()
    train(whole, tmp_path, every_step)
    again = tmp_path / "again.ckpt"
    train(Exact(), tmp_path, lambda _: SavesAtStart(again), ckpt_path=tmp_path / "step=14.ckpt", max_steps=15)
    train(resumed, tmp_path, ckpt_path=again)
    assert resumed.batches == whole.batches[14:]


def test_other_loaders_of_the_datamodule_do_not_matter(tmp_path):
    class Looks(Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            other = trainer.datamodule.train_dataloader()
            assert len({int(i) for batch in other for i in batch[0]}) == 96

    def run(*callbacks):
        model = Exact()
        save = ModelCheckpoint(tmp_path, filename="looked-{step}", every_n_train_steps=1, save_top_k=-1)
        callbacks = [*callbacks, walker(32, warmup_epochs=1), save]
        fit(model, Data(8, 100, seed=11), *callbacks, max_epochs=2, enable_checkpointing=True)
        return model

    torch.manual_seed(0)
    whole = run()
    torch.manual_seed(0)
    assert run(Looks()).batches == whole.batches
    resumed = Exact()
    path = tmp_path / "looked-step=14-v1.ckpt"
    fit(resumed, Data(8, 100, seed=11), walker(32, warmup_epochs=1), max_epochs=2, ckpt_path=path)
    assert resumed.batches == whole.batches[14:]


class KeepsNoState(ValidatedData):
    def state_dict(self):
        return {"mine": 1}


def test_a_state_of_the_users_alone_warns(tmp_path):
    train(Exact(), tmp_path, every_step, data=KeepsNoState)
    with pytest.warns(UserWarning, match="checkpoint without the state of BatchSamplerDataModule"):
        train(Exact(), tmp_path, ckpt_path=tmp_path / "step=14.ckpt", data=KeepsNoState)


def test_resuming_is_not_called_unreliable(tmp_path, recwarn):
    train(Exact(), tmp_path, every_step)
    train(Exact(), tmp_path, ckpt_path=tmp_path / "step=14.ckpt")
    assert not [w for w in recwarn if "not resumable" in str(w.message)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("loader", "kills"),
    [
        (LOADERS[1], (14, 16, 24)),
        (LOADERS[0], (14, 16, 24)),
        ({"num_workers": 0}, (15, 19, 23)),
        (LOADERS[2], (15, 19, 23)),
    ],
    ids=str,
)
def test_killed_and_resumed(loader, kills, tmp_path):
    """A run is killed at the first and last batch of an epoch and of a pool, and between them."""
    settings = {"n": 100, "batch_size": 8, "pool_size": 32, "warmup_epochs": 1, "max_epochs": EPOCHS}
    settings |= {"loader": loader, "save_every": 3}
    for kill_at in kills:
        run(tmp_path / "killed", fails=True, devices=1, kill_at=kill_at, **settings)
    killed, whole = run_all(tmp_path, {"killed": settings, "whole": settings}, devices=1).values()
    assert len(batches_by_step(tmp_path / "whole", 1)) == EPOCHS * 12
    assert batches_by_step(tmp_path / "killed", 1) == batches_by_step(tmp_path / "whole", 1)
    assert killed[0]["weights"] == whole[0]["weights"]


def test_sigterm_while_encoding_leaves_the_model_as_it_was(tmp_path):
    model = Exact()
    modes = [part.training for part in model.modules()]
    sent = []

    def embed(module, batch):
        if not sent:
            sent.append(torch.get_rng_state())
            torch.rand(1)
            os.kill(os.getpid(), signal.SIGTERM)
        return module(batch)

    from lightning.pytorch.utilities.exceptions import SIGTERMException

    with pytest.raises(SIGTERMException):
        fit(model, Data(), walker(embed=embed))
    assert [part.training for part in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), sent[0])
    assert len(model.batches) == 1  # Lightning finishes the step that it is about to train
    model.epochs.clear()
    fit(model, Data(), walker(embed=embed), max_epochs=1)
    assert len(model.batches) == 12


def test_another_checkpoints_state_is_not_taken(tmp_path):
    """A DataModule resumes once. It then validates and fits with other checkpoints."""
    whole, data = Exact(), ValidatedData(8, 100, seed=11)
    train(whole, tmp_path, every_step)
    train(Exact(), tmp_path / "other", every_step, seed=12)
    made = fit(Exact(), data, walker(32, warmup_epochs=1), ckpt_path=tmp_path / "step=35.ckpt", max_epochs=EPOCHS)
    made.validate(Exact(), datamodule=data, ckpt_path=tmp_path / "other" / "step=14.ckpt", verbose=False)
    again = Exact()
    fit(again, data, walker(32, warmup_epochs=1), max_epochs=1)
    assert again.epochs[0] == whole.epochs[0]


def test_a_checkpoint_without_our_state_does_not_get_that_of_an_earlier_fit(tmp_path):
    train(Exact(), tmp_path, every_step)
    train(Exact(), tmp_path / "other", every_step, data=Forgets)
    data = ValidatedData(8, 100, seed=11)
    settings = {"ckpt_path": tmp_path / "step=14.ckpt", "max_epochs": EPOCHS, "enable_checkpointing": True}
    fit(Exact(), data, walker(32, warmup_epochs=1), default_root_dir=tmp_path, **settings)
    settings["ckpt_path"] = tmp_path / "other" / "step=14.ckpt"
    with pytest.warns(UserWarning, match="checkpoint without the state of BatchSamplerDataModule"):
        fit(Exact(), data, walker(32, warmup_epochs=1), default_root_dir=tmp_path, **settings)
