"""Contrastive losses of pairs: each a function, and an ``nn.Module`` that holds its options.

A batch has two sides, floats ``[B, d]``: two views, query and document, or image and text. Row ``i`` of both sides is
the same instance, and the two rows are a positive pair. The other instances are the negatives. Rows need no length of
1: cosine similarities are compared.

**False negatives.** ``masked`` is bool ``[B, B]``, and row ``i`` is the anchor. Where ``masked[i, j]`` is true,
instance ``j`` is not a negative of instance ``i``. A mask may have a direction: instance ``i`` can still be a negative
of instance ``j``. Where negatives are on the other side only, the mask is about pairs of a row of the first side and a
row of the second side. Such a pair is left out in both directions. The diagonal has no meaning. An anchor without
a negative adds zero to the loss and has no gradient, but counts in the mean. With
:class:`~bs_lightning.BatchSamplerDataModule`, give ``masked=self.trainer.datamodule.likely_false_negatives()``.

**Several processes.** With ``gather=True`` the negatives come from the batches of all processes, with their gradients.
``masked`` then covers the global batch: its rows and columns are the instances of process 0, then of process 1, and so
on. Each process returns its own anchors' part, so that the *mean over processes* is the loss of the global batch. DDP
takes the same mean of the gradients. So the weights get the gradient of one process that has the global batch, also
where the processes have different numbers of instances. All processes must call the loss, and ``backward``, equally
often. There is no second derivative. To log the loss, take the mean: ``self.log("loss", loss, sync_dist=True)``.
Without ``torch.distributed``, ``gather=True`` changes nothing.

**Precision.** The losses compute in float32, or in float64 where a side is float64. Autocast does not change this.
Inputs that are not finite give a loss that is not finite.
"""

from bs_lightning.losses._functions import debiased, hard, hardness_weighted, info_nce, nt_xent, weighted
from bs_lightning.losses._modules import (
    DebiasedLoss,
    HardLoss,
    HardnessWeightedLoss,
    InfoNCELoss,
    NTXentLoss,
    WeightedLoss,
)

__all__ = [
    "DebiasedLoss",
    "HardLoss",
    "HardnessWeightedLoss",
    "InfoNCELoss",
    "NTXentLoss",
    "WeightedLoss",
    "debiased",
    "hard",
    "hardness_weighted",
    "info_nce",
    "nt_xent",
    "weighted",
]
