"""Cells: embeddings -> overlapping parts of a pool, in which several processes search for neighbours."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bs_lightning._embeddings import similar_to_nothing

MOST_CELLS = 4  # with each cut, more neighbours lie in other cells

# Share of the rows at a cut that both sides search. A wider overlap loses fewer neighbours, and leaves more work.
# `benchmarks/overhead` measures both.
_OVERLAP = 0.25
_SAMPLED = 10_000  # rows whose main direction stands for that of all


def cell(unit: Tensor, part: int, n_parts: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Return the rows that a part searches, and which of them are its own.

    The rows are cut in two across the direction in which they differ most, and each side again, until there is a cell
    for each part. A side also holds the rows that lie just beyond the cut. So a row whose neighbours lie on both sides
    of a cut finds most of them. Each row is the own row of one part. All-zero rows have no neighbours, and are in no
    cell.

    Args:
        unit: Rows of length 1, float32 ``[P, d]`` or ``[P, 2, d]``, on the CPU.
        part: The part's number, from 0.
        n_parts: Number of parts.

    Returns:
        The cell's rows in ascending order, int64 ``[rows of the cell]``, and for each whether it is the part's own.

    Source: spill trees. Liu et al., "An investigation of practical approximate nearest neighbor algorithms", NIPS 2004.
    """
    rows = (~similar_to_nothing(unit)).nonzero().squeeze(1)
    own = torch.ones(len(rows), dtype=torch.bool)
    first, stop = 0, n_parts
    while stop - first > 1 and len(rows):
        middle = (first + stop) // 2
        place = _places(unit, rows)
        cut = len(rows) * (middle - first) // (stop - first)
        margin = int(len(rows) * _OVERLAP / 2)
        if part < middle:
            stop = middle
            kept, beyond = place < cut + margin, place >= cut
        else:
            first = middle
            kept, beyond = place >= cut - margin, place < cut
        rows, own = rows[kept], (own & ~beyond)[kept]
    return rows.numpy(), own.numpy()


def _places(unit: Tensor, rows: Tensor) -> Tensor:
    """Return the places that some rows have in their order along the direction in which they differ most.

    With two sides, an instance lies at their mean.
    """
    sample = _points(unit[rows[:: max(len(rows) // _SAMPLED, 1)]]).double()
    centred = sample - sample.mean(dim=0)
    direction = torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -1]
    direction *= direction[direction.abs().argmax()].sign()  # the same on every machine
    along = torch.cat([_points(unit[some]) @ direction.float() for some in rows.split(100_000)])
    places = torch.empty_like(rows)
    places[along.argsort(stable=True)] = torch.arange(len(rows))
    return places


def _points(unit: Tensor) -> Tensor:
    return unit if unit.ndim == 2 else unit.mean(dim=1)
