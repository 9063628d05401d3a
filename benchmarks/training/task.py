"""What a task is: data, a small model, and what is measured of it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

Encode = Callable[[Tensor], Tensor]  # inputs [n, ...] -> features [n, d] of the trained model


class Task:
    """One task with one seed's split of the data.

    Args:
        data_dir: Folder of the data sets.
        seed: Chooses the split.
        settings: :attr:`defaults`, some of them changed.
    """

    name: ClassVar[str]
    defaults: ClassVar[dict[str, Any]]  # at least steps, batch_size, temperature, learning_rate
    main: ClassVar[tuple[str, str]]  # of what `evaluate` gives, what overviews show
    class_prior: ClassVar[float]  # what the debiased losses take for the chance that a negative is false

    size: int  # instances
    labels: Tensor | None = None  # int [size], hidden from training

    def __init__(self, data_dir: Path, seed: int, settings: dict[str, Any]) -> None:
        raise NotImplementedError

    def views(self, indices: Tensor) -> Tensor:
        """Two views of some instances to train on: ``[2, b, ...]``."""
        raise NotImplementedError

    def clean(self, indices: Tensor) -> Tensor:
        """One view of each to embed: ``[b, ...]``."""
        raise NotImplementedError

    def networks(self) -> tuple[nn.Module, nn.Module]:
        """Encoder, whose output is evaluated, and projector, whose output the loss compares."""
        raise NotImplementedError

    def evaluate(self, encode: Encode) -> dict[str, float]:
        """What the trained encoder is good for: names and values, higher is better."""
        raise NotImplementedError
