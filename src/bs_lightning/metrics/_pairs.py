"""Positives against negatives, in batches whose instances have two sides: does the positive win?"""

from typing import Any, NamedTuple

import torch
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics import Metric

from bs_lightning._checks import check_tensor
from bs_lightning._embeddings import TIE, unit_rows
from bs_lightning.metrics._negatives import BLOCK_ENTRIES


def in_batch_accuracy(embeddings: Tensor | NDArray[Any]) -> Tensor:
    """Compute the share of a batch's anchors that are most similar to their own positive. Higher is better.

    Each instance has two sides, such as query and document. The first side is the anchor, and its positive is the
    second side of the same instance. Its negatives are the second sides of the other instances. An anchor counts if its
    positive has a higher cosine similarity than each negative has. Second sides are not counted as anchors: flip the
    sides to measure the other direction.

    A negative that equals the positive ties with it, and the anchor does not count. So a collapsed model, whose
    embeddings are all equal, has accuracy 0. Similarities that differ by less than 1e-6 are ties. An all-zero side has
    similarity 0 with all others.

    Args:
        embeddings: Floats of shape ``[B, 2, d]``, or ``[n, B, 2, d]`` for ``n`` batches, ``B >= 2``, of any length.

    Returns:
        A scalar in ``[0, 1]`` without gradient, the mean over the anchors of all batches. It is NaN if an embedding is
        not finite in float32.

    Raises:
        TypeError: If ``embeddings`` is not a tensor or NumPy array of real numbers.
        ValueError: If ``embeddings`` has a different shape.

    Example:
        >>> import torch
        >>> from bs_lightning.metrics import in_batch_accuracy
        >>> queries = torch.tensor([[1.0, 0.0], [0.0, 1.0], [3.0, 2.0]])
        >>> documents = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
        >>> in_batch_accuracy(torch.stack([queries, documents], dim=1))
        tensor(0.3333)

    Source: the contrastive accuracy of van den Oord et al., "Representation learning with contrastive predictive
    coding", arXiv 1807.03748, figure 6.
    """
    return accuracy_and_negatives_above(embeddings)[0]


class InBatchAccuracy(Metric):
    """Accumulate :func:`in_batch_accuracy` over batches. Higher is better.

    As input to ``forward`` and ``update`` the metric accepts:

    - ``embeddings`` (:class:`~torch.Tensor` or NumPy array): floats of shape ``[B, 2, d]``, or ``[n, B, 2, d]`` for
      ``n`` batches, ``B >= 2``, of any length. The first side is the anchor, the second its positive.

    As output of ``forward`` and ``compute`` the metric returns a scalar in ``[0, 1]``: the mean over all anchors so
    far, or NaN before the first anchor and after an embedding that is not finite in float32.

    Args:
        **kwargs: Passed to :class:`torchmetrics.Metric`.

    Raises:
        TypeError: If ``embeddings`` is not a tensor or NumPy array of real numbers.
        ValueError: If ``embeddings`` has a different shape.

    Example:
        >>> import torch
        >>> from bs_lightning.metrics import InBatchAccuracy
        >>> metric = InBatchAccuracy()
        >>> metric.update(torch.eye(4)[:, None].expand(4, 2, 4))
        >>> metric.update(torch.ones(4, 2, 4))
        >>> metric.compute()
        tensor(0.5000)

    Source: arXiv 1807.03748, figure 6.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    won: Tensor
    anchors: Tensor
    not_finite: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # Integers are exact, and stay integers in a module that is moved to half precision.
        for name in ("won", "anchors", "not_finite"):
            self.add_state(name, torch.tensor(0), dist_reduce_fx="sum")

    def update(self, embeddings: Tensor | NDArray[Any]) -> None:
        """Add the anchors of one or more batches."""
        counts = _count(embeddings)
        self.won += counts.won
        self.anchors += counts.anchors
        self.not_finite += counts.not_finite

    def compute(self) -> Tensor:
        """Return the share of anchors so far whose positive won."""
        return _share(self.won, self.anchors, self.not_finite)


def negatives_above_positive(embeddings: Tensor | NDArray[Any]) -> Tensor:
    """Compute the share of a batch's negatives that are more similar to their anchor than its positive is.

    Lower is better. Anchors, positives and negatives are those of :func:`in_batch_accuracy`. A negative that equals the
    positive is not above it. So a collapsed model, whose embeddings are all equal, has share 0: read the share beside
    the accuracy. Similarities that differ by less than 1e-6 are equal. An all-zero side has similarity 0 with all
    others.

    Args:
        embeddings: Floats of shape ``[B, 2, d]``, or ``[n, B, 2, d]`` for ``n`` batches, ``B >= 2``, of any length.

    Returns:
        A scalar in ``[0, 1]`` without gradient, the mean over the negatives of all batches. It is NaN if an embedding
        is not finite in float32.

    Raises:
        TypeError: If ``embeddings`` is not a tensor or NumPy array of real numbers.
        ValueError: If ``embeddings`` has a different shape.

    Example:
        >>> import torch
        >>> from bs_lightning.metrics import negatives_above_positive
        >>> queries = torch.tensor([[1.0, 0.0], [0.0, 1.0], [3.0, 2.0]])
        >>> documents = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
        >>> negatives_above_positive(torch.stack([queries, documents], dim=1))
        tensor(0.1667)
    """
    return accuracy_and_negatives_above(embeddings)[1]


class NegativesAbovePositive(Metric):
    """Accumulate :func:`negatives_above_positive` over batches. Lower is better.

    As input to ``forward`` and ``update`` the metric accepts:

    - ``embeddings`` (:class:`~torch.Tensor` or NumPy array): floats of shape ``[B, 2, d]``, or ``[n, B, 2, d]`` for
      ``n`` batches, ``B >= 2``, of any length. The first side is the anchor, the second its positive.

    As output of ``forward`` and ``compute`` the metric returns a scalar in ``[0, 1]``: the mean over all negatives so
    far, or NaN before the first negative and after an embedding that is not finite in float32.

    Args:
        **kwargs: Passed to :class:`torchmetrics.Metric`.

    Raises:
        TypeError: If ``embeddings`` is not a tensor or NumPy array of real numbers.
        ValueError: If ``embeddings`` has a different shape.

    Example:
        >>> import torch
        >>> from bs_lightning.metrics import NegativesAbovePositive
        >>> metric = NegativesAbovePositive()
        >>> metric.update(torch.eye(4)[:, None].expand(4, 2, 4))
        >>> metric.compute()
        tensor(0.)
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False

    above: Tensor
    negatives: Tensor
    not_finite: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # Integers are exact, and stay integers in a module that is moved to half precision.
        for name in ("above", "negatives", "not_finite"):
            self.add_state(name, torch.tensor(0), dist_reduce_fx="sum")

    def update(self, embeddings: Tensor | NDArray[Any]) -> None:
        """Add the negatives of one or more batches."""
        counts = _count(embeddings)
        self.above += counts.above
        self.negatives += counts.negatives
        self.not_finite += counts.not_finite

    def compute(self) -> Tensor:
        """Return the share of negatives so far that are above their positive."""
        return _share(self.above, self.negatives, self.not_finite)


def accuracy_and_negatives_above(embeddings: Tensor | NDArray[Any]) -> tuple[Tensor, Tensor]:
    """Compute :func:`in_batch_accuracy` and :func:`negatives_above_positive` from the same similarities."""
    counts = _count(embeddings)
    return (
        _share(counts.won, counts.anchors, counts.not_finite),
        _share(counts.above, counts.negatives, counts.not_finite),
    )


class _Counts(NamedTuple):
    won: Tensor  # anchors whose positive is above all negatives
    anchors: int
    above: Tensor  # negatives above their positive
    negatives: int
    not_finite: Tensor  # 1 if an embedding is not finite, else 0


def _count(embeddings: Tensor | NDArray[Any]) -> _Counts:
    """Compare the positives of all batches with the negatives."""
    batches = _two_sided(embeddings)
    n_batches, size = batches.shape[:2]
    won, above, not_finite = (batches.new_zeros((), dtype=torch.int64) for _ in range(3))
    # A few batches at a time: scaled copies of all would take their memory several times over.
    for part in batches.split(max(1, BLOCK_ENTRIES // (size * max(size, batches.shape[2:].numel())))):
        unit = unit_rows(part)
        with torch.autocast(unit.device.type, enabled=False):  # a product would round to three digits, and make ties
            similarity = unit[:, :, 0] @ unit[:, :, 1].mT
        positive = similarity.diagonal(dim1=1, dim2=2).unsqueeze(2)
        # The positive itself is the only entry that is not clearly below the positive.
        won += ((similarity >= positive - TIE).sum(dim=2) == 1).sum()
        above += (similarity > positive + TIE).sum()
        # Comparisons with NaN are false, and would hide an embedding that is not finite.
        not_finite |= (~unit.isfinite().all()).long()
    return _Counts(won, n_batches * size, above, n_batches * size * (size - 1), not_finite)


def _share(part: Tensor, whole: Tensor | int, not_finite: Tensor) -> Tensor:
    """Return a share, or NaN after an embedding that is not finite."""
    return torch.where(not_finite == 0, part / whole, torch.nan).float()


def _two_sided(embeddings: Tensor | NDArray[Any]) -> Tensor:
    """Return batches of two sides as a tensor ``[n, B, 2, d]``."""
    batches = check_tensor("embeddings", embeddings)
    if batches.ndim == 3:
        batches = batches.unsqueeze(0)
    if batches.ndim != 4 or batches.shape[1] < 2 or batches.shape[2] != 2 or batches.shape[3] < 1:
        raise ValueError(
            "embeddings must have two sides: shape [B, 2, d] or [n, B, 2, d] with B >= 2 and d >= 1, got "
            f"{list(embeddings.shape)}. Join the sides: torch.stack([queries, documents], dim=-2)."
        )
    return batches
