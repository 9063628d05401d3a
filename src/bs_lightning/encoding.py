"""Encode: a pool of dataset indices -> L2-normalised embeddings, of one side or two."""

import warnings
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from bs_lightning._checks import check_integer, check_integer_array
from bs_lightning._embeddings import as_sides, finite_unit_rows_, similar_to_nothing
from bs_lightning._types import Indices
from bs_lightning.loader import Load

Embed = Callable[[Any], Tensor | tuple[Tensor, Tensor]]


def encode(
    indices: Sequence[int] | Indices,
    load: Load,
    embed: Embed,
    *,
    batch_size: int,
    advance: Callable[[], None] | None = None,
) -> Tensor:
    """Embed a pool without gradients, and scale each embedding to length 1.

    This is the hot path. Embeddings stay on the device on which ``embed`` makes them. Nothing waits for the device
    before the whole pool is embedded.

    Args:
        indices: Dataset indices, integers ``[P]``.
        load: Loads batches of indices, as :class:`bs_lightning.BatchFetcher` does.
        embed: A batch as loaded -> floats of shape ``[b, d]``. For two sides: a pair of such tensors, or ``[b, 2, d]``.
            The function moves the batch to the device itself.
        batch_size: Instances embedded at a time; the last batch may be smaller.
        advance: A function without arguments, called after each batch.

    Returns:
        float32 of shape ``[P, d]`` or ``[P, 2, d]``, on the device, rows of length 1. All-zero rows stay zero, with a
        warning.

    Raises:
        TypeError: If ``indices`` does not hold integers, ``batch_size`` is not an integer, or ``embed`` does not return
            a float tensor.
        ValueError: If ``indices`` is not of shape ``[P]`` or is empty, ``batch_size`` is below 1, or ``embed`` does not
            return one or two sides of one width with one row per instance of the batch, or returns numbers that are not
            finite. The message then names the dataset index.

    Example:
        >>> import torch
        >>> from bs_lightning import BatchFetcher, encode
        >>> encode([2, 0], BatchFetcher(torch.eye(3) * 5), lambda batch: batch, batch_size=2).tolist()
        [[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]
    """
    return checked_unit_rows_(embed_in_batches(indices, load, embed, batch_size=batch_size, advance=advance), indices)


def has_embed(module: object) -> bool:
    """Return whether a module has a method ``embed``, which is taken before its ``forward``.

    Args:
        module: The module that encodes.
    """
    return callable(getattr(type(module), "embed", None))  # of the class: a layer may be named `embed`, too


@torch.no_grad()
def embed_in_batches(
    indices: Sequence[int] | Indices,
    load: Load,
    embed: Embed,
    *,
    batch_size: int,
    advance: Callable[[], None] | None = None,
) -> Tensor:
    """Embed a pool as :func:`encode` does, without waiting for the device.

    Returns:
        float32 of shape ``[P, d]`` or ``[P, 2, d]``, on the device, for :func:`checked_unit_rows_`.
    """
    array = check_integer_array("indices", indices)
    if array.ndim != 1 or not len(array):
        raise ValueError(f"indices must have shape [P] with P >= 1, got shape {list(array.shape)}.")
    batch_size = check_integer("batch_size", batch_size, 1)
    starts = range(0, len(array), batch_size)
    # One batch at a time: lists of Python integers are ten times as large as arrays.
    chunks = (array[start : start + batch_size].tolist() for start in starts)
    embeddings: Tensor | None = None
    for start, batch in zip(starts, load(chunks), strict=True):
        n_rows = min(batch_size, len(array) - start)
        embedded = embed(batch)
        try:
            piece = as_sides(embedded, "embed must return")
            check_piece(piece, n_rows, piece.shape[1:] if embeddings is None else embeddings.shape[1:])
        except (TypeError, ValueError) as error:
            error.add_note(f"embed was given {_shown(batch)}.")
            raise
        if embeddings is None:
            embeddings = torch.empty((len(array), *piece.shape[1:]), dtype=torch.float32, device=piece.device)
        embeddings[start : start + n_rows] = piece
        if advance is not None:
            advance()
    assert embeddings is not None
    return embeddings


def checked_unit_rows_(embeddings: Tensor, indices: Sequence[int] | Indices) -> Tensor:
    """Check a pool's embeddings as :func:`encode` does, and scale them to length 1 in place. May warn.

    Returns:
        ``embeddings``.
    """
    if finite_unit_rows_(embeddings, indices):
        _warn_once(
            "Some embeddings of a pool are all zero: they count as similar to nothing."
            if embeddings.any()
            else "All embeddings are zero: the model has collapsed. Batches composed from them are random."
        )
    warn_of_collapse(embeddings)
    return embeddings


def warn_of_collapse(unit: Tensor) -> None:
    """Warn if all instances of a pool have the same row, and there are more than two. All-zero rows do not count."""
    # Two equal embeddings prove nothing: the dataset may hold an instance twice. The comparison of all embeddings needs
    # memory several times over, so the first ones come first, on the CPU, where they start no kernels.
    for some in (unit[:9].cpu(), unit):
        known = some[~similar_to_nothing(some)]
        if not torch.allclose(known, known[:1], atol=1e-6):
            return
    if len(known) > 2:
        _warn_once("All embeddings are equal: the model has collapsed. Batches composed from them are random.")


@cache  # Python forgets which warnings it has shown wherever somebody uses `warnings.catch_warnings`
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=4)


def _shown(batch: Any) -> str:
    """Return what a batch is, for an error: its type, and the shapes of its tensors."""
    if isinstance(batch, Tensor):
        return f"a tensor of shape {list(batch.shape)}"
    kind = f"a {type(batch).__name__}"
    return f"{kind} of {' and '.join(map(_shown, batch[:2]))}" if isinstance(batch, (list, tuple)) and batch else kind


def check_piece(piece: Tensor, n_rows: int, shape: torch.Size) -> None:
    """Refuse embeddings of a part of the instances that differ in width from earlier parts, or in number.

    Args:
        piece: Floats of shape ``[n_rows, d]`` or ``[n_rows, 2, d]``.
        n_rows: Number of instances.
        shape: The shape of an instance's embeddings in earlier parts.

    Raises:
        ValueError: Naming both shapes, or both numbers.
    """
    if piece.shape[1:] != shape:
        raise ValueError(
            f"embed must return embeddings of one width, got {list(shape)} and then {list(piece.shape[1:])}."
        )
    if len(piece) != n_rows:
        raise ValueError(
            f"embed returned {len(piece)} rows for {n_rows} instances. One embedding per instance is needed: "
            "pool_dataset must give one view of each, and collate_fn must neither add nor drop any."
        )
