"""Walk: a neighbour graph -> batches, by random walk with restart (RWR)."""

import numpy as np
from numpy.typing import ArrayLike

from bs_lightning._checks import check_integer, check_neighbors, check_number, check_seed
from bs_lightning._types import Batches


def rwr_batches(
    neighbors: ArrayLike,
    batch_size: int,
    *,
    restart_probability: float = 0.2,
    n_roots: int = 1,
    seed: int = 0,
    replacement: bool = False,
) -> Batches:
    """Compose batches of nodes that random walks with restart visit together.

    One walk fills a batch, or ``n_roots`` walks share it. A walk starts at a root. At each step it jumps back to the
    root with probability ``restart_probability``. Otherwise it moves to a random neighbour of the current node, all
    neighbours being equally likely. The batch consists of the distinct new nodes that the walk meets. If a walk meets
    no new node for a while, it continues from a new root, so the work is bounded on every graph.

    Args:
        neighbors: Integers of shape ``[P, K]``. Row ``i`` holds the neighbours of node ``i``. An entry equal to its
            own row's number means "no edge here".
        batch_size: Nodes in a batch, from 1 to ``P``.
        restart_probability: Chance to jump back at each step, in ``(0, 1]``.
        n_roots: Number of walks that fill a batch, each an equal part, from 1 (the paper's value) to ``batch_size``.
            With one root, all pairs of a batch are moderately hard. With several roots, each instance meets a few
            hard instances among many easy ones.
        seed: Seed of the walks, an integer of at least 0. The same seed gives the same batches.
        replacement: With ``False``, each node is in at most one batch, and each walk starts at the lowest unused node.
            ``True`` is the paper's mode: different batches may share nodes, and roots are drawn uniformly. No batch
            holds a node twice in either mode.

    Returns:
        int64 of shape ``[P // batch_size, batch_size]``. If ``batch_size`` does not divide ``P`` and ``replacement``
        is ``False``, ``P % batch_size`` nodes are in no batch.

    Raises:
        TypeError: If ``neighbors`` does not hold integers, if ``batch_size``, ``n_roots`` or ``seed`` is not an
            integer, or if ``restart_probability`` is not a number.
        ValueError: If ``neighbors`` does not have shape ``[P, K]`` with entries in ``[0, P)``, or if ``batch_size``,
            ``restart_probability``, ``n_roots`` or ``seed`` is out of range.

    Example:
        >>> from bs_lightning import rwr_batches
        >>> two_cliques = [[1, 2], [0, 2], [0, 1], [4, 5], [3, 5], [3, 4]]
        >>> sorted(sorted(batch) for batch in rwr_batches(two_cliques, 3).tolist())
        [[0, 1, 2], [3, 4, 5]]

    Source: Algorithm 1 of "BatchSampler: Sampling Mini-Batches for Contrastive Learning in Vision, Language, and
    Graphs", KDD 2023, arXiv 2306.03355.
    """
    graph = check_neighbors(neighbors)
    size = len(graph)
    batch_size, n_roots = check_integer("batch_size", batch_size), check_integer("n_roots", n_roots)
    if not 1 <= batch_size <= size:
        raise ValueError(f"batch_size must be from 1 to the graph's {size} nodes, got {batch_size}.")
    if not 1 <= n_roots <= batch_size:
        raise ValueError(f"n_roots must be from 1 to batch_size {batch_size}, got {n_roots}.")
    restart_probability, seed = check_restart_probability(restart_probability), check_seed(seed)

    from bs_lightning._walk_kernel import walk_batches  # numba is slow to import: not before the first walk

    batches: Batches = walk_batches(
        np.ascontiguousarray(graph, dtype=np.int32),
        batch_size,
        restart_probability,
        n_roots,
        bool(replacement),
        np.random.default_rng(seed),
    )
    return batches


def check_restart_probability(value: float, name: str = "restart_probability") -> float:
    """Return a restart probability as a float. Reject values outside ``(0, 1]``.

    At 0 a walk would never return to its root.

    Raises:
        TypeError: If ``value`` is not a number.
        ValueError: If ``value`` is out of range, or NaN.
    """
    number = check_number(name, value)
    if not 0 < number <= 1:
        raise ValueError(f"{name} must lie in (0, 1], got {value}. The paper's restart probability is 0.05 to 0.2.")
    return number
