"""Encode: a pool of dataset indices -> L2-normalised embeddings."""

import warnings
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from bs_lightning._checks import check_integer, check_integer_array
from bs_lightning._embeddings import unit_rows_
from bs_lightning.loader import Load

Embed = Callable[[Any], Tensor]


@torch.no_grad()
def encode(
    indices: Sequence[int], load: Load, embed: Embed, *, batch_size: int, advance: Callable[[], None] | None = None
) -> Tensor:
    """Embed a pool without gradients, and scale each embedding to length 1.

    This is the hot path. Embeddings stay on the device on which ``embed`` makes them. Nothing waits for the device
    before the whole pool is embedded.

    Args:
        indices: Dataset indices, ``P`` of them.
        load: Loads batches of indices, as :class:`bs_lightning.BatchFetcher` does.
        embed: A batch as loaded -> floats of shape ``[b, d]``. The function moves the batch to the device itself.
        batch_size: Instances embedded at a time; the last batch may be smaller.
        advance: A function without arguments, called after each batch.

    Returns:
        float32 of shape ``[P, d]``, on the device, rows of length 1. All-zero rows stay zero, with a warning.

    Raises:
        TypeError: If ``indices`` does not hold integers, ``batch_size`` is not an integer, or ``embed`` does not return
            a float tensor.
        ValueError: If ``indices`` is not of shape ``[P]`` or is empty, ``batch_size`` is below 1, or ``embed`` does not
            return shape ``[b, d]`` with one row per instance of the batch, or returns numbers that are not finite. The
            message then names the dataset index.

    Example:
        >>> import torch
        >>> from bs_lightning import BatchFetcher, encode
        >>> encode([2, 0], BatchFetcher(torch.eye(3) * 5), lambda batch: batch, batch_size=2).tolist()
        [[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]
    """
    array = check_integer_array("indices", indices)
    if array.ndim != 1 or not len(array):
        raise ValueError(f"indices must have shape [P] with P >= 1, got shape {list(array.shape)}.")
    if check_integer("batch_size", batch_size) < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    rows: list[int] = array.tolist()
    chunks = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    pieces: list[Tensor] = []
    for chunk, batch in zip(chunks, load(chunks), strict=True):
        piece = embed(batch)
        _check_piece(piece, len(chunk), pieces[0].shape[1] if pieces else None)
        pieces.append(piece.to(torch.float32, copy=True))  # a compiled model may reuse its output's memory
        if advance is not None:
            advance()
    embeddings = torch.cat(pieces)

    finite = torch.isfinite(embeddings).all(dim=1)
    if not finite.all():
        row = int((~finite).nonzero()[0])
        raise ValueError(
            f"The embedding of dataset index {rows[row]} is not finite. Check that instance, or whether training "
            "diverged. Lower precisions overflow sooner."
        )
    if not embeddings.any(dim=1).all():
        _warn_once("Some embeddings of a pool are all zero: they count as similar to nothing.")
    unit_rows_(embeddings)
    # Two equal embeddings prove nothing: the dataset may hold an instance twice.
    if len(embeddings) > 2 and torch.allclose(embeddings, embeddings[:1], atol=1e-6):
        _warn_once("A pool's embeddings are all equal: the model has collapsed. Batches are random.")
    return embeddings


@cache  # Python forgets which warnings it has shown wherever somebody uses `warnings.catch_warnings`
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=4)


def _check_piece(piece: object, n_rows: int, width: int | None) -> None:
    if not isinstance(piece, Tensor) or not piece.is_floating_point():
        got = f"a tensor of {piece.dtype}" if isinstance(piece, Tensor) else type(piece).__name__
        raise TypeError(f"embed must return a float tensor of shape [b, d], got {got}.")
    if piece.ndim != 2 or piece.shape[1] < 1:
        raise ValueError(f"embed must return shape [b, d], got {list(piece.shape)}. Pool or flatten first.")
    if width is not None and piece.shape[1] != width:
        raise ValueError(f"embed must return embeddings of one width, got {width} and then {piece.shape[1]}.")
    if len(piece) != n_rows:
        raise ValueError(
            f"embed returned {len(piece)} rows for {n_rows} instances. One embedding per instance is needed: "
            "pool_dataset must give one view of each, and collate_fn must not drop any."
        )
