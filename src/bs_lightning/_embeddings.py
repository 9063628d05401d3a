"""Checks and scaling of embeddings that several modules share."""

import torch
from torch import Tensor

from bs_lightning._checks import check_integer


def check_embeddings(embeddings: Tensor) -> None:
    """Refuse what is not of shape ``[P, d]`` with ``P >= 2``, or not finite in float32.

    Raises:
        ValueError: Naming the shape, or the first row that is not finite.
    """
    if embeddings.ndim != 2 or len(embeddings) < 2:
        raise ValueError(f"embeddings must have shape [P, d] with P >= 2, got {list(embeddings.shape)}.")
    finite = torch.isfinite(embeddings.float()).all(dim=1)
    if not finite.all():
        raise ValueError(f"embeddings must be finite, but row {int((~finite).nonzero()[0])} is not.")


def check_whole_batches(n_embeddings: int, batch_size: int) -> None:
    """Refuse what does not make whole batches.

    Raises:
        TypeError: If ``batch_size`` is no integer.
        ValueError: If it does not divide the number of embeddings.
    """
    if check_integer("batch_size", batch_size) < 1 or n_embeddings % batch_size:
        raise ValueError(
            f"batch_size must divide the number of embeddings, {n_embeddings}, got {batch_size}. "
            "Leave out the embeddings that do not fill a batch."
        )


def unit_rows(embeddings: Tensor) -> Tensor:
    """A copy with rows of length 1, float32 ``[P, d]`` without gradient; all-zero rows stay."""
    return unit_rows_(embeddings.detach().to(torch.float32, copy=True))


def unit_rows_(rows: Tensor) -> Tensor:
    """As :func:`unit_rows`, in place, of float32 rows.

    Returns:
        ``rows``.
    """
    rows *= _scales(rows)
    rows /= rows.norm(dim=1, keepdim=True).clamp_min(1e-12)
    return rows


def unit_rows_with_gradient(embeddings: Tensor) -> Tensor:
    """Scale rows to length 1, float32 ``[B, d]``, in a differentiable way. All-zero rows stay zero."""
    rows = embeddings.float()
    rows = rows * _scales(rows.detach())  # `torch.ldexp` has a wrong gradient
    lengths: Tensor = rows.norm(dim=1, keepdim=True)
    return rows / lengths.clamp_min(1e-12)


def _scales(rows: Tensor) -> Tensor:
    """Return the power of two, float32 ``[P, 1]``, that scales each row's largest number to between 0.5 and 1.

    Such a scaling is exact, and then the length of a row of very large or small numbers neither overflows nor vanishes.
    """
    largest = torch.linalg.vector_norm(rows, ord=torch.inf, dim=1, keepdim=True)
    return torch.ldexp(torch.ones_like(largest), -torch.frexp(largest).exponent.clamp(-126, 126))
