"""MVGRL, graph level: the nodes of one view of a graph against the whole of the other view, a diffusion.

Source: Hassani and Khasahmadi, "Contrastive multi-view representation learning on graphs", ICML 2020,
arXiv 2006.05582. The widths, the teleport probability and the learning rate are its public code's.
"""

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from bs_lightning._checks import check_number
from bs_lightning.recipes.graph_data import check_features

try:
    from torch_geometric.data import Batch
    from torch_geometric.nn import global_add_pool
    from torch_geometric.utils import to_dense_adj, to_dense_batch
except ImportError as error:
    raise ImportError("MVGRL needs torch_geometric: pip install 'bs-lightning[graphs]'") from error


class MVGRL(LightningModule):
    """Trains two graph convolutional networks, of the graph and of its diffusion by personalised PageRank.

    A node of one view and the whole graph of the other view are a positive pair. A node and a different graph of the
    batch are a negative pair. A graph's representation is the sum of the two views' graph embeddings. The batches come
    from :class:`~bs_lightning.recipes.graph_data.GraphDataModule`.

    The graphs of a batch are padded to the largest, and the diffusion inverts a matrix of that size for each. This
    suits graphs of up to some hundred nodes.

    Args:
        n_features: Features of a node; 1 for graphs without features. The public code gives node labels and one-hot
            degrees: ``torch_geometric.transforms.OneHotDegree(max_degree)``.
        width: Outputs of a layer.
        n_layers: Layers of a network.
        teleport: PageRank's probability to start again.
        learning_rate: Adam's.

    Example:
        >>> from bs_lightning.recipes.mvgrl import MVGRL
        >>> model = MVGRL(n_features=7, width=64)
    """

    def __init__(
        self,
        n_features: int,
        width: int = 512,
        n_layers: int = 2,
        teleport: float = 0.2,
        learning_rate: float = 0.001,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        if not 0 < check_number("teleport", teleport) <= 1:
            raise ValueError(f"teleport must lie in (0, 1], got {teleport}. The paper's is 0.2.")
        self.n_features = n_features
        self.teleport = teleport
        self.learning_rate = learning_rate
        self.networks = nn.ModuleList(GCN(n_features, width, n_layers) for _ in range(2))
        self.node_head = Head(width, width)
        self.graph_head = Head(n_layers * width, width)

    def views(self, graphs: Batch) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Encode both views.

        Returns:
            For each view, what :class:`GCN` returns: the nodes' features ``[n_nodes, width]`` and the graphs' features
            ``[B, n_layers * width]``.
        """
        check_features(graphs, self.n_features)
        adjacency, diffusion = adjacency_and_diffusion(graphs, self.teleport)
        first, second = self.networks
        return first(graphs.x, adjacency, graphs.batch), second(graphs.x, diffusion, graphs.batch)

    def forward(self, graphs: Batch) -> Tensor:
        """Return the graphs' representations, ``[B, width]``."""
        (_, first), (_, second) = self.views(graphs)
        representations: Tensor = self.graph_head(first) + self.graph_head(second)
        return representations

    def embed(self, graphs: Batch) -> Tensor:
        """Return the graphs' representations, from which batches are composed."""
        representations: Tensor = self(graphs)
        return representations

    def training_step(self, graphs: Batch, batch_idx: int) -> Tensor:
        """Compare the nodes of each view with the graphs of the other."""
        (first_nodes, first), (second_nodes, second) = self.views(graphs)
        loss = local_global_loss(self.node_head(first_nodes), self.graph_head(second), graphs.batch)
        loss = loss + local_global_loss(self.node_head(second_nodes), self.graph_head(first), graphs.batch)
        self.log("train/loss", loss, on_step=False, on_epoch=True, batch_size=graphs.num_graphs, sync_dist=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return Adam."""
        return torch.optim.Adam(self.parameters(), lr=self.learning_rate)


class GCN(nn.Module):
    """Graph convolutions, one after the other.

    Args:
        n_features: Features of a node.
        width: Outputs of a layer.
        n_layers: Number of layers.
    """

    def __init__(self, n_features: int, width: int, n_layers: int) -> None:
        super().__init__()
        inputs = [n_features, *[width] * (n_layers - 1)]
        self.layers = nn.ModuleList(GraphConvolution(n_inputs, width) for n_inputs in inputs)

    def forward(self, x: Tensor, matrix: Tensor, graph_of: Tensor) -> tuple[Tensor, Tensor]:
        """Return the last layer's nodes ``[n_nodes, width]``, and each layer's sums ``[B, n_layers * width]``.

        Args:
            x: Floats ``[n_nodes, n_features]``.
            matrix: Floats ``[B, n, n]``, padded to the largest graph: what each node takes from the others.
            graph_of: int64 ``[n_nodes]``, ascending: which graph each node belongs to.
        """
        sums = []
        for layer in self.layers:
            x = layer(x, matrix, graph_of)
            sums.append(global_add_pool(x.float(), graph_of, size=len(matrix)))
        return x, torch.cat(sums, dim=1).to(x.dtype)


class GraphConvolution(nn.Linear):
    """Computes ``PReLU(matrix @ x @ weight + bias)``, initialised as in the public code.

    Args:
        n_inputs: Width of the inputs.
        width: Width of the outputs.
    """

    def __init__(self, n_inputs: int, width: int) -> None:
        super().__init__(n_inputs, width)
        nn.init.xavier_uniform_(self.weight)
        nn.init.zeros_(self.bias)
        self.activation = nn.PReLU()

    def forward(self, x: Tensor, matrix: Tensor, graph_of: Tensor) -> Tensor:  # type: ignore[override]
        """Return the nodes' outputs, floats ``[n_nodes, width]``, for the arguments of :class:`GCN`."""
        # Only this product needs padded graphs: most rows of a padded batch are no nodes.
        weighted = F.linear(x.to(self.weight.dtype), self.weight)
        padded, is_node = to_dense_batch(weighted, graph_of, batch_size=len(matrix), max_num_nodes=matrix.shape[1])
        outputs: Tensor = self.activation((matrix.to(padded.dtype) @ padded)[is_node] + self.bias)
        return outputs


class Head(nn.Module):
    """Three linear layers with PReLU, and a linear shortcut around them.

    Args:
        n_inputs: Width of the inputs.
        width: Width of the outputs.
    """

    def __init__(self, n_inputs: int, width: int) -> None:
        super().__init__()
        layers = (nn.Linear(n_inputs, width), nn.Linear(width, width), nn.Linear(width, width))
        self.layers = nn.Sequential(*(each for layer in layers for each in (layer, nn.PReLU())))
        self.shortcut = nn.Linear(n_inputs, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return floats ``[..., width]`` for floats ``[..., n_inputs]``."""
        outputs: Tensor = self.layers(x) + self.shortcut(x)
        return outputs


def adjacency_and_diffusion(graphs: Batch, teleport: float) -> tuple[Tensor, Tensor]:
    """Return the two views of each graph as matrices.

    Args:
        graphs: A batch of graphs. An edge counts in both directions.
        teleport: PageRank's probability to start again.

    Returns:
        Floats ``[B, n, n]``, padded to the largest graph: the adjacency with self-loops, symmetrically normalised, and
        its diffusion ``teleport * (I - (1 - teleport) * adjacency)^-1``.
    """
    with torch.autocast(graphs.x.device.type, enabled=False):  # no inverse in half precision
        adjacency = to_dense_adj(graphs.edge_index, graphs.batch, batch_size=graphs.num_graphs).clamp_max(1).float()
        adjacency = torch.maximum(adjacency, adjacency.mT)
        identity = torch.eye(adjacency.shape[1], device=adjacency.device, dtype=torch.float32)
        adjacency = adjacency + identity
        scale = adjacency.sum(dim=2).rsqrt()
        adjacency = scale[:, :, None] * adjacency * scale[:, None, :]
        # The matrix is symmetric, and its eigenvalues are at least `teleport`. A check of that would wait for a GPU.
        # On a CPU with several threads, `torch.linalg.inv_ex` of a batch is wrong (pytorch issue 141358, torch 2.13).
        factor, _ = torch.linalg.cholesky_ex(identity - (1 - teleport) * adjacency)
        return adjacency, teleport * torch.cholesky_inverse(factor)


def local_global_loss(nodes: Tensor, wholes: Tensor, graph_of: Tensor) -> Tensor:
    """Compute the Jensen-Shannon estimate of how much nodes tell about their graphs, with a minus sign.

    Args:
        nodes: Floats ``[n_nodes, d]``, nodes of one view.
        wholes: Floats ``[B, d]``, graphs of the other view.
        graph_of: int64 ``[n_nodes]``: which graph each node belongs to.

    Returns:
        A differentiable scalar: the mean over negative pairs, minus the mean over positive pairs.
    """
    scores = (nodes @ wholes.T).float()
    is_positive = graph_of[:, None] == torch.arange(len(wholes), device=nodes.device)
    # softplus(-s) + s is softplus(s); the constants log 2 of both parts are left out.
    # A batch may have no pair of a kind: graphs without nodes, or only one graph. The mean of nothing would be NaN.
    negative, positive = F.softplus(scores[~is_positive]), F.softplus(-scores[is_positive])
    return negative.sum() / max(len(negative), 1) + positive.sum() / max(len(positive), 1)
