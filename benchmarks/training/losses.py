"""Contrastive losses of two views, ``first`` and ``second``: floats ``[B, d]``; row i of both is the same instance.

Each view is compared with its partner and with its negatives, the other ``2B - 2`` views. ``class_prior`` is the
probability that a negative has the anchor's hidden class.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def nt_xent(
    first: Tensor, second: Tensor, *, temperature: float, class_prior: float = 0.0, masked: Tensor | None = None
) -> Tensor:
    """Return SimCLR's normalised temperature-scaled cross entropy (InfoNCE); ``class_prior`` is ignored.

    Instances i and j do not count as each other's negatives if ``masked[i, j]`` is true; ``masked`` is bool ``[B, B]``.

    Source: Chen et al., "A simple framework for contrastive learning of visual representations", ICML 2020.
    """
    logits, partner = pair_logits(first, second, temperature)
    if masked is not None:
        others = masked & ~torch.eye(len(masked), dtype=torch.bool, device=masked.device)
        logits = logits.masked_fill(others.repeat(2, 2), -torch.inf)
    return F.cross_entropy(logits, partner)


def info_nce(
    first: Tensor, second: Tensor, *, temperature: float, class_prior: float = 0.0, masked: Tensor | None = None
) -> Tensor:
    """Return InfoNCE between two sides, mean of both directions; ``class_prior`` is ignored.

    The negatives of ``first[i]`` are the other rows of ``second``, and the reverse. ``masked`` is as in `nt_xent`.

    Source: Radford et al., "Learning transferable visual models from natural language supervision", ICML 2021.
    """
    logits = F.normalize(first, dim=1) @ F.normalize(second, dim=1).T / temperature
    if masked is not None:
        others = masked & ~torch.eye(len(masked), dtype=torch.bool, device=masked.device)
        logits = logits.masked_fill(others, -torch.inf)
    own = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def debiased(first: Tensor, second: Tensor, *, temperature: float, class_prior: float) -> Tensor:
    """Subtract from the negatives' sum what false negatives are expected to add to it.

    At a low temperature nothing may remain of the sum. That happens where the positive is more similar than the mean
    negative by ``temperature * log(1 / class_prior)``. The gradients of the negatives then vanish.

    Source: Chuang et al., "Debiased contrastive learning", NeurIPS 2020, arXiv 2007.00224.
    """
    positive, negatives = _split(first, second, temperature)
    log_mean = negatives.logsumexp(dim=1) - math.log(negatives.shape[1])
    return _corrected(positive, log_mean, negatives.shape[1], temperature, class_prior)


def hard(
    first: Tensor, second: Tensor, *, temperature: float, class_prior: float, concentration: float = 1.0
) -> Tensor:
    """Return the debiased loss with negatives weighted by ``exp(concentration * similarity / temperature)``.

    Source: Robinson et al., "Contrastive learning with hard negative samples", ICLR 2021, arXiv 2010.04592.
    """
    positive, negatives = _split(first, second, temperature)
    weights = concentration * negatives
    log_mean = (weights + negatives).logsumexp(dim=1) - weights.logsumexp(dim=1)
    return _corrected(positive, log_mean, negatives.shape[1], temperature, class_prior)


def weighted(first: Tensor, second: Tensor, *, temperature: float, class_prior: float = 0.0) -> Tensor:
    """Return the hard loss without its debiasing; ``class_prior`` is ignored."""
    return hard(first, second, temperature=temperature, class_prior=0.0)


LOSSES: dict[str, Callable[..., Tensor]] = {
    "nt-xent": nt_xent,
    "info-nce": info_nce,
    "debiased": debiased,
    "hard": hard,
    "weighted": weighted,
}


def pair_logits(first: Tensor, second: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return cosine similarity / temperature ``[2B, 2B]``, minus infinity on the diagonal, and the partners."""
    unit = F.normalize(torch.cat([first, second]), dim=1)
    logits = (unit @ unit.T / temperature).fill_diagonal_(-torch.inf)
    return logits, torch.arange(len(unit), device=unit.device).roll(len(first))


def _split(first: Tensor, second: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return similarity / temperature of each view's partner ``[2B]`` and negatives ``[2B, 2B - 2]``."""
    logits, partner = pair_logits(first, second, temperature)
    rows = torch.arange(len(logits), device=logits.device)
    is_negative = torch.ones_like(logits, dtype=torch.bool).fill_diagonal_(False)
    is_negative[rows, partner] = False
    return logits[rows, partner], logits[is_negative].reshape(len(logits), -1)


def _corrected(positive: Tensor, log_mean: Tensor, n: int, temperature: float, class_prior: float) -> Tensor:
    """Return the loss after subtracting the expected false negatives from the mean, down to its lower bound."""
    left = (1 - class_prior * (positive - log_mean).clamp_max(80).exp()) / (1 - class_prior)  # exp(88) is infinite
    log_true_mean = torch.where(left > 0, log_mean + left.clamp_min(1e-30).log(), -torch.inf)
    return F.softplus(math.log(n) + log_true_mean.clamp_min(-1 / temperature) - positive).mean()
