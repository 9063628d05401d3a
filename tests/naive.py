"""Slow, literal versions of the walk (with the numba kernel's random draws) and of the search among candidates."""

from itertools import chain

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bs_lightning._walk_kernel import PATIENCE


def rwr_batches(
    neighbors: list[list[int]],
    batch_size: int,
    *,
    restart_probability: float = 0.2,
    n_roots: int = 1,
    seed: int = 0,
    replacement: bool = False,
    patience: int = PATIENCE,
) -> list[list[int]]:
    """Return the batches that :func:`bs_lightning.rwr_batches` returns, as lists."""
    rng = np.random.default_rng(seed)
    n_nodes, n_neighbors = len(neighbors), len(neighbors[0])
    free = set(range(n_nodes))
    ends = {(walk + 1) * batch_size // n_roots for walk in range(n_roots)}
    batches: list[list[int]] = []
    for _ in range(n_nodes // batch_size):
        if replacement:
            free = set(range(n_nodes))
        batch: list[int] = []
        idle = patience
        while len(batch) < batch_size:
            if idle == patience:
                first = int(rng.random() * n_nodes) if replacement else 0
                root = next(node for node in chain(range(first, n_nodes), range(first)) if node in free)
                node = root
            else:
                draw = rng.random()
                if draw < restart_probability:
                    node = root
                else:
                    column = int((draw - restart_probability) * (n_neighbors / (1 - restart_probability)))
                    node = neighbors[node][min(column, n_neighbors - 1)]
            if node in free:
                free.remove(node)
                batch.append(node)
                idle = patience if len(batch) in ends else 0
            else:
                idle += 1
        batches.append(batch)
    return batches


def nearest_of(embeddings: ArrayLike, candidates: ArrayLike, n_neighbors: int) -> NDArray[np.int64]:
    """Return each row's nearest neighbours among its own candidates, nearest first."""
    x = np.asarray(embeddings, dtype=float)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    rows = []
    for row, own in enumerate(np.asarray(candidates)):
        rows.append(own[np.argsort(-(x[own] @ x[row]))[:n_neighbors]])
    return np.array(rows)
