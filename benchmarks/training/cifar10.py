"""CIFAR-10: SimCLR on a subset of the training images."""

import io
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from bs_lightning.recipes.probes import knn_accuracy, linear_probe
from bs_lightning.recipes.resnet import Residual

from . import augment
from .model import convolution, perceptron
from .task import Encode, Task

MEAN = torch.tensor([0.491, 0.482, 0.447])[:, None, None]
DEVIATION = torch.tensor([0.247, 0.243, 0.262])[:, None, None]


@lru_cache(maxsize=2)  # the training and the test images of one seed
def images(path: Path, seed: int, size: int | None) -> tuple[Tensor, Tensor]:
    """Return ``size`` random images of a parquet file, uint8 ``[n, 3, 32, 32]``, and their labels; ``None`` is all."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise ImportError("Reading the parquet files of CIFAR-10 needs pyarrow: pip install pyarrow") from None
    table = pyarrow.parquet.read_table(path)
    table = table.take(np.random.default_rng(seed).permutation(len(table))[:size])
    pixels = [np.asarray(Image.open(io.BytesIO(image["bytes"])).convert("RGB")) for image in table["img"].to_pylist()]
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous(), torch.tensor(table["label"].to_pylist())


class CIFAR10SimCLR(Task):
    """Unsupervised: an instance is an image; its positive pair is two crops of it with changed colours.

    With ten classes, hard negatives are often false. Two classifiers of the test images measure the features: logistic
    regression (``linear_probe``) and a vote of the nearest training images (``knn``).
    """

    name = "cifar10-simclr"
    main = ("linear_probe", "knn")
    defaults: ClassVar[dict[str, Any]] = {
        "steps": 800,
        "batch_size": 128,
        "temperature": 0.2,
        "learning_rate": 2e-3,
        "width": 24,
        "subset": 10_000,
    }
    class_prior = 0.1
    labels: Tensor

    def __init__(self, data_dir: Path, seed: int, settings: dict[str, Any]) -> None:
        folder = data_dir / "cifar10"
        self.width = settings["width"]
        self.images, self.labels = images(folder / "train-00000-of-00001.parquet", seed, settings["subset"])
        self.test_images, self.test_labels = images(folder / "test-00000-of-00001.parquet", 0, None)
        self.size = len(self.images)

    def views(self, indices: Tensor) -> Tensor:
        pixels = self.images[indices].repeat(2, 1, 1, 1) / 255
        return standardize(augment.jitter_colors(augment.crop_and_flip(pixels))).unflatten(0, (2, -1))

    def clean(self, indices: Tensor) -> Tensor:
        return standardize(self.images[indices] / 255)

    def networks(self) -> tuple[nn.Module, nn.Module]:
        width = self.width
        return small_encoder(width), perceptron(4 * width, 8 * width, 64)

    def evaluate(self, encode: Encode) -> dict[str, float]:
        features, test_features = (encode(standardize(pixels / 255)) for pixels in (self.images, self.test_images))
        data = (features, self.labels, test_features, self.test_labels)
        return {"linear_probe": linear_probe(*data), "knn": knn_accuracy(*data, k=20)}


class CIFAR10ResNet18(CIFAR10SimCLR):
    """All images, with the paper's network, batch size and temperature; needs a GPU (``--accelerator gpu``)."""

    name = "cifar10-simclr-resnet18"
    defaults: ClassVar[dict[str, Any]] = {
        "steps": 19_500,
        "batch_size": 256,
        "temperature": 0.5,
        "learning_rate": 1e-3,
        "width": 64,
        "subset": 50_000,
    }

    def networks(self) -> tuple[nn.Module, nn.Module]:
        width = self.width
        layers: list[nn.Module] = [convolution(3, width)]
        for n_in, n_out, stride in ((1, 1, 1), (1, 2, 2), (2, 4, 2), (4, 8, 2)):
            layers += [Residual(n_in * width, n_out * width, stride), Residual(n_out * width, n_out * width, 1)]
        encoder = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        return encoder, perceptron(8 * width, 8 * width, 64)


def small_encoder(width: int) -> nn.Sequential:
    """Return an encoder of images ``[n, 3, h, w]`` to ``4 * width`` features, which two cores train in minutes."""
    return nn.Sequential(
        convolution(3, width, 2),
        Residual(width, 2 * width, 2),
        Residual(2 * width, 4 * width, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


def standardize(pixels: Tensor) -> Tensor:
    """Bring each colour of the training images to mean 0 and deviation 1."""
    return (pixels - MEAN) / DEVIATION
