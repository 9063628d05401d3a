"""The negatives of a batch: how many are false, and how hard they are."""

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics import Metric

from bs_lightning._checks import check_tensor
from bs_lightning._embeddings import to_device, unit_rows

BLOCK_ENTRIES = 2**24
"""Numbers that metrics hold at a time: 64 MB of float32."""


def in_batch_false_negative_rate(labels: Tensor | NDArray[Any]) -> Tensor:
    """Compute the share of a batch's pairs whose two instances have the same label.

    An in-batch contrastive loss uses every pair as negatives. A pair with the same label is a false negative.

    Args:
        labels: Integers of shape ``[B]``, or ``[n, B]`` for ``n`` batches, ``B >= 2``.

    Returns:
        A scalar in ``[0, 1]``, the mean over the pairs of all batches.

    Raises:
        TypeError: If ``labels`` is not a tensor or NumPy array of integers.
        ValueError: If ``labels`` has a different shape.

    Example:
        >>> import torch
        >>> from bs_lightning.metrics import in_batch_false_negative_rate
        >>> in_batch_false_negative_rate(torch.tensor([0, 0, 1]))
        tensor(0.3333)

    Source: arXiv 2306.03355, figure 4 ("percentage of false negatives").
    """
    return _false_negative_rate_compute(*_false_negative_rate_update(labels))


class InBatchFalseNegativeRate(Metric):
    """Accumulate :func:`in_batch_false_negative_rate` over batches.

    As input to ``forward`` and ``update`` the metric accepts:

    - ``labels`` (:class:`~torch.Tensor` or NumPy array): integers of shape ``[B]``, or ``[n, B]`` for ``n`` batches,
      ``B >= 2``.

    As output of ``forward`` and ``compute`` the metric returns a scalar in ``[0, 1]``: the mean over all pairs so far,
    or NaN before the first pair.

    Args:
        **kwargs: Passed to :class:`torchmetrics.Metric`.

    Raises:
        TypeError: If ``labels`` is not a tensor or NumPy array of integers.
        ValueError: If ``labels`` has a different shape.

    Example:
        >>> import torch
        >>> from bs_lightning.metrics import InBatchFalseNegativeRate
        >>> metric = InBatchFalseNegativeRate()
        >>> metric.update(torch.tensor([0, 0, 1]))
        >>> metric.update(torch.tensor([0, 1, 2]))
        >>> metric.compute()
        tensor(0.1667)

    Source: arXiv 2306.03355, figure 4 ("percentage of false negatives").
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False

    false_pairs: Tensor
    pairs: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("false_pairs", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("pairs", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, labels: Tensor | NDArray[Any]) -> None:
        """Add the pairs of one or more batches.

        Args:
            labels: Integers of shape ``[B]``, or ``[n, B]`` for ``n`` batches, ``B >= 2``.

        Raises:
            TypeError: If ``labels`` is not a tensor or NumPy array of integers.
            ValueError: If ``labels`` has a different shape.
        """
        false_pairs, pairs = _false_negative_rate_update(labels)
        self.false_pairs += false_pairs
        self.pairs += pairs

    def compute(self) -> Tensor:
        """Compute the share of false negatives among all pairs so far.

        Returns:
            A scalar in ``[0, 1]``, or NaN before the first pair.
        """
        return _false_negative_rate_compute(self.false_pairs, self.pairs)


def in_batch_hardness(embeddings: Tensor | NDArray[Any], labels: Tensor | NDArray[Any] | None = None) -> Tensor:
    """Compute the mean cosine similarity of a batch's pairs: the hardness of its negatives.

    Instances with two sides are compared as losses compare them: the first side of an instance with the second side of
    each other instance. Time and memory are proportional to ``B``, not to ``B^2``.

    Args:
        embeddings: Floats of shape ``[B, d]``, or ``[n, B, d]`` for ``n`` batches, ``B >= 2``, of any length. With two
            sides, ``[n, B, 2, d]``, also for one batch: three dimensions always mean ``n`` batches with one side. An
            all-zero row has similarity 0 with all others.
        labels: Integers of shape ``[B]`` or ``[n, B]``. With labels, only true negatives count: the pairs of different
            labels.

    Returns:
        A scalar in ``[-1, 1]`` without gradient, the mean over the pairs of all batches. It is NaN if an embedding is
        not finite in float32, or if all labels of each batch are equal.

    Raises:
        TypeError: If ``embeddings`` is not a tensor or NumPy array of real numbers, or ``labels`` of integers.
        ValueError: If ``embeddings`` or ``labels`` has a different shape.

    Example:
        >>> import torch
        >>> from bs_lightning.metrics import in_batch_hardness
        >>> embeddings = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]])
        >>> in_batch_hardness(embeddings)
        tensor(0.3333)
        >>> in_batch_hardness(embeddings, labels=torch.tensor([0, 0, 1]))
        tensor(0.)
        >>> two_sides = torch.stack([embeddings, embeddings.roll(1, dims=0)], dim=1)
        >>> in_batch_hardness(two_sides[None])
        tensor(0.6667)

    Source: arXiv 2306.03355, figure 4 ("cosine similarity").
    """
    return _hardness_compute(*_hardness_update(embeddings, labels))


class InBatchHardness(Metric):
    """Accumulate :func:`in_batch_hardness` over batches.

    As input to ``forward`` and ``update`` the metric accepts:

    - ``embeddings`` (:class:`~torch.Tensor` or NumPy array): floats of shape ``[B, d]``, or ``[n, B, d]`` for ``n``
      batches, ``B >= 2``, of any length. With two sides, ``[n, B, 2, d]``, also for one batch: three dimensions always
      mean ``n`` batches with one side. An all-zero row has similarity 0 with all others.
    - ``labels`` (:class:`~torch.Tensor` or NumPy array, optional): integers of shape ``[B]`` or ``[n, B]``. With
      labels, only true negatives count: the pairs of different labels.

    As output of ``forward`` and ``compute`` the metric returns a scalar in ``[-1, 1]``: the mean over all pairs so
    far, or NaN before the first pair and after an embedding that is not finite in float32.

    Args:
        **kwargs: Passed to :class:`torchmetrics.Metric`.

    Raises:
        TypeError: If ``embeddings`` is not a tensor or NumPy array of real numbers, or ``labels`` of integers.
        ValueError: If ``embeddings`` or ``labels`` has a different shape.

    Example:
        >>> import torch
        >>> from bs_lightning.metrics import InBatchHardness
        >>> metric = InBatchHardness()
        >>> metric.update(torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]]))
        >>> metric.update(torch.tensor([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0]]))
        >>> metric.compute()
        tensor(0.6667)

    Source: arXiv 2306.03355, figure 4 ("cosine similarity").
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False

    similarity: Tensor
    pairs: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("similarity", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("pairs", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, embeddings: Tensor | NDArray[Any], labels: Tensor | NDArray[Any] | None = None) -> None:
        """Add the pairs of one or more batches.

        Args:
            embeddings: Floats of shape ``[B, d]``, ``[n, B, d]`` for ``n`` batches, or ``[n, B, 2, d]`` for two sides,
                ``B >= 2``, of any length.
            labels: Integers of shape ``[B]`` or ``[n, B]``. With labels, only true negatives count.

        Raises:
            TypeError: If ``embeddings`` is not a tensor or NumPy array of real numbers, or ``labels`` of integers.
            ValueError: If ``embeddings`` or ``labels`` has a different shape.
        """
        similarity, pairs = _hardness_update(embeddings, labels)
        # Not in place: a sum in float32, even where the state is in the half precision of a module that holds it.
        self.similarity = self.similarity + similarity
        self.pairs += pairs

    def compute(self) -> Tensor:
        """Compute the mean cosine similarity of all pairs so far.

        Returns:
            A scalar in ``[-1, 1]``, or NaN before the first pair and after an embedding that is not finite in float32.
        """
        return _hardness_compute(self.similarity, self.pairs)


def _false_negative_rate_update(labels: Tensor | NDArray[Any]) -> tuple[Tensor, int]:
    """Return the number of ordered pairs with the same label, and of all ordered pairs."""
    labels = _check_labels(labels)
    n_batches, size = labels.shape
    ordered = labels.sort(dim=1).values
    # Runs of equal labels: a run of length r holds r * (r - 1) ordered pairs.
    new_run = torch.ones_like(ordered, dtype=torch.bool)
    new_run[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    lengths = new_run.flatten().cumsum(0).bincount()[1:]
    return (lengths * (lengths - 1)).sum(), n_batches * size * (size - 1)


def _false_negative_rate_compute(false_pairs: Tensor, pairs: Tensor | int) -> Tensor:
    return (false_pairs / pairs).float()


def _hardness_update(
    embeddings: Tensor | NDArray[Any], labels: Tensor | NDArray[Any] | None
) -> tuple[Tensor, Tensor | int]:
    """Return the sum of the ordered pairs' cosine similarities, and their number."""
    batches = check_tensor("embeddings", embeddings)
    if batches.ndim == 2:
        batches = batches.unsqueeze(0)
    is_two_sided = batches.ndim == 4 and batches.shape[2] == 2
    if not (batches.ndim == 3 or is_two_sided) or batches.shape[1] < 2 or batches.shape[-1] < 1:
        raise ValueError(
            "embeddings must have shape [B, d] or [n, B, d], or [n, B, 2, d] for two sides, with B >= 2 and d >= 1, "
            f"got {list(embeddings.shape)}."
        )
    if labels is not None:
        labels = _check_labels(labels)
        if labels.shape != batches.shape[:2]:
            raise ValueError(f"labels must have shape {list(batches.shape[:2])}, got {list(labels.shape)}.")
    n = max(1, BLOCK_ENTRIES // batches.shape[1:].numel())  # the sums need memory several times over
    some = [
        _similarity_and_pairs(batches[start : start + n], None if labels is None else labels[start : start + n])
        for start in range(0, max(len(batches), 1), n)
    ]
    return torch.stack([similarity for similarity, _ in some]).sum(), sum(pairs for _, pairs in some)


def _similarity_and_pairs(batches: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor | int]:
    """Return the same for batches ``[n, B, d]`` or ``[n, B, 2, d]``, and labels ``[n, B]``."""
    n_batches, size = batches.shape[:2]
    unit = unit_rows(batches)
    pairs: Tensor | int = n_batches * size * (size - 1)
    # Sums of the unit vectors of each group of equal labels. Without labels each instance is its own group.
    if labels is None:
        sums, rest = unit.flatten(0, 1), (unit.sum(dim=1, keepdim=True) - unit).flatten(0, 1)
    else:
        # Where the labels are: on a CPU, numbers of groups do not wait for a GPU.
        values, label = labels.flatten().unique(return_inverse=True)
        batch = torch.arange(n_batches, device=labels.device).repeat_interleave(size)
        keys = batch * len(values) + label  # one number for each batch and label, as rows are slow to sort
        groups, group, counts = keys.unique(return_inverse=True, return_counts=True)
        sums = unit.new_zeros(len(groups), *unit.shape[2:])
        sums.index_add_(0, to_device(group, unit.device), unit.flatten(0, 1))
        batch = to_device(groups // len(values), unit.device)
        totals = unit.new_zeros(n_batches, *unit.shape[2:]).index_add_(0, batch, sums)
        # A group's pairs with the rest of its batch. To subtract the pairs within groups from all pairs would lose the
        # digits of a few true negatives among many false ones.
        rest = totals[batch] - sums
        pairs = pairs - to_device((counts * (counts - 1)).sum(), unit.device)
    if batches.ndim == 4:
        sums, rest = sums[:, 0], rest[:, 1]
    return (sums * rest).sum(), pairs


def _hardness_compute(similarity: Tensor, pairs: Tensor | int) -> Tensor:
    return (similarity / pairs).float().clamp(-1, 1)  # rounding can exceed 1 where all rows are equal


def _check_labels(labels: Tensor | NDArray[Any]) -> Tensor:
    """Return labels of integers as int64 ``[n, B]``."""
    labels = check_tensor("labels", labels)
    if labels.is_floating_point():
        raise TypeError(f"labels must hold integers, got dtype {labels.dtype}. Convert them, e.g. labels.long().")
    batches = labels.long()  # torch sorts and stacks no uint16
    if batches.ndim == 1:
        batches = batches.unsqueeze(0)
    if batches.ndim != 2 or batches.shape[1] < 2:
        raise ValueError(f"labels must have shape [B] or [n, B] with B >= 2, got {list(labels.shape)}.")
    return batches
