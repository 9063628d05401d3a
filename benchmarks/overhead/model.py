"""The model, the data and the Trainer whose epochs and pools are timed."""

import argparse
import logging
import time
import warnings
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import Dataset

from bs_lightning import BatchSamplerDataModule
from bs_lightning.recipes.resnet import ResNet18

from ..csv_files import Row
from ..trainers import make_trainer


class Images(Dataset[Tensor]):
    """Random images; both views are the same, as augmentation is not what is measured.

    Args:
        size: Number of images.
        seconds: How long an image takes to load. Loaders sleep, as if each had a core of its own.
    """

    def __init__(self, size: int, seconds: float = 0.0) -> None:
        self.images = torch.rand(size, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        self.seconds = seconds

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, indices: list[int]) -> Tensor:
        time.sleep(self.seconds * len(indices))
        return self.images[indices]


def as_loaded(batch: Tensor) -> Tensor:
    """Collate what is a batch already. A function of a module, so that any worker can load it."""
    return batch


class Data(BatchSamplerDataModule):
    """The data of all arms."""

    def __init__(self, size: int, batch_size: int = 64, seconds: float = 0.0, **kwargs: Any) -> None:
        super().__init__(batch_size, collate_fn=as_loaded, **kwargs)
        self.size, self.seconds = size, seconds

    def train_dataset(self) -> Dataset[Tensor]:
        return Images(self.size, self.seconds)


class SimCLR(LightningModule):
    """A small convolutional net, one twice as wide, or a ResNet-18, trained with NT-Xent."""

    def __init__(self, network: str = "small", channels_last: bool = False) -> None:
        super().__init__()
        self.net: nn.Module = ResNet18() if network == "resnet18" else _convolutional(64 if network == "wide" else 32)
        if channels_last:
            self.net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, images: Tensor) -> Tensor:
        embeddings: Tensor = self.net(images)
        return embeddings

    def training_step(self, images: Tensor, batch_idx: int) -> dict[str, Tensor]:
        first, second = (nn.functional.normalize(self(images), dim=1) for _ in range(2))
        loss = nn.functional.cross_entropy(first @ second.T / 0.5, torch.arange(len(first), device=first.device))
        return {"loss": loss, "embeddings": first}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def _convolutional(width: int) -> nn.Module:
    """Three convolutions with stride 2, of which the first has ``width`` channels."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, width), (width, 2 * width), (2 * width, 4 * width)):
        layers += [nn.Conv2d(inputs, outputs, 3, stride=2, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, 128))


def precision_columns(args: argparse.Namespace) -> Row:
    """Return the precision and the order of memory that were asked for."""
    return {"precision": args.precision, "channels last": args.channels_last}


def quiet_trainer(args: argparse.Namespace, callbacks: list[Callback], epochs: int | None, **limits: int) -> Trainer:
    """Return a Trainer on the device and in the precision that were asked for, and silence warnings."""
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "bs_lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)
    return make_trainer(epochs, callbacks, args.device, precision=args.precision, **limits)
