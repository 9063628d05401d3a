"""The benchmark of the graph recipes: its arms, and resuming."""

from functools import partial

import numpy as np
import pytest
import torch
from graph_parts import cycle, star, write_tu
from torch_geometric.data import Data

from benchmarks import csv_files
from benchmarks.recipes import graphs, page
from benchmarks.runs import run_missing, wanted
from bs_lightning import Composer

SETTINGS = {"loss": "infonce", "batch_size": 8, "epochs": 3}


@pytest.fixture
def data_dir(tmp_path):
    """A TU dataset of cycles and stars, without node labels."""
    made = [Data(edge_index=(cycle, star)[i % 2](5 + i % 3), num_nodes=5 + i % 3) for i in range(42)]
    for i, graph in enumerate(made):
        graph.y = torch.tensor([i % 2])
    write_tu(tmp_path / "MUTAG", made, n_node_labels=0)
    return tmp_path


@pytest.mark.parametrize("model", ["graphcl", "mvgrl"])
def test_a_whole_run(model, data_dir, tmp_path):
    """Runs that the file holds are not repeated, and the folder of the raw data is not written to."""
    settings = SETTINGS if model == "graphcl" else {**SETTINGS, "loss": "jsd", "n_layers": 2, "width": 8}
    runs = list(wanted({"model": model, "dataset": "MUTAG"}, ["knn", "untrained"], [0], settings))

    def go_on():
        return list(run_missing(runs, partial(graphs.run, data_dir), tmp_path / "results.csv"))

    rows = go_on()
    assert [row["arm"] for row in rows] == ["knn", "untrained"]
    assert go_on() == []
    for row in csv_files.read(tmp_path / "results.csv"):
        folds = [float(row[f"fold/{fold}"]) for fold in range(10)]
        assert float(row["result/accuracy"]) == pytest.approx(np.mean(folds), abs=1e-5)
    assert rows[0]["last_epoch/epochs"] == 3
    assert [path.name for path in (data_dir / "MUTAG").iterdir()] == ["raw"]
    assert "### " + model in "\n".join(page.sections(tmp_path / "results.csv"))


@pytest.mark.parametrize("arm", graphs.ARMS)
def test_a_single_batch_cannot_be_composed(arm, data_dir):
    """Of 42 graphs, an epoch has one full batch of 22: all arms have the same batches."""
    chosen = {"model": "graphcl", "dataset": "MUTAG", "arm": arm, "seed": 0, **SETTINGS, "batch_size": 22}
    if arm in ("fixed", "uniform", "untrained"):
        assert "result/accuracy" in graphs.run(data_dir, chosen)
    else:
        with pytest.raises(SystemExit, match="42 graphs of MUTAG make one full batch of 22"):
            graphs.run(data_dir, chosen)


def test_fixed_batches_stay_and_uniform_batches_change(data_dir, monkeypatch):
    served = {}

    class Keeps(graphs.LastBatches):
        def on_train_epoch_end(self, trainer, module):
            served.setdefault(arm, []).append([batch.tolist() for batch in self.batches])

    monkeypatch.setattr(graphs, "LastBatches", Keeps)
    for arm in ("fixed", "uniform"):
        made = graphs.load(data_dir, "MUTAG", with_degrees=False)
        graphs.train(*graphs.make("graphcl", made, SETTINGS), arm, 3, None)
    for epochs in served.values():
        assert all(sorted(sum(batches, [])) == list(range(42)) for batches in epochs)
    assert served["fixed"][0] == served["fixed"][1] == served["fixed"][2]
    assert served["uniform"][0] != served["uniform"][1]


@pytest.mark.parametrize("loss", graphs.LOSSES)
def test_every_loss_is_low_for_pairs_that_are_alike(loss):
    first, other = torch.eye(8), torch.eye(8).roll(1, 0)
    assert graphs.LOSSES[loss]()(first, first) < graphs.LOSSES[loss]()(first, other)


def test_nearest_with_replacement():
    """Each batch is an instance and its nearest."""
    composer = graphs.NearestWithReplacement()
    assert isinstance(composer, Composer)
    angles = torch.linspace(0, 3, 12)
    embeddings = torch.stack([angles.cos(), angles.sin()], dim=1)
    batches = composer(embeddings, 4, seed=0, epoch=0)
    assert batches.shape == (3, 4)
    for root, *others in batches.tolist():
        nearest = sorted(set(range(12)) - {root}, key=lambda i: abs(i - root))
        assert {abs(i - root) for i in others} == {abs(i - root) for i in nearest[:3]}


def test_degrees_are_features_of_mvgrl(data_dir):
    plain, with_degrees = (graphs.load(data_dir, "MUTAG", with_degrees=flag) for flag in (False, True))
    assert plain[1].x is None
    assert with_degrees[1].x.argmax(dim=1).tolist() == [5, 1, 1, 1, 1, 1]  # a star of six nodes
