"""A study: every run that is not in the results yet is trained, measured and added to them."""

import csv
import logging
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import Trainer, seed_everything
from torch import Tensor
from torch.utils.data import Dataset

from bs_lightning import BatchSamplerCallback, BatchSamplerDataModule, PoolBatchSampler
from bs_lightning.isolation import no_trace
from bs_lightning.metrics import Alignment, InBatchFalseNegativeRate, InBatchHardness, Uniformity

from .arms import ARMS, Arm
from .cifar10 import CIFAR10ResNet18, CIFAR10SimCLR
from .losses import LOSSES, nt_xent, pair_logits
from .model import Contrastive, apply_in_chunks
from .omniglot import OmniglotPairs, OmniglotPairsGroupNorm, OmniglotSimCLR
from .task import Task
from .text import TextPairs, TextSimCSE

TASKS: dict[str, type[Task]] = {
    task.name: task
    for task in (
        OmniglotPairs,
        OmniglotPairsGroupNorm,
        OmniglotSimCLR,
        CIFAR10SimCLR,
        CIFAR10ResNet18,
        TextSimCSE,
        TextPairs,
    )
}
N_MEASURED_BATCHES = 20

Row = dict[str, Any]


# Training, as a user would


class WholeBatches(Dataset):
    """A data set that makes whole batches at once, which is fast: ``make(indices)``."""

    def __init__(self, size: int, make) -> None:
        self.size = size
        self.make = make

    def __len__(self) -> int:
        return self.size

    def __getitems__(self, indices: list[int]) -> Tensor:
        return self.make(torch.tensor(indices))


class Data(BatchSamplerDataModule):
    def __init__(self, task: Task, batch_size: int) -> None:
        super().__init__(batch_size, collate_fn=lambda batch: batch)
        self.task = task

    def train_dataset(self) -> Dataset:
        return WholeBatches(self.task.size, self.task.views)

    def pool_dataset(self) -> Dataset:
        return WholeBatches(self.task.size, self.task.clean)

    def train_labels(self) -> Tensor | None:
        return self.task.labels


def train(
    task: Task, arm: Arm, seed: int, settings: dict[str, Any], accelerator: str
) -> tuple[Contrastive, BatchSamplerCallback | None, Row]:
    """A trained model, the callback that it was trained with, and what that logged in the last epoch.

    Arms differ in nothing but their batches and loss: the same seed gives the same weights and the same random numbers
    for augmentation, and all train for the same number of steps.
    """
    seed_everything(seed, verbose=False)
    batch_size = settings["batch_size"]
    n_epochs = number_of_epochs(task, settings)
    loss = partial(LOSSES[arm.loss], temperature=settings["temperature"], class_prior=task.class_prior)
    steps = n_epochs * (task.size // batch_size)
    callback = arm.callback(batch_size, n_epochs)
    mask = {None: None, "labels": same_label, "nearest": Data.likely_false_negatives}[arm.masked]
    model = Contrastive(*task.networks(), loss, settings["learning_rate"], steps, mask)
    trainer = Trainer(
        max_epochs=n_epochs,
        callbacks=[] if callback is None else [callback],
        accelerator=accelerator,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, datamodule=Data(task, batch_size))
    logged = {
        f"last_epoch/{name.removeprefix('batch_sampler/')}": float(value)
        for name, value in trainer.callback_metrics.items()
        if name.startswith("batch_sampler/") and not name.endswith("_seconds")
    }
    return model, callback, logged


def number_of_epochs(task: Task, settings: dict[str, Any]) -> int:
    return round(settings["steps"] / (task.size // settings["batch_size"]))


def same_label(data: Data) -> Tensor:
    """Which pairs of the batch being trained are false negatives, bool ``[B, B]``."""
    own = data.task.labels[torch.from_numpy(data.trained_batch())]
    return own[:, None] == own


# What the batches are like


def own_batches(
    embeddings: Tensor, callback: BatchSamplerCallback | None, batch_size: int, seed: int, last_epoch: int
) -> Tensor:
    """Some of the batches that a callback makes of its model's embeddings, as in the last epoch.

    Returns:
        int64 ``[N_MEASURED_BATCHES, batch_size]``.
    """
    composer = getattr(callback, "composer", None)
    pool_size = getattr(callback, "pool_size", None) or len(embeddings)

    def plan(indices: np.ndarray, *, seed: int, epoch: int) -> np.ndarray:
        return composer(embeddings[indices], batch_size, seed=seed, epoch=last_epoch)

    sampler = PoolBatchSampler(
        len(embeddings),
        batch_size,
        pool_size=min(pool_size, len(embeddings)),
        plan_pool=None if composer is None else plan,
        replacement=getattr(composer, "replacement", False),
        seed=seed,
    )
    batches = torch.tensor(list(sampler))
    # Not the first: a pool's first walks are harder than its last.
    chosen = np.random.default_rng(seed).permutation(len(batches))[:N_MEASURED_BATCHES]
    return batches[torch.from_numpy(chosen)]


def describe_batches(
    model: Contrastive, task: Task, callback: BatchSamplerCallback | None, seed: int, settings: dict[str, Any]
) -> Row:
    """What the trained model makes of some batches of the arm's own, in training mode unless said otherwise.

    - ``loss``: NT-Xent, whatever the arm trained with.
    - ``hardness``: mean similarity of true negatives; ``hardness_clean`` of what the batches were made from: without
      augmentation, in eval mode. Batch norm brings the two apart.
    - ``alignment`` of the positive pairs.
    - ``uniformity`` of the batches; ``uniformity_mixed`` of the same instances in random batches.
    - ``false_negative_rate``, and ``false_negative_mass``, the share of false negatives in the softmax mass of all
      negatives: the part of the loss's pushing apart that is aimed at them.
    """
    size, temperature = settings["batch_size"], settings["temperature"]
    measured: dict[str, list[float]] = defaultdict(list)
    with no_trace(model), torch.no_grad():
        clean = torch.cat([model.embed(task.clean(chunk)) for chunk in torch.arange(task.size).split(1024)])
        batches = own_batches(clean, callback, size, seed, number_of_epochs(task, settings) - 1)
        mixed = batches.flatten()[torch.randperm(batches.numel())].reshape(batches.shape)
        model.train()
        for batch, random_batch in zip(batches, mixed, strict=True):
            labels = None if task.labels is None else task.labels[batch]
            first, second = model.embed(task.views(batch).flatten(0, 1)).chunk(2)
            other, _ = model.embed(task.views(random_batch).flatten(0, 1)).chunk(2)
            measured["loss"].append(nt_xent(first, second, temperature=temperature))
            measured["hardness"].append(InBatchHardness()(first, labels))
            measured["hardness_clean"].append(InBatchHardness()(clean[batch], labels))
            measured["alignment"].append(Alignment()(first, second))
            measured["uniformity"].append(Uniformity()(first))
            measured["uniformity_mixed"].append(Uniformity()(other))
            if labels is not None:
                measured["false_negative_rate"].append(InBatchFalseNegativeRate()(labels))
                measured["false_negative_mass"].append(false_negative_mass(first, second, labels, temperature))
    return {f"batch/{name}": float(np.mean(values)) for name, values in measured.items()}


def false_negative_mass(first: Tensor, second: Tensor, labels: Tensor, temperature: float) -> float:
    """The share of false negatives in the softmax mass of all negatives, mean over anchors."""
    logits, partner = pair_logits(first, second, temperature)
    logits[torch.arange(len(logits)), partner] = -torch.inf
    twice = labels.repeat(2)
    return float((logits.softmax(dim=1) * (twice[:, None] == twice)).sum(dim=1).mean())


# Results


def run(
    task_name: str, arm_name: str, seed: int, data_dir: Path, settings: dict[str, Any], accelerator: str = "cpu"
) -> Row:
    """Train and measure once.

    Returns:
        What was run, then measures: names with a slash.
    """
    start, cpu_start = time.perf_counter(), time.process_time()
    task = TASKS[task_name](data_dir, seed, settings)
    loaded = time.perf_counter()
    model, callback, logged = train(task, ARMS[arm_name], seed, settings, accelerator)
    trained = time.perf_counter()
    results = task.evaluate(partial(apply_in_chunks, model.encoder))
    return {
        **identity(task_name, arm_name, seed, settings),
        **{f"result/{name}": value for name, value in results.items()},
        **describe_batches(model, task, callback, seed, settings),
        **logged,
        "seconds/train": trained - loaded,
        "seconds/all": time.perf_counter() - start,
        "seconds/all_cpu": time.process_time() - cpu_start,  # what others on the machine do not change
    }


def run_missing(
    task: str,
    arms: list[str],
    seeds: list[int],
    data_dir: Path,
    settings: dict[str, Any],
    results: Path,
    accelerator: str = "cpu",
) -> Iterator[Row]:
    """Run what is not in ``results`` yet and add it there; all arms of a seed come before the next seed."""
    quiet()
    done = {row_key(row) for row in read(results)}
    for seed in seeds:
        for arm in arms:
            if row_key(identity(task, arm, seed, settings)) not in done:
                row = run(task, arm, seed, data_dir, settings, accelerator)
                append(results, row)
                yield row


def identity(task: str, arm: str, seed: int, settings: dict[str, Any]) -> Row:
    return {"task": task, "arm": arm, "seed": seed, **settings}


def row_key(row: Row) -> frozenset[tuple[str, str]]:
    """What makes a run the same as another: all that was set, as the file has it."""
    return frozenset((name, str(value)) for name, value in row.items() if "/" not in name and value != "")


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a results file; none if there is no such file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def append(path: Path, row: Row) -> None:
    """Add a row to a results file, and the columns that it has not yet. One process at a time."""
    rows = [*read(path), {name: f"{value:.6g}" if "/" in name else value for name, value in row.items()}]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    columns.sort(key=lambda name: "/" in name)
    path.parent.mkdir(parents=True, exist_ok=True)
    written = path.with_suffix(".partial")
    with written.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    written.replace(path)


def quiet() -> None:
    """Leave out what Lightning says of every Trainer."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
