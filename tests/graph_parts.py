"""Parts of the tests of the graph recipes: tiny graphs, and a folder of TUDataset's raw files.

``python graph_parts.py FOLDER`` trains each recipe in two processes. Each rank writes what it saw to ``FOLDER``.
"""

import json
import sys
from pathlib import Path

import torch
from lightning.pytorch import seed_everything
from parts import Records, trainer, walker
from torch_geometric.data import Data

from bs_lightning.recipes.graph_data import GraphDataModule
from bs_lightning.recipes.graphcl import GraphCL, GraphCLDataModule
from bs_lightning.recipes.mvgrl import MVGRL

RECIPES = {
    "graphcl": (lambda: GraphCL(2, width=8), GraphCLDataModule),
    "mvgrl": (lambda: MVGRL(2, width=16, learning_rate=0.02), GraphDataModule),
}


def both_directions(pairs):
    """Return undirected edges as ``edge_index``."""
    one = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).T
    return torch.cat([one, one.flip(0)], dim=1)


def cycle(n):
    return both_directions([(i, (i + 1) % n) for i in range(n)])


def star(n):
    return both_directions([(0, i) for i in range(1, n)])


def tiny_graphs(n=40):
    """Return cycles (label 0) and stars (label 1) of 5 to 8 nodes with two features; graph 3 has no edges."""
    graphs, generator = [], torch.Generator().manual_seed(0)
    for i in range(n):
        size = 5 + i // 2 % 4
        edges = (cycle, star)[i % 2](size) if i != 3 else torch.empty(2, 0, dtype=torch.int64)
        x = torch.randn(2, generator=generator) + 0.1 * torch.randn(size, 2, generator=generator)
        graphs.append(Data(x=x, edge_index=edges, y=torch.tensor([i % 2])))
    return graphs


def write_tu(folder, graphs, n_node_labels=7):
    """Write graphs as TUDataset's raw files; nodes get labels from 0 to ``n_node_labels - 1``, in turn."""
    name = folder.name
    (folder / "raw").mkdir(parents=True)
    edges, owners, start = [], [], 1
    for number, graph in enumerate(graphs, start=1):
        edges += [f"{a + start}, {b + start}" for a, b in graph.edge_index.T.tolist()]
        owners += [number] * graph.num_nodes
        start += graph.num_nodes
    lines = {"A": edges, "graph_indicator": owners, "graph_labels": [int(graph.y) for graph in graphs]}
    if n_node_labels:
        lines["node_labels"] = [i % n_node_labels for i in range(len(owners))]
    for kind, values in lines.items():
        (folder / "raw" / f"{name}_{kind}.txt").write_text("".join(f"{value}\n" for value in values))


def train(folder):
    """Train each recipe in two processes, and write what this process saw."""
    saw = {}
    for name, (model, data) in RECIPES.items():
        seed_everything(0)
        module, records = model(), Records()
        made = trainer(walker(16), records, strategy="ddp", devices=2)
        made.fit(module, datamodule=data(tiny_graphs(), batch_size=4))
        weights = [float(p.sum()) for p in module.parameters()]
        saw[name] = {"epochs": records.epochs, "weights": weights, "loss": float(made.callback_metrics["train/loss"])}
    (folder / f"rank{made.global_rank}.json").write_text(json.dumps(saw))


if __name__ == "__main__":
    train(Path(sys.argv[1]))
    torch.distributed.barrier()  # gloo's threads may abort a process that leaves while the other is still there
    torch.distributed.destroy_process_group()
