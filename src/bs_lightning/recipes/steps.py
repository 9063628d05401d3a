"""The length of a training, for schedules that follow its progress."""

import math

from lightning import Trainer


def n_steps(trainer: Trainer) -> float:
    """Return how many optimizer steps the training has.

    Args:
        trainer: The Trainer, in a fit.

    Returns:
        The number of steps; infinity if it is not known, as for a stream, so that schedules stay at their start.
    """
    steps = trainer.estimated_stepping_batches  # -1 where it is not known
    return steps if steps > 0 else math.inf
