"""GraphCL and MVGRL on TU datasets: train each arm, and measure it by ten-fold cross-validation.

Arms of a seed differ in their batches only, and are measured on the same folds. All settings are the papers' or the
public codes', and none is chosen on test folds.
"""

import argparse
import shutil
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import LightningModule, seed_everything
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from threadpoolctl import threadpool_limits
from torch import Tensor, nn
from torch_geometric.data import Data
from torch_geometric.datasets import TUDataset
from torch_geometric.transforms import OneHotDegree
from torch_geometric.utils import degree

from bs_lightning import BatchSamplerCallback, Composer, ExactGraph, RWRComposer
from bs_lightning.baselines import knn_batches
from bs_lightning.losses import DebiasedLoss, HardLoss
from bs_lightning.metrics import InBatchFalseNegativeRate, InBatchHardness
from bs_lightning.recipes.graph_data import GraphDataModule
from bs_lightning.recipes.graph_evaluation import represent, svm_accuracies
from bs_lightning.recipes.graphcl import GraphCL, GraphCLDataModule, GraphCLLoss
from bs_lightning.recipes.mvgrl import MVGRL

from ..csv_files import Row
from ..runs import run_missing, show, wanted
from ..trainers import make_trainer
from .last_epoch import LastBatches

DATASETS = ("MUTAG", "IMDB-BINARY", "IMDB-MULTI", "PROTEINS", "NCI1")
SETTINGS: dict[str, dict[str, Any]] = {
    "graphcl": {"loss": "infonce", "batch_size": 128, "epochs": 20},
    "mvgrl": {"loss": "jsd", "batch_size": 128, "epochs": 100, "n_layers": 2, "width": 512},
}
PATIENCE = 20  # MVGRL's, in epochs; GraphCL trains all epochs
CLASS_PRIOR = 0.1  # as in the debiased loss's paper; with 1 / 2 and a temperature of 0.2 the negatives have no gradient
LOSSES: dict[str, Callable[[], nn.Module]] = {
    "infonce": GraphCLLoss,
    "debiased": lambda: DebiasedLoss(temperature=0.2, class_prior=CLASS_PRIOR, negatives="second"),
    "hard": lambda: HardLoss(temperature=0.2, class_prior=CLASS_PRIOR, negatives="second"),
}


# Arms


class NearestWithReplacement(Composer):
    """The paper's kNN sampler where batches may share instances: random instances, each with its nearest of all."""

    replacement = True

    def __call__(self, embeddings: Any, batch_size: int, *, seed: int, epoch: int) -> Any:
        """Compose batches."""
        neighbors = ExactGraph(batch_size - 1)(embeddings, seed=seed)
        roots = np.random.default_rng(seed).permutation(len(neighbors))[: len(neighbors) // batch_size]
        return np.column_stack([roots, neighbors[roots]]).astype(np.int64)


def walk(replacement: bool = False) -> RWRComposer:
    """Return a composer of random walks on an exact graph, which needs no compilation."""
    return RWRComposer(ExactGraph(15), replacement=replacement)


# An epoch ends with a uniform batch of what is left: all graphs count, as in the public codes.
ARMS: dict[str, Callable[[], BatchSamplerCallback | None]] = {
    "fixed": lambda: None,  # the same uniform batches in all epochs, as GraphCL's public code
    "uniform": lambda: None,
    "knn": lambda: BatchSamplerCallback(None, knn_batches),
    "batchsampler": lambda: BatchSamplerCallback(None, walk()),
    # Of the whole dataset, where batches may share graphs: the paper's manner
    "knn-replacement": lambda: BatchSamplerCallback(None, NearestWithReplacement(), refresh_every=100),
    "batchsampler-replacement": lambda: BatchSamplerCallback(None, walk(replacement=True), refresh_every=100),
    "untrained": lambda: None,
}


# One run


def load(data_dir: Path, name: str, *, with_degrees: bool) -> list[Data]:
    """Read a TU dataset.

    Args:
        data_dir: A folder with ``NAME/raw/NAME_A.txt`` and so on. It is not written to.
        name: The dataset's name.
        with_degrees: Whether nodes get their degree as one-hot features, as in MVGRL's public code.
    """
    with tempfile.TemporaryDirectory() as scratch:  # TUDataset writes beside the raw files
        shutil.copytree(data_dir / name / "raw", Path(scratch) / name / "raw")
        graphs: list[Data] = list(TUDataset(scratch, name))
    if with_degrees:
        largest = max(int(degree(graph.edge_index[0], graph.num_nodes).max()) for graph in graphs)
        graphs = [OneHotDegree(largest)(graph) for graph in graphs]
    return graphs


def make(model: str, graphs: list[Data], settings: Row) -> tuple[LightningModule, GraphDataModule]:
    """Return a recipe's model and its data."""
    n_features = 1 if graphs[0].x is None else graphs[0].num_features
    size = settings["batch_size"]
    if model == "graphcl":
        loss = LOSSES[settings["loss"]]()
        return GraphCL(n_features, loss=loss), GraphCLDataModule(graphs, size, drop_last=False)
    network = MVGRL(n_features, width=settings["width"], n_layers=settings["n_layers"])
    return network, GraphDataModule(graphs, size, drop_last=False)


def train(model: LightningModule, data: GraphDataModule, arm: str, epochs: int, patience: int | None) -> Row:
    """Train an arm, and return what its last epoch was like.

    Args:
        model: What to train. With ``patience`` it gets the weights of the epoch with the lowest training loss.
        data: Its data.
        arm: A key of :data:`ARMS`.
        epochs: The most epochs to train.
        patience: Epochs without a lower training loss after which to stop; ``None`` trains all epochs.
    """
    callback, last = ARMS[arm](), LastBatches()
    with tempfile.TemporaryDirectory() as scratch:
        best = ModelCheckpoint(scratch, monitor="train/loss", save_weights_only=True, save_on_train_epoch_end=True)
        stop = EarlyStopping("train/loss", patience=patience or 0, check_on_train_epoch_end=True)
        trainer = make_trainer(
            epochs,
            [*([callback] if callback else []), last, *([best, stop] if patience else [])],
            overfit_batches=1.0 if arm == "fixed" else 0.0,
            enable_checkpointing=patience is not None,
        )
        trainer.fit(model, datamodule=data)
        if patience:
            model.load_state_dict(torch.load(best.best_model_path, weights_only=True)["state_dict"])
    described = {"epochs": trainer.current_epoch, "loss": float(trainer.callback_metrics["train/loss"])}
    labels, embed = data.train_labels(), Embed(model)
    assert labels is not None
    embeddings = represent(embed, data.dataset)
    rate, hardness = InBatchFalseNegativeRate(), InBatchHardness()
    for batch in last.batches:
        rate.update(labels[batch])
        hardness.update(embeddings[batch], labels[batch])
    described |= {"false_negative_rate": float(rate.compute()), "hardness": float(hardness.compute())}
    return {f"last_epoch/{name}": value for name, value in described.items()}


class Embed(nn.Module):
    """Calls what the callback calls to embed a batch."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Any) -> Tensor:
        """Return embeddings ``[B, d]``."""
        return getattr(self.model, "embed", self.model)(batch)


def run(data_dir: Path, chosen: Row) -> Row:
    """Train and measure once.

    Args:
        data_dir: See :func:`load`.
        chosen: Model, dataset, arm, seed and settings.

    Returns:
        The measures, whose names have a slash.

    Raises:
        SystemExit: If the arm composes, and an epoch has a single full batch, which no arm can compose.
    """
    start = time.perf_counter()
    model, arm, seed, size = chosen["model"], chosen["arm"], chosen["seed"], chosen["batch_size"]
    seed_everything(seed, verbose=False)
    graphs = load(data_dir, chosen["dataset"], with_degrees=model == "mvgrl")
    if ARMS[arm]() is not None and len(graphs) < 2 * size:
        raise SystemExit(
            f"--batch-size: the {len(graphs)} graphs of {chosen['dataset']} make one full batch of {size}, so {arm} "
            f"would have the batches of uniform. Give at most {len(graphs) // 2}."
        )
    network, data = make(model, graphs, chosen)
    patience = PATIENCE if model == "mvgrl" else None
    described = {} if arm == "untrained" else train(network, data, arm, chosen["epochs"], patience)
    kernel = "rbf" if model == "graphcl" else "linear"
    labels = data.train_labels()
    assert labels is not None
    accuracies = svm_accuracies(represent(network, graphs), labels, kernel=kernel, seed=seed)
    return {
        "result/accuracy": float(accuracies.mean()),
        **{f"fold/{fold}": float(accuracy) for fold, accuracy in enumerate(accuracies)},
        **described,
        "seconds/all": time.perf_counter() - start,
    }


# The command line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this benchmark's arguments."""
    parser.add_argument("--data-dir", required=True, type=Path, help="folder with NAME/raw/NAME_A.txt and so on")
    parser.add_argument("--datasets", nargs="+", default=["MUTAG"], choices=DATASETS, metavar="NAME")
    parser.add_argument("--model", default="graphcl", choices=SETTINGS)
    parser.add_argument("--arms", nargs="+", default=["fixed", "uniform", "knn", "batchsampler"], choices=ARMS)
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds")
    parser.add_argument("--results", required=True, type=Path, help="CSV file to add rows to")
    parser.add_argument("--threads", type=int, default=1)
    group = parser.add_argument_group("settings", "recorded in the results")
    group.add_argument("--loss", choices=[*LOSSES, "jsd"], help="graphcl only")
    for name in ("batch_size", "epochs", "n_layers", "width"):
        group.add_argument(f"--{name.replace('_', '-')}", type=int)


def main(args: argparse.Namespace) -> None:
    """Train and measure, and print a line for each run."""
    torch.set_num_threads(args.threads)
    threadpool_limits(args.threads)  # the threads that scikit-learn uses
    settings = dict(SETTINGS[args.model])
    for name in ("loss", "batch_size", "epochs", "n_layers", "width"):
        if getattr(args, name) is not None:
            if name not in settings or (name == "loss" and (args.loss == "jsd") != (args.model == "mvgrl")):
                raise SystemExit(f"{args.model} has no setting {name} {getattr(args, name)}.")
            settings[name] = getattr(args, name)
    for dataset in args.datasets:
        runs = wanted({"model": args.model, "dataset": dataset}, args.arms, range(args.seeds), settings)
        show(run_missing(runs, partial(run, args.data_dir), args.results))
