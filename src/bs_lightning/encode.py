"""Encode: a pool of dataset indices -> L2-normalised embeddings."""

import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bs_lightning.loader import Load

Embed = Callable[[Any], Tensor]


@torch.no_grad()
def encode(
    indices: Sequence[int], load: Load, embed: Embed, *, batch_size: int, advance: Callable[[], None] | None = None
) -> Tensor:
    """Embed a pool: the hot path.

    Runs without gradients. Embeddings stay on the device on which ``embed`` makes them until the pool is done; nothing
    waits for the device before.

    Args:
        indices: Dataset indices, ``P`` of them.
        load: Loads batches of indices, as :class:`bs_lightning.BatchLoader` does.
        embed: A batch as loaded -> floats of shape ``[b, d]``; it moves the batch to the device itself.
        batch_size: Instances embedded at a time; the last batch may be smaller.
        advance: Called after each batch.

    Returns:
        float32 of shape ``[P, d]``, on the device, rows of length 1. All-zero rows stay zero, with a warning.

    Raises:
        TypeError: If ``embed`` returns no float tensor.
        ValueError: If it returns another shape than ``[b, d]``, another number of rows than the batch has, or numbers
            that are not finite; then the message names the dataset index.

    Example:
        >>> import torch
        >>> from bs_lightning import BatchLoader, encode
        >>> encode([2, 0], BatchLoader(torch.eye(3) * 5), lambda batch: batch, batch_size=2).tolist()
        [[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]
    """
    chunks = [list(indices[start : start + batch_size]) for start in range(0, len(indices), batch_size)]
    pieces = []
    for chunk, batch in zip(chunks, load(chunks), strict=True):
        piece = embed(batch)
        _check_piece(piece, len(chunk))
        pieces.append(piece.to(torch.float32, copy=True))  # a compiled model may write the next into the same place
        if advance is not None:
            advance()
    embeddings = torch.cat(pieces)

    finite = torch.isfinite(embeddings).all(dim=1)
    largest = embeddings.abs().amax(dim=1, keepdim=True)
    if not finite.all():
        row = int((~finite).nonzero()[0])
        raise ValueError(
            f"The embedding of dataset index {indices[row]} is not finite. Check that instance, or whether training "
            "diverged; lower precisions overflow sooner."
        )
    # The words of these warnings never change, so that Python shows each once.
    if not largest.all():
        warnings.warn("Some embeddings of a pool are all zero: they count as similar to nothing.", stacklevel=2)
    # Twice: a norm of very large or small numbers would overflow or vanish.
    embeddings = embeddings / largest.masked_fill(largest == 0, 1)
    embeddings = torch.nn.functional.normalize(embeddings, dim=1)
    if len(embeddings) > 1 and torch.allclose(embeddings, embeddings[:1], atol=1e-6):
        warnings.warn("A pool's embeddings are all equal: the model has collapsed. Batches are random.", stacklevel=2)
    return embeddings


def _check_piece(piece: object, n_rows: int) -> None:
    if not isinstance(piece, Tensor) or not piece.is_floating_point():
        got = f"a tensor of {piece.dtype}" if isinstance(piece, Tensor) else type(piece).__name__
        raise TypeError(f"embed must return a float tensor of shape [b, d], got {got}.")
    if piece.ndim != 2:
        raise ValueError(f"embed must return shape [b, d], got {list(piece.shape)}. Pool or flatten first.")
    if len(piece) != n_rows:
        raise ValueError(
            f"embed returned {len(piece)} rows for {n_rows} instances. One embedding per instance is needed: "
            "pool_dataset must give one view of each, and collate_fn must not drop any."
        )


@contextmanager
def no_trace(module: nn.Module) -> Iterator[None]:
    """Put a module into eval mode and, whatever happens inside, leave everything as it was.

    Restores each submodule's train or eval mode, every buffer (batch-norm statistics, queues of a momentum encoder),
    and the random states of Python, numpy, torch and the current CUDA device.

    Args:
        module: The module that is going to encode.

    Example:
        >>> import torch
        >>> from bs_lightning.encode import no_trace
        >>> norm = torch.nn.BatchNorm1d(3)
        >>> with no_trace(norm):
        ...     norm.training
        False
        >>> norm.training
        True
    """
    modes = [(part, part.training) for part in module.modules()]
    buffers = [
        (part, name, buffer, None if buffer is None else buffer.clone())
        for part in module.modules()
        for name, buffer in part._buffers.items()  # `named_buffers` leaves out those that are None
    ]
    with isolated_rng():
        try:
            module.eval()
            yield
        finally:
            for part, training in modes:
                part.training = training
            with torch.no_grad():
                for part, name, buffer, before in buffers:
                    setattr(part, name, buffer)
                    # Unchanged ones may be views or made in inference mode, which cannot be written to.
                    if buffer is not None and before is not None and not torch.equal(buffer, before):
                        buffer.copy_(before)


@contextmanager
def isolated_rng() -> Iterator[None]:
    """Restore the random states of Python, numpy, torch and the current CUDA device, whatever happens inside."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)
