"""Graphs: embeddings -> each instance's nearest neighbours.

A graph is any callable ``(embeddings, *, seed=0) -> int32 [P, K]``. Row ``i`` holds neighbours of instance ``i``, and
never ``i`` itself or a placeholder.

Embeddings have one side, ``[P, d]``, or two sides, ``[P, 2, d]``: query and document, image and text, or two views. Two
sides are compared as losses compare them: the similarity of instances ``i`` and ``j`` is the mean of the cosines of
``first_i`` with ``second_j`` and of ``second_i`` with ``first_j``.

Several processes that hold the same embeddings may share a graph's work: each calls ``part``, and then ``join`` makes
the graph from all parts. With one part, the result is the graph itself.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeGuard

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bs_lightning._cells import MOST_CELLS, cell
from bs_lightning._checks import check_integer, check_seed
from bs_lightning._embeddings import (
    BELOW_ANY_COSINE,
    as_embeddings,
    similar_to_nothing,
    similarity_blocks,
    similarity_factors,
    unit_rows,
    unit_rows_,
)
from bs_lightning._nndescent import compile_ahead, descend
from bs_lightning._types import Embeddings, Neighbors

# Instances up to which a matrix product is as fast as pynndescent, by `benchmarks/overhead graphs`.
_SMALL_POOL = 4096
# The same for embeddings on a GPU. On an H200 beside 16 cores the product is still 2.5 times as fast at 262,144. Other
# GPUs are slower.
_SMALL_POOL_ON_GPU = 131_072
_COLUMN_GROUP = 128  # columns of similarities that are looked at together on a GPU, by `benchmarks/overhead graphs`
_CHUNK_ENTRIES = 2**22  # similarities that `RandomCandidateGraph` holds at a time
# Runs of distances in `RandomCandidateGraph`. With more runs, two steps of a walk reach more instances, and a graph
# takes longer. `benchmarks/composers` measures both.
_N_RUNS = 64
_RUN_BLOCK = 32  # rows of one product in `RandomCandidateGraph`


class Graph(Protocol):
    """Finds neighbours: embeddings ``[P, d]`` -> neighbours int32 ``[P, K]``."""

    # `Any`, because some graphs take arrays too, some only tensors, and jsonargparse compares annotations literally.
    def __call__(self, embeddings: Any, *, seed: int = 0) -> Neighbors:
        """Find each instance's neighbours.

        Args:
            embeddings: Floats of shape ``[P, d]``, or ``[P, 2, d]`` for two sides.
            seed: The same seed must give the same neighbours.

        Returns:
            int32 of shape ``[P, K]``: positions in the pool. A row's own position means that it has no neighbour there.
        """
        ...


class SharedGraph(ABC):
    """Base class of graphs whose work several processes may share."""

    @torch.no_grad()
    def __call__(self, embeddings: Embeddings, *, seed: int = 0) -> Neighbors:
        """Build the graph.

        Args:
            embeddings: A tensor on any device or a NumPy array, floats of shape ``[P, d]`` or
                ``[P, 2, d]`` with ``P >= 2``.
            seed: Seed of what is random in the graph.

        Returns:
            int32 of shape ``[P, min(n_neighbors, P - 1)]``, each row nearest first.

        Raises:
            TypeError: If the embeddings are not a dense tensor or an array of floats, or ``seed`` is not an integer.
            ValueError: If the embeddings are not of shape ``[P, d]`` or ``[P, 2, d]`` with ``P >= 2`` and ``d >= 1``,
                or not finite, or ``seed`` is negative.
        """
        seed = check_seed(seed)
        embeddings = as_embeddings(embeddings)
        return self.join([self.part(embeddings, 0, 1, seed=seed)], embeddings, seed=seed)

    @abstractmethod
    def part(self, embeddings: Tensor, part: int, n_parts: int, *, seed: int = 0) -> Neighbors:
        """Find the neighbours of a part of the instances.

        Args:
            embeddings: All embeddings, finite floats ``[P, d]`` or ``[P, 2, d]``, the same in every process.
            part: The part's number, from 0.
            n_parts: Number of parts.
            seed: Seed of the graph.

        Returns:
            int32 with a row for each instance of the part, for :meth:`join`: ``[part of P, K]``, or as the graph says.
        """

    @abstractmethod
    def join(self, parts: Sequence[Neighbors], embeddings: Tensor, *, seed: int = 0) -> Neighbors:
        """Make the graph from all its parts.

        Args:
            parts: What :meth:`part` returned for each part, in order.
            embeddings: All embeddings, ``[P, d]`` or ``[P, 2, d]``.
            seed: Seed of the graph.

        Returns:
            int32 of shape ``[P, K]``, each row nearest first.
        """


@dataclass(frozen=True)
class NNDescentGraph(SharedGraph):
    """Find approximate nearest neighbours, with nearest neighbour descent in large pools.

    In pools of up to 4,096 instances a matrix product is as fast, and for embeddings on a GPU up to 131,072. There the
    graph equals :class:`ExactGraph`. In larger pools pynndescent finds the neighbours, on the CPU. On the first call on
    a machine, its kernels are compiled, which takes one to two minutes. numba keeps them on disk, as it keeps other
    functions of pynndescent. One line in the log says when. :class:`~bs_lightning.BatchSamplerCallback` has them
    compiled in a process of its own while uniform epochs train.

    pynndescent runs on numba's threads, which numba starts once per process. The first graph starts them on the layer
    that numba calls ``forksafe``, so that the process can fork data-loading workers afterwards. Unless ``tbb`` is
    installed, this layer aborts a process in which two threads run parallel numba code at the same time. Graphs in
    different threads wait for each other. If your own threads run such code, choose a different layer with the
    environment variable ``NUMBA_THREADING_LAYER``: the graph keeps to your choice.

    The same seed gives the same graph if the numbers of threads and processes are the same. Several processes share the
    work. A matrix product then is as fast in pools as many times larger. In still larger pools, up to four processes
    search a cell of like instances each. Cells overlap, but some neighbours beyond a cell's edge are missed.

    With two sides, pynndescent finds fewer of the nearest where the sides are not aligned, as in models that are not
    trained yet. :class:`ExactGraph` finds all of them.

    Args:
        n_neighbors: Neighbours to keep per instance (the paper's K). A pool of ``P`` instances gives at most ``P - 1``.

    Raises:
        TypeError: If ``n_neighbors`` is not an integer.
        ValueError: If ``n_neighbors`` is below 1.

    Example:
        >>> import torch
        >>> from bs_lightning import NNDescentGraph
        >>> neighbors = NNDescentGraph(n_neighbors=5)(torch.randn(100, 16))  # doctest: +SKIP
        >>> neighbors.shape  # doctest: +SKIP
        (100, 5)

    Source: Dong et al., "Efficient k-nearest neighbor graph construction for generic similarity measures", WWW 2011,
    as implemented by pynndescent.
    """

    n_neighbors: int = 15

    def __post_init__(self) -> None:
        object.__setattr__(self, "n_neighbors", check_integer("n_neighbors", self.n_neighbors, 1))

    def prepare(self, pool_size: int, example: Tensor) -> None:
        """Start to compile what pools of this size need, in a process of its own. The first graph waits for its end.

        Args:
            pool_size: The most instances that a pool may have.
            example: Embeddings of a few instances, ``[b, d]`` or ``[b, 2, d]``, on the device of a pool's embeddings.
        """
        if pool_size > _small_pool(example):
            compile_ahead(n_sides=example.ndim - 1)

    def part(self, embeddings: Tensor, part: int, n_parts: int, *, seed: int = 0) -> Neighbors:
        """Find the neighbours of a part of the instances, as ``SharedGraph`` says.

        Returns:
            int32 ``[part of P, K]`` in pools that suit a matrix product. In larger ones, the number of its instance
            comes first in each row: ``[part of P, 1 + K]``. At most four parts have rows then.
        """
        if _suits_product(embeddings, n_parts):
            return ExactGraph(self.n_neighbors).part(embeddings, part, n_parts, seed=seed)
        n_found = self._n_found(embeddings)
        if n_parts == 1:
            return descend(unit_rows(embeddings.cpu()).numpy(), n_found, seed)
        nothing = np.empty((0, 1 + n_found), dtype=np.int32)
        n_cells = min(n_parts, MOST_CELLS)
        number, behind = divmod(part * n_cells, n_parts)
        if behind >= n_cells:  # the first process of each cell searches it, so that all machines have some
            return nothing
        unit = unit_rows(embeddings.cpu())
        rows, own = cell(unit, number, n_cells)
        if not len(rows):
            return nothing
        compile_ahead(n_sides=embeddings.ndim - 1)  # else each process of a machine would compile the kernels
        searched = unit[rows].numpy()
        del unit
        near = descend(searched, min(n_found, len(rows)), seed, n_shares=n_parts // n_cells)[own]
        found = np.full((len(near), 1 + n_found), -1, dtype=np.int32)
        found[:, 0] = rows[own]
        found[:, 1 : 1 + near.shape[1]] = np.where(near < 0, -1, rows[near])
        return found

    def join(self, parts: Sequence[Neighbors], embeddings: Tensor, *, seed: int = 0) -> Neighbors:
        """Make the graph from all its parts, as ``SharedGraph`` says."""
        if _suits_product(embeddings, len(parts)):
            return ExactGraph(self.n_neighbors).join(parts, embeddings, seed=seed)
        if len(parts) == 1:
            found = parts[0]
        else:
            found = np.full((len(embeddings), self._n_found(embeddings)), -1, dtype=np.int32)
            for numbered in parts:
                found[numbered[:, 0]] = numbered[:, 1:]
        k = min(self.n_neighbors, len(embeddings) - 1)
        return _real_neighbors(found, k, similar_to_nothing(embeddings).cpu().numpy(), seed)

    def _n_found(self, embeddings: Tensor) -> int:
        """Return how many neighbours pynndescent looks for, the instance itself included.

        With one side, each instance is its own nearest neighbour. With two sides it may not be, and more candidates
        find more of the nearest.
        """
        k = min(self.n_neighbors, len(embeddings) - 1)
        return min(k + 1 if embeddings.ndim == 2 else 2 * k + 1, len(embeddings))


@dataclass(frozen=True)
class ExactGraph(SharedGraph):
    """Find exact nearest neighbours by cosine similarity, with a matrix product per block of rows.

    The graph is computed on the device of the embeddings. It does not hold all ``P x P`` similarities, but 4 MB at a
    time, and on a GPU less than 600 MB. The work grows with ``P^2``. On a CPU it suits pools of up to some thousands,
    on a GPU far larger ones.

    Args:
        n_neighbors: Neighbours to keep per instance (the paper's K). A pool of ``P`` instances gives at most ``P - 1``.

    Raises:
        TypeError: If ``n_neighbors`` is not an integer.
        ValueError: If ``n_neighbors`` is below 1.

    Example:
        >>> import torch
        >>> from bs_lightning import ExactGraph
        >>> ExactGraph(n_neighbors=1)(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.1, 1.0]])).tolist()
        [[2], [2], [1]]

    Source: the paper's "kNN sampler" graph (arXiv 2306.03355, section 4.4).
    """

    n_neighbors: int = 15

    def __post_init__(self) -> None:
        object.__setattr__(self, "n_neighbors", check_integer("n_neighbors", self.n_neighbors, 1))

    @torch.no_grad()
    def part(self, embeddings: Tensor, part: int, n_parts: int, *, seed: int = 0) -> Neighbors:
        """Find the neighbours of a part of the instances, as ``SharedGraph`` says."""
        unit = unit_rows(embeddings)
        rows = _rows_of_part(len(unit), part, n_parts)
        isolated = similar_to_nothing(unit)
        some_isolated = bool(isolated.any())
        k = min(self.n_neighbors, len(unit) - 1)
        found = torch.empty((len(rows), k), dtype=torch.int32, device=unit.device)
        for start, similarity in similarity_blocks(unit, rows):
            if some_isolated:
                similarity.masked_fill_(isolated, BELOW_ANY_COSINE)
            similarity.diagonal(start).fill_(-torch.inf)  # no instance is its own neighbour
            first = start - rows.start
            found[first : first + len(similarity)] = _most_similar(similarity, k)
        return found.cpu().numpy()

    def join(self, parts: Sequence[Neighbors], embeddings: Tensor, *, seed: int = 0) -> Neighbors:
        """Make the graph from all its parts, as ``SharedGraph`` says."""
        return _without_isolated(np.concatenate(parts), embeddings, seed)


@dataclass(frozen=True)
class RandomCandidateGraph(SharedGraph):
    """Build the paper's graph: each instance's nearest neighbours among random candidates, by cosine similarity.

    Fewer candidates make batches less hard and lower their false-negative rate. This graph is meant for whole
    datasets. A pool is itself a random choice of candidates: in a pool, use :class:`NNDescentGraph` or
    :class:`ExactGraph`.

    All instances stand on a circle in random order. Each instance's candidates are the instances at ``n_candidates``
    random distances ahead of it. The distances are the same for all instances. So each instance draws exactly
    ``n_candidates`` distinct others, and is drawn exactly as often.

    The distances form a few runs of consecutive numbers. So all similarities are products of slices of one matrix, and
    no embedding is copied for each instance that draws it. In exchange, the draws of neighbouring instances are not
    quite independent: two steps of a walk reach slightly fewer instances of a large dataset. The graph is computed on
    the device of the embeddings, in ``O(P (d + n_neighbors))`` memory.

    Args:
        n_candidates: Random candidates per instance (the paper's M). With ``P - 1`` or more, the result equals
            :class:`ExactGraph`.
        n_neighbors: Neighbours to keep per instance (the paper's K), at most ``n_candidates``. A pool of ``P``
            instances gives at most ``P - 1``.

    Raises:
        TypeError: If an argument is not an integer.
        ValueError: If ``n_neighbors`` is below 1 or above ``n_candidates``.

    Example:
        >>> import torch
        >>> from bs_lightning import RandomCandidateGraph
        >>> RandomCandidateGraph(n_candidates=20, n_neighbors=5)(torch.randn(100, 16)).shape
        (100, 5)

    Source: arXiv 2306.03355, section 3.2 ("proximity graph construction").
    """

    n_candidates: int = 1000
    n_neighbors: int = 100

    def __post_init__(self) -> None:
        object.__setattr__(self, "n_neighbors", check_integer("n_neighbors", self.n_neighbors, 1))
        object.__setattr__(self, "n_candidates", check_integer("n_candidates", self.n_candidates))
        if self.n_candidates < self.n_neighbors:
            raise ValueError(
                f"n_candidates must be at least n_neighbors, {self.n_neighbors}, got {self.n_candidates}. "
                "The paper draws ten times as many."
            )

    @torch.no_grad()
    def part(self, embeddings: Tensor, part: int, n_parts: int, *, seed: int = 0) -> Neighbors:
        """Find the neighbours of a part of the instances, as ``SharedGraph`` says, in the circle's order."""
        size = len(embeddings)
        if self.n_candidates >= size - 1:
            return ExactGraph(self.n_neighbors).part(embeddings, part, n_parts, seed=seed)
        rng = np.random.default_rng(seed)
        device = embeddings.device
        order = torch.from_numpy(rng.permutation(size)).to(device)
        runs = _random_runs(size, self.n_candidates, rng)
        ahead = torch.cat([torch.arange(start, stop, device=device) for start, stop in runs])

        own = _rows_of_part(size, part, n_parts)
        chunk = max(_RUN_BLOCK, _CHUNK_ENTRIES // self.n_candidates // _RUN_BLOCK * _RUN_BLOCK)
        chunk = min(chunk, max(1, -(-len(own) // _RUN_BLOCK)) * _RUN_BLOCK)
        longest = chunk + max(stop - start for start, stop in runs)
        # The circle repeats its beginning after its end, so that each slice is in one piece.
        circle = unit_rows_(embeddings[order[torch.arange(size + longest, device=device) % size]].float())
        isolated = similar_to_nothing(circle[:size])
        some_isolated = bool(isolated.any())
        left, right = similarity_factors(circle)
        found = torch.empty((len(own), self.n_neighbors), dtype=torch.int32, device=device)
        similarity = torch.empty((chunk, self.n_candidates), device=device)
        for first in range(own.start, own.stop, chunk):
            column = 0
            for start, stop in runs:
                band = _banded_product(left, right, first, (first + start) % size, chunk, stop - start)
                similarity[:, column : column + stop - start] = band.flatten(0, 1)
                column += stop - start
            rows = torch.arange(first, min(first + chunk, own.stop), device=device)
            if some_isolated:
                candidates = (rows[:, None] + ahead) % size
                similarity[: len(rows)].masked_fill_(isolated[candidates], BELOW_ANY_COSINE)
            nearest = ahead[similarity[: len(rows)].topk(self.n_neighbors, dim=1).indices]
            found[rows - own.start] = order[(rows[:, None] + nearest) % size].int()
        return found.cpu().numpy()

    def join(self, parts: Sequence[Neighbors], embeddings: Tensor, *, seed: int = 0) -> Neighbors:
        """Make the graph from all its parts, as ``SharedGraph`` says."""
        size = len(embeddings)
        if self.n_candidates >= size - 1:
            return ExactGraph(self.n_neighbors).join(parts, embeddings, seed=seed)
        neighbors = np.empty((size, self.n_neighbors), dtype=np.int32)
        neighbors[np.random.default_rng(seed).permutation(size)] = np.concatenate(parts)
        return _without_isolated(neighbors, embeddings, seed)


def can_share(graph: object) -> TypeGuard[SharedGraph]:
    """Return whether several processes may build a graph in parts. They may not if its class overrides ``__call__``.

    Args:
        graph: Any graph.
    """
    return isinstance(graph, SharedGraph) and type(graph).__call__ is SharedGraph.__call__


def _rows_of_part(size: int, part: int, n_parts: int) -> range:
    """Return the rows of one of ``n_parts`` parts of about equal size."""
    return range(size * part // n_parts, size * (part + 1) // n_parts)


def _suits_product(embeddings: Tensor, n_parts: int) -> bool:
    """Return whether a matrix product, shared by as many processes, is as fast as pynndescent."""
    return len(embeddings) <= _small_pool(embeddings) * n_parts


def _small_pool(embeddings: Tensor) -> int:
    """Return the most instances for which a matrix product is as fast as pynndescent."""
    return _SMALL_POOL_ON_GPU if embeddings.is_cuda else _SMALL_POOL


def _most_similar(similarity: Tensor, k: int) -> Tensor:
    """Return the columns of each row's ``k`` largest entries, largest first, int32 ``[rows, k]``."""
    n_columns = similarity.shape[1]
    if similarity.is_cuda and n_columns >= 4 * k * _COLUMN_GROUP:
        return _most_similar_of_groups(similarity, k)
    # From 64 k columns on, `topk` on a CPU has a faster method, which pays for some more columns.
    if similarity.device.type == "cpu" and 32 * k <= n_columns < 64 * k <= 1024:
        similarity = torch.nn.functional.pad(similarity, (0, 64 * k - n_columns), value=-torch.inf)
    return similarity.topk(k, dim=1).indices.int()


def _most_similar_of_groups(similarity: Tensor, k: int) -> Tensor:
    """Return what :func:`_most_similar` returns, and read large rows once, where `topk` on a GPU reads them many times.

    The ``k`` largest entries of a row lie in the ``k`` groups of columns whose largest entries are largest.
    """
    n_columns = similarity.shape[1]
    n_grouped = n_columns // _COLUMN_GROUP * _COLUMN_GROUP
    groups = similarity[:, :n_grouped].unflatten(1, (-1, _COLUMN_GROUP))
    chosen = groups.amax(dim=2).topk(k, dim=1).indices
    columns = (chosen[:, :, None] * _COLUMN_GROUP + torch.arange(_COLUMN_GROUP, device=chosen.device)).flatten(1)
    rest = torch.arange(n_grouped, n_columns, device=chosen.device).expand(len(columns), -1)
    columns = torch.cat([columns, rest], dim=1)
    largest = similarity.gather(1, columns).topk(k, dim=1).indices
    return columns.gather(1, largest).int()


def _random_runs(size: int, n_candidates: int, rng: np.random.Generator) -> list[tuple[int, int]]:
    """Draw disjoint runs ``[start, stop)`` of distances in ``[1, size)``, ``n_candidates`` distances in all."""
    n_runs = min(_N_RUNS, n_candidates)
    lengths = np.full(n_runs, n_candidates // n_runs)
    lengths[: n_candidates % n_runs] += 1
    skipped = np.sort(rng.integers(0, size - n_candidates, size=n_runs))  # distances left out before each run
    stops = 1 + skipped + np.cumsum(lengths)
    return [(int(stop - length), int(stop)) for stop, length in zip(stops, lengths, strict=True)]


def _banded_product(left: Tensor, right: Tensor, rows: int, columns: int, n_rows: int, width: int) -> Tensor:
    """Multiply row ``rows + i`` of ``left`` with rows ``columns + i`` to ``columns + i + width - 1`` of ``right``.

    Returns:
        A view of shape ``[n_rows / b, b, width]``, where ``b`` is the number of rows of a block; ``i`` counts rows.
    """
    b, d = _RUN_BLOCK, left.shape[1]
    blocks = left[rows : rows + n_rows].view(-1, b, d)
    others = right.as_strided((len(blocks), b + width, d), (b * d, d, 1), columns * d)
    with torch.autocast(left.device.type, enabled=False):
        product = torch.bmm(blocks, others.transpose(1, 2))
    # Row i of a block begins i columns further right: its stride is one row and one column.
    return product.as_strided((len(blocks), b, width), (b * (b + width), b + width + 1, 1))


def _without_isolated(neighbors: Neighbors, embeddings: Tensor, seed: int) -> Neighbors:
    """Replace edges from and to all-zero rows, if there are any. All other edges are real."""
    isolated = similar_to_nothing(embeddings).cpu().numpy()
    return _real_neighbors(neighbors, neighbors.shape[1], isolated, seed) if isolated.any() else neighbors


def _real_neighbors(found: Neighbors, k: int, isolated: NDArray[np.bool_], seed: int) -> Neighbors:
    """Keep each row's first ``k`` real neighbours, and fill the row up with random other instances.

    An entry is not real if it is -1, the instance itself, or an all-zero (``isolated``) instance. No entry of an
    isolated row is real.
    """
    own = np.arange(len(found), dtype=np.int32)[:, None]
    real = (found >= 0) & (found != own) & ~isolated[found] & ~isolated[:, None]
    if real[:, :k].all():
        return np.ascontiguousarray(found[:, :k], dtype=np.int32)
    nearest_first = np.argsort(~real, axis=1, kind="stable")[:, :k]
    neighbors = np.take_along_axis(found, nearest_first, axis=1)
    lacking = ~np.take_along_axis(real, nearest_first, axis=1)
    if lacking.any():
        others = np.random.default_rng(seed).integers(0, len(found) - 1, size=neighbors.shape, dtype=np.int32)
        others += others >= own
        neighbors = np.where(lacking, others, neighbors)
    return np.ascontiguousarray(neighbors, dtype=np.int32)
