"""Parts that the tests of training share: data with known indices, a model that records them, and a Trainer."""

import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import Dataset

from bs_lightning import BatchSamplerCallback, BatchSamplerDataModule, ExactGraph, RWRComposer


class Points(Dataset[tuple[int, torch.Tensor]]):
    """Item ``i`` is ``(i, point i)``. Each point lies in one of ten clusters, ``i % 10``."""

    def __init__(self, n: int = 100, dim: int = 8) -> None:
        generator = torch.Generator().manual_seed(0)
        self.targets = torch.arange(n) % 10
        self.points = torch.randn(10, dim, generator=generator)[self.targets]
        self.points += 0.3 * torch.randn(n, dim, generator=generator)

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, index: int) -> tuple[int, torch.Tensor]:
        return index, self.points[index]


class Data(BatchSamplerDataModule):
    def __init__(self, batch_size: int = 8, n: int = 100, **kwargs: Any) -> None:
        super().__init__(batch_size, **kwargs)
        self.n = n

    def train_dataset(self) -> Points:
        return Points(self.n)


class Model(LightningModule):
    """An encoder with batch norm and dropout, and the InfoNCE loss. It records the indices of every batch by epoch."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.encoder = torch.nn.Sequential(
            torch.nn.Linear(8, 16),
            torch.nn.BatchNorm1d(16),
            torch.nn.ReLU(),
            torch.nn.Dropout(dropout),
            torch.nn.Linear(16, 4),
        )
        self.epochs: dict[int, list[list[int]]] = {}

    def forward(self, batch: Any) -> Any:
        return self.encoder(batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.epochs.setdefault(self.current_epoch, []).append(batch[0].tolist())
        view = batch[1] + 0.1 * torch.randn_like(batch[1])
        a, b = (torch.nn.functional.normalize(self.encoder(x).float(), dim=1) for x in (batch[1], view))
        return torch.nn.functional.cross_entropy(a @ b.T / 0.5, torch.arange(len(a), device=a.device))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)

    @property
    def batches(self) -> list[list[int]]:
        return [batch for epoch in sorted(self.epochs) for batch in self.epochs[epoch]]


class Exact(Model):
    """Trains without randomness of its own, because Lightning does not restore random states."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.epochs.setdefault(self.current_epoch, []).append(batch[0].tolist())
        z = torch.nn.functional.normalize(self.encoder(batch[1]), dim=1)
        return torch.nn.functional.cross_entropy(z @ z.T / 0.5, torch.arange(len(z)))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass


class Returns(Model):
    """Returns what ``recycle=True`` keeps."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return {"loss": super().training_step(batch, batch_idx), "embeddings": self(batch).detach()}


def two_sides(module: Any, batch: Any) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Embed a batch as two sides, with the annotation that the documentation gives."""
    return module(batch), module(batch)


class TooFewRows(ExactGraph):
    """A graph that lacks the first row."""

    def __call__(self, embeddings: Any, *, seed: int = 0) -> Any:
        return super().__call__(embeddings, seed=seed)[1:]


class Records(Callback):
    """Records the batches' dataset indices, epoch by epoch, and the losses."""

    def __init__(self) -> None:
        self.epochs: dict[int, list[list[int]]] = {}
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.epochs.setdefault(trainer.current_epoch, []).append(trainer.datamodule.trained_batch().tolist())
        self.losses.append(outputs["loss"].item())


class SavesAtBatchStart(Callback):
    """Saves a checkpoint before each step is trained."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        trainer.save_checkpoint(self.folder / f"step={trainer.global_step}.ckpt")


class SavesBefore(Callback):
    """Saves a checkpoint in a hook that comes before a run, or an epoch, has trained anything."""

    def __init__(self, folder: Path, hook: str) -> None:
        setattr(self, hook, lambda trainer, _: trainer.save_checkpoint(folder / f"start={trainer.global_step}.ckpt"))


def walker(pool_size: int = 32, **kwargs: Any) -> BatchSamplerCallback:
    """Return a callback that does not wait for pynndescent to compile."""
    chosen: dict[str, Any] = {"composer": RWRComposer(ExactGraph(n_neighbors=5)), "warmup_epochs": 0} | kwargs
    return BatchSamplerCallback(pool_size, **chosen)


def trainer(*callbacks: Any, max_epochs: int = 2, **kwargs: Any) -> Trainer:
    quiet: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(callbacks=list(callbacks), max_epochs=max_epochs, **quiet | kwargs)


def fit(model: Model, data: Data, *callbacks: Any, ckpt_path: str | None = None, **kwargs: Any) -> Trainer:
    made = trainer(*callbacks, **kwargs)
    made.fit(model, datamodule=data, ckpt_path=ckpt_path)
    return made


def resumed_exactly(
    train: Callable[..., Any], make: type[Model], folder: Path, steps: Sequence[int]
) -> Iterator[tuple[str, int, Any]]:
    """Train a run that saves before and after each step, resume it, and compare the batches.

    Args:
        train: ``train(model, *callbacks, **kwargs)`` fits a model, with arguments of the Trainer.
        make: Makes a model.
        folder: Where checkpoints are saved.
        steps: The steps to resume from.

    Yields:
        ``"before"`` or ``"after"``, the step, and the resumed model.
    """
    whole = make()
    saves = ModelCheckpoint(folder / "after", filename="{step}", every_n_train_steps=1, save_top_k=-1)
    train(whole, saves, SavesAtBatchStart(folder / "before"), enable_checkpointing=True)
    for name in ("before", "after"):
        for step in steps:
            resumed = make()
            train(resumed, ckpt_path=folder / name / f"step={step}.ckpt")
            assert resumed.batches == whole.batches[step:], f"{name} step {step}"
            yield name, step, resumed


def pool_order(embeddings: torch.Tensor, batch_size: int, *, seed: int, epoch: int) -> Any:
    """Compose batches in the pool's own order."""
    return torch.arange(len(embeddings)).reshape(-1, batch_size).numpy()


def same_cluster_share(batches: list[list[int]]) -> float:
    """Return the share of a batch's pairs that lie in the same cluster: 0.1 in uniform batches."""
    same = [(a % 10 == b % 10) for batch in batches for a in batch for b in batch if a != b]
    return sum(same) / len(same)


def clusters(size: int = 640, n_clusters: int = 20, dim: int = 16) -> torch.Tensor:
    """Return embeddings in clusters of equal size, in random order."""
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(n_clusters, dim, generator=generator)
    points = centers[torch.arange(size) % n_clusters] + 0.3 * torch.randn(size, dim, generator=generator)
    return points[torch.randperm(size, generator=generator)]


def rng_states() -> tuple[Any, ...]:
    return random.getstate(), np.random.get_state(), torch.get_rng_state()


def assert_equal(a: Any, b: Any) -> None:
    """Assert that two nested values are equal bit for bit."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_equal(x, y)
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, np.ndarray):
        assert np.array_equal(a, b)
    else:
        assert a == b
