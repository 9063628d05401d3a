"""GraphCL: each graph against an augmented view of it, with the other graphs of the batch as negatives.

Source: You et al., "Graph contrastive learning with augmentations", NeurIPS 2020, arXiv 2010.13902. The settings are
the defaults of its public code for unsupervised learning on TU datasets: 3 layers, hidden width 32, temperature 0.2,
Adam with a learning rate of 0.01, batches of 128, 20 epochs. That code also adds a loop to each node; here graphs stay
as they are.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import Dataset

from bs_lightning.losses._rows import anchor_rows, check_temperature
from bs_lightning.recipes.graph_data import GraphDataModule, Graphs, check_features

try:
    from torch_geometric.data import Batch, Data
    from torch_geometric.data import Dataset as GraphDataset
    from torch_geometric.nn import GINConv, global_add_pool
except ImportError as error:
    raise ImportError("GraphCL needs torch_geometric: pip install 'bs-lightning[graphs]'") from error


class GraphCL(LightningModule):
    """Trains a graph isomorphism network so that a graph and its augmented view are alike.

    A graph's representation is the sum over its nodes, of each layer's outputs: ``n_layers * width`` numbers. The head
    is for the loss only. The batches come from :class:`GraphCLDataModule`.

    Args:
        n_features: Features of a node; 1 for graphs without features.
        width: Outputs of a layer.
        n_layers: Layers of the network.
        loss: A module that is called with two sides ``[B, d]``: the graphs and their augmented views. ``None`` is
            ``GraphCLLoss(gather=True)``: with several processes, the negatives come from all of them.
            :class:`~bs_lightning.losses.DebiasedLoss` and :class:`~bs_lightning.losses.HardLoss` with
            ``negatives="second"`` have the same negatives.
        learning_rate: Adam's.

    Example:
        >>> from bs_lightning.losses import DebiasedLoss
        >>> from bs_lightning.recipes.graphcl import GraphCL
        >>> model = GraphCL(n_features=7)
        >>> debiased = DebiasedLoss(temperature=0.2, class_prior=0.1, negatives="second", gather=True)
        >>> model = GraphCL(n_features=7, loss=debiased)
    """

    def __init__(
        self,
        n_features: int,
        width: int = 32,
        n_layers: int = 3,
        loss: nn.Module | None = None,
        learning_rate: float = 0.01,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore="loss")
        self.n_features = n_features
        self.loss = GraphCLLoss(gather=True) if loss is None else loss
        self.learning_rate = learning_rate
        inputs = [n_features, *[width] * (n_layers - 1)]
        self.layers = nn.ModuleList(GINConv(two_layers(n_inputs, width)) for n_inputs in inputs)
        self.norms = nn.ModuleList(nn.BatchNorm1d(width) for _ in inputs)
        self.head = two_layers(n_layers * width, n_layers * width)

    def forward(self, graphs: Batch) -> Tensor:
        """Return the graphs' representations, ``[B, n_layers * width]``."""
        check_features(graphs, self.n_features)
        dtype = next(self.parameters()).dtype
        x, sums = graphs.x.to(dtype), []  # Lightning leaves graphs in float32
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = norm(layer(x, graphs.edge_index).relu())
            sums.append(global_add_pool(x.float(), graphs.batch, graphs.num_graphs))  # bfloat16 cannot count to 257
        return torch.cat(sums, dim=1).to(dtype)

    def embed(self, graphs: Batch) -> Tensor:
        """Return what the loss compares, ``[B, n_layers * width]``. The callback composes batches from it."""
        projections: Tensor = self.head(self(graphs))
        return projections

    def training_step(self, views: tuple[Batch, Batch], batch_idx: int) -> dict[str, Any]:
        """Compare each graph with the augmented views; ``recycle=True`` keeps both sides."""
        if isinstance(views, Data):
            raise TypeError("GraphCL takes graphs and their views, got one batch of graphs. Use GraphCLDataModule.")
        first, second = (self.embed(view) for view in views)
        loss: Tensor = self.loss(first, second)
        self.log("train/loss", loss, on_step=False, on_epoch=True, batch_size=views[0].num_graphs, sync_dist=True)
        return {"loss": loss, "embeddings": (first.detach(), second.detach())}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return Adam."""
        return torch.optim.Adam(self.parameters(), lr=self.learning_rate)


def two_layers(n_inputs: int, n_outputs: int) -> nn.Sequential:
    """Return two linear layers, initialised as in the public code."""
    first, second = nn.Linear(n_inputs, n_outputs), nn.Linear(n_outputs, n_outputs)
    for linear in (first, second):
        nn.init.xavier_uniform_(linear.weight)
        nn.init.zeros_(linear.bias)
    return nn.Sequential(first, nn.ReLU(), second)


class GraphCLLoss(nn.Module):
    """InfoNCE with the positive pair left out of the denominator: each graph against the other graphs' views.

    It has no lower bound: with perfect positive pairs it goes on to push negatives apart.

    Args:
        temperature: What cosine similarities are divided by.
        gather: Whether negatives come from all processes; see the API reference of ``bs_lightning.losses``.

    Raises:
        TypeError: If ``temperature`` is not a number.
        ValueError: If ``temperature`` is not finite and above 0.

    Example:
        >>> import torch
        >>> from bs_lightning.recipes.graphcl import GraphCLLoss
        >>> GraphCLLoss(temperature=0.5)(torch.eye(3), torch.eye(3))  # log(2 exp(0)) - 1 / 0.5
        tensor(-1.3069)

    Source: the public code of GraphCL. The paper's equation 3 says the same in words.
    """

    def __init__(self, temperature: float = 0.2, gather: bool = False) -> None:
        super().__init__()
        self.temperature = check_temperature(temperature)
        self.gather = gather

    def forward(self, first: Tensor, second: Tensor, masked: Tensor | None = None) -> Tensor:
        """Compute the loss of a batch.

        Args:
            first: Floats ``[B, d]``: the anchors.
            second: Floats ``[B, d]``: the other views.
            masked: bool ``[B, B]``: the pairs that are not negatives.

        Returns:
            A differentiable scalar.
        """
        rows = anchor_rows(first, second, self.temperature, masked, "second", self.gather)
        return rows.mean(rows.log_sum(rows.logits) - rows.positive)


class GraphCLDataModule(GraphDataModule):
    """Serves pairs of ``Batch``: graphs, and an augmented view of each. Pools are encoded without augmentation.

    Args:
        dataset: Graphs: a ``torch_geometric`` dataset, or a list of ``torch_geometric.data.Data``.
        batch_size: Graphs per batch and process.
        augmentations: Each view is made by one of these functions of a graph, chosen at random. ``None`` is
            :func:`drop_nodes`, :func:`perturb_edges`, :func:`mask_attributes` and :func:`sample_subgraph`.
        **kwargs: As for :class:`~bs_lightning.BatchSamplerDataModule`, such as ``drop_last`` and ``num_workers``.

    Raises:
        ValueError: If ``augmentations`` is empty.

    Example:
        >>> import torch
        >>> from torch_geometric.data import Data
        >>> from bs_lightning.recipes.graphcl import GraphCLDataModule
        >>> path = Data(edge_index=torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]]), num_nodes=3)
        >>> graphs, views = next(iter(GraphCLDataModule([path] * 8, batch_size=4).train_dataloader()))
        >>> graphs.num_graphs, views.num_graphs
        (4, 4)
    """

    def __init__(
        self,
        dataset: GraphDataset | list[Data],
        batch_size: int = 128,
        augmentations: Sequence[Callable[[Data], Data]] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(dataset, batch_size, **kwargs)
        if augmentations is None:
            augmentations = (drop_nodes, perturb_edges, mask_attributes, sample_subgraph)
        if not isinstance(augmentations, (list, tuple)) or not all(map(callable, augmentations)):
            raise TypeError(f"augmentations must be a list of functions, such as [drop_nodes], got {augmentations!r}.")
        self.augmentations = tuple(augmentations)
        if not self.augmentations:
            raise ValueError("augmentations must name at least one function. Leave it out to use all four.")

    def train_dataset(self) -> Dataset[Any]:
        """Return pairs of a graph and its view."""
        return Graphs(self.dataset, self.augment)

    def pool_dataset(self) -> Dataset[Any]:
        """Return the graphs without a view."""
        return Graphs(self.dataset)

    def augment(self, graph: Data) -> Data:
        """Return a view of a graph, by an augmentation chosen at random."""
        return self.augmentations[int(torch.randint(len(self.augmentations), ()))](graph)


# Augmentations: a graph -> a new graph. Random numbers are torch's, so that a worker's seed decides them.


def drop_nodes(graph: Data, share: float = 0.1) -> Data:
    """Remove a share of the nodes, from 0 to 1, at random, and their edges. At least one node is left."""
    n_nodes = graph.num_nodes
    n_kept = n_nodes - min(int(share * n_nodes), n_nodes - 1)
    return graph.subgraph(torch.randperm(n_nodes)[:n_kept].sort().values)


def perturb_edges(graph: Data, share: float = 0.1) -> Data:
    """Remove a share of the edges, from 0 to 1, at random, and add as many between nodes chosen at random.

    The two directions of an undirected edge are two edges, as in the public code. The public code only removes edges.
    The paper also adds.
    """
    n_edges = graph.num_edges
    n_changed = int(share * n_edges)
    kept = graph.edge_index[:, torch.randperm(n_edges)[n_changed:]]
    added = torch.randint(max(graph.num_nodes, 1), (2, n_changed))
    return Data(x=graph.x, edge_index=torch.cat([kept, added], dim=1))


def mask_attributes(graph: Data, share: float = 0.1) -> Data:
    """Replace the features of a share of the nodes, from 0 to 1, by noise of mean 0.5 and deviation 0.5."""
    x = graph.x.clone()
    masked = torch.randperm(len(x))[: int(share * len(x))]
    x[masked] = torch.randn_like(x[masked]) * 0.5 + 0.5
    return Data(x=x, edge_index=graph.edge_index)


def sample_subgraph(graph: Data, share: float = 0.8) -> Data:
    """Keep a connected share of the nodes, from 0 to 1.

    From a random node, random neighbours are added until there are enough. Where the node's component is smaller than
    that, the component is kept. The public code walks over a fifth of the nodes. One version keeps the edges among the
    other four fifths, and another those among the fifth.
    """
    if not graph.num_nodes:
        return graph
    neighbors: list[list[int]] = [[] for _ in range(graph.num_nodes)]
    for source, target in graph.edge_index.T.tolist():
        neighbors[source].append(target)
    frontier = [int(torch.randint(graph.num_nodes, ()))]
    kept: set[int] = set()
    while frontier and len(kept) < max(share * graph.num_nodes, 1):
        node = frontier.pop(int(torch.randint(len(frontier), ())))
        if node not in kept:
            kept.add(node)
            frontier += neighbors[node]
    return graph.subgraph(torch.tensor(sorted(kept)))
