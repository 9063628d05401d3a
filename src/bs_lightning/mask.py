"""Mask: a pool's graph -> which pairs of a batch are likely false negatives, to be left out of the loss."""

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from bs_lightning._checks import check_integer
from bs_lightning._types import Pairs


def mutual_nearest(neighbors: ArrayLike, n_nearest: int) -> Pairs:
    """The pairs of nodes that are among each other's nearest.

    Args:
        neighbors: Integers of shape ``[P, K]``, each row nearest first, as the graphs here return them.
        n_nearest: How many of a row count as nearest; at most ``K`` do.

    Returns:
        int64 of shape ``[m, 2]``, each pair once, the lower node first; ``m`` is at most ``P * n_nearest / 2``.

    Raises:
        TypeError: If ``n_nearest`` is no integer.
        ValueError: If ``n_nearest`` is below 1, or ``neighbors`` not of shape ``[P, K]``.

    Example:
        >>> from bs_lightning.mask import mutual_nearest
        >>> mutual_nearest([[1, 2], [0, 2], [1, 0]], n_nearest=1).tolist()
        [[0, 1]]

    Source: that instances which are each other's nearest are likely of one class is known from re-ranking with
    k-reciprocal neighbours (Zhong et al., CVPR 2017, arXiv 1701.08398).
    """
    near = np.asarray(neighbors)
    if near.ndim != 2:
        raise ValueError(f"neighbors must have shape [P, K], got shape {list(near.shape)}.")
    if check_integer("n_nearest", n_nearest) < 1:
        raise ValueError(f"n_nearest must be at least 1, got {n_nearest}.")
    near = near[:, :n_nearest].astype(np.int64)
    size = len(near)
    rows = np.repeat(np.arange(size), near.shape[1])
    columns = near.ravel()
    lower_first = rows < columns
    back = np.isin(rows[lower_first] * size + columns[lower_first], columns * size + rows)
    return np.stack([rows[lower_first][back], columns[lower_first][back]], axis=1)


def pair_mask(pairs: Pairs, batch: ArrayLike) -> Tensor:
    """Which pairs of a batch are among some pairs.

    Args:
        pairs: int64 of shape ``[m, 2]``.
        batch: Distinct integers of shape ``[B]``, numbered as ``pairs`` are.

    Returns:
        bool of shape ``[B, B]``, symmetric, false on the diagonal.

    Example:
        >>> import numpy as np
        >>> from bs_lightning.mask import pair_mask
        >>> pair_mask(np.array([[3, 8], [5, 8]]), [8, 4, 3]).int().tolist()
        [[0, 0, 1], [0, 0, 0], [1, 0, 0]]
    """
    members = np.asarray(batch)
    order = np.argsort(members)
    places = np.searchsorted(members, pairs, sorter=order).clip(max=len(members) - 1)
    positions = order[places]
    first, second = positions[(members[positions] == pairs).all(axis=1)].T
    mask = torch.zeros(len(members), len(members), dtype=torch.bool)
    mask[first, second] = mask[second, first] = True
    return mask
