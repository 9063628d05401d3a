"""GraphCL and MVGRL: against literal versions, and trained as users train them."""

import contextlib
import importlib
import json
import math
import sys
from pathlib import Path

import graph_parts
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from graph_parts import RECIPES, both_directions, cycle, star, tiny_graphs, write_tu
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from parts import Records, assert_equal, trainer, walker
from processes import finish
from test_docs import printed
from torch_geometric.data import Batch, Data
from torch_geometric.transforms import OneHotDegree

from bs_lightning.losses import DebiasedLoss, HardLoss
from bs_lightning.recipes.__main__ import main
from bs_lightning.recipes.graph_data import GraphDataModule, Graphs
from bs_lightning.recipes.graph_evaluation import represent, svm_accuracies
from bs_lightning.recipes.graphcl import (
    GraphCL,
    GraphCLDataModule,
    GraphCLLoss,
    drop_nodes,
    mask_attributes,
    perturb_edges,
    sample_subgraph,
)
from bs_lightning.recipes.mvgrl import MVGRL, adjacency_and_diffusion, local_global_loss

both = pytest.mark.parametrize("recipe", RECIPES)


def big_graph(n=60):
    """A cycle with some chords. Feature 0 is the node's number."""
    edges = torch.cat([cycle(n), both_directions([(i, (i + 7) % n) for i in range(0, n, 3)])], dim=1)
    return Data(x=torch.stack([torch.arange(n) + 0.0, torch.ones(n)], dim=1), edge_index=edges)


def numbered_edges(graph):
    """The edges, as pairs of the numbers that the nodes had before an augmentation."""
    return [(int(graph.x[a, 0]), int(graph.x[b, 0])) for a, b in graph.edge_index.T.tolist()]


# Training


@both
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_training_lowers_the_loss(recipe, precision):
    make, data = RECIPES[recipe]
    module = make()
    losses = []

    class Losses(Records):
        def on_train_epoch_end(self, trainer, module):
            losses.append(float(trainer.callback_metrics["train/loss"]))

    records = Losses()
    made = trainer(walker(16), records, max_epochs=8, precision=precision)
    made.fit(module, datamodule=data(tiny_graphs(), batch_size=8))
    assert math.isfinite(losses[-1])
    assert np.mean(losses[-3:]) < losses[0] - 0.1
    assert all(sorted(sum(batches, [])) == list(range(40)) for batches in records.epochs.values())
    assert {"batch_sampler/hardness", "batch_sampler/false_negative_rate"} <= made.callback_metrics.keys()


@both
def test_a_run_resumed_in_mid_epoch_goes_on_with_its_batches(recipe, tmp_path):
    make, data = RECIPES[recipe]

    def train(ckpt_path=None, **options):
        seed_everything(0, verbose=False)
        records = Records()
        saves = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=7, save_top_k=-1)
        made = trainer(walker("all"), records, saves, enable_checkpointing=True, **options)
        made.fit(make(), datamodule=data(tiny_graphs(), batch_size=8), ckpt_path=ckpt_path)
        return records.epochs

    whole = train()
    resumed = train(ckpt_path=tmp_path / "step=7.ckpt")
    assert [len(batches) for batches in whole.values()] == [5, 5]
    assert resumed == {1: whole[1][2:]}


@pytest.mark.slow
def test_two_processes(tmp_path):
    done = finish([sys.executable, graph_parts.__file__, tmp_path])
    assert done.returncode == 0, done.error[-4000:]
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2))
    for recipe in RECIPES:
        assert first[recipe] == second[recipe]  # weights, loss, and the global batches
        assert all(sorted(sum(batches, [])) == list(range(40)) for batches in first[recipe]["epochs"].values())


@pytest.mark.parametrize("name", ["graphcl", "mvgrl"])
def test_the_examples_yaml(name, tmp_path):
    """Each YAML trains, with graphs in MUTAG's format, which has 7 node labels and degrees of at most 4."""
    write_tu(tmp_path / "MUTAG", [Data(edge_index=cycle(8 + i % 3), y=torch.tensor([i % 2])) for i in range(70)])
    config = Path(__file__).parents[1] / "examples" / f"{name}.yaml"
    args = [name, "fit", f"--config={config}", f"--data.dataset.init_args.root={tmp_path}"]
    args += ["--trainer.max_epochs=2", f"--trainer.default_root_dir={tmp_path}", "--trainer.accelerator=cpu"]
    args += ["--trainer.logger=false", "--trainer.enable_progress_bar=false"]
    cli = main(args)
    assert cli.trainer.global_step == 2 * 2
    assert "batch_sampler/walk_seconds" in cli.trainer.callback_metrics


def test_the_documentations_example(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    graphs = [Data(edge_index=(cycle, star)[i % 2](6), num_nodes=6, y=torch.tensor([i % 2])) for i in range(140)]
    write_tu(tmp_path / "data" / "tu" / "PROTEINS", graphs, n_node_labels=3)
    (code,) = printed("docs/reference/recipes-graphs.md")
    exec(code.replace("max_epochs=20", "max_epochs=2"), {})
    assert float(capsys.readouterr().out.split()[-1]) > 0.9


# GraphCL


def test_representation_is_that_of_a_literal_network():
    """Sums over nodes after each layer, with the adjacency as a matrix."""
    model = GraphCL(2, width=4, n_layers=3)
    trainer(max_epochs=1).fit(model, datamodule=GraphCLDataModule(tiny_graphs(), batch_size=8))  # moves batch norm
    graph = tiny_graphs()[2]
    adjacency = torch.zeros(graph.num_nodes, graph.num_nodes)
    adjacency[graph.edge_index[1], graph.edge_index[0]] = 1
    x, sums = graph.x, []
    with torch.no_grad():
        for layer, norm in zip(model.layers, model.norms, strict=True):
            x = layer.nn(x + adjacency @ x).relu()
            x = (x - norm.running_mean) / (norm.running_var + norm.eps).sqrt() * norm.weight + norm.bias
            sums.append(x.sum(dim=0))
    found = represent(model, tiny_graphs(), batch_size=7)
    assert found.shape == (40, 12)
    torch.testing.assert_close(found[2], torch.cat(sums))
    assert model.training


@pytest.mark.parametrize("graph", [tiny_graphs()[0], Data(x=torch.ones(4, 3))], ids=["fits", "is refused"])
def test_each_part_of_a_represented_model_keeps_its_mode(graph):
    model = GraphCL(2, width=4)
    model.norms.eval()  # as of a frozen part
    modes = [part.training for part in model.modules()]
    with contextlib.suppress(ValueError):
        represent(model, [graph])
    assert [part.training for part in model.modules()] == modes


def test_loss_leaves_the_positive_out_of_the_denominator():
    first, second = torch.randn(2, 5, 3, dtype=torch.float64)
    masked = torch.zeros(5, 5, dtype=torch.bool)
    masked[1, 2] = masked[3, :] = True
    losses = []
    for i, anchor in enumerate(first):
        scores = [math.exp(F.cosine_similarity(anchor, other, dim=0) / 0.2) for other in second]
        negatives = [score for j, score in enumerate(scores) if j != i and not masked[i, j]]
        losses.append(-math.log(scores[i] / sum(negatives)) if negatives else 0)
    assert float(GraphCLLoss()(first, second, masked)) == pytest.approx(np.mean(losses))
    with pytest.raises(ValueError, match="temperature must be finite and above 0, got 0"):
        GraphCLLoss(temperature=0)
    assert GraphCL(2).loss.gather  # composed batches span the processes


@pytest.mark.parametrize("loss", [DebiasedLoss, HardLoss])
def test_trains_with_the_librarys_losses(loss):
    model = GraphCL(2, width=4, loss=loss(temperature=0.2, class_prior=0.1, negatives="second"))
    before = [p.clone() for p in model.parameters()]
    trainer(max_epochs=1).fit(model, datamodule=GraphCLDataModule(tiny_graphs(), batch_size=8))
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_drop_nodes():
    graph = big_graph()
    view = drop_nodes(graph)
    kept = view.x[:, 0].tolist()
    assert len(kept) == 54
    assert numbered_edges(view) == [(a, b) for a, b in numbered_edges(graph) if a in kept and b in kept]
    assert drop_nodes(graph).x[:, 0].tolist() != kept
    assert drop_nodes(graph, share=1.0).num_nodes == 1


def test_perturb_edges():
    graph = big_graph()
    before, after = numbered_edges(graph), numbered_edges(perturb_edges(graph))
    assert len(after) == len(before) == 160
    assert 144 <= sum(edge in set(before) for edge in after) < 160  # an added edge may have been there


def test_mask_attributes():
    graph = big_graph()
    before = graph.x.clone()
    view = mask_attributes(graph)
    assert torch.equal(graph.x, before)
    assert int((view.x != before).any(dim=1).sum()) == 6
    assert torch.equal(view.edge_index, graph.edge_index)
    noise = mask_attributes(Data(x=torch.zeros(10_000, 1), edge_index=graph.edge_index), share=1.0).x
    assert (float(noise.mean()), float(noise.std())) == pytest.approx((0.5, 0.5), abs=0.03)


def test_sample_subgraph():
    graph = big_graph()
    view = sample_subgraph(graph, share=0.3)
    kept = {int(number) for number in view.x[:, 0]}
    assert len(kept) == 18
    edges = numbered_edges(view)
    assert edges == [(a, b) for a, b in numbered_edges(graph) if a in kept and b in kept]
    reached = {min(kept)}
    for _ in kept:
        reached |= {b for a, b in edges if a in reached}
    assert reached == kept
    two_parts = Data(x=torch.ones(9, 1), edge_index=torch.cat([cycle(5), cycle(4) + 5], dim=1))
    assert sample_subgraph(two_parts).num_nodes in (4, 5)


@pytest.mark.parametrize("augment", [drop_nodes, perturb_edges, mask_attributes, sample_subgraph])
@pytest.mark.parametrize("n_nodes", [0, 1, 3])
def test_augmentations_of_graphs_without_edges(augment, n_nodes):
    view = augment(Data(x=torch.ones(n_nodes, 2), edge_index=torch.empty(2, 0, dtype=torch.int64)))
    assert min(n_nodes, 1) <= view.num_nodes <= n_nodes
    assert view.num_edges == 0


def test_each_view_is_made_by_a_random_augmentation():
    def first(graph):
        return Data(x=graph.x + 1, edge_index=graph.edge_index)

    def second(graph):
        return Data(x=graph.x + 2, edge_index=graph.edge_index)

    data = GraphCLDataModule(tiny_graphs(), 20, augmentations=[first, second])
    graphs, views = next(iter(data.train_dataloader()))
    added = (views.x - graphs.x).round()
    assert sorted(set(added.flatten().tolist())) == [1, 2]
    assert isinstance(data.pool_dataset()[0], Data)
    assert torch.equal(data.pool_dataset()[5].x, tiny_graphs()[5].x)
    with pytest.raises(ValueError, match="augmentations must name at least one"):
        GraphCLDataModule(tiny_graphs(), 20, augmentations=[])


# MVGRL


def test_views_are_those_of_the_public_code():
    graphs = [Data(x=torch.ones(5, 1), edge_index=star(5)), Data(x=torch.ones(3, 1), edge_index=cycle(3))]
    adjacency, diffusion = adjacency_and_diffusion(Batch.from_data_list(graphs), teleport=0.2)
    for number, graph in enumerate(graphs):
        n = graph.num_nodes
        matrix = np.eye(n)
        matrix[tuple(graph.edge_index.numpy())] = 1
        scale = np.diag(matrix.sum(axis=1) ** -0.5)
        normalised = scale @ matrix @ scale
        np.testing.assert_allclose(adjacency[number, :n, :n], normalised, atol=1e-6)
        expected = 0.2 * np.linalg.inv(np.eye(n) - 0.8 * normalised)
        np.testing.assert_allclose(diffusion[number, :n, :n], expected, atol=1e-6)
        assert not adjacency[number, :n, n:].any()
        assert not diffusion[number, :n, n:].any()


@pytest.mark.parametrize("threads", [1, 2])
def test_diffusions_of_large_graphs_are_right_on_any_number_of_threads(threads):
    before = torch.get_num_threads()
    generator = torch.Generator().manual_seed(0)
    one_way = [torch.randint(150, (2, 400), generator=generator) for _ in range(32)]
    graphs = Batch.from_data_list([Data(x=torch.ones(150, 1), edge_index=edges) for edges in one_way])
    try:
        torch.set_num_threads(threads)
        adjacency, diffusion = adjacency_and_diffusion(graphs, teleport=0.2)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(adjacency, adjacency.mT)  # an edge counts in both directions
    expected = 0.2 * np.linalg.inv(np.eye(150) - 0.8 * adjacency.double().numpy())
    np.testing.assert_allclose(diffusion, expected, atol=1e-5)


def test_local_global_loss_is_that_of_a_literal_sum():
    nodes, wholes, graph_of = torch.randn(5, 4), torch.randn(3, 4), torch.tensor([0, 0, 1, 2, 2])
    positive, negative = [], []
    for node, own in zip(nodes, graph_of, strict=True):
        for number, whole in enumerate(wholes):
            score = float(node @ whole)
            if number == own:
                positive.append(math.log(2) - math.log1p(math.exp(-score)))
            else:
                negative.append(math.log1p(math.exp(-score)) + score - math.log(2))
    expected = np.mean(negative) - np.mean(positive) + 2 * math.log(2)
    assert float(local_global_loss(nodes, wholes, graph_of)) == pytest.approx(expected)
    assert float(local_global_loss(nodes[:0], wholes, graph_of[:0])) == 0  # graphs without nodes


def test_nodes_of_each_view_are_compared_with_graphs_of_the_other(monkeypatch):
    model, graphs = MVGRL(2, width=4), Batch.from_data_list(tiny_graphs(6))
    monkeypatch.setattr(model, "log", lambda *_, **__: None)
    one, other = model.views(graphs)
    expected = 0
    for (nodes, _), (_, wholes) in ((one, other), (other, one)):
        expected += local_global_loss(model.node_head(nodes), model.graph_head(wholes), graphs.batch)
    torch.testing.assert_close(model.training_step(graphs, 0), expected)


@pytest.mark.parametrize("repeat", [lambda edges: edges[:, :5], lambda edges: edges.repeat(1, 2)])
def test_an_edge_counts_once_and_in_both_directions(repeat):
    graphs = [
        Batch.from_data_list([Data(x=torch.ones(5, 1), edge_index=edges(cycle(5)))]) for edges in (repeat, torch.clone)
    ]
    assert_equal(*(adjacency_and_diffusion(each, teleport=0.2) for each in graphs))


def test_both_views_train_both_networks():
    model = MVGRL(2, width=4)
    model.training_step(Batch.from_data_list(tiny_graphs(6)), 0).backward()
    for part in (*model.networks, model.node_head, model.graph_head):
        assert all(p.grad is not None for p in part.parameters())
        assert any(p.grad.any() for p in part.parameters())


@both
def test_a_graphs_representation_does_not_depend_on_its_batch(recipe):
    model = RECIPES[recipe][0]()
    together = represent(model, tiny_graphs(), batch_size=40)
    torch.testing.assert_close(represent(model, tiny_graphs(), batch_size=1), together)
    assert float(together.std(dim=0).max()) > 0.01


# Data


def test_graphs_without_features_or_edges():
    plain = [Data(edge_index=cycle(4), num_nodes=4), Data(num_nodes=3), Data(x=torch.tensor([[2], [3]]))]
    batch = next(iter(GraphDataModule(plain, batch_size=3).train_dataloader()))
    assert batch.x.dtype == torch.float32
    assert sorted(batch.x.flatten().tolist()) == [1.0] * 7 + [2.0, 3.0]
    assert batch.edge_index.shape == (2, 8)
    assert [graph.num_nodes for graph in batch.to_data_list()] == torch.bincount(batch.batch).tolist()
    assert Graphs([OneHotDegree(2)(plain[0])])[0].x.tolist() == [[0, 0, 1]] * 4
    for make, _ in RECIPES.values():
        assert represent(make(), [Data(x=torch.ones(2, 2)), Data(x=torch.ones(1, 2))]).isfinite().all()


def test_labels_are_the_graphs_y():
    graphs = tiny_graphs()
    assert GraphDataModule(graphs, 8).train_labels().tolist() == [0, 1] * 20
    graphs[4].y = 0  # `Data` holds plain numbers, too
    assert GraphDataModule(graphs, 8).train_labels().tolist() == [0, 1] * 20
    for y in (torch.tensor([0.5]), torch.tensor([1, 0]), 0.5, "one", None):
        graphs[4].y = y
        assert GraphDataModule(graphs, 8).train_labels() is None


def test_graphcl_returns_the_embeddings_that_were_compared():
    class Compares(Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            with torch.no_grad():
                self.sides = tuple(module.embed(view) for view in batch)

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            torch.testing.assert_close(outputs["embeddings"], self.sides)
            torch.testing.assert_close(outputs["loss"], GraphCLLoss()(*self.sides))

    trainer(Compares(), max_steps=2).fit(GraphCL(2, width=8), datamodule=GraphCLDataModule(tiny_graphs(), 8))


def test_graphcl_returns_what_recycle_keeps():
    made = trainer(walker(16, recycle=True), max_epochs=2)
    made.fit(GraphCL(2, width=8), datamodule=GraphCLDataModule(tiny_graphs(), batch_size=8))
    assert made.callback_metrics["batch_sampler/hardness"] > made.callback_metrics["batch_sampler/uniform_hardness"]


def test_bad_graphs_are_refused():
    with pytest.raises(TypeError, match=r"dataset must hold torch_geometric.data.Data, but dataset\[0\] is 3"):
        GraphDataModule([3], 2)
    with pytest.raises(ValueError, match="dataset must hold at least one graph"):
        GraphDataModule([], 2)
    with pytest.raises(ValueError, match=r"Graph 1 has no nodes, edges or features\. Set its num_nodes\."):
        Graphs([Data(num_nodes=1), Data()])[1]
    with pytest.raises(ValueError, match=r"x of graph 0 must have shape \[n_nodes, n_features\], got shape \[4\]"):
        Graphs([Data(x=torch.ones(4))])[0]
    three_edges = torch.tensor([[0, 1], [1, 2], [2, 0]])
    for edges in (three_edges, three_edges.T.int(), three_edges.T.float()):
        with pytest.raises(ValueError, match=r"edge_index of graph 0 must be int64 of shape \[2, n_edges\], got torch"):
            Graphs([Data(edge_index=edges, num_nodes=3)])[0]
    with pytest.raises(ValueError, match="edge_index of graph 0 must name nodes from 0 to 1, got 0 to 2"):
        Graphs([Data(edge_index=three_edges.T, num_nodes=2)])[0]
    with pytest.raises(ValueError, match="Graph 0 holds its edges as a sparse matrix"):
        Graphs([Data(x=torch.ones(4, 1), adj_t=torch.eye(4).to_sparse())])[0]
    for make, _ in RECIPES.values():
        with pytest.raises(ValueError, match="3 features for each node, but the model has n_features=2"):
            represent(make(), [Data(x=torch.ones(4, 3))])


@pytest.mark.parametrize(
    ("model", "data", "words"),
    [
        (GraphCL, GraphDataModule, "GraphCL takes graphs and their views, got one batch of graphs. Use GraphCLDataM"),
        (
            MVGRL,
            GraphCLDataModule,
            "got a tuple of 2. GraphCL needs GraphCLDataModule, and MVGRL needs GraphDataModule",
        ),
    ],
)
def test_the_data_of_the_other_model_are_refused(model, data, words):
    batch = next(iter(data(tiny_graphs(), 8).train_dataloader()))
    with pytest.raises(TypeError, match=words):
        model(2, width=8).training_step(batch, 0)


@pytest.mark.parametrize("augmentations", [lambda graph: graph, ["drop"], 3])
def test_augmentations_are_a_list_of_functions(augmentations):
    with pytest.raises(TypeError, match=r"augmentations must be a list of functions, such as \[drop_nodes\], got"):
        GraphCLDataModule(tiny_graphs(), 8, augmentations)


@pytest.mark.parametrize("teleport", [-0.2, 0, 1.5, math.nan])
def test_mvgrl_refuses_what_is_no_probability(teleport):
    with pytest.raises(ValueError, match=rf"teleport must lie in \(0, 1\], got {teleport}"):
        MVGRL(2, teleport=teleport)


@pytest.mark.parametrize("module", ["graph_data", "graph_evaluation", "graphcl", "mvgrl"])
def test_a_missing_extra_says_how_to_install_it(module, monkeypatch):
    missing = ("sklearn.svm",) if module == "graph_evaluation" else ("torch_geometric", "torch_geometric.data")
    for name in (*missing, f"bs_lightning.recipes.{module}"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, f"bs_lightning.recipes.{module}")
    with pytest.raises(ImportError, match=r"pip install 'bs-lightning\[graphs\]'"):
        importlib.import_module(f"bs_lightning.recipes.{module}")


# Evaluation


@pytest.mark.slow
def test_svm_accuracies():
    generator = np.random.default_rng(0)
    x = generator.uniform(-1, 1, size=(40, 2))
    labels = (x[:, 0] * x[:, 1] > 0).astype(int)  # no line separates them
    curved, straight = (svm_accuracies(x, labels, kernel=kernel) for kernel in ("rbf", "linear"))
    assert curved.shape == (10,)
    assert curved.mean() > 0.75 > straight.mean()
    assert np.array_equal(curved, svm_accuracies(torch.tensor(x), torch.tensor(labels)))
    assert not np.array_equal(curved, svm_accuracies(x, labels, seed=1))
    far = x * [1, 1e9]  # a machine without a limit of iterations would never end
    assert svm_accuracies(far, labels, kernel="linear").shape == (10,)
    with pytest.raises(ValueError, match="at least 10 graphs of each class for 10 folds, got a class of 9"):
        svm_accuracies(x[:20], [0] * 9 + [1] * 11)
