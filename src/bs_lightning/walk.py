"""Walk: a neighbour graph -> batches, by random walk with restart (RWR)."""

from numbers import Real

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bs_lightning._checks import check_integer


def rwr_batches(
    neighbors: ArrayLike,
    batch_size: int,
    *,
    restart_probability: float = 0.2,
    n_roots: int = 1,
    seed: int = 0,
    replacement: bool = False,
) -> NDArray[np.int64]:
    """Batches of nodes that random walks with restart visit together.

    One walk makes one batch, or ``n_roots`` walks share it. A walk starts at a root, and at each step jumps back to the
    root with probability ``restart_probability``, else moves to one of the current node's neighbours, each as likely as
    the others. The distinct new nodes it meets are the batch. A walk that meets nothing new for a while goes on from
    another root, so the work is bounded on every graph.

    Args:
        neighbors: Integers of shape ``[P, K]``; row ``i`` holds the neighbours of node ``i``. An entry equal to its
            own row's number means "no edge here".
        batch_size: Nodes in a batch, from 1 to ``P``.
        restart_probability: Chance to jump back at each step, in ``(0, 1]``.
        n_roots: Walks that make a batch, each an equal part of it, from 1 (the paper's) to ``batch_size``. Instead of
            a batch that is moderately hard throughout, each instance meets a few hard ones among many easy ones.
        seed: The same seed gives the same batches.
        replacement: ``False`` gives every node to one batch at most, each walk rooted at the lowest unused node.
            ``True`` is the paper's mode: a batch may take what earlier ones took (never the same node twice within a
            batch), and roots are drawn uniformly.

    Returns:
        int64 of shape ``[P // batch_size, batch_size]``. Where ``batch_size`` does not divide ``P`` and
        ``replacement`` is ``False``, the ``P % batch_size`` nodes no walk took are left out.

    Raises:
        TypeError: If ``neighbors`` does not hold integers, or an argument is of another type.
        ValueError: If ``neighbors`` is not of shape ``[P, K]`` with entries in ``[0, P)``, or ``batch_size``,
            ``restart_probability`` or ``n_roots`` is out of range.

    Example:
        >>> from bs_lightning import rwr_batches
        >>> two_cliques = [[1, 2], [0, 2], [0, 1], [4, 5], [3, 5], [3, 4]]
        >>> sorted(sorted(batch) for batch in rwr_batches(two_cliques, 3).tolist())
        [[0, 1, 2], [3, 4, 5]]

    Source: Algorithm 1 of "BatchSampler: Sampling Mini-Batches for Contrastive Learning in Vision, Language, and
    Graphs", KDD 2023, arXiv 2306.03355.
    """
    graph = np.asarray(neighbors)
    if graph.dtype.kind not in "iu":
        raise TypeError(f"neighbors must hold integers, got dtype {graph.dtype}. Convert it, e.g. astype('int32').")
    if graph.ndim != 2 or graph.shape[1] < 1:
        raise ValueError(f"neighbors must have shape [P, K] with K >= 1, got shape {list(graph.shape)}.")
    size = len(graph)
    if size and (graph.min() < 0 or graph.max() >= size):
        bad = int(graph.min()) if graph.min() < 0 else int(graph.max())
        raise ValueError(
            f"neighbors must lie in [0, {size}), got {bad}. For 'no edge here' write the row's own number."
        )
    batch_size, n_roots = check_integer("batch_size", batch_size), check_integer("n_roots", n_roots)
    if not 1 <= batch_size <= size:
        raise ValueError(f"batch_size must be from 1 to the graph's {size} nodes, got {batch_size}.")
    if not 1 <= n_roots <= batch_size:
        raise ValueError(f"n_roots must be from 1 to batch_size {batch_size}, got {n_roots}.")
    check_restart_probability(restart_probability)

    from bs_lightning._walk_kernel import walk_batches  # numba is slow to import: not before the first walk

    batches: NDArray[np.int64] = walk_batches(
        np.ascontiguousarray(graph, dtype=np.int32),
        batch_size,
        float(restart_probability),
        n_roots,
        bool(replacement),
        np.random.default_rng(seed),
    )
    return batches


def check_restart_probability(value: float) -> None:
    """Refuse a restart probability outside ``(0, 1]``.

    Raises:
        TypeError: If it is no number.
        ValueError: Naming the value. At 0 a walk would never come back to its root.
    """
    if not isinstance(value, Real):
        raise TypeError(f"restart_probability must be a number, got {value!r}.")
    if not 0 < value <= 1:
        raise ValueError(f"restart_probability must lie in (0, 1], got {value}. The paper uses 0.05 to 0.2.")
