"""Edges: a graph -> a checked graph, or one with fewer edges."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bs_lightning._checks import check_neighbors
from bs_lightning._types import Indices, Neighbors


def check_graph(neighbors: Sequence[Any] | Neighbors, n_embeddings: int) -> Neighbors:
    """Return a graph as an array. Refuse it if it lacks rows, or names an instance that does not exist.

    Args:
        neighbors: What a graph returned.
        n_embeddings: Number of embeddings that the graph was built from.

    Returns:
        int32 of shape ``[P, K]``.

    Raises:
        TypeError: If the graph does not hold integers.
        ValueError: If the number of rows is different, or an entry is out of range.
    """
    if len(neighbors) != n_embeddings:
        raise ValueError(
            f"The graph must return a row of neighbours for each of {n_embeddings} embeddings, got "
            f"{len(neighbors)} rows."
        )
    return check_neighbors(neighbors).astype(np.int32, copy=False)


def without_edges(neighbors: Neighbors, marked: NDArray[np.bool_]) -> Neighbors:
    """Take edges out of a graph. The other edges of a row take their places in turn, so that walks choose among them.

    Args:
        neighbors: int32 of shape ``[P, K]``.
        marked: The edges to take out, bool ``[P, K]``.

    Returns:
        int32 of shape ``[P, K]``. A row whose edges are all taken out holds its own number, which means "no edge".

    Example:
        >>> import numpy as np
        >>> from bs_lightning.edges import without_edges
        >>> neighbors = np.array([[1, 2, 3], [0, 2, 3], [1, 0, 3], [0, 1, 2]], dtype=np.int32)
        >>> without_edges(neighbors, neighbors == 1)
        array([[2, 3, 2],
               [0, 2, 3],
               [0, 3, 0],
               [0, 2, 0]], dtype=int32)
    """
    kept_first = np.take_along_axis(neighbors, np.argsort(marked, axis=1, kind="stable"), axis=1)
    n_kept = (~marked).sum(axis=1, keepdims=True)
    columns = np.arange(neighbors.shape[1]) % np.maximum(n_kept, 1)
    own = np.arange(len(neighbors), dtype=np.int32)[:, None]
    return np.where(n_kept > 0, np.take_along_axis(kept_first, columns, axis=1), own)


def restricted(neighbors: Neighbors, indices: Indices) -> Neighbors:
    """Return the part of a dataset's graph that joins the instances of a pool.

    Args:
        neighbors: The dataset's graph, int32 ``[N, K]``.
        indices: Dataset indices of the pool, int64 ``[P]``, each once.

    Returns:
        The pool's graph, positions in the pool, int32 ``[P, K]``.

    Example:
        >>> import numpy as np
        >>> from bs_lightning.edges import restricted
        >>> restricted(np.array([[1, 2], [2, 0], [0, 1]], dtype=np.int32), np.array([2, 0]))
        array([[1, 1],
               [0, 0]], dtype=int32)
    """
    position = np.full(len(neighbors), -1, dtype=np.int32)
    position[indices] = np.arange(len(indices), dtype=np.int32)
    inside = position[neighbors[indices]]
    return without_edges(inside, inside < 0)
