"""The state that a checkpoint holds: it is restored unchanged, or refused with an explanation."""

import copy
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from parts import Data, Exact, fit, walker

from bs_lightning import ExactGraph, PlannedPool, Planning, PoolBatchSampler, Pools, RWRComposer
from bs_lightning.state import SamplerState

CHECKPOINTS = Path(__file__).parent / "saved"


def plan_pool(indices, *, seed, epoch):
    batches = np.random.default_rng([seed, epoch]).permutation(len(indices)).reshape(-1, 4)
    return PlannedPool(batches, batches[:, :2])


def make(**kwargs):
    return PoolBatchSampler(103, 4, planning=Planning(plan_pool, Pools(32), **kwargs), seed=5)


def taken(served, **kwargs):
    """Return the state after ``served`` batches."""
    made = make(**kwargs)
    batches = iter(made)
    for _ in range(served):
        next(batches)
    return made.state_dict()


def goes_on(state):
    made = make()
    made.load_state_dict(state)
    return list(made)


STATE = taken(10)
PATHS = [(name,) for name in STATE] + [("pool", name) for name in STATE["pool"]]
WRONG = [None, True, -1, 3, 7, 27, 10**6, 1.5, "x", "5", [1], {}, torch.tensor([1]), torch.zeros(2, 2)]


@pytest.mark.parametrize("path", PATHS, ids=".".join)
def test_every_single_edit_is_refused_or_changes_nothing(path):
    whole = goes_on(STATE)
    for wrong in [*WRONG, "left out"]:
        state = copy.deepcopy(STATE)
        inner = state if len(path) == 1 else state["pool"]
        if type(wrong) is type(inner[path[-1]]) and not isinstance(wrong, torch.Tensor) and wrong == inner[path[-1]]:
            continue
        if wrong == "left out":
            del inner[path[-1]]
        else:
            inner[path[-1]] = wrong
        if path == ("pool", "replacement") and wrong is True:
            assert goes_on(state) == whole  # makes fewer checks, but the batches are the same
        else:
            with pytest.raises((ValueError, TypeError), match="checkpoint"):
                goes_on(state)


@settings(deadline=None)
@given(st.data())
def test_no_edit_of_a_pools_batches_resumes_wrongly(data):
    for replacement in (False, True):
        state = copy.deepcopy(taken(10, replacement=replacement))
        batches = state["pool"]["batches"]
        place = data.draw(st.integers(0, batches.numel() - 1))
        row, column = divmod(place, 4)
        value = data.draw(st.integers(-120, 220))
        kept = batches[row, column].item() == value
        repeated = value in batches[row].tolist()
        batches[row, column] = value
        # Walks with replacement may take any instance of the dataset. A row's first two instances are a masked pair.
        if not kept and (not replacement or not 0 <= value < 103 or repeated):
            with pytest.raises(ValueError, match="does not hold the instances"):
                goes_on(state)


def test_a_newer_format_is_refused():
    with pytest.raises(ValueError, match="state has format 3, but this version of bs-lightning reads format 2"):
        goes_on(STATE | {"format": 3})


def test_numpys_integers_are_saved_as_plain_ones():
    numbers = {name: np.int64(number) for name, number in {"n_instances": 103, "batch_size": 4, "seed": 5}.items()}
    made = PoolBatchSampler(**numbers, planning=Planning(plan_pool, Pools(np.int64(32))))
    made.set_epoch(np.int64(2))
    next(iter(made))
    file = io.BytesIO()
    torch.save(made.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert {type(value) for name, value in state.items() if name not in ("pool", "in_pool")} == {int}
    assert SamplerState.from_dict(state).epoch == 2


# Under the Trainer


class Saves(Callback):
    def __init__(self, path, step):
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def run(ckpt_path=None, *callbacks, max_epochs=2, max_steps=-1, limit=1.0, composer=None, **data):
    seed_everything(0, verbose=False)
    model = Exact()
    how = {} if composer is None else {"composer": composer}
    settings = {"max_epochs": max_epochs, "max_steps": max_steps, "limit_train_batches": limit, "ckpt_path": ckpt_path}
    fit(model, Data(8, **{"n": 103} | data), walker(32, **how), *callbacks, **settings)
    return model.epochs


@pytest.mark.parametrize(
    ("first", "then"), [({"drop_last": True}, {"drop_last": False}), ({"limit": 5}, {"limit": 9})], ids=str
)
def test_an_epoch_that_has_become_longer_after_its_last_batch_is_refused(first, then, tmp_path):
    last = 5 if "limit" in first else 12
    run(None, Saves(tmp_path / "last.ckpt", last), max_epochs=1, **first)
    with pytest.raises(ValueError, match=f"after all {last} batches of epoch 0, .* drop_last, limit"):
        run(tmp_path / "last.ckpt", **then)
    assert [len(batches) for batches in run(tmp_path / "last.ckpt", **first).values()] == [last]


def test_a_tampered_checkpoint_is_refused(tmp_path):
    run(None, Saves(tmp_path / "mid.ckpt", 6), max_epochs=1)
    checkpoint = torch.load(tmp_path / "mid.ckpt", weights_only=True)
    checkpoint["Data"]["pool"]["batches"][-1, 0] = 99
    torch.save(checkpoint, tmp_path / "mid.ckpt")
    with pytest.raises(ValueError, match="pool, batches 4 to 8 of epoch 0, does not hold the instances"):
        run(tmp_path / "mid.ckpt")


def test_a_checkpoint_that_is_saved_while_a_pool_is_planned_is_resumed(tmp_path):
    """As ModelCheckpoint(save_on_exception=True) does, or a signal from a cluster."""

    class SavesInEmbed(Exact):
        def embed(self, batch):
            if self.global_step == 8:
                self.trainer.save_checkpoint(tmp_path / "planning.ckpt")
            return self(batch)

    seed_everything(0, verbose=False)
    whole = SavesInEmbed()
    fit(whole, Data(8, 103), walker(32), max_epochs=1)
    assert run(tmp_path / "planning.ckpt", max_epochs=1)[0] == whole.epochs[0][8:]


def test_going_on_after_max_steps_ended_an_epoch_early_is_warned_of(tmp_path):
    saves = ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=10)
    fit(Exact(), Data(8, 103), walker(32), saves, max_epochs=-1, max_steps=5, enable_checkpointing=True)
    with pytest.warns(UserWarning, match="after 5 of 12 batches of epoch 0, as max_steps or a hook ended the epoch"):
        epochs = run(tmp_path / "last.ckpt", max_steps=20)
    assert [len(batches) for batches in epochs.values()] == [12]


def test_a_users_own_state_may_have_common_names(tmp_path):
    class Own(Data):
        def state_dict(self):
            return {"format": "jpeg", "pool": 3, "served": "hot"}

    fit(Exact(), Own(8, 103), walker(32), Saves(tmp_path / "own.ckpt", 6), max_epochs=1)
    with pytest.warns(UserWarning, match="without the state of BatchSamplerDataModule"):
        fit(Exact(), Own(8, 103), walker(32), max_epochs=1, ckpt_path=tmp_path / "own.ckpt")


KEPT = {
    "pools": {},
    "mask": {},
    "whole": {"composer": RWRComposer(ExactGraph(5), replacement=True)},
}


@pytest.mark.parametrize("kind", KEPT)
def test_checkpoints_of_format_2_are_resumed(kind):
    """The repository keeps them. ``write_checkpoints`` wrote them in the version that introduced the format."""
    seed_everything(0, verbose=False)
    model, how = Exact(), kept(kind)
    fit(model, Data(8, 103), walker(**how), max_epochs=2, ckpt_path=CHECKPOINTS / f"format2-{kind}.ckpt")
    expected = torch.load(CHECKPOINTS / f"format2-{kind}.ckpt", weights_only=True)["expected"]
    assert model.batches[: len(expected)] == expected
    assert len(model.epochs[1]) == 12


def kept(kind):
    sizes = {"pool_size": None, "refresh_every": 5} if kind == "whole" else {"pool_size": 32}
    return sizes | KEPT[kind] | ({"mask_nearest": 3} if kind == "mask" else {})


def write_checkpoints():
    """Write a checkpoint of each kind after six batches, with the batches that follow from its pool."""
    CHECKPOINTS.mkdir(exist_ok=True)
    for kind in KEPT:
        path = CHECKPOINTS / f"format2-{kind}.ckpt"
        seed_everything(0, verbose=False)
        model = Exact()
        fit(model, Data(8, 103), walker(**kept(kind)), Saves(path, 6), max_epochs=1)
        checkpoint = torch.load(path, weights_only=True)
        stop = {"whole": 10}.get(kind, 8)  # the pool's end
        torch.save(checkpoint | {"expected": model.batches[6:stop]}, path)


if __name__ == "__main__":
    write_checkpoints()
