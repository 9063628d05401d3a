"""Schedules of the restart probability over epochs, for :class:`~bs_lightning.RWRComposer`.

A plain float is a constant restart probability, and any function of the epoch is a schedule. The schedules here are
classes, so that a YAML config can name them by ``class_path`` and an object that holds one can be pickled.
"""

import math
from dataclasses import dataclass

from bs_lightning._checks import check_integer, check_number
from bs_lightning.walk import check_restart_probability


@dataclass(frozen=True)
class LinearDecay:
    """Fall linearly from ``start`` in epoch 0 to ``end`` in epoch ``n_epochs``, then stay there.

    Args:
        start: The value in epoch 0, in ``(0, 1]``. The paper starts at 0.2.
        end: The last value, in ``(0, 1]``. The paper ends at 0.05.
        n_epochs: Number of epochs until ``end`` is reached, at least 1.

    Raises:
        TypeError: If ``start`` or ``end`` is not a number, or ``n_epochs`` or the epoch is not an integer.
        ValueError: If an argument is out of range.

    Example:
        >>> from bs_lightning.schedules import LinearDecay
        >>> [round(LinearDecay(0.2, 0.05, n_epochs=10)(epoch), 3) for epoch in (0, 5, 10, 11)]
        [0.2, 0.125, 0.05, 0.05]

    Source: arXiv 2306.03355, section 4.5 (restart probability falling from 0.2 to 0.05).
    """

    start: float = 0.2
    end: float = 0.05
    n_epochs: int = 100

    def __post_init__(self) -> None:
        _set(
            self,
            start=check_restart_probability(self.start, "start"),
            end=check_restart_probability(self.end, "end"),
            n_epochs=check_integer("n_epochs", self.n_epochs, 1),
        )

    def __call__(self, epoch: int) -> float:
        """Return the restart probability of an epoch.

        Args:
            epoch: The epoch's number, at least 0.

        Returns:
            The restart probability, in ``(0, 1]``.

        Raises:
            TypeError: If ``epoch`` is not an integer.
            ValueError: If ``epoch`` is negative.
        """
        share = min(check_integer("epoch", epoch, 0) / self.n_epochs, 1.0)
        # Exact at both ends. `start + (end - start) * share` can round to a last value that is not above 0.
        return (1 - share) * self.start + share * self.end


@dataclass(frozen=True)
class Staircase:
    """Fall by ``step`` every ``every`` epochs, but never below ``floor``.

    Args:
        start: The value in epoch 0, in ``(0, 1]``.
        step: The size of each fall, finite and at least 0.
        every: Number of epochs between two falls, at least 1.
        floor: The lowest value, in ``(0, start]``.

    Raises:
        TypeError: If ``start``, ``step`` or ``floor`` is not a number, or ``every`` or the epoch is not an integer.
        ValueError: If an argument is out of range.

    Example:
        >>> from bs_lightning.schedules import Staircase
        >>> [round(Staircase()(epoch), 3) for epoch in (0, 4, 5, 9, 10, 50)]
        [0.2, 0.2, 0.1, 0.1, 0.05, 0.05]

    Source: the line ``0.2 - (epoch / 5) * 0.1`` of the paper's public implementation, read as a fall every 5 epochs.
    Taken literally, the line falls in each epoch: :func:`~bs_lightning.presets.public_code` uses
    ``Staircase(0.18, 0.02, every=1)``.
    """

    start: float = 0.2
    step: float = 0.1
    every: int = 5
    floor: float = 0.05

    def __post_init__(self) -> None:
        _set(
            self,
            start=check_restart_probability(self.start, "start"),
            step=check_number("step", self.step),
            every=check_integer("every", self.every, 1),
            floor=check_restart_probability(self.floor, "floor"),
        )
        if not 0 <= self.step < math.inf:  # NaN too
            raise ValueError(f"step must be finite and not negative, got {self.step}. It is the size of each fall.")
        if self.floor > self.start:
            raise ValueError(f"floor must not be above start {self.start}, got {self.floor}.")

    def __call__(self, epoch: int) -> float:
        """Return the restart probability of an epoch.

        Args:
            epoch: The epoch's number, at least 0.

        Returns:
            The restart probability, in ``(0, 1]``.

        Raises:
            TypeError: If ``epoch`` is not an integer.
            ValueError: If ``epoch`` is negative.
        """
        return max(self.start - check_integer("epoch", epoch, 0) // self.every * self.step, self.floor)


def _set(schedule: LinearDecay | Staircase, **values: float) -> None:
    """Set fields of a frozen schedule to plain Python numbers.

    NumPy's numbers would let ``__call__`` compute in their type: float32 rounds values out of range, uint8 overflows.
    """
    for name, value in values.items():
        object.__setattr__(schedule, name, value)
