"""A study: train and measure every run that the results file lacks, and add it there."""

import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from lightning import Trainer, seed_everything
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from bs_lightning import (
    BatchSamplerCallback,
    BatchSamplerDataModule,
    PlannedPool,
    Planning,
    PoolBatchSampler,
    Pools,
)
from bs_lightning.isolation import no_trace
from bs_lightning.layout import BatchLayout
from bs_lightning.losses import debiased, hard, hardness_weighted, info_nce, nt_xent, weighted
from bs_lightning.metrics import Alignment, InBatchFalseNegativeRate, InBatchHardness, Uniformity
from bs_lightning.rules import AbovePositive

from ..csv_files import Row
from ..trainers import make_trainer
from .arms import ARMS, Arm
from .cifar10 import CIFAR10ResNet18, CIFAR10SimCLR
from .code import CodeSearch
from .model import Contrastive, Mask, apply_in_chunks, embed_sides
from .omniglot import OmniglotPairs, OmniglotPairsGroupNorm, OmniglotSimCLR
from .task import Task
from .text import TextPairs, TextSimCSE
from .transformer import TransformerSimCSE

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
        CodeSearch,
        TransformerSimCSE,
    )
}
LOSSES: dict[str, Callable[..., Tensor]] = {
    "debiased": debiased,
    "hard": hard,
    "weighted": weighted,
    "hardness-weighted": hardness_weighted,
}
N_MEASURED_BATCHES = 20


# Training, as users do it


class WholeBatches(Dataset[Tensor]):
    """A dataset that makes a whole batch at once, ``make(indices)``: this is faster than item by item."""

    def __init__(self, size: int, make: Callable[[Tensor], Tensor]) -> None:
        self.size = size
        self.make = make

    def __len__(self) -> int:
        return self.size

    def __getitems__(self, indices: list[int]) -> Tensor:
        """Return a batch, already collated."""
        return self.make(torch.tensor(indices))


class Data(BatchSamplerDataModule):
    """A task's data, with what an arm knows of false negatives."""

    def __init__(self, task: Task, batch_size: int, arm: Arm) -> None:
        rule = AbovePositive(every_side=not task.two_towers) if task.has_sides and arm.masked == "reference" else None
        super().__init__(batch_size, collate_fn=lambda batch: batch, reference_rule=rule)
        self.task = task
        self.arm = arm

    def train_dataset(self) -> Dataset[Tensor]:
        """Return two views of each instance."""
        return WholeBatches(self.task.size, self.task.views)

    def pool_dataset(self) -> Dataset[Tensor]:
        """Return one view of each instance, or both of its sides."""
        return WholeBatches(self.task.size, self.task.sides if self.task.has_sides else self.task.clean)

    def train_labels(self) -> Tensor | None:
        """Return the hidden labels."""
        return self.task.labels

    def train_groups(self) -> Tensor | None:
        """Return what a user knows to belong together, for the arms that use it."""
        return self.task.groups if self.arm.masked == "groups" else None

    def reference_embeddings(self) -> Tensor | None:
        """Return the second opinion, for the arms that use it."""
        return self.task.reference() if self.arm.masked == "reference" or self.arm.from_reference else None


def train(
    task: Task, arm: Arm, seed: int, settings: dict[str, Any], accelerator: str
) -> tuple[Contrastive, BatchSamplerCallback | None, Row]:
    """Return a trained model, the callback it was trained with, and what the callback logged in the last epoch.

    Arms differ in nothing but their batches and their loss. The same seed gives the same initial weights and the same
    random numbers for augmentation, and all arms train for the same number of steps.
    """
    seed_everything(seed, verbose=False)
    batch_size = settings["batch_size"]
    n_epochs = number_of_epochs(task, settings)
    loss = partial(loss_function(task, arm.loss), temperature=settings["temperature"])
    steps = n_epochs * (task.size // batch_size)
    callback = arm.callback(batch_size, n_epochs, embed_sides if task.has_sides else None, not task.two_towers)
    mask: Mask | None = None if arm.masked is None else Data.likely_false_negatives
    if arm.masked == "labels":
        mask = same_label
    model = Contrastive(*task.networks(), loss, settings["learning_rate"], steps, mask)
    trainer = make_trainer(n_epochs, [] if callback is None else [callback], accelerator)
    trainer.fit(model, datamodule=Data(task, batch_size, arm))
    logged = {
        f"last_epoch/{name.removeprefix('batch_sampler/')}": float(value)
        for name, value in trainer.callback_metrics.items()
        if name.startswith("batch_sampler/") and not name.endswith("_seconds")
    }
    return model, callback, logged


def loss_function(task: Task, name: str | None = None) -> Callable[..., Tensor]:
    """Return a loss by its key in ``LOSSES``; ``None`` is the task's InfoNCE, of two views or of two towers."""
    if name is None:
        return info_nce if task.two_towers else nt_xent
    chosen: dict[str, Any] = {"negatives": "other_side" if task.two_towers else "views"}
    if name in ("debiased", "hard"):
        chosen["class_prior"] = task.class_prior
    return partial(LOSSES[name], **chosen)


def number_of_epochs(task: Task, settings: dict[str, Any]) -> int:
    """Return how many whole epochs come closest to the steps of the settings, at least one."""
    return max(1, round(settings["steps"] / (task.size // settings["batch_size"])))


def same_label(data: Any) -> Tensor:
    """Return which pairs of the trained batch have the same label, bool ``[B, B]``."""
    own = data.task.labels[torch.from_numpy(data.trained_batch())]
    return own[:, None] == own


# What the batches are like


def own_batches(
    embeddings: Tensor, callback: BatchSamplerCallback | None, batch_size: int, seed: int, last_epoch: int
) -> Tensor:
    """Return some of the batches that a callback composes from embeddings in the last epoch; ``None`` is uniform.

    Returns:
        int64 ``[N_MEASURED_BATCHES, batch_size]``.
    """
    composer: Any = getattr(callback, "composer", None)
    pool_size = len(embeddings)
    if callback is not None and callback.refresh_every is None:
        pool_size = callback.resolve_pool_size(Trainer(logger=False), BatchLayout(len(embeddings), batch_size))

    def plan(indices: NDArray[np.int64], *, seed: int, epoch: int) -> PlannedPool:
        return PlannedPool(composer(embeddings[indices], batch_size, seed=seed, epoch=last_epoch))

    planning = None
    if composer is not None:
        planning = Planning(plan, Pools(min(pool_size, len(embeddings))), composer.replacement)
    sampler = PoolBatchSampler(len(embeddings), batch_size, planning=planning, seed=seed)
    batches = torch.tensor(list(sampler))
    # A random choice: a pool's first batches are harder than its last.
    chosen = np.random.default_rng(seed).permutation(len(batches))[:N_MEASURED_BATCHES]
    return batches[torch.from_numpy(chosen)]


def describe_batches(
    model: Contrastive, task: Task, callback: BatchSamplerCallback | None, seed: int, settings: dict[str, Any]
) -> Row:
    """Measure some of the arm's own batches with its trained model, in training mode except where said otherwise.

    - ``loss``: the task's, also for arms that trained with a different loss.
    - ``accuracy``: share of first views whose second view is more similar than all other second views.
    - ``hardness``: mean cosine similarity of true negatives.
    - ``hardness_clean``: the same without augmentation and in eval mode, as the batches were composed. Batch norm makes
      the two differ.
    - ``alignment``: of the positive pairs.
    - ``uniformity``: of the batches; ``uniformity_mixed``: of the same instances in random batches.
    - ``false_negative_rate``: share of the in-batch pairs that have the same label.
    - ``false_negative_mass``: the false negatives' share of the softmax over all negatives. The loss spends this share
      of its repulsion on them.
    """
    size, temperature = settings["batch_size"], settings["temperature"]
    measured: dict[str, list[float]] = defaultdict(list)
    with no_trace(model), torch.no_grad():
        clean = torch.cat([clean_embeddings(model, task, chunk) for chunk in torch.arange(task.size).split(1024)])
        batches = own_batches(clean, callback, size, seed, number_of_epochs(task, settings) - 1)
        mixed = batches.flatten()[torch.randperm(batches.numel())].reshape(batches.shape)
        model.train()
        for batch, random_batch in zip(batches, mixed, strict=True):
            labels = None if task.labels is None else task.labels[batch]
            first, second = model.embed(task.views(batch).flatten(0, 1)).chunk(2)
            other, _ = model.embed(task.views(random_batch).flatten(0, 1)).chunk(2)
            measured["loss"].append(float(loss_function(task)(first, second, temperature=temperature)))
            cosine = F.normalize(first, dim=1) @ F.normalize(second, dim=1).T
            measured["accuracy"].append(float((cosine.argmax(dim=1) == torch.arange(size)).float().mean()))
            measured["hardness"].append(InBatchHardness()(first, labels))
            measured["hardness_clean"].append(
                InBatchHardness()(clean[batch][None], None if labels is None else labels[None])
            )
            measured["alignment"].append(Alignment()(first, second))
            measured["uniformity"].append(Uniformity()(first))
            measured["uniformity_mixed"].append(Uniformity()(other))
            if labels is not None:
                measured["false_negative_rate"].append(InBatchFalseNegativeRate()(labels))
                measured["false_negative_mass"].append(false_negative_mass(first, second, labels, temperature))
    return {f"batch/{name}": float(np.mean(values)) for name, values in measured.items()}


def clean_embeddings(model: Contrastive, task: Task, indices: Tensor) -> Tensor:
    """Return what batches are composed from: embeddings ``[b, d]``, or of both sides ``[b, 2, d]``."""
    if not task.has_sides:
        return model.embed(task.clean(indices))
    return torch.stack(embed_sides(model, task.sides(indices)), dim=1)


def false_negative_mass(first: Tensor, second: Tensor, labels: Tensor, temperature: float) -> float:
    """Return the false negatives' share of the softmax over all negatives, mean over anchors."""
    unit = F.normalize(torch.cat([first, second]), dim=1)
    instance, twice = torch.arange(len(first)).repeat(2), labels.repeat(2)
    negatives = (unit @ unit.T / temperature).masked_fill(instance[:, None] == instance, -torch.inf)
    return float((negatives.softmax(dim=1) * (twice[:, None] == twice)).sum(dim=1).mean())


# Results


def run(data_dir: Path, accelerator: str, chosen: Row) -> Row:
    """Train and measure once.

    Args:
        data_dir: The folder of the data.
        accelerator: Lightning's name of the device.
        chosen: Task, arm, seed and settings.

    Returns:
        The measures, whose names have a slash.
    """
    start, cpu_start = time.perf_counter(), time.process_time()
    seed = chosen["seed"]
    task = TASKS[chosen["task"]](data_dir, seed, chosen)
    loaded = time.perf_counter()
    model, callback, logged = train(task, ARMS[chosen["arm"]], seed, chosen, accelerator)
    trained = time.perf_counter()
    results = task.evaluate(partial(apply_in_chunks, model.encoder))
    return {
        **{f"result/{name}": value for name, value in results.items()},
        **describe_batches(model, task, callback, seed, chosen),
        **logged,
        "seconds/train": trained - loaded,
        "seconds/all": time.perf_counter() - start,
        "seconds/all_cpu": time.process_time() - cpu_start,  # other work on the machine hardly changes it
    }
