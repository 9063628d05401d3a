"""Compose: a pool's embeddings -> its batches.

To compose batches differently, write a composer. It is a subclass of :class:`Composer`, or a plain function
``(embeddings, batch_size, *, seed, epoch)``. It returns positions in the pool, int64 ``[P // batch_size, batch_size]``,
and uses each position once.
"""

import functools
import inspect
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from bs_lightning._checks import check_instance_callable, check_integer, check_signature
from bs_lightning._types import Batches, Embeddings, Neighbors
from bs_lightning.edges import check_graph, without_edges
from bs_lightning.graphs import Graph, NNDescentGraph, RandomCandidateGraph, SharedGraph
from bs_lightning.isolation import isolated
from bs_lightning.plan import check_batches
from bs_lightning.walk import check_restart_probability, rwr_batches


class ComposeFunction(Protocol):
    """A composer as a plain function: embeddings ``[P, d]`` -> batches int64 ``[P // batch_size, batch_size]``."""

    def __call__(self, embeddings: Any, batch_size: int, *, seed: int, epoch: int) -> Batches:
        """Compose a pool's batches, as :meth:`Composer.__call__` does."""
        ...


class Composer(ABC):
    """Base class of composers. Override :meth:`__call__`, and each attribute whose default does not fit.

    A composer may ask for more than embeddings, by a keyword argument of its ``__call__``. Plain functions may ask in
    the same way. The callback then passes these; other trainers pass ``indices``, and ``None`` for the rest:

    - ``indices``: the pool's dataset indices, int64 ``[P]``;
    - ``labels``: the pool's labels, an int64 tensor ``[P]``, or ``None`` if the data has no labels;
    - ``likely_false_negatives``: a function that marks the edges of a graph whose two ends are a likely false negative,
      int32 ``[P, K]`` -> bool ``[P, K]``, or ``None`` if there is no rule;
    - ``neighbors``: the pool's graph, int32 ``[P, K]``, if it is known already, else ``None``.

    Attributes:
        replacement: Whether different batches may share instances. A single batch never repeats one.
        finds_nearest: Whether a call leaves each instance's nearest neighbours in the whole pool in ``neighbors``.
            ``mask_nearest`` and ``own_rule`` of the callback need such a composer.
        neighbors: The last call's neighbours, int32 ``[P, K]``, each row nearest first; ``None`` if there are none.
        seconds: Seconds that the last call spent in each step, by the step's name. The callback logs them. If there are
            none, the callback logs the time of the whole call as ``"compose"``.

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
        """Whether a call leaves each instance's nearest neighbours in the whole pool in ``neighbors``."""
        return False

    def check_batch_size(self, batch_size: int) -> None:  # noqa: B027, most composers accept any batch size
        """Refuse a batch size that this composer cannot serve. Called before training starts.

        Args:
            batch_size: Instances in a batch; under several processes, in a global batch.
        """

    def prepare(self, pool_size: int, example: Tensor) -> None:  # noqa: B027, most composers need no preparation
        """Start what takes long before the first pool, such as compilation, and do not wait for it.

        Called in processes that compose or share a graph, before the first of the uniform epochs at the start of
        training.

        Args:
            pool_size: The most instances that a pool may have, divided by the number of processes that share its graph.
            example: Embeddings of a few instances, ``[b, d]`` or ``[b, 2, d]``, on the device of a pool's embeddings.
        """

    @abstractmethod
    def __call__(self, embeddings: Tensor, batch_size: int, *, seed: int, epoch: int) -> Batches:
        """Compose a pool's batches.

        Args:
            embeddings: Floats of shape ``[P, d]``, or ``[P, 2, d]`` for two sides. ``P`` is a multiple of
                ``batch_size``.
            batch_size: Instances in a batch; under several processes, in a global batch.
            seed: The same seed must give the same batches.
            epoch: The epoch's number.

        Returns:
            int64 of shape ``[P // batch_size, batch_size]``, positions in the pool.
        """


class FunctionComposer(Composer):
    """Wraps a plain function as a composer.

    Args:
        function: ``(embeddings, batch_size, *, seed, epoch)`` -> positions in the pool. It may ask for more, as
            :class:`Composer` says.
    """

    def __init__(self, function: ComposeFunction) -> None:
        self.function = function

    def __call__(self, embeddings: Tensor, batch_size: int, *, seed: int, epoch: int, **more: Any) -> Batches:
        return self.function(embeddings, batch_size, seed=seed, epoch=epoch, **more)

    def __repr__(self) -> str:
        return getattr(self.function, "__qualname__", type(self.function).__qualname__)


def as_composer(composer: Composer | ComposeFunction) -> Composer:
    """Return a composer unchanged, and wrap a plain function as a composer with the defaults of :class:`Composer`.

    Args:
        composer: A composer or a plain function.

    Returns:
        A composer.

    Raises:
        TypeError: If ``composer`` is not callable, is a class or a graph, or takes other arguments.
    """
    check_instance_callable("composer", composer, "RWRComposer()")
    if isinstance(composer, SharedGraph):
        raise TypeError(f"composer must be a composer, got the graph {composer!r}. Give RWRComposer(graph).")
    made = composer if isinstance(composer, Composer) else FunctionComposer(composer)
    asked = dict.fromkeys(asked_for(made))
    check_signature("composer", composer, "(embeddings, batch_size, *, seed, epoch)", None, 2, seed=0, epoch=0, **asked)
    return made


def asked_for(composer: Composer) -> set[str]:
    """Return what a composer asks for beside embeddings.

    Args:
        composer: A composer.

    Returns:
        A subset of ``{"indices", "labels", "likely_false_negatives", "neighbors"}``.
    """
    called: Any = composer.function if isinstance(composer, FunctionComposer) else composer
    bound = called.keywords.keys() if isinstance(called, functools.partial) else ()
    offered = {"indices", "labels", "likely_false_negatives", "neighbors"}
    return (offered & inspect.signature(called).parameters.keys()) - set(bound)


def call_composer(
    composer: Composer, embeddings: Tensor, batch_size: int, *, seed: int, epoch: int, **offered: Any
) -> Batches:
    """Call a composer with what it asks for, and check its batches.

    Random states and numbers of threads that the composer changes are restored.

    Args:
        composer: A composer.
        embeddings: The pool's, as in :meth:`Composer.__call__`.
        batch_size: Instances in a batch.
        seed: The pool's seed.
        epoch: The epoch's number.
        **offered: What composers may ask for. What is missing here is ``None``.

    Returns:
        Positions in the pool, int64 ``[P // batch_size, batch_size]``.

    Raises:
        TypeError: If the composer does not return integers.
        ValueError: If it does not return batches of the pool.
    """
    more = {name: offered.get(name) for name in asked_for(composer)}
    with isolated():
        batches = composer(embeddings, batch_size, seed=seed, epoch=epoch, **more)
    return check_batches(batches, len(embeddings), batch_size, replacement=composer.replacement)


class GraphComposer(Composer):
    """Base class of composers that build a neighbour graph. :meth:`__call__` must leave the graph in ``neighbors``.

    Args:
        graph: Builds the graph; ``None`` is ``NNDescentGraph(n_neighbors=15)``.

    Raises:
        TypeError: If ``graph`` is not callable, or takes other arguments.
    """

    def __init__(self, graph: Graph | None = None) -> None:
        if graph is not None:
            check_instance_callable("graph", graph, "ExactGraph(n_neighbors=15)")
            check_signature("graph", graph, "(embeddings, *, seed=0)", None, seed=0)
        self.graph = NNDescentGraph() if graph is None else graph

    @property
    def finds_nearest(self) -> bool:
        return not isinstance(self.graph, RandomCandidateGraph)

    def prepare(self, pool_size: int, example: Tensor) -> None:
        """Start to compile what :class:`~bs_lightning.NNDescentGraph` needs in pools of this size.

        Args:
            pool_size: The most instances that a pool may have.
            example: Embeddings of a few instances, ``[b, d]`` or ``[b, 2, d]``, on the device of a pool's embeddings.
        """
        if isinstance(self.graph, NNDescentGraph):
            self.graph.prepare(pool_size, example)


class RWRComposer(GraphComposer):
    """Composes batches by random walks with restart on a neighbour graph, as BatchSampler does.

    Args:
        graph: Builds the graph; ``None`` is ``NNDescentGraph(n_neighbors=15)``.
        restart_probability: Chance per step to jump back to the walk's start (the paper's alpha), in ``(0, 1]``, or a
            function of the epoch that returns it. With a higher chance, walks stay closer to their start: batches are
            harder and have more false negatives.
        replacement: ``True`` lets a batch take instances that earlier batches took, as in the paper. About 40% of the
            data then goes unseen in an epoch.
        n_roots: Number of walks that make a batch; the paper uses 1. With more walks, an instance meets a few hard
            negatives among many easy ones.

    Attributes:
        neighbors: The last call's graph, int32 ``[P, K]``; ``None`` before the first call.
        seconds: Seconds that the last call spent in ``"graph"`` and ``"walk"``.

    Raises:
        TypeError: If ``graph`` is not callable or takes other arguments, or an argument has a wrong type.
        ValueError: If ``restart_probability`` is a number outside ``(0, 1]``, or ``n_roots`` is below 1.

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
        super().__init__(graph)
        if not callable(restart_probability):
            check_restart_probability(restart_probability)
        self.restart_probability = restart_probability
        self.replacement = replacement
        self.n_roots = check_integer("n_roots", n_roots, 1, "The paper walks from one root per batch.")

    def check_batch_size(self, batch_size: int) -> None:
        """Refuse batches that have fewer instances than ``n_roots``.

        Args:
            batch_size: Instances in a batch; under several processes, in a global batch.

        Raises:
            ValueError: Naming both numbers.
        """
        if self.n_roots > batch_size:
            raise ValueError(f"n_roots must be at most the {batch_size} instances of a batch, got {self.n_roots}.")

    def __repr__(self) -> str:
        return f"RWRComposer({self.graph!r})"

    def __call__(
        self,
        embeddings: Embeddings,
        batch_size: int,
        *,
        seed: int,
        epoch: int,
        likely_false_negatives: Callable[[Neighbors], NDArray[np.bool_]] | None = None,
        neighbors: Neighbors | None = None,
    ) -> Batches:
        """Compose a pool's batches.

        Args:
            embeddings: Floats of shape ``[P, d]``, or ``[P, 2, d]`` for two sides. ``P`` is a multiple of
                ``batch_size``.
            batch_size: Instances in a batch; under several processes, in a global batch.
            seed: The same seed gives the same batches.
            epoch: The epoch's number, passed to ``restart_probability`` if that is a function.
            likely_false_negatives: Marks the graph's edges that walks must not take, int32 ``[P, K]`` -> bool
                ``[P, K]``.
            neighbors: The graph, int32 ``[P, K]``, if it is known already. No graph is built then.

        Returns:
            int64 of shape ``[P // batch_size, batch_size]``, positions in the pool.

        Raises:
            ValueError: If the embeddings are not of shape ``[P, d]`` or not finite, or if the graph does not return one
                row of neighbours for each embedding.
        """
        alpha = self.restart_probability
        self.neighbors = None  # two graphs of a whole dataset may not fit into memory
        start = time.perf_counter()
        if neighbors is None:
            neighbors = self.graph(embeddings, seed=seed)
        built = time.perf_counter()
        self.neighbors = neighbors = check_graph(neighbors, len(embeddings))
        if likely_false_negatives is not None:
            neighbors = without_edges(neighbors, likely_false_negatives(neighbors))
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
