"""How good frozen features of images are: a linear probe and weighted nearest neighbours."""

from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn


def knn_accuracy(
    features: Tensor,
    labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    *,
    k: int = 200,
    temperature: float = 0.1,
) -> float:
    """Return the accuracy of a vote of the nearest labelled instances, by cosine similarity.

    Args:
        features: Floats of shape ``[N, d]``: the instances that vote.
        labels: Integers of at least 0, of shape ``[N]``.
        test_features: Floats of shape ``[n, d]``.
        test_labels: Integers of shape ``[n]``.
        k: How many instances vote, at most ``N``.
        temperature: A vote's weight is ``exp(similarity / temperature)``.

    Returns:
        The share of the test instances whose class wins the vote.

    Raises:
        ValueError: If a label of a voting instance is negative.

    Example:
        >>> import torch
        >>> from bs_lightning.recipes.probes import knn_accuracy
        >>> knn_accuracy(torch.eye(3), torch.arange(3), torch.eye(3), torch.tensor([0, 1, 1]), k=2)  # two of three
        0.6666666865348816

    Source: Wu et al., "Unsupervised feature learning via non-parametric instance discrimination", CVPR 2018,
    arXiv 1805.01978, section 3.4.
    """
    if labels.min() < 0:
        raise ValueError(f"labels must be at least 0, got {int(labels.min())}. Leave out the images without a label.")
    gallery = F.normalize(features.float(), dim=1)
    labels, n_classes = labels.long(), int(labels.max()) + 1
    guesses = []
    for chunk in F.normalize(test_features.float(), dim=1).split(1024):
        similarity, nearest = (chunk @ gallery.T).topk(min(k, len(gallery)), dim=1)
        weights = ((similarity - 1) / temperature).exp()
        votes = weights.new_zeros(len(chunk), n_classes).scatter_add_(1, labels[nearest], weights)
        guesses.append(votes.argmax(dim=1))
    return (torch.cat(guesses) == test_labels).float().mean().item()


def linear_probe(features: Tensor, labels: Tensor, test_features: Tensor, test_labels: Tensor) -> float:
    """Return the test accuracy of scikit-learn's logistic regression, on standardised features.

    Args:
        features: Floats of shape ``[N, d]``, to fit the classifier.
        labels: Integers of shape ``[N]``.
        test_features: Floats of shape ``[n, d]``.
        test_labels: Integers of shape ``[n]``.

    Returns:
        The share of the test instances that are classified correctly.

    Raises:
        ImportError: If scikit-learn is missing.

    Example:
        >>> import torch
        >>> from bs_lightning.recipes.probes import linear_probe
        >>> linear_probe(torch.eye(3), torch.arange(3), torch.eye(3), torch.arange(3))
        1.0
    """
    try:
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    except ImportError:
        raise ImportError('The linear probe needs scikit-learn: pip install "bs-lightning[vision]"') from None
    classifier = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=300, tol=1e-3))
    classifier.fit(features.float().cpu().numpy(), labels.cpu().numpy())
    return float(classifier.score(test_features.float().cpu().numpy(), test_labels.cpu().numpy()))


class ProbedModule(LightningModule):
    """Evaluates the features of its ``encoder`` in ``trainer.test``, and logs ``test/knn`` and ``test/linear_probe``.

    Its DataModule's ``test_dataloader()`` returns two loaders of ``(images, labels)``. The first has the labelled
    images that vote and that the classifier is fitted to. The second has the test images. Several processes divide the
    images; a process that has fewer than the others repeats one, so the accuracy may differ by one image.
    """

    encoder: nn.Module

    def on_test_epoch_start(self) -> None:
        """Begin without features."""
        self._seen: tuple[list[tuple[Tensor, Tensor]], ...] = ([], [])

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Keep the features of a batch of images."""
        images, labels = batch
        self._seen[dataloader_idx].append((self.encoder(images).float(), labels))

    def on_test_epoch_end(self) -> None:
        """Log both accuracies."""
        data: list[Tensor] = []
        for batches in self._seen:
            for part in zip(*batches, strict=True):
                gathered: Any = self.all_gather(torch.cat(part))
                data.append(gathered.flatten(0, 1) if self.trainer.world_size > 1 else gathered)
        del self._seen
        self.log_dict({"test/knn": knn_accuracy(*data), "test/linear_probe": linear_probe(*data)})
