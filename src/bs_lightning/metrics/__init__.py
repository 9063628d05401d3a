"""Metrics of batches and embeddings: each a function, and a ``torchmetrics`` class that accumulates it over batches."""

from bs_lightning.metrics._negatives import (
    InBatchFalseNegativeRate,
    InBatchHardness,
    in_batch_false_negative_rate,
    in_batch_hardness,
)
from bs_lightning.metrics._pairs import (
    InBatchAccuracy,
    NegativesAbovePositive,
    in_batch_accuracy,
    negatives_above_positive,
)
from bs_lightning.metrics._sphere import Alignment, Uniformity, alignment, uniformity

__all__ = [
    "Alignment",
    "InBatchAccuracy",
    "InBatchFalseNegativeRate",
    "InBatchHardness",
    "NegativesAbovePositive",
    "Uniformity",
    "alignment",
    "in_batch_accuracy",
    "in_batch_false_negative_rate",
    "in_batch_hardness",
    "negatives_above_positive",
    "uniformity",
]
