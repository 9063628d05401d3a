"""Compose: a pool's embeddings -> its batches.

Everything about batches is varied here. A composer is a subclass of :class:`Composer`, or a plain function
``(embeddings, batch_size, *, seed, epoch)`` that returns positions in the pool, int64 ``[P // batch_size,
batch_size]``, and uses each position once.
"""

import inspect
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Protocol

from torch import Tensor

from bs_lightning._checks import check_instance_callable, check_integer
from bs_lightning._types import Batches, Embeddings, Neighbors
from bs_lightning.graphs import NNDescentGraph, RandomCandidateGraph
from bs_lightning.walk import check_restart_probability, rwr_batches


class Graph(Protocol):
    """Embeddings ``[P, d]`` -> neighbours int32 ``[P, K]``."""

    # `Any`, as some graphs take arrays too and some tensors alone, and jsonargparse compares annotations literally.
    def __call__(self, embeddings: Any, *, seed: int = 0) -> Neighbors: ...


class ComposeFunction(Protocol):
    """Embeddings ``[P, d]`` -> batches int64 ``[P // batch_size, batch_size]``."""

    def __call__(self, embeddings: Any, batch_size: int, *, seed: int, epoch: int) -> Batches: ...


class Composer(ABC):
    """Base class of composers: override :meth:`__call__`, and of the rest what differs.

    A composer that needs more than embeddings asks by name. If its ``__call__`` has a keyword argument ``indices``,
    the callback passes the pool's dataset indices, int64 ``[P]``. If it has ``labels``, the callback passes the pool's
    labels, an int64 tensor ``[P]``, or ``None`` where there are none. The same holds for plain functions.

    Attributes:
        replacement: Whether different batches may share instances. A single batch never repeats one.
        finds_nearest: Whether ``neighbors`` holds each instance's nearest in the whole pool after a call.
            ``BatchSamplerCallback(mask_nearest=...)`` needs such a composer.
        neighbors: The last call's neighbours, int32 ``[P, K]``, each row nearest first; ``None`` if there are none.
        seconds: What the last call spent in each of its steps, by the step's name. The callback logs them. If it is
            empty, the callback logs the whole call as ``"compose"``.

    Example:
        >>> import numpy as np
        >>> import torch
        >>> from bs_lightning.compose import Composer
        >>> class InOrder(Composer):
        ...     def __call__(self, embeddings, batch_size, *, seed, epoch):
        ...         return np.arange(len(embeddings)).reshape(-1, batch_size)
        >>> InOrder()(torch.randn(6, 2), 3, seed=0, epoch=0).tolist()
        [[0, 1, 2], [3, 4, 5]]
    """

    replacement: bool = False
    neighbors: Neighbors | None = None
    seconds: Mapping[str, float] = MappingProxyType({})

    @property
    def finds_nearest(self) -> bool:
        return False

    def check_batch_size(self, batch_size: int) -> None:  # noqa: B027, most composers serve any
        """Refuse a batch size that this composer cannot serve. Called before training starts."""

    @abstractmethod
    def __call__(self, embeddings: Tensor, batch_size: int, *, seed: int, epoch: int) -> Batches:
        """Compose a pool's batches.

        Args:
            embeddings: Floats of shape ``[P, d]``, ``P`` a multiple of ``batch_size``.
            batch_size: Instances in a batch; under several processes, in a global batch.
            seed: The same seed must give the same batches.
            epoch: The epoch's number.

        Returns:
            int64 of shape ``[P // batch_size, batch_size]``, positions in the pool.
        """


class FunctionComposer(Composer):
    """A plain function as a composer.

    Args:
        function: ``(embeddings, batch_size, *, seed, epoch)`` -> positions in the pool, and perhaps with ``indices`` or
            ``labels``.
    """

    def __init__(self, function: ComposeFunction) -> None:
        self.function = function

    def __call__(self, embeddings: Tensor, batch_size: int, *, seed: int, epoch: int, **more: Any) -> Batches:
        return self.function(embeddings, batch_size, seed=seed, epoch=epoch, **more)

    def __repr__(self) -> str:
        return getattr(self.function, "__qualname__", type(self.function).__qualname__)


def as_composer(composer: Composer | ComposeFunction) -> Composer:
    """Return a composer as it is, and a plain function as a composer with the defaults of :class:`Composer`.

    Raises:
        TypeError: If ``composer`` is not callable, or is a class instead of an object.
    """
    check_instance_callable("composer", composer, "RWRComposer()")
    return composer if isinstance(composer, Composer) else FunctionComposer(composer)


def asked_for(composer: Composer) -> set[str]:
    """Which of ``indices`` and ``labels`` a composer has a keyword argument for."""
    called = composer.function if isinstance(composer, FunctionComposer) else composer
    return {"indices", "labels"} & inspect.signature(called).parameters.keys()


class RWRComposer(Composer):
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
        neighbors: The last call's graph, int32 ``[P, K]``; ``None`` before the first call.
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

    @property
    def finds_nearest(self) -> bool:
        return not isinstance(self.graph, RandomCandidateGraph)

    def check_batch_size(self, batch_size: int) -> None:
        """Refuse batches of fewer instances than roots.

        Raises:
            ValueError: Naming both numbers.
        """
        if self.n_roots > batch_size:
            raise ValueError(f"n_roots must be at most the {batch_size} instances of a batch, got {self.n_roots}.")

    def __repr__(self) -> str:
        return f"RWRComposer({self.graph!r})"

    def __call__(self, embeddings: Embeddings, batch_size: int, *, seed: int, epoch: int) -> Batches:
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
        self.neighbors = None  # two graphs of a whole dataset may not fit
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
        self.seconds = {"graph": built - start, "walk": time.perf_counter() - built}
        return batches
