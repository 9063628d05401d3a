"""Compose: a pool's embeddings -> its batches.

This is the one seam by which everything about batches is varied. A composer is any callable
``(embeddings, batch_size, *, seed, epoch) -> int64 [P // batch_size, batch_size]`` of positions in the pool, for
embeddings of shape ``[P, d]`` with ``P`` a multiple of ``batch_size``. It uses each position once, unless it has an
attribute ``replacement`` that is true; then only a single batch must not repeat one.
"""

import time
from collections.abc import Callable
from typing import Protocol

import numpy as np
from torch import Tensor

from bs_lightning._checks import check_instance_callable, check_integer
from bs_lightning._types import Batches, Neighbors
from bs_lightning.graphs import NNDescentGraph
from bs_lightning.walk import check_restart_probability, rwr_batches


class Graph(Protocol):
    """Embeddings ``[P, d]`` -> neighbours int32 ``[P, K]``."""

    def __call__(self, embeddings: Tensor, *, seed: int = 0) -> Neighbors: ...


class Composer(Protocol):
    """Embeddings ``[P, d]`` -> batches int64 ``[P // batch_size, batch_size]``."""

    def __call__(self, embeddings: Tensor, batch_size: int, *, seed: int, epoch: int) -> Batches: ...


class RWRComposer:
    """Batches that random walks with restart visit on a neighbour graph: BatchSampler's way.

    Args:
        graph: Builds the graph; ``None`` is ``NNDescentGraph(n_neighbors=15)``.
        restart_probability: Chance per step to jump back to the walk's start (the paper's alpha), in ``(0, 1]``, or a
            function of the epoch that returns it. Higher stays closer: harder batches, more false negatives.
        replacement: ``True`` lets a batch take instances that earlier batches took, as the paper does; about 40% of
            the data then goes unseen in an epoch.
        n_roots: Walks that make a batch; 1 is the paper's. With more, an instance meets a few hard others among many
            easy ones.

    Attributes:
        neighbors: The last call's graph, int32 ``[P, K]``; ``None`` before.
        seconds: What the last call spent in ``"graph"`` and ``"walk"``.

    Raises:
        TypeError: If ``graph`` cannot be called, or an argument is of another type.
        ValueError: If ``restart_probability`` is a number outside ``(0, 1]``, or ``n_roots`` below 1.

    Example:
        >>> import torch
        >>> from bs_lightning import ExactGraph, RWRComposer
        >>> composer = RWRComposer(ExactGraph(n_neighbors=5), lambda epoch: max(0.2 - 0.02 * epoch, 0.05))
        >>> composer(torch.randn(64, 8), 16, seed=0, epoch=3).shape
        (4, 16)

    Source: arXiv 2306.03355, section 3 and Algorithm 1.
    """

    def __init__(
        self,
        graph: Graph | None = None,
        restart_probability: float | Callable[[int], float] = 0.2,
        replacement: bool = False,
        n_roots: int = 1,
    ) -> None:
        if graph is not None:
            check_instance_callable("graph", graph, "ExactGraph(n_neighbors=15)")
        if not callable(restart_probability):
            check_restart_probability(restart_probability)
        if check_integer("n_roots", n_roots) < 1:
            raise ValueError(f"n_roots must be at least 1, got {n_roots}. The paper walks from one root per batch.")
        self.graph = NNDescentGraph() if graph is None else graph
        self.restart_probability = restart_probability
        self.replacement = replacement
        self.n_roots = n_roots
        self.neighbors: Neighbors | None = None
        self.seconds: dict[str, float] = {}

    def __call__(self, embeddings: Tensor, batch_size: int, *, seed: int, epoch: int) -> Batches:
        """Compose a pool's batches.

        Args:
            embeddings: Floats of shape ``[P, d]``, ``P`` a multiple of ``batch_size``.
            batch_size: Instances in a batch; under several processes the global batch.
            seed: The same seed gives the same batches.
            epoch: Handed to ``restart_probability`` where that is a function.

        Returns:
            int64 of shape ``[P // batch_size, batch_size]``, positions in the pool.

        Raises:
            ValueError: If the embeddings are not of shape ``[P, d]`` or not finite, or the graph does not give a row
                of neighbours for each.
        """
        alpha = self.restart_probability
        self.neighbors = None  # two graphs of a whole data set may not fit
        start = time.perf_counter()
        neighbors = self.graph(embeddings, seed=seed)
        built = time.perf_counter()
        if len(neighbors) != len(embeddings):
            raise ValueError(
                f"The graph must return a row of neighbours for each of {len(embeddings)} embeddings, got "
                f"{len(neighbors)} rows."
            )
        self.neighbors = neighbors
        batches = rwr_batches(
            neighbors,
            batch_size,
            restart_probability=alpha(epoch) if callable(alpha) else alpha,
            n_roots=self.n_roots,
            seed=seed,
            replacement=self.replacement,
        )
        self.seconds.update(graph=built - start, walk=time.perf_counter() - built)
        return batches


def check_batches(batches: object, pool_size: int, batch_size: int, *, replacement: bool = False) -> Batches:
    """Refuse what is no composition of a pool, whoever made it.

    Args:
        batches: What a composer returned.
        pool_size: Instances in the pool, a multiple of ``batch_size``.
        batch_size: Instances in a batch.
        replacement: Whether different batches may share instances.

    Returns:
        The batches as int64 of shape ``[pool_size // batch_size, batch_size]``.

    Raises:
        TypeError: If they are not integers.
        ValueError: If they have another shape, lie outside ``[0, pool_size)``, or repeat a position.
    """
    try:
        array = np.asarray(batches)
    except ValueError as error:  # rows of unequal length
        raise ValueError(f"The composer must return an array of positions in the pool: {error}") from None
    if array.dtype.kind not in "iu":
        raise TypeError(f"The composer must return integer positions in the pool, got dtype {array.dtype}.")
    shape = (pool_size // batch_size, batch_size)
    if array.shape != shape:
        raise ValueError(
            f"The composer must return batches of shape {list(shape)} for a pool of {pool_size} and batches of "
            f"{batch_size}, got {list(array.shape)}."
        )
    if array.min() < 0 or array.max() >= pool_size:
        bad = int(array.min()) if array.min() < 0 else int(array.max())
        raise ValueError(f"The composer must return positions in [0, {pool_size}), got {bad}.")
    rows = np.sort(array if replacement else array.reshape(1, -1), axis=1)
    repeated = rows[:, 1:] == rows[:, :-1]
    if repeated.any():
        raise ValueError(
            f"The composer returned position {int(rows[:, 1:][repeated][0])} twice"
            + (
                " within one batch."
                if replacement
                else ". If batches may share instances, give it `replacement = True`."
            )
        )
    return array.astype(np.int64, copy=False)
