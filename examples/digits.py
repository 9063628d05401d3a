"""SimCLR on scikit-learn's handwritten digits, with uniform batches and with walked batches.

The script shows what false negatives do: five seeds, less than a minute on two CPU cores. With ten classes, hard
negatives are often false, and walked batches gain nothing. They gain in `examples/glyphs.py`, which `make demo` runs.
"""

import logging
import time
import warnings
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from lightning import Callback, LightningModule, Trainer, seed_everything
from matplotlib.transforms import Bbox
from numpy.typing import NDArray
from scipy import stats
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.utils.data import Dataset

from bs_lightning import (
    BatchSamplerCallback,
    BatchSamplerDataModule,
    PlannedPool,
    Planning,
    PoolBatchSampler,
    Pools,
    RWRComposer,
)
from bs_lightning.metrics import InBatchFalseNegativeRate, InBatchHardness

BATCH_SIZE = 64
POOL_SIZE = 256  # 26 of each digit; in ten batches, the default, a walk could fill a batch with a single digit
EPOCHS = 20
SEEDS = range(5)
STEPS = ("encode", "graph", "walk")
FIGURE = Path("build/digits.png")
BATCHES = Path("build/digits_batches.png")  # the figure's upper half
NOTES = """\
Mean ± standard deviation over seeds. With the same seed, both arms have the same initial weights, augmentations and
test split. The same probe on raw pixels: {raw:.3f}.
Each arm's false-negative rate and hardness (mean cosine similarity of true negatives) are measured on one epoch of
its own batches, with the embeddings of its own trained model. Seconds are medians."""


# What is trained: an ordinary SimCLR


def augment(images: Tensor) -> Tensor:
    """Turn, zoom and shift each image at random, and add noise."""
    n = len(images)
    angle = torch.empty(n).uniform_(-0.3, 0.3)
    zoom = torch.empty(n, 1, 1).uniform_(0.8, 1.2)
    shift = torch.empty(n, 2, 1).uniform_(-0.25, 0.25)
    rotation = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], dim=1).reshape(n, 2, 2)
    grid = F.affine_grid(torch.cat([zoom * rotation, shift], dim=2), list(images.shape), align_corners=False)
    views = F.grid_sample(images, grid, align_corners=False)
    return views + 0.1 * torch.randn_like(views)


class TwoViews(Dataset[Tensor]):
    """Two augmented views of each image; DataLoader collates them to [2, B, 1, 8, 8]."""

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, indices: list[int]) -> list[Tensor]:  # a batch at once: faster than image by image
        images = self.images[indices]
        return [augment(images), augment(images)]


def block(n_in: int, n_out: int, stride: int) -> nn.Sequential:
    """A convolution with batch norm and ReLU."""
    return nn.Sequential(nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False), nn.BatchNorm2d(n_out), nn.ReLU())


class SimCLR(LightningModule):
    """A small encoder and projector, trained with the InfoNCE loss."""

    def __init__(self, width: int = 16, temperature: float = 0.5) -> None:
        super().__init__()
        self.temperature = temperature
        self.encoder = nn.Sequential(
            block(1, width, 1),
            block(width, 2 * width, 2),
            block(2 * width, 2 * width, 2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.projector = nn.Sequential(nn.Linear(2 * width, 2 * width), nn.ReLU(), nn.Linear(2 * width, 64))

    def embed(self, images: Tensor) -> Tensor:
        """Return the projections: the loss compares them, and the callback builds its graph on them."""
        return self.projector(self.encoder(images))

    def training_step(self, views: Tensor, batch_idx: int) -> Tensor:
        z = F.normalize(self.embed(views.flatten(0, 1)), dim=1)
        logits = (z @ z.T / self.temperature).fill_diagonal_(-torch.inf)
        other_view = torch.arange(len(z)).roll(len(z) // 2)
        return F.cross_entropy(logits, other_view)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3, weight_decay=1e-6)


# What bs-lightning adds: a DataModule to subclass, and a callback


class Digits(BatchSamplerDataModule):
    """The digits: two views to train on, one clean view to embed."""

    def __init__(self, images: Tensor, labels: Tensor, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.images, self.labels = images, labels

    def train_dataset(self) -> Dataset[Tensor]:
        return TwoViews(self.images)

    def pool_dataset(self) -> Any:  # one clean view, which the callback embeds
        return self.images

    def train_labels(self) -> Tensor:  # only to measure false negatives; training never sees the labels
        return self.labels


def train(images: Tensor, labels: Tensor, composer: RWRComposer | None, seed: int) -> tuple[SimCLR, list[list[float]]]:
    """Return a trained model, and the seconds that each epoch spent in each step."""
    seed_everything(seed, verbose=False)
    torch.set_num_threads(1)  # more threads do not speed up so small a model, and slow it down on shared cores
    model, stopwatch = SimCLR(), Stopwatch()
    sampling = [BatchSamplerCallback(POOL_SIZE, composer)] if composer else []
    trainer = Trainer(
        max_epochs=EPOCHS,
        callbacks=[*sampling, stopwatch],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, datamodule=Digits(images, labels, batch_size=BATCH_SIZE))
    return model.eval(), stopwatch.epochs


class Stopwatch(Callback):
    """Records each epoch's seconds of training and of the steps that BatchSamplerCallback logs; add it after that."""

    def __init__(self) -> None:
        self.epochs: list[list[float]] = []

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.start = time.perf_counter()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        sampling = [float(trainer.callback_metrics.get(f"batch_sampler/{step}_seconds", 0)) for step in STEPS]
        self.epochs.append([time.perf_counter() - self.start - sum(sampling), *sampling])


# What comes out


def epoch_of_batches(embeddings: Tensor, composer: RWRComposer | None, seed: int = 0) -> Tensor:
    """Return the batches of one epoch, as training would serve them with a fixed model: [n, BATCH_SIZE]."""

    def plan(indices: NDArray[np.int64], *, seed: int, epoch: int) -> PlannedPool:
        assert composer is not None
        return PlannedPool(composer(embeddings[indices], BATCH_SIZE, seed=seed, epoch=epoch))

    planning = Planning(plan, Pools(POOL_SIZE)) if composer else None
    sampler = PoolBatchSampler(len(embeddings), BATCH_SIZE, planning=planning, seed=seed)
    return torch.tensor(list(sampler))


def describe(embeddings: Tensor, labels: Tensor, batches: Tensor) -> tuple[float, float]:
    """Return the false-negative rate and the hardness of batches."""
    false_negative_rate, hardness = InBatchFalseNegativeRate(), InBatchHardness()
    false_negative_rate.update(labels[batches])
    hardness.update(embeddings[batches], labels[batches])
    return float(false_negative_rate.compute()), float(hardness.compute())


def probe(train_features: Tensor, train_labels: Tensor, test_features: Tensor, test_labels: Tensor) -> float:
    """Return the test accuracy of a linear classifier on frozen features."""
    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    return float(classifier.fit(train_features, train_labels).score(test_features, test_labels))


def draw(embeddings: Tensor, images: Tensor, labels: Tensor, composer: RWRComposer) -> None:
    """Draw a uniform and a walked batch of the same model, above the similarities of their pairs."""
    figure, axes = plt.subplots(2, 2, figsize=(9, 8), height_ratios=[3, 2], sharey="row", layout="constrained")
    cosine = F.normalize(embeddings, dim=1) @ F.normalize(embeddings, dim=1).T
    for name, chosen, (grid, histogram) in zip(("Uniform", "Walked"), (None, composer), axes.T, strict=True):
        batches = epoch_of_batches(embeddings, chosen)
        # The batch of median hardness: the first walks in a pool are harder than the last.
        by_hardness = np.argsort([describe(embeddings, labels, batch)[1] for batch in batches])
        batch = batches[by_hardness[len(batches) // 2]]
        batch = batch[labels[batch].argsort(stable=True)]

        tiles = F.pad(images[batch, 0], (1, 1, 1, 1)).unflatten(0, (8, -1))
        grid.imshow(tiles.transpose(1, 2).flatten(0, 1).flatten(1, 2), cmap="gray_r")
        rate, hardness = describe(embeddings, labels, batch)
        caption = f"false-negative rate {rate:.0%}, hardness {hardness:z.2f}"
        grid.set_title(f"{name} batch, sorted by digit\n{caption}")
        grid.axis("off")

        pairs = torch.triu_indices(BATCH_SIZE, BATCH_SIZE, offset=1)
        first, second = batch[pairs]
        same = labels[first] == labels[second]
        similarity = cosine[first, second]
        histogram.hist(
            [similarity[~same], similarity[same]],
            bins=np.linspace(-1, 1, 41),
            stacked=True,
            color=["tab:blue", "tab:orange"],
            label=["true negatives (different digits)", "false negatives (same digit)"],
        )
        histogram.set_xticks([-1, -0.5, 0, 0.5, 1])
        histogram.set_xlabel("cosine similarity of a pair in the batch")
        histogram.spines[["top", "right"]].set_visible(False)
    axes[1, 0].set_ylabel("pairs")
    legend = figure.legend(*axes[1, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    FIGURE.parent.mkdir(exist_ok=True)
    figure.savefig(FIGURE, dpi=120)
    figure.set_layout_engine("none")  # or it would move the axes as the legend leaves
    legend.remove()
    boxes = [grid.get_tightbbox() for grid in axes[0]]
    upper_half = Bbox.union(boxes).transformed(figure.dpi_scale_trans.inverted())
    figure.savefig(BATCHES, dpi=120, bbox_inches=upper_half.padded(0.05))


def report(results: dict[str, list[list[float]]], seconds: dict[str, list[list[float]]]) -> None:
    """Print the means ± deviations over seeds, the median seconds, and the difference in accuracy by seed."""
    uniform, walked = (np.array(runs) for runs in results.values())
    print(f"\n{'':26}{'uniform':>18}{'walked':>18}")
    measures = ("linear-probe accuracy", "false-negative rate", "hardness")
    for measure, *runs in zip(measures, uniform.T, walked.T, strict=True):
        print(f"{measure:26}" + "".join(f"{run.mean():10.3f} ± {run.std(ddof=1):.3f}" for run in runs))
    medians = (np.median(epochs, axis=0) for epochs in seconds.values())
    for step, *runs in zip(("train", *STEPS), *medians, strict=True):
        print(f"{'seconds per epoch, ' + step:26}" + "".join(f"{run:18.3f}" for run in runs))

    difference = walked[:, 0] - uniform[:, 0]
    low, high = stats.t.interval(0.95, len(SEEDS) - 1, difference.mean(), stats.sem(difference))
    print(f"\nAccuracy, walked - uniform: {difference.mean():+.3f}, 95% interval [{low:+.3f}, {high:+.3f}].")


def main() -> None:
    """Train both arms with every seed, print the table and draw the figure."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    pixels, digits = load_digits(return_X_y=True)
    pixels, digits = torch.tensor(pixels / 16, dtype=torch.float32).reshape(-1, 1, 8, 8), torch.tensor(digits)

    print(f"SimCLR on handwritten digits: {len(SEEDS)} seeds, {EPOCHS} epochs, batches of {BATCH_SIZE}.", flush=True)
    walked = RWRComposer()
    arms = {"uniform": None, "walked": walked}
    results: dict[str, list[list[float]]] = {name: [] for name in arms}
    seconds: dict[str, list[list[float]]] = {name: [] for name in arms}
    raw = []
    for seed in SEEDS:
        split = train_test_split(pixels, digits, test_size=0.25, stratify=digits, random_state=seed)
        images, test_images, labels, test_labels = split
        raw.append(probe(images.flatten(1), labels, test_images.flatten(1), test_labels))
        for name, composer in arms.items():
            model, epochs = train(images, labels, composer, seed)
            seconds[name] += epochs
            with torch.no_grad():
                accuracy = probe(model.encoder(images), labels, model.encoder(test_images), test_labels)
                embeddings = model.embed(images)
            batches = epoch_of_batches(embeddings, composer, seed)
            results[name].append([accuracy, *describe(embeddings, labels, batches)])
        print(f"seed {seed}: " + ", ".join(f"{name} {runs[-1][0]:.3f}" for name, runs in results.items()), flush=True)

    report(results, seconds)
    print(NOTES.format(raw=np.mean(raw)))
    draw(embeddings, images, labels, walked)  # embeddings of the last walked model
    print(f"Figures: {FIGURE}, {BATCHES}")


if __name__ == "__main__":
    main()
