"""Checks, scaling and similarities of embeddings that several modules share."""

from collections.abc import Iterator

import torch
from torch import Tensor

from bs_lightning._checks import check_integer

BLOCK_ENTRIES = 2**24
"""Similarities that :func:`similarity_blocks` holds at a time: 64 MB of float32."""

BELOW_ANY_COSINE = -2.0
"""Stands in for the similarity to an all-zero row, so that such a row is chosen last."""


def check_embeddings(embeddings: Tensor) -> None:
    """Refuse what is not of shape ``[P, d]`` with ``P >= 2``, or not finite in float32.

    Raises:
        ValueError: Naming the shape, or the first row that is not finite.
    """
    if embeddings.ndim != 2 or len(embeddings) < 2:
        raise ValueError(f"embeddings must have shape [P, d] with P >= 2, got {list(embeddings.shape)}.")
    row = first_not_finite(embeddings.float())
    if row is not None:
        raise ValueError(f"embeddings must be finite, but row {row} is not.")


def first_not_finite(rows: Tensor) -> int | None:
    """Return the number of the first row that holds a NaN or an infinity, or ``None`` if there is none."""
    finite = torch.isfinite(rows).all(dim=1)
    return None if finite.all() else int((~finite).nonzero()[0])


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
    largest = torch.linalg.vector_norm(rows, ord=torch.inf, dim=1, keepdim=True)
    # First by a power of two, which is exact: a norm of very large or small numbers would overflow or vanish.
    exponent = torch.frexp(largest).exponent.clamp(-126, 126)
    rows.ldexp_(-exponent)
    rows /= rows.norm(dim=1, keepdim=True).clamp_min(1e-12)
    return rows


def similarity_blocks(unit: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield the cosine similarities of all rows to all rows, a block of rows at a time.

    Args:
        unit: Rows of length 1, float32 ``[P, d]``.

    Yields:
        The block's first row, and its similarities: a new tensor of shape ``[rows in the block, P]``.
    """
    rows_per_block = max(1, BLOCK_ENTRIES // len(unit))
    for start in range(0, len(unit), rows_per_block):
        yield start, unit[start : start + rows_per_block] @ unit.T
