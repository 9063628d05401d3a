"""The losses as functions. Each makes its anchors' rows, sums over the negatives, and compares with the positive."""

import math

import torch
from torch import Tensor

from bs_lightning.losses._rows import AnchorRows, Negatives, anchor_rows, check_class_prior, check_factor


def nt_xent(
    first: Tensor,
    second: Tensor,
    *,
    temperature: float | Tensor,
    masked: Tensor | None = None,
    gather: bool = False,
) -> Tensor:
    """Compute SimCLR's normalised temperature-scaled cross entropy: each view against all other views.

    Both views of each instance are anchors. An anchor's negatives are both views of the other instances, ``2B - 2``.

    Args:
        first: Floats of shape ``[B, d]``, one view of each instance.
        second: Floats of shape ``[B, d]``, the other view.
        temperature: What similarities are divided by: a float, or a tensor of one float, which gets a gradient.
        masked: bool of shape ``[B, B]``. Where ``masked[i, j]`` is true, no view of instance ``j`` is a negative of a
            view of instance ``i``.
        gather: Whether negatives come from all processes. ``masked`` then covers the global batch.

    Returns:
        A differentiable scalar, the mean over the ``2B`` anchors.

    Raises:
        TypeError: If an argument is of the wrong kind, or ``masked`` is not bool.
        ValueError: If the shapes are not as above, ``B`` is below 2, or ``temperature`` is not finite and above 0.

    Example:
        >>> import torch
        >>> from bs_lightning.losses import nt_xent
        >>> nt_xent(torch.eye(3), torch.eye(3), temperature=0.5)
        tensor(0.4327)

    Source: Chen et al., "A simple framework for contrastive learning of visual representations", ICML 2020,
    arXiv 2002.05709, equation 1.
    """
    return _info_nce(anchor_rows(first, second, temperature, masked, "views", gather))


def info_nce(
    queries: Tensor,
    documents: Tensor,
    *,
    temperature: float | Tensor,
    masked: Tensor | None = None,
    symmetric: bool = True,
    gather: bool = False,
) -> Tensor:
    """Compute InfoNCE of two towers: each query against all documents, and each document against all queries.

    An anchor's negatives are on the other side only, ``B - 1``.

    Args:
        queries: Floats of shape ``[B, d]``, such as queries or images.
        documents: Floats of shape ``[B, d]``, such as documents or texts.
        temperature: What similarities are divided by: a float, or a tensor of one float, which gets a gradient. CLIP's
            is ``(-log_scale).exp()`` with a parameter ``log_scale``.
        masked: bool of shape ``[B, B]``. Where ``masked[i, j]`` is true, query ``i`` and document ``j`` are not each
            other's negatives.
        symmetric: ``False`` takes queries as anchors only.
        gather: Whether negatives come from all processes. ``masked`` then covers the global batch.

    Returns:
        A differentiable scalar, the mean over the ``2B`` anchors, or over the ``B`` queries.

    Raises:
        TypeError: If an argument is of the wrong kind, or ``masked`` is not bool.
        ValueError: If the shapes are not as above, ``B`` is below 2, or ``temperature`` is not finite and above 0.

    Example:
        >>> import torch
        >>> from bs_lightning.losses import info_nce
        >>> info_nce(torch.eye(3), torch.eye(3), temperature=0.5)
        tensor(0.2395)

    Source: van den Oord et al., "Representation learning with contrastive predictive coding", arXiv 1807.03748,
    equation 4. In both directions: Radford et al., "Learning transferable visual models from natural language
    supervision", ICML 2021, arXiv 2103.00020, figure 3.
    """
    negatives: Negatives = "other_side" if symmetric else "second"
    names = "queries", "documents"
    return _info_nce(anchor_rows(queries, documents, temperature, masked, negatives, gather, names))


def debiased(
    first: Tensor,
    second: Tensor,
    *,
    temperature: float | Tensor,
    class_prior: float,
    masked: Tensor | None = None,
    negatives: Negatives = "views",
    gather: bool = False,
) -> Tensor:
    """Compute InfoNCE without what false negatives are expected to add to it.

    The positive pair stands for the false negatives: ``class_prior`` times its score is subtracted from the negatives'
    mean score. The rest of the mean is at least ``exp(-1 / temperature)``, the score of opposite rows. At a low
    temperature nothing may remain: where the positive is more similar than the mean negative by
    ``temperature * log(1 / class_prior)``. The gradients of the negatives vanish there.

    Args:
        first: Floats of shape ``[B, d]``, one side of each instance.
        second: Floats of shape ``[B, d]``, the other side.
        temperature: What similarities are divided by: a float, or a tensor of one float, which gets a gradient.
        class_prior: Probability that a negative has the anchor's hidden class, in ``[0, 1)``. At 0 the loss is
            :func:`nt_xent` or :func:`info_nce`.
        masked: bool of shape ``[B, B]``. Where ``masked[i, j]`` is true, instance ``j`` is not a negative of instance
            ``i``.
        negatives: ``"views"`` compares each row with all others of both sides, as :func:`nt_xent`. ``"other_side"``
            compares each row with those of the other side, as :func:`info_nce`. ``"second"`` takes the rows of
            ``first`` as anchors only, as ``info_nce(symmetric=False)``.
        gather: Whether negatives come from all processes. ``masked`` then covers the global batch.

    Returns:
        A differentiable scalar, the mean over the anchors.

    Raises:
        TypeError: If an argument is of the wrong kind, or ``masked`` is not bool.
        ValueError: If the shapes are not as above, ``B`` is below 2, or another value is out of range.

    Example:
        >>> import torch
        >>> from bs_lightning.losses import debiased
        >>> debiased(torch.eye(3), torch.eye(3), temperature=0.5, class_prior=0.1)
        tensor(0.1459)

    Source: Chuang et al., "Debiased contrastive learning", NeurIPS 2020, arXiv 2007.00224, the loss
    L_Debiased^{N,M} with M = 1.
    """
    class_prior = check_class_prior(class_prior)
    rows = anchor_rows(first, second, temperature, masked, negatives, gather)
    return _debiased(rows, rows.log_sum(rows.logits) - rows.log_count(), class_prior)


def hard(
    first: Tensor,
    second: Tensor,
    *,
    temperature: float | Tensor,
    class_prior: float,
    concentration: float = 1.0,
    masked: Tensor | None = None,
    negatives: Negatives = "views",
    gather: bool = False,
) -> Tensor:
    """Compute the debiased loss, with more weight for negatives that are more similar to the anchor.

    A negative's weight is proportional to ``exp(concentration * similarity / temperature)``. An anchor's weights have
    the mean 1. They have a gradient, unlike the weights of :func:`hardness_weighted`.

    Args:
        first: Floats of shape ``[B, d]``, one side of each instance.
        second: Floats of shape ``[B, d]``, the other side.
        temperature: What similarities are divided by: a float, or a tensor of one float, which gets a gradient.
        class_prior: Probability that a negative has the anchor's hidden class, in ``[0, 1)``. At 0 the loss is
            :func:`weighted`.
        concentration: How strongly similar negatives count, at least 0. At 0 the loss is :func:`debiased`.
        masked: bool of shape ``[B, B]``. Where ``masked[i, j]`` is true, instance ``j`` is not a negative of instance
            ``i``.
        negatives: ``"views"`` compares each row with all others of both sides, as :func:`nt_xent`. ``"other_side"``
            compares each row with those of the other side, as :func:`info_nce`. ``"second"`` takes the rows of
            ``first`` as anchors only, as ``info_nce(symmetric=False)``.
        gather: Whether negatives come from all processes. ``masked`` then covers the global batch.

    Returns:
        A differentiable scalar, the mean over the anchors.

    Raises:
        TypeError: If an argument is of the wrong kind, or ``masked`` is not bool.
        ValueError: If the shapes are not as above, ``B`` is below 2, or another value is out of range.

    Example:
        >>> import torch
        >>> from bs_lightning.losses import hard
        >>> first, second = torch.tensor([[[1.0, 0], [0, 1], [1, 1]], [[1, 0], [0, 1], [1, 0]]])
        >>> hard(first, second, temperature=0.5, class_prior=0.1)
        tensor(1.3253)

    Source: Robinson et al., "Contrastive learning with hard negative samples", ICLR 2021, arXiv 2010.04592, section 3:
    the objective with the negatives' distribution q_beta, estimated by importance sampling.
    """
    class_prior = check_class_prior(class_prior)
    concentration = check_factor("concentration", concentration)
    rows = anchor_rows(first, second, temperature, masked, negatives, gather)
    log_weights = concentration * rows.logits
    log_mean = rows.log_sum(log_weights + rows.logits) - rows.log_sum(log_weights)
    return _debiased(rows, log_mean, class_prior)


def weighted(
    first: Tensor,
    second: Tensor,
    *,
    temperature: float | Tensor,
    concentration: float = 1.0,
    masked: Tensor | None = None,
    negatives: Negatives = "views",
    gather: bool = False,
) -> Tensor:
    """Compute InfoNCE with more weight for more similar negatives: :func:`hard` without its debiasing.

    Args:
        first: Floats of shape ``[B, d]``, one side of each instance.
        second: Floats of shape ``[B, d]``, the other side.
        temperature: What similarities are divided by: a float, or a tensor of one float, which gets a gradient.
        concentration: How strongly similar negatives count, at least 0. At 0 the loss is :func:`nt_xent` or
            :func:`info_nce`.
        masked: bool of shape ``[B, B]``. Where ``masked[i, j]`` is true, instance ``j`` is not a negative of instance
            ``i``.
        negatives: ``"views"`` compares each row with all others of both sides, as :func:`nt_xent`. ``"other_side"``
            compares each row with those of the other side, as :func:`info_nce`. ``"second"`` takes the rows of
            ``first`` as anchors only, as ``info_nce(symmetric=False)``.
        gather: Whether negatives come from all processes. ``masked`` then covers the global batch.

    Returns:
        A differentiable scalar, the mean over the anchors.

    Raises:
        TypeError: If an argument is of the wrong kind, or ``masked`` is not bool.
        ValueError: If the shapes are not as above, ``B`` is below 2, or another value is out of range.

    Example:
        >>> import torch
        >>> from bs_lightning.losses import weighted
        >>> queries, documents = torch.randn(2, 8, 4)
        >>> loss = weighted(queries, documents, temperature=0.05, negatives="other_side")

    Source: Robinson et al., "Contrastive learning with hard negative samples", ICLR 2021, arXiv 2010.04592, section 3,
    with a class prior of 0.
    """
    return hard(
        first,
        second,
        temperature=temperature,
        class_prior=0.0,
        concentration=concentration,
        masked=masked,
        negatives=negatives,
        gather=gather,
    )


def hardness_weighted(
    first: Tensor,
    second: Tensor,
    *,
    temperature: float | Tensor,
    strength: float = 9.0,
    masked: Tensor | None = None,
    negatives: Negatives = "views",
    gather: bool = False,
) -> Tensor:
    """Compute InfoNCE with negatives weighted by ``exp(strength * similarity)``, a weight without gradient.

    The weights are not scaled to a mean of 1, unlike the weights of :func:`weighted`. So a negative of similarity 0
    counts as in InfoNCE, and a similar negative counts more.

    Args:
        first: Floats of shape ``[B, d]``, one side of each instance.
        second: Floats of shape ``[B, d]``, the other side.
        temperature: What similarities are divided by: a float, or a tensor of one float, which gets a gradient.
        strength: The paper's alpha, at least 0. The paper takes 9 with a temperature of 0.02. At 0 the loss is
            :func:`nt_xent` or :func:`info_nce`.
        masked: bool of shape ``[B, B]``. Where ``masked[i, j]`` is true, instance ``j`` is not a negative of instance
            ``i``.
        negatives: ``"views"`` compares each row with all others of both sides, as :func:`nt_xent`. ``"other_side"``
            compares each row with those of the other side, as :func:`info_nce`. ``"second"`` takes the rows of
            ``first`` as anchors only, as ``info_nce(symmetric=False)`` and the paper.
        gather: Whether negatives come from all processes. ``masked`` then covers the global batch.

    Returns:
        A differentiable scalar, the mean over the anchors.

    Raises:
        TypeError: If an argument is of the wrong kind, or ``masked`` is not bool.
        ValueError: If the shapes are not as above, ``B`` is below 2, or another value is out of range.

    Example:
        >>> import torch
        >>> from bs_lightning.losses import hardness_weighted
        >>> images, texts = torch.randn(2, 8, 4)
        >>> loss = hardness_weighted(images, texts, temperature=0.02, negatives="second")

    Source: Lan et al., "LLaVE: large language and vision embedding models with hardness-weighted contrastive learning",
    Findings of EMNLP 2025, arXiv 2503.04812, equation 5.
    """
    strength = check_factor("strength", strength)
    rows = anchor_rows(first, second, temperature, masked, negatives, gather)
    log_weights = strength * (rows.logits * rows.temperature).detach()
    return rows.mean_loss(rows.log_sum(rows.logits + log_weights))


def _info_nce(rows: AnchorRows) -> Tensor:
    return rows.mean_loss(rows.log_sum(rows.logits))


def _debiased(rows: AnchorRows, log_mean: Tensor, class_prior: float) -> Tensor:
    """Subtract the expected false negatives from the negatives' mean score, down to its lower bound."""
    if class_prior:
        excess = (rows.positive - log_mean).clamp_max(80).exp()  # exp(88) is infinite
        left = (1 - class_prior * excess) / (1 - class_prior)
        log_mean = torch.where(left > 0, log_mean + left.clamp_min(1e-30).log(), -math.inf)
        log_mean = log_mean.clamp_min(-1 / rows.temperature)
    return rows.mean_loss(rows.log_count() + log_mean)
