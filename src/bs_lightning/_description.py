"""Description: a pool's batches -> what they are like, as values to log by name."""

import numpy as np
import torch
from torch import Tensor

from bs_lightning._embeddings import to_device
from bs_lightning._types import Batches
from bs_lightning.metrics._negatives import in_batch_false_negative_rate, in_batch_hardness
from bs_lightning.metrics._pairs import accuracy_and_negatives_above


def describe(embeddings: Tensor, batches: Batches, labels: Tensor | None = None) -> dict[str, float]:
    """Describe batches of a pool.

    Args:
        embeddings: The pool's, ``[P, d]``, or ``[P, 2, d]`` for two sides.
        batches: Positions in the pool, int64 ``[n, B]``.
        labels: The pool's, int64 ``[P]``; ``None`` if there are none.

    Returns:
        The hardness; with two sides, the in-batch accuracy and the share of negatives above the positive; with labels,
        the false-negative rate.
    """
    return _read(_described(embeddings, batches, labels))


def describe_composed(embeddings: Tensor, batches: Batches, labels: Tensor | None = None) -> dict[str, float]:
    """Describe composed batches of a pool beside uniform ones.

    Args:
        embeddings: The pool's, in random order, ``[P, d]``, or ``[P, 2, d]`` for two sides.
        batches: Positions in the pool, int64 ``[n, B]``.
        labels: The pool's, int64 ``[P]``; ``None`` if there are none.

    Returns:
        What :func:`describe` returns, and ``"uniform_hardness"`` and ``"uniform_accuracy"`` of two uniform batches.
    """
    # A pool comes in random order, so its first batches are uniform ones.
    uniform = _described(embeddings, np.arange(batches.size).reshape(batches.shape)[:2], labels)
    compared = {f"uniform_{name}": uniform[name] for name in ("hardness", "accuracy") if name in uniform}
    return _read(_described(embeddings, batches, labels) | compared)


def _described(embeddings: Tensor, batches: Batches, labels: Tensor | None) -> dict[str, Tensor]:
    """Return what :func:`describe` returns, as scalars that are not waited for."""
    positions = torch.from_numpy(batches)
    in_batches = embeddings[to_device(positions, embeddings.device)]
    labels = None if labels is None else labels[positions]
    found = {"hardness": in_batch_hardness(in_batches, labels)}
    if embeddings.ndim == 3:
        found["accuracy"], found["negatives_above_positive"] = accuracy_and_negatives_above(in_batches)
    if labels is not None:
        found["false_negative_rate"] = to_device(in_batch_false_negative_rate(labels), embeddings.device)
    return found


def _read(scalars: dict[str, Tensor]) -> dict[str, float]:
    """Return scalars of one device as numbers. Waits for a GPU once."""
    return dict(zip(scalars, torch.stack(list(scalars.values())).tolist(), strict=True))


class Means:
    """Means of values by name, of which no list is kept."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, int]] = {}  # a sum, and of how many

    def note(self, values: dict[str, float], weight: int = 1) -> None:
        """Note some values.

        Args:
            values: The values by name.
            weight: How much they count, such as the number of batches that they describe.
        """
        for name, value in values.items():
            total, n_before = self._sums.get(name, (0.0, 0))
            self._sums[name] = total + value * weight, n_before + weight

    def read(self) -> dict[str, float]:
        """Return the means for the log, each under ``batch_sampler/`` and its name."""
        return {f"batch_sampler/{name}": total / n for name, (total, n) in self._sums.items()}
