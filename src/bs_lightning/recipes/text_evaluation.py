"""The evaluation of recipes for texts, on pairs: by people's scores, or by retrieval."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule
from numpy.typing import ArrayLike
from torch import Tensor

from bs_lightning.recipes.text_encoder import Tokens
from bs_lightning.recipes.text_files import EvaluationPairs, pair_groups, require

Embedded = dict[int, list[tuple[Tensor, Tensor]]]
"""The number of a file in ``evaluate_on`` -> both sides of its pairs, batch by batch."""


def evaluate(evaluation: Sequence[EvaluationPairs], embedded: Embedded) -> dict[str, float]:
    """Return the scores of a model on all files.

    Args:
        evaluation: The files.
        embedded: The embeddings of their pairs. A file may have fewer than its pairs, such as in Lightning's sanity
            check.

    Returns:
        For each file of scored pairs ``NAME/spearman``, and the mean over these files as ``val/spearman``. For each
        other file ``NAME/r1`` and ``NAME/mrr``, of the second text found by the first, and their means as ``val/r1``
        and ``val/mrr``.
    """
    logged: dict[str, float] = {}
    for number, batches in embedded.items():
        file = evaluation[number]
        first, second = (torch.cat(side) for side in zip(*batches, strict=True))
        if file.scores is None:
            found = retrieval(first, second, file.pairs[: len(first)])
        else:
            found = {"spearman": spearman(first, second, file.scores[: len(first)])}
        logged |= {f"{file.name}/{name}": value for name, value in found.items()}
    for name in ("spearman", "r1", "mrr"):
        values = [value for key, value in logged.items() if key.endswith(f"/{name}")]
        if values:
            logged[f"val/{name}"] = sum(values) / len(values)
    return logged


def spearman(first: Tensor, second: Tensor, scores: ArrayLike) -> float:
    """Return the rank correlation between cosine similarities and people's scores.

    Args:
        first: Floats ``[n, d]``.
        second: Floats ``[n, d]``.
        scores: How similar people find the two texts, ``n`` numbers.

    Returns:
        Spearman's correlation in [-1, 1]; NaN if all similarities, or all scores, are equal.

    Example:
        >>> import torch
        >>> from bs_lightning.recipes.text_evaluation import spearman
        >>> round(spearman(torch.eye(2), torch.tensor([[1.0, 0], [1, 0]]), [5, 1]), 3)
        1.0
    """
    similarity = torch.nn.functional.cosine_similarity(first.float(), second.float())
    return float(require("scipy.stats").spearmanr(similarity.detach().cpu().numpy(), scores).statistic)


def retrieval(queries: Tensor, documents: Tensor, pairs: Sequence[tuple[Any, Any]]) -> dict[str, float]:
    """Return how well queries find their documents among all different documents, by cosine similarity.

    A document is right if any pair names it with the query, and the best of these counts. A wrong document that is
    equally similar is ranked before it. So a model that has collapsed finds nothing. A document of several pairs is
    ranked once. A document that equals the query is not ranked, unless a pair names it with the query.

    Args:
        queries: Floats ``[n, d]``.
        documents: Floats ``[n, d]``; row ``i`` is the document of query ``i``.
        pairs: What query and document ``i`` are: ``n`` pairs of hashable values, such as the texts.

    Returns:
        ``"r1"``, the share of queries whose first document is right, and ``"mrr"``, the mean of 1 / rank of the first
        right document.

    Example:
        >>> import torch
        >>> from bs_lightning.recipes.text_evaluation import retrieval
        >>> retrieval(torch.eye(2), torch.tensor([[1.0, 0], [1, 0.5]]), [("a", "x"), ("b", "y")])
        {'r1': 1.0, 'mrr': 1.0}
    """
    query, document = pair_groups(pairs).numpy().T
    different, first, column = np.unique(document, return_index=True, return_inverse=True)
    named = require("scipy.sparse").csr_array(
        (np.ones(len(pairs), dtype=bool), (query, column)), shape=(query.max() + 1, len(different))
    )
    documents = documents[torch.from_numpy(first).to(documents.device)]
    queries, documents = (torch.nn.functional.normalize(side.float(), dim=1) for side in (queries, documents))
    ranks = []
    for start in range(0, len(queries), 1024):
        rows = query[start : start + 1024]
        is_right = torch.from_numpy(named[rows].toarray()).to(queries.device)
        is_itself = torch.from_numpy(rows[:, None] == different).to(queries.device)
        similarity = queries[start : start + 1024] @ documents.T
        best = similarity.masked_fill(~is_right, -torch.inf).amax(dim=1, keepdim=True)
        ranks.append(1 + (~is_right & ~is_itself & ~(similarity < best)).sum(dim=1))  # NaN is a loss too
    rank = torch.cat(ranks).double()
    return {"r1": float((rank == 1).double().mean()), "mrr": float((1 / rank).mean())}


class EvaluatedModule(LightningModule):
    """Embeds the pairs of its DataModule's evaluation files in validation, and logs the scores of :func:`evaluate`.

    Subclasses define ``embed_pairs(batch)``, which returns the embeddings of both sides.
    """

    def embed_pairs(self, batch: tuple[Tokens, Tokens]) -> tuple[Tensor, Tensor]:
        """Return the embeddings of both sides of pairs, floats ``[b, d]`` each."""
        raise NotImplementedError

    def on_validation_epoch_start(self) -> None:
        """Forget the embeddings of the last validation."""
        self.embedded: Embedded = defaultdict(list)

    def validation_step(self, batch: tuple[Tokens, Tokens], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Embed both sides of pairs."""
        self.embedded[dataloader_idx].append(self.embed_pairs(batch))

    def on_validation_epoch_end(self) -> None:
        """Log the scores."""
        scores = evaluate(self.trainer.datamodule.evaluation, self.embedded)
        self.embedded.clear()
        self.log_dict(scores, sync_dist=True)
