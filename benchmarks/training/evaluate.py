"""Measures of frozen features ``[n, d]``; similarity is cosine similarity."""

import torch
import torch.nn.functional as F
from torch import Tensor


def retrieval(features: Tensor, labels: Tensor, *, rows_at_a_time: int = 512) -> tuple[float, float]:
    """Retrieve for each row the other rows of its label; return recall at 1 and mean average precision."""
    unit = F.normalize(features, dim=1)
    hits, precisions = [], []
    for rows in torch.arange(len(unit)).split(rows_at_a_time):
        similarity = unit[rows] @ unit.T
        similarity[torch.arange(len(rows)), rows] = -torch.inf
        ranking = similarity.argsort(dim=1, descending=True)[:, :-1]  # the row itself is last
        relevant = labels[ranking] == labels[rows, None]
        precision = relevant.cumsum(dim=1) / torch.arange(1, len(unit))
        hits.append(relevant[:, 0])
        precisions.append((precision * relevant).sum(dim=1) / relevant.sum(dim=1))
    return torch.cat(hits).float().mean().item(), torch.cat(precisions).mean().item()


def recall_at_1(features: Tensor, labels: Tensor, distractors: Tensor | None = None) -> float:
    """Return how often a row's most similar item, among the other rows and ``distractors``, has the row's label."""
    unit = F.normalize(features, dim=1)
    similarity = (unit @ unit.T).fill_diagonal_(-torch.inf)
    best, nearest = similarity.max(dim=1)
    found = labels[nearest] == labels
    if distractors is not None:
        found &= best > (unit @ F.normalize(distractors, dim=1).T).amax(dim=1)
    return found.float().mean().item()


def mean_reciprocal_rank(queries: Tensor, candidates: Tensor, positives: Tensor, *, rows_at_a_time: int = 512) -> float:
    """Return the mean of 1 / rank of each query's positive among all candidates; ties count as half above.

    Args:
        queries: Floats ``[n, d]``.
        candidates: Floats ``[m, d]``.
        positives: int64 ``[n]``, the index of each query's candidate.
    """
    unit = F.normalize(candidates, dim=1)
    reciprocals = []
    for rows in torch.arange(len(queries)).split(rows_at_a_time):
        similarity = F.normalize(queries[rows], dim=1) @ unit.T
        own = similarity[torch.arange(len(rows)), positives[rows], None]
        above, equal = (similarity > own).sum(dim=1), (similarity == own).sum(dim=1)
        reciprocals.append(1 / (above + (equal + 1) / 2))
    return torch.cat(reciprocals).mean().item()
