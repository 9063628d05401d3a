"""What the benchmarks of the recipes share: resuming, and what the last epoch's batches were like."""

import argparse
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from bs_lightning.metrics import InBatchAccuracy, InBatchFalseNegativeRate, InBatchHardness

from .. import csv_files
from ..csv_files import Row
from ..training.study import quiet, row_key

N_MEASURED_BATCHES = 20


def run_missing(wanted: Iterable[Row], run: Callable[[Row], Row], results: Path) -> Iterator[Row]:
    """Do the runs that ``results`` lacks, one after the other, and add them there.

    Args:
        wanted: What was set for each run: the columns that tell runs apart.
        run: Trains and measures; returns the measures, whose names have a slash.
        results: A CSV file, made if it does not exist.

    Yields:
        The row of each finished run.
    """
    quiet()
    done = {row_key(row) for row in csv_files.read(results)}
    for chosen in wanted:
        if row_key(chosen) not in done:
            row = {**chosen, **run(chosen)}
            csv_files.append(results, row)
            yield row


def show(rows: Iterable[Row]) -> None:
    """Print a line for each run, as soon as it is finished."""
    for row in rows:
        chosen = " ".join(str(value) for name, value in row.items() if "/" not in name)
        results = ", ".join(f"{name[7:]} {value:.4f}" for name, value in row.items() if name.startswith("result/"))
        print(f"{chosen}: {results}, {row['seconds/all']:.0f} s", flush=True)


def chosen_settings(args: argparse.Namespace, defaults: Row) -> Row:
    """Return the defaults, with those replaced that the command line gives."""
    return {name: value if getattr(args, name) is None else getattr(args, name) for name, value in defaults.items()}


class LastBatches(Callback):
    """Keeps the latest epoch's batches, as indices, and their losses."""

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.batches: list[Tensor] = []
        self.losses: list[Tensor] = []

    def on_train_batch_end(self, trainer: Any, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        self.batches.append(torch.from_numpy(trainer.datamodule.trained_batch()))
        self.losses.append(outputs["loss"].detach())


@torch.no_grad()
def describe(last: LastBatches, sides: Callable[[Tensor], tuple[Tensor, Tensor]], groups: Tensor | None) -> Row:
    """Return what the last epoch's batches were like.

    The loss is the mean over the epoch, as it was trained. The other measures are of the trained model on some of the
    batches: a random choice, because a pool's first batches are harder than its last.

    Args:
        last: The batches.
        sides: Indices -> the two sides that the loss compares, floats ``[B, d]`` each, under new random numbers.
        groups: Labels or groups of the dataset, int ``[N]``. Two instances of one group are a false negative.
    """
    accuracy, hardness, rate = InBatchAccuracy(), InBatchHardness(), InBatchFalseNegativeRate()
    for number in np.random.default_rng(0).permutation(len(last.batches))[:N_MEASURED_BATCHES]:
        batch = last.batches[number]
        both = torch.stack(sides(batch), dim=1)[None]
        accuracy.update(both)
        if groups is None:
            hardness.update(both)
        else:
            hardness.update(both, groups[batch][None])
            rate.update(groups[batch])
    described = {"accuracy": float(accuracy.compute()), "hardness": float(hardness.compute())}
    if groups is not None:
        described["false_negative_rate"] = float(rate.compute())
    described = {"loss": float(torch.stack(last.losses).mean()), **described}
    return {f"last_epoch/{name}": value for name, value in described.items()}
