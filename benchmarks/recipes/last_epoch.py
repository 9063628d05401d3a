"""What the batches of the last epoch of a training were like."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from bs_lightning.metrics import InBatchAccuracy, InBatchFalseNegativeRate, InBatchHardness

from ..csv_files import Row

N_MEASURED_BATCHES = 20


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
