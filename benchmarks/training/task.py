"""A task: data, a small model, and an evaluation."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

Encode = Callable[[Tensor], Tensor]  # inputs [n, ...] -> the trained model's features [n, d]


class Task:
    """A task, with the split of the data that a seed chooses.

    Args:
        data_dir: Folder of the datasets.
        seed: Chooses the split.
        settings: All of :attr:`defaults`, some with changed values.
    """

    name: ClassVar[str]
    defaults: ClassVar[dict[str, Any]]  # at least steps, batch_size, temperature, learning_rate
    main: ClassVar[tuple[str, str]]  # the results of `evaluate` that overviews show, the most telling one first
    class_prior: ClassVar[float]  # the debiased losses' probability that a negative is false

    # Whether the loss compares one side with the other only. The negatives of two views are on both sides.
    two_towers: ClassVar[bool] = False

    size: int  # instances
    has_sides: ClassVar[bool] = False  # whether an instance is a pair of two sides, which are both embedded
    groups: Tensor | None = None  # int [size]: what a user knows to belong together, such as equal sentences
    labels: Tensor | None = None  # int [size]; training does not see them, but for arms that mask by labels

    def __init__(self, data_dir: Path, seed: int, settings: dict[str, Any]) -> None:
        raise NotImplementedError

    def views(self, indices: Tensor) -> Tensor:
        """Return two views of each instance to train on, ``[2, b, ...]``."""
        raise NotImplementedError

    def clean(self, indices: Tensor) -> Tensor:
        """Return one view of each instance to embed, ``[b, ...]``; the query's where the two sides differ."""
        raise NotImplementedError

    def sides(self, indices: Tensor) -> Tensor:
        """Return both sides of each pair to embed, ``[2, b, ...]``, for tasks that compare two sides."""
        raise NotImplementedError

    def reference(self) -> Tensor | None:
        """Return a second opinion: embeddings by a fixed model, ``[size, d]`` or ``[size, 2, d]``, if there is one."""
        return None

    def networks(self) -> tuple[nn.Module, nn.Module]:
        """Return the encoder, whose output is evaluated, and the projector, whose output the loss compares."""
        raise NotImplementedError

    def evaluate(self, encode: Encode) -> dict[str, float]:
        """Measure the trained encoder; return values by name, of which higher is better."""
        raise NotImplementedError
