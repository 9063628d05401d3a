"""Schedules of the restart probability over epochs, for :class:`~bs_lightning.RWRComposer`.

A constant is a plain float, and any function of the epoch is a schedule too. These have names, so that a YAML config
can give them by ``class_path`` and what holds them can be pickled.
"""

from dataclasses import dataclass

from bs_lightning._checks import check_integer
from bs_lightning.walk import check_restart_probability


@dataclass(frozen=True)
class LinearDecay:
    """Falls evenly from ``start`` in epoch 0 to ``end`` in epoch ``n_epochs``, and stays there.

    Args:
        start: The first epoch's value, in ``(0, 1]``; the paper's range begins at 0.2.
        end: The last value; the paper's range ends at 0.05.
        n_epochs: Epochs until ``end`` is reached, at least 1.

    Raises:
        TypeError: If an argument is no number, or one in epochs no integer.
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
        check_restart_probability(self.start)
        check_restart_probability(self.end)
        _check_positive("n_epochs", self.n_epochs)

    def __call__(self, epoch: int) -> float:
        return self.start + (self.end - self.start) * min(epoch / self.n_epochs, 1.0)


@dataclass(frozen=True)
class Staircase:
    """Falls by ``step`` every ``every`` epochs, never below ``floor``.

    Args:
        start: The first epoch's value, in ``(0, 1]``.
        step: How much it falls at a time, not negative.
        every: Epochs between two falls, at least 1.
        floor: The lowest value, in ``(0, start]``.

    Raises:
        TypeError: If an argument is no number, or one in epochs no integer.
        ValueError: If an argument is out of range.

    Example:
        >>> from bs_lightning.schedules import Staircase
        >>> [round(Staircase()(epoch), 3) for epoch in (0, 4, 5, 9, 10, 50)]
        [0.2, 0.2, 0.1, 0.1, 0.05, 0.05]

    Source: the paper's public implementation, in the way that its line ``0.2 - (epoch / 5) * 0.1`` may be meant. What
    that line does is ``Staircase(0.18, 0.02, every=1)``, as :func:`~bs_lightning.presets.public_code` has it.
    """

    start: float = 0.2
    step: float = 0.1
    every: int = 5
    floor: float = 0.05

    def __post_init__(self) -> None:
        check_restart_probability(self.start)
        check_restart_probability(self.floor)
        _check_positive("every", self.every)
        if not self.step >= 0:  # NaN too
            raise ValueError(f"step must not be negative, got {self.step}. It is what is taken off every few epochs.")
        if self.floor > self.start:
            raise ValueError(f"floor must not be above start {self.start}, got {self.floor}.")

    def __call__(self, epoch: int) -> float:
        return max(self.start - epoch // self.every * self.step, self.floor)


def _check_positive(name: str, value: int) -> None:
    if check_integer(name, value) < 1:
        raise ValueError(f"{name} must be at least 1 epoch, got {value}.")
