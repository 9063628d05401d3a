"""The length of a training, and learning rates that follow its progress."""

import math
from collections.abc import Callable
from typing import Any

from lightning import Trainer
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def n_steps(trainer: Trainer) -> float:
    """Return how many optimizer steps the training has.

    Args:
        trainer: The Trainer, in a fit.

    Returns:
        The number of steps; infinity if it is not known, as for a stream, so that schedules stay at their start.
    """
    steps = trainer.estimated_stepping_batches  # -1 where it is not known
    return steps if steps > 0 else math.inf


def cosine(done: float) -> float:
    """Return what is left after a part of the training: from 1 to 0, as half a period of a cosine.

    Args:
        done: The part of the training that is done, from 0 to 1.
    """
    return (1 + math.cos(math.pi * done)) / 2


def with_decay(optimizer: Optimizer, trainer: Trainer, decay: Callable[[float], float]) -> dict[str, Any]:
    """Return what ``configure_optimizers`` returns for a learning rate that decays over the training.

    Args:
        optimizer: The optimizer.
        trainer: The Trainer, in a fit.
        decay: The part of the training that is done, from 0 to 1 -> the part of the learning rate that is left.

    Returns:
        The optimizer and its schedule.
    """
    steps = n_steps(trainer)
    # torch's own schedules would keep the length of the run that a resumed run comes from.
    schedule = LambdaLR(optimizer, lambda step: decay(min(step / steps, 1)))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
