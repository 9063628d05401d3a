"""The shape of the package: which module imports which, and which private parts of Lightning it uses."""

import ast
import importlib
import logging
import math
import pkgutil
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from parts import Data, Model, fit, trainer, walker

import bs_lightning

SOURCE = Path(bs_lightning.__file__).parent


def imported(path):
    """Return the modules that a file imports, at its top or in its functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_only_the_plugin_and_the_recipes_import_lightning():
    for path in SOURCE.rglob("*.py"):
        packages = {name.split(".")[0] for name in imported(path)}
        assert path.parent.name in ("plugin", "recipes") or not packages & {"lightning", "pytorch_lightning"}, path


def test_nothing_imports_the_recipes():
    for path in SOURCE.rglob("*.py"):
        assert path.parent.name == "recipes" or not [name for name in imported(path) if "recipes" in name], path


def test_only_the_adapters_import_other_trainers_and_nothing_imports_them():
    for path in SOURCE.rglob("*.py"):
        if path.parent.name != "adapters":
            packages = {name.split(".")[0] for name in imported(path)}
            assert not packages & {"accelerate", "datasets", "sentence_transformers"}, path
            assert not [name for name in imported(path) if "adapters" in name], path


def test_an_import_does_not_warn_in_a_notebook():
    for path in SOURCE.rglob("*.py"):
        assert "tqdm.auto" not in set(imported(path)), f"{path}: without ipywidgets, tqdm.auto warns in a notebook"


@pytest.mark.parametrize("is_set_up", [False, True])
def test_messages_go_where_the_user_logs_else_to_the_screen(is_set_up, monkeypatch, capsys):
    log = logging.getLogger("bs_lightning")
    monkeypatch.setattr(log, "handlers", [])
    monkeypatch.setattr(log, "propagate", True)
    theirs = [logging.StreamHandler(sys.stdout)] if is_set_up else []
    monkeypatch.setattr(logging.root, "handlers", theirs)
    importlib.reload(bs_lightning)
    log.info("a message")
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == (("a message\n", "") if is_set_up else ("", "a message\n"))


def test_imports_have_no_circle():
    def name(path):
        return ".".join(path.relative_to(SOURCE.parent).with_suffix("").parts).removesuffix(".__init__")

    modules = {name(path): {m for m in imported(path) if m.startswith("bs_")} for path in SOURCE.rglob("*.py")}
    modules["bs_lightning"].remove("bs_lightning")  # its own submodules
    outside = ("adapters", "plugin", "recipes")
    order = TopologicalSorter(modules).static_order()
    core = [name for name in order if not any(folder in name for folder in outside)]
    for module in set(core) - {"bs_lightning", "bs_lightning.presets"}:
        assert not [name for name in modules[module] if "plugin" in name], module


def test_one_import_makes_the_documented_modules_reachable():
    code = "import bs_lightning as bl; bl.baselines, bl.losses, bl.metrics, bl.presets, bl.rules, bl.schedules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_no_public_name_hides_a_module():
    for module in pkgutil.walk_packages([str(SOURCE)], "bs_lightning."):
        parent, _, name = module.name.rpartition(".")
        found = getattr(importlib.import_module(parent), name, importlib.import_module(module.name))
        assert found is importlib.import_module(module.name), f"{module.name} is hidden by {found!r}"


# The attributes that the library uses of Lightning's loops. Lightning documents none of them, so each is named here.


def attribute(owner, path, change):
    for name in path.split("."):
        assert hasattr(owner, name), f"Lightning has moved Trainer.{path}: change {change} in src/bs_lightning/plugin."
        owner = getattr(owner, name)
    return owner


@pytest.mark.parametrize(
    ("path", "change"),
    [
        ("fit_loop.epoch_loop.batch_progress.current.ready", "loops.next_batch"),
        ("fit_loop.epoch_loop.batch_progress.current.completed", "loops.batch_in_training"),
        ("fit_loop.epoch_loop.batch_progress.current.processed", "loops.step_is_done"),
        ("fit_loop.epoch_loop.batch_progress.is_last_batch", "loops.epoch_is_trained"),
        ("fit_loop.restarting", "loops.restarting"),
        ("fit_loop._data_fetcher", "loops.fetch_anew"),
        ("fit_loop.epoch_progress.current.processed", "loops.epochs_processed"),
        ("fit_loop.epoch_progress.current.ready", "loops.mend_counters"),
        ("fit_loop.epoch_progress.current.started", "loops.in_epoch"),
        ("fit_loop.epoch_progress.increment_ready", "loops.mend_counters"),
        ("fit_loop.epoch_progress.increment_started", "loops.mend_counters"),
        ("fit_loop.restarted_mid_epoch", "loops.mend_counters"),
        ("fit_loop.restarted_on_epoch_start", "loops.mend_counters"),
        ("fit_loop.restarted_on_epoch_end", "loops.mend_counters"),
        ("fit_loop.reset_restart_stage", "loops.mend_counters"),
        ("fit_loop._restarting", "loops.mend_counters"),
        ("fit_loop.epoch_progress.increment_completed", "loops.mend_counters"),
        ("fit_loop.epoch_loop.restarted_on_train_batch_end", "loops.mend_counters"),
        ("fit_loop.epoch_loop.restarting", "loops.mend_counters"),
        *(
            (f"fit_loop.epoch_loop.batch_progress.{name}", "loops.mend_counters")
            for name in ("total.ready", "total.started", "total.processed", "total.completed", "reset_on_run")
        ),
        ("num_training_batches", "batch_sampler.TrainerBatchSampler.plan"),
        ("distributed_sampler_kwargs", "datamodule.BatchSamplerDataModule.train_dataloader"),
        ("overfit_batches", "callback.BatchSamplerCallback.should_plan"),
        ("ckpt_path", "datamodule.BatchSamplerDataModule.restored_state"),
        ("precision_plugin.convert_input", "encoder.EncodedEmbeddings"),
        ("precision_plugin.forward_context", "encoder.EncodedEmbeddings"),
        ("strategy.reduce_boolean_decision", "processes.failing_together"),
        ("progress_bar_callback", "progress.progress"),
    ],
)
def test_what_lightning_is_asked_for_is_there(path, change):
    attribute(trainer(), path, change)


def test_lightning_sets_the_epoch_after_on_train_start_and_before_each_epoch(monkeypatch):
    calls = []

    class Notes(Callback):
        def on_train_start(self, trainer, module):
            calls.append("start")
            monkeypatch.setattr(trainer.datamodule.train_sampler, "set_epoch", calls.append)

        def on_train_epoch_start(self, trainer, module):
            calls.append("epoch")

    fit(Model(), Data(), Notes(), max_epochs=2)
    assert calls == ["start", 0, "epoch", 1, "epoch"], "change batch_sampler.TrainerBatchSampler.set_epoch"


def test_what_lightnings_loops_count():
    """Lightning's counters give the batch being trained and its epoch, as the plan assumes."""

    class Counts(Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            batches = trainer.fit_loop.epoch_loop.batch_progress.current
            assert (batches.ready, batches.completed) == (batch_idx + 1, batch_idx), "change loops.batch_in_training"
            assert trainer.fit_loop.epoch_progress.current.processed == trainer.current_epoch
            assert not trainer.fit_loop.restarted_mid_epoch

    made = fit(Model(), Data(), walker(), Counts())
    assert made.num_training_batches == 12
    assert math.isfinite(made.current_epoch)


def test_lightning_ends_a_loaders_workers_by_its_iterator():
    """Lightning sets ``_iterator`` to ``None``, as on torch's loaders. Our loader then ends its workers."""

    class Loader:
        _iterator = "workers"

        def __iter__(self):
            return iter([1, 2])

        def __len__(self):
            return 2

    loader = Loader()
    combined = CombinedLoader(loader)
    iter(combined)
    combined.reset()
    assert loader._iterator is None, "Lightning ends workers in a different way: change loader.LightningLoader."
