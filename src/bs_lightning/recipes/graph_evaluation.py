"""Evaluation of graphs' representations, as graph papers report it: by a support vector machine."""

import warnings
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader

from bs_lightning.isolation import no_trace
from bs_lightning.recipes.graph_data import Data, GraphDataset, Graphs, collate

try:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.model_selection import GridSearchCV, StratifiedKFold
    from sklearn.svm import SVC, LinearSVC
except ImportError as error:
    raise ImportError(f"The graph recipes need {error.name}: pip install 'bs-lightning[graphs]'") from error


@torch.no_grad()
def represent(model: nn.Module, dataset: GraphDataset | list[Data], batch_size: int = 256) -> Tensor:
    """Return a model's representations of all graphs, computed in eval mode.

    Args:
        model: Returns representations, ``[b, d]``, for a ``Batch``, such as ``GraphCL`` and ``MVGRL``. Afterwards each
            of its parts is in the mode in which it was.
        dataset: Graphs.
        batch_size: Graphs at a time.

    Returns:
        Floats of shape ``[N, d]``, on the CPU.
    """
    device = next(model.parameters()).device
    batches = DataLoader(Graphs(dataset), batch_size, collate_fn=collate)
    with no_trace(model):
        return torch.cat([model(batch.to(device)).cpu() for batch in batches])


def svm_accuracies(
    representations: Tensor | NDArray[Any], labels: Tensor | NDArray[Any], *, kernel: str = "rbf", seed: int = 0
) -> NDArray[np.float64]:
    """Return the test accuracies of a support vector machine, by stratified ten-fold cross-validation.

    Each fold chooses C from 0.001 to 1000, by five-fold cross-validation in its own training part. Test folds choose
    nothing.

    Args:
        representations: Floats of shape ``[N, d]``.
        labels: Integers of shape ``[N]``, at least ten graphs of each class.
        kernel: ``"rbf"`` as GraphCL, or ``"linear"`` as MVGRL: ``LinearSVC``, which stops after 1,000 iterations,
            where features of unequal size may not have converged.
        seed: The same seed gives the same folds. So two models' accuracies can be compared fold by fold.

    Returns:
        float64 of shape ``[10]``, between 0 and 1.

    Raises:
        ValueError: If a class has fewer than ten graphs.

    Example:
        >>> import torch
        >>> from bs_lightning.recipes.graph_evaluation import svm_accuracies
        >>> labels = torch.arange(40) % 2
        >>> float(svm_accuracies(labels[:, None] + torch.rand(40, 3) / 2, labels).mean())
        1.0

    Source: the public code of GraphCL and of MVGRL. Its inner folds choose among the same values of C.
    """
    x, y = np.asarray(representations), np.asarray(labels)
    smallest = np.unique(y, return_counts=True)[1].min()
    if smallest < 10:
        raise ValueError(f"labels must have at least 10 graphs of each class for 10 folds, got a class of {smallest}.")
    grid = {"C": [0.001, 0.01, 0.1, 1, 10, 100, 1000]}
    machine = LinearSVC(dual=True, random_state=seed) if kernel == "linear" else SVC(kernel=kernel)
    accuracies = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        for train, test in StratifiedKFold(10, shuffle=True, random_state=seed).split(x, y):
            chosen = GridSearchCV(machine, grid, cv=5).fit(x[train], y[train])
            accuracies.append(chosen.score(x[test], y[test]))
    return np.array(accuracies)
