"""What batches and embeddings are like: ``torchmetrics`` metrics, reduced over processes by sums."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


class InBatchFalseNegativeRate(Metric):
    """Share of the pairs within a batch that have the same label: negatives that are none.

    As input to ``forward`` and ``update`` the metric accepts:

    - ``labels`` (:class:`~torch.Tensor`): integers of shape ``[B]``, or ``[n, B]`` for ``n`` batches.

    Returns the mean over all pairs so far, in ``[0, 1]``; NaN before the first.

    Raises:
        ValueError: If a batch has fewer than two instances, or the shape is another.

    Example:
        >>> import torch
        >>> from bs_lightning.metrics import InBatchFalseNegativeRate
        >>> metric = InBatchFalseNegativeRate()
        >>> metric(torch.tensor([0, 0, 1]))
        tensor(0.3333)

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

    def update(self, labels: Tensor) -> None:
        """Count the pairs of one or more batches."""
        labels = _as_batches(labels, "labels", ndim=1)
        n_batches, size = labels.shape
        ordered = labels.sort(dim=1).values
        # Runs of equal labels: a run of length r holds r * (r - 1) ordered pairs.
        new_run = torch.ones_like(ordered, dtype=torch.bool)
        new_run[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
        lengths = new_run.flatten().cumsum(0).bincount()[1:]
        self.false_pairs += (lengths * (lengths - 1)).sum()
        self.pairs += n_batches * size * (size - 1)

    def compute(self) -> Tensor:
        """The share of false pairs."""
        return (self.false_pairs / self.pairs).float()


class InBatchHardness(Metric):
    """Mean cosine similarity of the negatives within a batch: how hard they are.

    As input to ``forward`` and ``update`` the metric accepts:

    - ``embeddings`` (:class:`~torch.Tensor`): floats of shape ``[B, d]``, or ``[n, B, d]`` for ``n`` batches;
      normalised here.
    - ``labels`` (:class:`~torch.Tensor`, optional): integers of shape ``[B]`` or ``[n, B]``; with them, only pairs of
      different labels count (true negatives).

    Returns the mean over all pairs so far, in ``[-1, 1]``; NaN before the first. Takes time and memory proportional
    to ``B``, not ``B^2``.

    Raises:
        ValueError: If a batch has fewer than two instances, or shapes do not fit.

    Example:
        >>> import torch
        >>> from bs_lightning.metrics import InBatchHardness
        >>> metric = InBatchHardness()
        >>> metric(torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]]))
        tensor(0.3333)

    Source: the "cosine similarity" of arXiv 2306.03355, figure 4.
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

    def update(self, embeddings: Tensor, labels: Tensor | None = None) -> None:
        """Sum the similarities of one or more batches."""
        embeddings = _as_batches(embeddings, "embeddings", ndim=2)
        n_batches, size, _ = embeddings.shape
        unit = torch.nn.functional.normalize(embeddings.float(), dim=2)
        # The similarities of all pairs of a group sum to |sum of its vectors|^2 less the vectors' own squares.
        total = unit.sum(dim=1).square().sum() - unit.square().sum()
        pairs = n_batches * size * (size - 1)
        if labels is not None:
            labels = _as_batches(labels, "labels", ndim=1)
            if labels.shape != embeddings.shape[:2]:
                raise ValueError(f"labels must have shape {list(embeddings.shape[:2])}, got {list(labels.shape)}.")
            batch = torch.arange(n_batches, device=labels.device).unsqueeze(1).expand_as(labels)
            group_keys = torch.stack([batch.flatten(), labels.flatten()], dim=1)
            _, group, counts = torch.unique(group_keys, dim=0, return_inverse=True, return_counts=True)
            flat = unit.flatten(0, 1)
            sums = torch.zeros(len(counts), flat.shape[1], dtype=flat.dtype, device=flat.device)
            sums.index_add_(0, group.to(flat.device), flat)
            total = total - (sums.square().sum() - flat.square().sum())
            pairs -= int((counts * (counts - 1)).sum())
        if pairs:
            self.similarity += total
            self.pairs += pairs

    def compute(self) -> Tensor:
        """The mean similarity."""
        return (self.similarity / self.pairs).float()


class Alignment(Metric):
    """Mean distance between the embeddings of positive pairs, to the power ``alpha``; lower is better.

    As input to ``forward`` and ``update`` the metric accepts:

    - ``x`` and ``y`` (:class:`~torch.Tensor`): floats of shape ``[B, d]``; rows ``i`` are a positive pair; normalised
      here.

    Args:
        alpha: The power.
        **kwargs: Those of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If the shapes differ or are not ``[B, d]``.

    Example:
        >>> import torch
        >>> from bs_lightning.metrics import Alignment
        >>> metric = Alignment()
        >>> metric(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]))
        tensor(2.0000)

    Source: Wang and Isola, "Understanding contrastive representation learning through alignment and uniformity on the
    hypersphere", ICML 2020, equation for L_align.
    """

    is_differentiable = True
    higher_is_better = False
    full_state_update = False

    total: Tensor
    count: Tensor

    def __init__(self, alpha: float = 2.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.alpha = alpha
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, x: Tensor, y: Tensor) -> None:
        """Sum the distances of a batch of positive pairs."""
        if x.shape != y.shape or x.ndim != 2:
            raise ValueError(f"x and y must have the same shape [B, d], got {list(x.shape)} and {list(y.shape)}.")
        distance = torch.linalg.vector_norm(_unit(x) - _unit(y), dim=1)
        self.total = self.total + distance.pow(self.alpha).sum()
        self.count = self.count + len(x)

    def compute(self) -> Tensor:
        """The mean distance to the power ``alpha``."""
        return (self.total / self.count).float()


class Uniformity(Metric):
    """Logarithm of the mean Gaussian potential of the pairs within a batch; lower is more uniform on the sphere.

    As input to ``forward`` and ``update`` the metric accepts:

    - ``x`` (:class:`~torch.Tensor`): floats of shape ``[B, d]``, at least two rows; normalised here.

    Args:
        t: Scale of the potential ``exp(-t * distance^2)``.
        **kwargs: Those of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If the shape is another.

    Example:
        >>> import torch
        >>> from bs_lightning.metrics import Uniformity
        >>> metric = Uniformity()
        >>> round(metric(torch.tensor([[1.0, 0.0], [0.0, 1.0]])).item(), 3)
        -4.0

    Source: Wang and Isola, ICML 2020, equation for L_uniform.
    """

    is_differentiable = True
    higher_is_better = False
    full_state_update = False

    potential: Tensor
    pairs: Tensor

    def __init__(self, t: float = 2.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.t = t
        self.add_state("potential", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("pairs", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, x: Tensor) -> None:
        """Sum the potentials of a batch."""
        if x.ndim != 2 or len(x) < 2:
            raise ValueError(f"x must have shape [B, d] with B >= 2, got {list(x.shape)}.")
        potentials = torch.pdist(_unit(x)).square().mul(-self.t).exp()
        self.potential = self.potential + potentials.sum()
        self.pairs = self.pairs + len(potentials)

    def compute(self) -> Tensor:
        """The logarithm of the mean potential."""
        return (self.potential / self.pairs).log().float()


def _unit(x: Tensor) -> Tensor:
    return torch.nn.functional.normalize(x.float(), dim=1)


def _as_batches(values: Tensor, name: str, ndim: int) -> Tensor:
    """``values`` with a leading dimension of batches, each of ``ndim`` dimensions and at least two instances."""
    batches = values.unsqueeze(0) if values.ndim == ndim else values
    if batches.ndim != ndim + 1 or batches.shape[1] < 2:
        one = "[B, d]" if ndim == 2 else "[B]"
        raise ValueError(f"{name} must have shape {one} or [n, {one[1:]} with B >= 2, got {list(values.shape)}.")
    return batches
