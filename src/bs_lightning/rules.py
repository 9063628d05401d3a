"""Rules: which pairs of instances are likely false negatives.

A rule serves twice. A graph keeps an edge only if no rule marks its two ends. A loss leaves out the pairs of a batch
that a rule marks. Pairs have a direction: the pair ``(i, j)`` compares the first side of the anchor ``i`` with the
second side of ``j``.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import reduce
from itertools import product
from operator import or_
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from bs_lightning._checks import check_instance_callable, check_integer_array, check_number, check_positive, kind_of
from bs_lightning._embeddings import TIE, are_floats, first_not_finite, have_sides, read_rows, to_device, unit_rows_
from bs_lightning._types import Embeddings, Indices, Neighbors

_CHUNK_ENTRIES = 2**24  # numbers that a rule reads at a time


class Rule(Protocol):
    """Marks pairs of instances that are likely false negatives."""

    def in_batch(self, batch: Indices, device: torch.device | None = None) -> Tensor:
        """Mark the pairs of a batch.

        Args:
            batch: Dataset indices, int64 ``[B]``.
            device: Where the mask is computed; ``None`` is the CPU.

        Returns:
            bool of shape ``[B, B]``, row ``i`` for the anchor ``i``. The diagonal has no meaning.
        """
        ...

    def along(self, nodes: Indices, neighbors: Indices) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Mark the edges of a graph, in both directions.

        Args:
            nodes: Dataset indices, int64 ``[n]``.
            neighbors: Dataset indices of each node's neighbours, int64 ``[n, K]``.

        Returns:
            Two arrays, bool ``[n, K]``: the pairs (node, neighbour), and the pairs (neighbour, node).
        """
        ...


Limit = Callable[[Tensor], Tensor]
"""Unit rows ``[B, d]`` or ``[B, 2, d]`` -> the similarity above which a pair is marked, for each anchor: ``[B]``."""


@dataclass(frozen=True)
class AbovePositive:
    """Mark a pair whose similarity exceeds the anchor's similarity to its own positive. Needs two sides.

    The limit is ``factor * positive + margin``, in cosine similarity.

    Args:
        margin: Added to the positive's similarity. A negative margin marks more pairs.
        factor: Multiplies the positive's similarity. 0.95 marks pairs from 95% of the positive's similarity on.
        every_side: ``False`` compares the anchor's first side with second sides, as losses of two towers do. ``True``
            compares both sides of the anchor with both sides of the others, as NT-Xent does. It finds more false
            negatives, such as one query with two documents. Use it only if both sides are of one kind, such as two
            sentences: two images are always more alike than an image and its caption.

    Raises:
        TypeError: If an argument is not a number.
        ValueError: If ``margin`` lies outside ``[-2, 2]``, or ``factor`` is not above 0.

    Example:
        >>> import torch
        >>> from bs_lightning.rules import AbovePositive
        >>> AbovePositive(margin=0.1)(torch.tensor([[[1.0, 0.0], [0.6, 0.8]]]))
        tensor([0.7000])

    Source: ``every_side=True`` is GISTEmbed (arXiv 2402.16829, section 3). ``margin=0.1`` is Qwen3-Embedding (arXiv
    2506.05176). ``factor=0.95`` is NV-Retriever's "TopK-PercPos" (arXiv 2407.15831).
    """

    margin: float = 0.0
    factor: float = 1.0
    every_side: bool = False

    def __post_init__(self) -> None:
        if not -2 <= check_number("margin", self.margin) <= 2:
            raise ValueError(f"margin must lie in [-2, 2], as cosine similarities do, got {self.margin}. Try 0.0.")
        check_positive("factor", self.factor, "Try 1.0 or 0.95.")

    def __call__(self, unit: Tensor) -> Tensor:
        """Return each anchor's limit.

        Args:
            unit: Rows of length 1, float32 ``[B, 2, d]``.

        Returns:
            float32 of shape ``[B]``.
        """
        return self.factor * (unit[:, 0] * unit[:, 1]).sum(dim=1) + self.margin


@dataclass(frozen=True)
class AboveSimilarity:
    """Mark a pair whose cosine similarity exceeds a threshold.

    Args:
        threshold: The similarity, in ``[-1, 1]``.

    Raises:
        TypeError: If ``threshold`` is not a number.
        ValueError: If it lies outside ``[-1, 1]``.

    Example:
        >>> import torch
        >>> from bs_lightning.rules import AboveSimilarity
        >>> AboveSimilarity(0.9)(torch.eye(2))
        tensor([0.9000, 0.9000])
    """

    threshold: float

    def __post_init__(self) -> None:
        if not -1 <= check_number("threshold", self.threshold) <= 1:
            raise ValueError(f"threshold must lie in [-1, 1], as cosine similarities do, got {self.threshold}.")

    def __call__(self, unit: Tensor) -> Tensor:
        """Return each anchor's limit, the same for all.

        Args:
            unit: Rows of length 1, float32 ``[B, d]`` or ``[B, 2, d]``.

        Returns:
            float32 of shape ``[B]``.
        """
        return unit.new_full((len(unit),), self.threshold)


class SameGroup:
    """Marks the pairs of a group: one product, caption, sentence or document.

    Args:
        groups: Each instance's group, integers ``[N]``. Instances of equal numbers are a group. An instance may have
            several groups, ``[N, G]``, such as its query and its document. Two instances are marked if they have a
            number in common, in any columns.

    Raises:
        TypeError: If ``groups`` does not hold integers.
        ValueError: If it does not have shape ``[N]`` or ``[N, G]``.

    Example:
        >>> import numpy as np
        >>> from bs_lightning.rules import SameGroup
        >>> SameGroup([7, 7, 8]).in_batch(np.array([0, 2, 1])).int().tolist()
        [[1, 0, 1], [0, 1, 0], [1, 0, 1]]
        >>> SameGroup([[0, 5], [0, 6], [1, 6]]).in_batch(np.array([0, 1, 2])).int().tolist()
        [[1, 1, 0], [1, 1, 1], [0, 1, 1]]
    """

    def __init__(self, groups: ArrayLike) -> None:
        self.groups = check_groups(groups)
        self._sets = self.groups[:, None] if self.groups.ndim == 1 else self.groups

    def in_batch(self, batch: Indices, device: torch.device | None = None) -> Tensor:
        """Mark the pairs of a batch that are of one group, bool ``[B, B]``; see :class:`Rule`."""
        own = to_device(torch.from_numpy(self._sets[batch]), device)
        return self._meet(own[:, None], own)

    def along(self, nodes: Indices, neighbors: Indices) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Mark the edges within a group, bool ``[n, K]`` in both directions; see :class:`Rule`."""
        own, near = (torch.from_numpy(self._sets[some]) for some in (nodes, neighbors))
        same = self._meet(own[:, None], near).numpy()
        return same, same

    def _meet(self, first: Tensor, second: Tensor) -> Tensor:
        """Return where two sets of groups have a number in common: integers ``[..., G]`` each -> bool ``[...]``."""
        columns = range(self._sets.shape[1])
        return reduce(or_, (first[..., one] == second[..., other] for one, other in product(columns, columns)))


class MoreSimilar:
    """Marks the pairs whose similarity in given embeddings exceeds a limit. A tie is not marked.

    So where the dataset holds a document twice, its two copies are not marked by this rule alone. Give them a group.

    Args:
        embeddings: Finite floats of shape ``[N, d]``, or ``[N, 2, d]`` for two sides; rows of any length. A
            :class:`numpy.memmap` is read a few rows at a time. They are not searched for NaN, which marks no pair.
        limit: Says how similar is too similar. ``None`` is :class:`AbovePositive`, which needs two sides.

    Raises:
        TypeError: If the embeddings are not floats, or ``limit`` is not callable.
        ValueError: If the embeddings have a different shape, or ``limit`` needs two sides and there is one.

    Example:
        >>> import numpy as np
        >>> from bs_lightning.rules import AboveSimilarity, MoreSimilar
        >>> rule = MoreSimilar(np.array([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]]), AboveSimilarity(0.5))
        >>> rule.in_batch(np.array([0, 1, 2])).int().tolist()
        [[1, 1, 0], [1, 1, 0], [0, 0, 1]]

    Source: GISTEmbed, arXiv 2402.16829, where a second model guides the choice of negatives.
    """

    def __init__(self, embeddings: Embeddings, limit: Limit | None = None) -> None:
        if not are_floats(embeddings):
            raise TypeError(f"embeddings must be a dense tensor or a NumPy array of floats, got {kind_of(embeddings)}.")
        if not have_sides(embeddings):
            raise ValueError(f"embeddings must have shape [N, d] or [N, 2, d], got {list(embeddings.shape)}.")
        self.embeddings = embeddings
        self.limit = AbovePositive() if limit is None else limit
        check_instance_callable("limit", self.limit, "AboveSimilarity(0.9)")
        needs_two_sides = isinstance(self.limit, AbovePositive)
        if needs_two_sides and embeddings.ndim != 3:
            raise ValueError(
                f"{self.limit} needs embeddings with two sides, [N, 2, d], got {list(embeddings.shape)}: one side has "
                "no positive to compare with. Give both sides. For one side there are AboveSimilarity(threshold), with "
                "reference embeddings, and mask_nearest=5."
            )
        self._every_side = isinstance(self.limit, AbovePositive) and self.limit.every_side

    def in_batch(self, batch: Indices, device: torch.device | None = None) -> Tensor:
        """Mark the pairs of a batch that are more similar than the limit, bool ``[B, B]``; see :class:`Rule`."""
        unit = to_device(self._unit(batch), device or torch.device("cpu"))
        with torch.autocast(unit.device.type, enabled=False):  # bfloat16 would round most differences away
            limit = self.limit(unit)[:, None] + TIE
            if unit.ndim == 2:
                return unit @ unit.T > limit
            if self._every_side:
                sides = unit.flatten(0, 1)
                highest = (sides @ sides.T).view(len(unit), 2, len(unit), 2).amax(dim=(1, 3))
                return highest > limit
            return unit[:, 0] @ unit[:, 1].T > limit

    def along(self, nodes: Indices, neighbors: Indices) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Mark the edges whose ends are more similar than the limit, bool ``[n, K]`` each; see :class:`Rule`."""
        n_numbers = neighbors.shape[1] * int(np.prod(self.embeddings.shape[1:]))  # of one node's neighbours
        forward, backward = np.zeros(neighbors.shape, dtype=np.bool_), np.zeros(neighbors.shape, dtype=np.bool_)
        for start in range(0, len(nodes), n := max(1, _CHUNK_ENTRIES // n_numbers)):
            rows = slice(start, start + n)
            # Each row is read and scaled once, however many edges it has.
            read, positions = np.unique(
                np.concatenate([nodes[rows, None], neighbors[rows]], axis=1), return_inverse=True
            )
            unit = self._unit(read)
            limits = self.limit(unit) + TIE
            at = to_device(torch.from_numpy(positions.reshape(-1, neighbors.shape[1] + 1)), unit.device)
            node, near = unit[at[:, :1]], unit[at[:, 1:]]
            if unit.ndim == 2:
                out = back = (node * near).sum(dim=-1)
            elif self._every_side:
                with torch.autocast(unit.device.type, enabled=False):
                    out = back = (node @ near.mT).amax(dim=(-2, -1))
            else:
                out = (node[:, :, 0] * near[:, :, 1]).sum(dim=-1)
                back = (near[:, :, 0] * node[:, :, 1]).sum(dim=-1)
            forward[rows] = (out > limits[at[:, :1]]).cpu().numpy()
            backward[rows] = (back > limits[at[:, 1:]]).cpu().numpy()
        return forward, backward

    def _unit(self, indices: Indices) -> Tensor:
        """Return rows of length 1, float32."""
        return unit_rows_(read_rows(self.embeddings, indices))


def either_way(rules: Iterable[Rule], indices: Indices, neighbors: Neighbors) -> NDArray[np.bool_]:
    """Mark the edges of a graph whose ends a rule marks, in one direction or the other.

    Args:
        rules: The rules.
        indices: Dataset indices of the graph's nodes, int64 ``[P]``.
        neighbors: Positions in ``indices``, int32 ``[P, K]``.

    Returns:
        bool of shape ``[P, K]``.

    Example:
        >>> import numpy as np
        >>> from bs_lightning.rules import SameGroup, either_way
        >>> either_way([SameGroup([4, 5, 4])], np.array([0, 1, 2]), np.array([[1, 2], [0, 2], [0, 1]])).astype(int)
        array([[0, 1],
               [0, 0],
               [1, 0]])
    """
    marked = np.zeros(neighbors.shape, dtype=np.bool_)
    for rule in rules:
        forward, backward = rule.along(indices, indices[neighbors])
        marked |= forward | backward
    return marked


def check_groups(groups: ArrayLike) -> NDArray[np.int64]:
    """Return groups as an array.

    Args:
        groups: What should be integers of shape ``[N]`` or ``[N, G]``.

    Returns:
        int64 of shape ``[N]`` or ``[N, G]``.

    Raises:
        TypeError: If the groups are not integers.
        ValueError: If they have a different shape.
    """
    array = check_integer_array("groups", groups)
    if array.ndim not in (1, 2) or 0 in array.shape[1:]:
        raise ValueError(
            "groups must have shape [N], one integer for each instance, or [N, G] with G >= 1, got shape "
            f"{list(array.shape)}."
        )
    return array.astype(np.int64)


def check_reference(embeddings: Embeddings, n_instances: int) -> None:
    """Refuse reference embeddings that do not fit the dataset.

    Args:
        embeddings: What should be floats of shape ``[n_instances, d]`` or ``[n_instances, 2, d]``.
        n_instances: Length of the dataset.

    Raises:
        TypeError: If the embeddings are not a dense tensor or a NumPy array of floats.
        ValueError: If the shape is different, a file is shorter than its array, or a row is not finite. The message
            names the dataset index.
    """
    if isinstance(embeddings, np.memmap):
        file, needed = embeddings.filename, embeddings.offset + embeddings.nbytes
        if file is not None and Path(file).stat().st_size < needed:
            raise ValueError(
                f"reference_embeddings() returned a memmap of {needed} bytes, but {file} has only "
                f"{Path(file).stat().st_size}. The file was cut off: write it again."
            )
    if not are_floats(embeddings):
        raise TypeError(
            "reference_embeddings() must return a dense tensor or a NumPy array of floats, [N, d] or [N, 2, d], got "
            f"{kind_of(embeddings)}."
        )
    shape = tuple(embeddings.shape)
    if not have_sides(embeddings) or shape[0] != n_instances:
        raise ValueError(
            f"reference_embeddings() must have shape [N, d] or [N, 2, d] with N = {n_instances}, the length of "
            f"train_dataset(), got {list(shape)}."
        )
    for start in range(0, n_instances, rows := max(1, _CHUNK_ENTRIES // int(np.prod(shape[1:])))):
        bad = first_not_finite(read_rows(embeddings, np.arange(start, min(start + rows, n_instances))))
        if bad is not None:
            raise ValueError(
                f"reference_embeddings() must be finite, but the row of dataset index {start + bad} is not. Check that "
                "instance and the model that embedded it."
            )
