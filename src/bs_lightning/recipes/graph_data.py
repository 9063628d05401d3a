"""Graphs of any ``torch_geometric`` dataset as training data."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from bs_lightning import BatchSamplerDataModule
from bs_lightning._checks import kind_of

try:
    from torch_geometric.data import Batch, Data
    from torch_geometric.data import Dataset as GraphDataset
except ImportError as error:
    raise ImportError(f"The graph recipes need {error.name}: pip install 'bs-lightning[graphs]'") from error


class GraphDataModule(BatchSamplerDataModule):
    """Serves the graphs of any ``torch_geometric`` dataset, as batches of the type ``torch_geometric.data.Batch``.

    A graph without node features gets a single feature, 1 for each node. For node degrees instead, or in addition to
    the features, give the dataset a ``transform=torch_geometric.transforms.OneHotDegree(max_degree)``. A graph without
    edges is served as it is. Edge features are left out.

    Args:
        dataset: Graphs: a ``torch_geometric`` dataset, or a list of ``torch_geometric.data.Data``.
        batch_size: Graphs per batch and process.
        **kwargs: As for :class:`~bs_lightning.BatchSamplerDataModule`, such as ``drop_last`` and ``num_workers``.

    Raises:
        TypeError: If ``dataset`` holds anything but graphs.
        ValueError: If it is empty.

    Example:
        >>> import torch
        >>> from torch_geometric.data import Data
        >>> from bs_lightning.recipes.graph_data import GraphDataModule
        >>> path = Data(edge_index=torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]]), num_nodes=3)
        >>> next(iter(GraphDataModule([path] * 8, batch_size=4).train_dataloader()))
        DataBatch(x=[12, 1], edge_index=[2, 16], batch=[12], ptr=[5])
    """

    def __init__(self, dataset: GraphDataset | list[Data], batch_size: int, **kwargs: Any) -> None:
        super().__init__(batch_size, collate_fn=collate, **kwargs)
        self.dataset = dataset
        if not len(dataset):
            raise ValueError("dataset must hold at least one graph, got none.")
        if not isinstance(dataset[0], Data):
            raise TypeError(f"dataset must hold torch_geometric.data.Data, but dataset[0] is {dataset[0]!r}.")

    def train_dataset(self) -> Dataset[Any]:
        """Return the graphs."""
        return Graphs(self.dataset)

    def train_labels(self) -> Tensor | None:
        """Return the graphs' ``y``, int64 ``[N]``; ``None`` where it is not one integer for each graph."""
        found = [self.dataset[i].y for i in range(len(self.dataset))]
        if any(y is None or isinstance(y, str) for y in found):
            return None
        labels = [torch.as_tensor(y) for y in found]
        if any(y.is_floating_point() or y.numel() != 1 for y in labels):
            return None
        return torch.cat([y.flatten() for y in labels])


class Graphs(Dataset[Any]):
    """Makes a dataset's graphs ready for a model: item ``i`` has float features ``x``, and ``edge_index``.

    Args:
        dataset: Graphs.
        views: Functions of a graph. Item ``i`` is then a tuple: the graph, and what each function returns.
    """

    def __init__(self, dataset: GraphDataset | list[Data], *views: Callable[[Data], Data]) -> None:
        self.dataset = dataset
        self.views = views

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Data | tuple[Data, ...]:
        graph = with_features(self.dataset[index], index)
        return (graph, *(view(graph) for view in self.views)) if self.views else graph


def with_features(graph: Data, index: int) -> Data:
    """Return a graph's nodes and edges. A node without features gets a single one, 1.

    Args:
        graph: A graph. It is not changed.
        index: The graph's place in the dataset, for errors.

    Returns:
        A graph with ``x``, floats ``[n_nodes, n_features]``, and ``edge_index``, int64 ``[2, n_edges]``.

    Raises:
        ValueError: If the graph does not say how many nodes it has, ``x`` is not of shape ``[n_nodes, n_features]``,
            the edges are held as a sparse matrix, or ``edge_index`` has a different dtype or shape, or names a node
            that there is not.
    """
    if graph.edge_index is None and any(name in graph for name in ("adj_t", "adj")):
        raise ValueError(
            f"Graph {index} holds its edges as a sparse matrix, but the recipes read edge_index. Leave out the "
            "transform ToSparseTensor, or ToDense."
        )
    edge_index = torch.empty(2, 0, dtype=torch.int64) if graph.edge_index is None else graph.edge_index
    x = graph.x
    if x is None:
        if graph.num_nodes is None:
            raise ValueError(f"Graph {index} has no nodes, edges or features. Set its num_nodes.")
        x = torch.ones(graph.num_nodes, 1)
    if x.ndim != 2:
        raise ValueError(f"x of graph {index} must have shape [n_nodes, n_features], got shape {list(x.shape)}.")
    if edge_index.ndim != 2 or len(edge_index) != 2 or edge_index.dtype != torch.int64:
        raise ValueError(
            f"edge_index of graph {index} must be int64 of shape [2, n_edges], got {edge_index.dtype} of shape "
            f"{list(edge_index.shape)}."
        )
    if edge_index.numel() and not 0 <= int(edge_index.min()) <= int(edge_index.max()) < len(x):
        raise ValueError(
            f"edge_index of graph {index} must name nodes from 0 to {len(x) - 1}, got {int(edge_index.min())} to "
            f"{int(edge_index.max())}."
        )
    return Data(x=x.to(torch.get_default_dtype()), edge_index=edge_index)


def collate(items: Sequence[Data] | Sequence[tuple[Data, ...]]) -> Batch | tuple[Batch, ...]:
    """Return one ``Batch`` for each view."""
    if isinstance(items[0], tuple):
        return tuple(Batch.from_data_list(list(view)) for view in zip(*items, strict=True))
    return Batch.from_data_list(list(items))


def check_features(batch: Batch, n_features: int) -> None:
    """Reject graphs whose nodes have a different number of features than the model takes, and what is no graph.

    Raises:
        TypeError: If it is not a batch of graphs, as where the DataModule belongs to a different model.
        ValueError: Naming both numbers.
    """
    if not isinstance(batch, Data):
        raise TypeError(
            f"The model takes torch_geometric.data.Batch, got {kind_of(batch)}. GraphCL needs GraphCLDataModule, and "
            "MVGRL needs GraphDataModule."
        )
    if batch.x.shape[1] != n_features:
        raise ValueError(
            f"The graphs have {batch.x.shape[1]} features for each node, but the model has n_features={n_features}. "
            f"Make the model with n_features={batch.x.shape[1]}. Graphs without features count as 1."
        )
