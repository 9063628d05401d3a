"""Mask: a pool's graph -> the pairs of a batch that are likely false negatives, which the loss can leave out."""

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from bs_lightning._checks import check_integer, check_integer_array, check_neighbors
from bs_lightning._types import Pairs


def mutual_nearest(neighbors: ArrayLike, n_nearest: int) -> Pairs:
    """Find the pairs of nodes in which each node is among the other node's nearest neighbours.

    Args:
        neighbors: Integers of shape ``[P, K]``, the nearest neighbour of each row first, as the graphs of this library
            return them. An entry equal to its own row's number means "no edge here".
        n_nearest: How many entries of a row count as nearest, at least 1. Above ``K``, all of them count.

    Returns:
        int64 of shape ``[m, 2]``. Each pair occurs in both directions. ``m`` is at most ``P * n_nearest``.

    Raises:
        TypeError: If ``neighbors`` does not hold integers, or ``n_nearest`` is not an integer.
        ValueError: If ``neighbors`` does not have shape ``[P, K]`` with entries in ``[0, P)``, or ``n_nearest`` is
            below 1.

    Example:
        >>> from bs_lightning.mask import mutual_nearest
        >>> mutual_nearest([[1, 2], [0, 2], [1, 0]], n_nearest=1).tolist()
        [[0, 1], [1, 0]]

    Source: re-ranking with k-reciprocal neighbours (Zhong et al., CVPR 2017, arXiv 1701.08398), where instances that
    are each other's nearest neighbours likely have the same class.
    """
    graph = check_neighbors(neighbors)
    nearest = graph[:, : check_integer("n_nearest", n_nearest, 1)].astype(np.int64)
    size = len(nearest)
    rows, columns = np.repeat(np.arange(size), nearest.shape[1]), nearest.ravel()
    real = rows != columns
    # One number for each directed pair. A row may name a neighbour twice; `intersect1d` returns each pair once.
    forward, backward = rows * size + columns, columns * size + rows
    mutual = np.intersect1d(forward[real], backward[real])
    return np.stack(np.divmod(mutual, size), axis=1)


def pair_mask(pairs: ArrayLike, batch: ArrayLike) -> Tensor:
    """Mark the pairs of a batch that are in a list of pairs.

    Args:
        pairs: Integers of shape ``[m, 2]``: pairs of instances, such as dataset indices, the anchor first.
        batch: Distinct integers of shape ``[B]``: the instances of the batch, numbered as in ``pairs``.

    Returns:
        bool of shape ``[B, B]``, row ``i`` for the anchor ``i``, false on the diagonal.

    Raises:
        TypeError: If ``pairs`` or ``batch`` does not hold integers.
        ValueError: If ``pairs`` or ``batch`` has a different shape, or ``batch`` holds an instance twice.

    Example:
        >>> import numpy as np
        >>> from bs_lightning.mask import pair_mask
        >>> pair_mask(np.array([[3, 8], [5, 8]]), [8, 4, 3]).int().tolist()
        [[0, 0, 0], [0, 0, 0], [1, 0, 0]]
    """
    pairs, members = check_integer_array("pairs", pairs), check_integer_array("batch", batch)
    if pairs.ndim != 2 or pairs.shape[1] != 2:
        raise ValueError(f"pairs must have shape [m, 2], got shape {list(pairs.shape)}.")
    if members.ndim != 1:
        raise ValueError(f"batch must have shape [B], got shape {list(members.shape)}.")
    mask = torch.zeros(len(members), len(members), dtype=torch.bool)
    if not len(members):
        return mask
    ordered, order = np.unique(members, return_index=True)
    if len(ordered) < len(members):
        raise ValueError(f"batch must hold distinct integers, got {members}.")
    positions = order[np.searchsorted(ordered, pairs).clip(max=len(members) - 1)]
    first, second = positions[(members[positions] == pairs).all(axis=1)].T
    mask[first, second] = True
    return mask.fill_diagonal_(False)  # an instance is never its own negative
