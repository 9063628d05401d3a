"""Embeddings on the unit sphere: how close positive pairs are, and how evenly all embeddings are spread."""

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics import Metric

from bs_lightning._checks import check_positive, check_tensor
from bs_lightning._embeddings import unit_rows_with_gradient


def alignment(x: Tensor | NDArray[Any], y: Tensor | NDArray[Any], alpha: float = 2.0) -> Tensor:
    """Compute the mean distance of positive pairs on the unit sphere, to the power ``alpha``. Lower is better.

    Args:
        x: Floats of shape ``[B, d]``, of any length.
        y: Floats of shape ``[B, d]``, of any length. Row ``i`` of ``x`` and row ``i`` of ``y`` are a positive pair.
        alpha: Power of the distance, above 0.

    Returns:
        A differentiable scalar in ``[0, 2^alpha]``. It is NaN if an embedding is not finite in float32.

    Raises:
        TypeError: If ``x`` or ``y`` is not a tensor or NumPy array of real numbers, or ``alpha`` is not a number.
        ValueError: If the shapes differ or are not ``[B, d]``, or ``alpha`` is out of range.

    Example:
        >>> import torch
        >>> from bs_lightning.metrics import alignment
        >>> alignment(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]))
        tensor(2.0000)

    Source: Wang and Isola, "Understanding contrastive representation learning through alignment and uniformity on the
    hypersphere", ICML 2020, equation for L_align.
    """
    return _alignment_compute(*_alignment_update(x, y, check_positive("alpha", alpha)))


class Alignment(Metric):
    """Accumulate :func:`alignment` over batches. Lower is better.

    As input to ``forward`` and ``update`` the metric accepts:

    - ``x`` and ``y`` (:class:`~torch.Tensor` or NumPy array): floats of shape ``[B, d]``, of any length. Row ``i`` of
      ``x`` and row ``i`` of ``y`` are a positive pair.

    As output of ``forward`` and ``compute`` the metric returns a scalar in ``[0, 2^alpha]``: the mean over all pairs so
    far, or NaN before the first pair and after an embedding that is not finite in float32.

    Args:
        alpha: Power of the distance, above 0.
        **kwargs: Passed to :class:`torchmetrics.Metric`.

    Raises:
        TypeError: If ``x`` or ``y`` is not a tensor or NumPy array of real numbers, or ``alpha`` is not a number.
        ValueError: If the shapes differ or are not ``[B, d]``, or ``alpha`` is out of range.

    Example:
        >>> import torch
        >>> from bs_lightning.metrics import Alignment
        >>> metric = Alignment()
        >>> metric.update(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]))
        >>> metric.update(torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0]]))
        >>> metric.compute()
        tensor(1.0000)

    Source: Wang and Isola, ICML 2020, equation for L_align.
    """

    is_differentiable = True
    higher_is_better = False
    full_state_update = False

    total: Tensor
    count: Tensor

    def __init__(self, alpha: float = 2.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.alpha = check_positive("alpha", alpha)
        _add_option(self, "power", self.alpha)
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, x: Tensor | NDArray[Any], y: Tensor | NDArray[Any]) -> None:
        """Add a batch of positive pairs.

        Args:
            x: Floats of shape ``[B, d]``, of any length.
            y: Floats of shape ``[B, d]``, of any length. Row ``i`` of ``x`` and row ``i`` of ``y`` are a positive pair.

        Raises:
            TypeError: If ``x`` or ``y`` is not a tensor or NumPy array of real numbers.
            ValueError: If the shapes differ or are not ``[B, d]``.
        """
        total, count = _alignment_update(x, y, self.alpha)
        self.total = self.total + total
        self.count = self.count + count

    def compute(self) -> Tensor:
        """Compute the mean distance to the power ``alpha`` of all pairs so far.

        Returns:
            A scalar in ``[0, 2^alpha]``, or NaN before the first pair and after an embedding that is not finite in
            float32.
        """
        return _alignment_compute(self.total, self.count)


def uniformity(x: Tensor | NDArray[Any], t: float = 2.0) -> Tensor:
    """Compute the logarithm of a batch's mean Gaussian potential on the unit sphere. Lower is more uniform.

    Args:
        x: Floats of shape ``[B, d]``, ``B >= 2``, of any length.
        t: Scale of the potential ``exp(-t * distance^2)`` of a pair, above 0 and at most 20.

    Returns:
        A differentiable scalar in ``[-4 t, 0]``. It is NaN if an embedding is not finite in float32.

    Raises:
        TypeError: If ``x`` is not a tensor or NumPy array of real numbers, or ``t`` is not a number.
        ValueError: If ``x`` has a different shape, or ``t`` is out of range.

    Example:
        >>> import torch
        >>> from bs_lightning.metrics import uniformity
        >>> uniformity(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        tensor(-4.0000)

    Source: Wang and Isola, "Understanding contrastive representation learning through alignment and uniformity on the
    hypersphere", ICML 2020, equation for L_uniform.
    """
    return _uniformity_compute(*_uniformity_update(x, _check_scale(t)))


class Uniformity(Metric):
    """Accumulate :func:`uniformity` over batches. Lower is more uniform.

    The pairs are those within each batch.

    As input to ``forward`` and ``update`` the metric accepts:

    - ``x`` (:class:`~torch.Tensor` or NumPy array): floats of shape ``[B, d]``, ``B >= 2``, of any length.

    As output of ``forward`` and ``compute`` the metric returns a scalar in ``[-4 t, 0]``: the logarithm of the mean
    potential of all pairs so far, or NaN before the first pair and after an embedding that is not finite in float32.

    Args:
        t: Scale of the potential ``exp(-t * distance^2)`` of a pair, above 0 and at most 20.
        **kwargs: Passed to :class:`torchmetrics.Metric`.

    Raises:
        TypeError: If ``x`` is not a tensor or NumPy array of real numbers, or ``t`` is not a number.
        ValueError: If ``x`` has a different shape, or ``t`` is out of range.

    Example:
        >>> import torch
        >>> from bs_lightning.metrics import Uniformity
        >>> metric = Uniformity()
        >>> metric.update(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        >>> metric.update(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
        >>> metric.compute()
        tensor(-4.6750)

    Source: Wang and Isola, ICML 2020, equation for L_uniform.
    """

    is_differentiable = True
    higher_is_better = False
    full_state_update = False

    potential: Tensor
    pairs: Tensor

    def __init__(self, t: float = 2.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.t = _check_scale(t)
        _add_option(self, "scale", self.t)
        self.add_state("potential", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("pairs", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, x: Tensor | NDArray[Any]) -> None:
        """Add the pairs of a batch.

        Args:
            x: Floats of shape ``[B, d]``, ``B >= 2``, of any length.

        Raises:
            TypeError: If ``x`` is not a tensor or NumPy array of real numbers.
            ValueError: If ``x`` has a different shape.
        """
        potential, pairs = _uniformity_update(x, self.t)
        self.potential = self.potential + potential
        self.pairs = self.pairs + pairs

    def compute(self) -> Tensor:
        """Compute the logarithm of the mean potential of all pairs so far.

        Returns:
            A scalar in ``[-4 t, 0]``, or NaN before the first pair and after an embedding that is not finite in
            float32.
        """
        return _uniformity_compute(self.potential, self.pairs)


def _alignment_update(x: Tensor | NDArray[Any], y: Tensor | NDArray[Any], alpha: float) -> tuple[Tensor, int]:
    """Return the sum of the pairs' distances to the power ``alpha``, and the number of pairs."""
    x, y = check_tensor("x", x), check_tensor("y", y)
    if x.shape != y.shape or x.ndim != 2 or 0 in x.shape:
        raise ValueError(
            f"x and y must have the same shape [B, d] with B >= 1 and d >= 1, got {list(x.shape)} and {list(y.shape)}."
        )
    x, y = unit_rows_with_gradient(x.float()), unit_rows_with_gradient(y.float())
    distance = torch.linalg.vector_norm(x - y, dim=1)
    no_distance = distance == 0  # where a power below 1 has no gradient
    return distance.masked_fill(no_distance, 1).pow(alpha).masked_fill(no_distance, 0).sum(), len(x)


def _alignment_compute(total: Tensor, count: Tensor | int) -> Tensor:
    return (total / count).float()


def _uniformity_update(x: Tensor | NDArray[Any], t: float) -> tuple[Tensor, int]:
    """Return the sum of the pairs' potentials, and the number of pairs."""
    x = check_tensor("x", x)
    if x.ndim != 2 or len(x) < 2 or x.shape[1] < 1:
        raise ValueError(f"x must have shape [B, d] with B >= 2 and d >= 1, got {list(x.shape)}.")
    potentials = torch.pdist(unit_rows_with_gradient(x.float())).square().mul(-t).exp()
    return potentials.sum(), len(potentials)


def _uniformity_compute(potential: Tensor, pairs: Tensor | int) -> Tensor:
    return (potential / pairs).log().float()


def _add_option(metric: Metric, name: str, value: float) -> None:
    """Make an option of a metric its first state.

    ``MetricCollection`` lets metrics share their sums from then on if all states are equal after the first batch. The
    sums are, whatever the option is, where all rows are equal. Older versions of torchmetrics compare the first
    state alone.
    """
    metric.add_state(name, torch.tensor(value), dist_reduce_fx="max")


def _check_scale(t: float) -> float:
    """Return the scale of the Gaussian potential as a float that is above 0 and at most 20."""
    scale = check_positive("t", t)
    if scale > 20:
        raise ValueError(f"t must be at most 20, got {t}: the potentials of distant pairs would vanish in float32.")
    return scale
