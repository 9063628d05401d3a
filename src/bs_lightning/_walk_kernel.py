"""The numba kernel of :func:`bs_lightning.rwr_batches`: plain arrays in and out, without checks."""

from collections.abc import Callable
from typing import Any

import numba
import numpy as np

# A walk continues from a new root after this many steps in a row without a new node. So a walk takes at most this many
# steps per node, plus one. `benchmarks/pools.py --patience` compares values.
PATIENCE = 200


def _compile(function: Callable[..., Any]) -> Callable[..., Any]:
    try:
        return numba.njit(cache=True, nogil=True)(function)
    except RuntimeError:  # no folder for the cache can be written: each process compiles the kernel, about a second
        return numba.njit(nogil=True)(function)


@_compile
def walk_batches(neighbors, batch_size, restart_probability, n_roots, replacement, rng):  # type: ignore[no-untyped-def]
    """Fill int64 ``[P // batch_size, batch_size]`` with the nodes that the walks meet."""
    n_nodes, n_neighbors = neighbors.shape
    n_batches = n_nodes // batch_size
    batches = np.empty((n_batches, batch_size), dtype=np.int64)
    taken_by = np.full(n_nodes, -1, dtype=np.int32)  # each node's last batch, or -1
    lowest_unused = 0
    columns_per_draw = 0.0 if restart_probability == 1 else n_neighbors / (1 - restart_probability)

    for batch in range(n_batches):
        # A node is free if no batch has taken it or, with replacement, if this batch has not taken it.
        last_free = batch - 1 if replacement else -1
        size = walk = 0
        root = node = 0
        idle = PATIENCE  # the first step picks a root
        while size < batch_size:
            if idle == PATIENCE:
                if replacement:
                    root = int(rng.random() * n_nodes)
                    while taken_by[root] > last_free:
                        root = (root + 1) % n_nodes
                else:
                    while taken_by[lowest_unused] > last_free:
                        lowest_unused += 1
                    root = lowest_unused
                node = root
            else:
                draw = rng.random()
                if draw < restart_probability:
                    node = root
                else:
                    column = int((draw - restart_probability) * columns_per_draw)
                    node = neighbors[node, min(column, n_neighbors - 1)]
            if taken_by[node] > last_free:
                idle += 1
            else:
                taken_by[node] = batch
                batches[batch, size] = node
                size += 1
                idle = 0
                if size == (walk + 1) * batch_size // n_roots:  # this walk has filled its part of the batch
                    walk += 1
                    idle = PATIENCE
    return batches
