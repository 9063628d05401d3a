"""Parts that the tests of the vision recipes share, and a training run in two processes.

``python vision_parts.py FOLDER`` trains each recipe in turn. Each rank writes ``FOLDER/simclr/rank0.json`` and so on.
"""

import hashlib
import io
import json
import sys
import zipfile
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import torch
from lightning.pytorch import seed_everything
from parts import Records, trainer, walker
from PIL import Image
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset

from bs_lightning.recipes.images import ImageData
from bs_lightning.recipes.moco_v3 import MoCoV3
from bs_lightning.recipes.simclr import SimCLR

RECIPES = ("simclr", "moco_v3")


class Encoder(nn.Sequential):
    """Two convolutions: quicker than ResNet-18's layers, and features that training makes better."""

    num_features = 16

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, self.num_features, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )


def model(name: str, **kwargs: Any) -> SimCLR | MoCoV3:
    """Return a tiny model of a recipe."""
    if name == "simclr":
        return SimCLR(Encoder(), embedding_width=8, **kwargs)
    return MoCoV3(Encoder(), embedding_width=8, hidden_width=16, **kwargs)


def digits(start: int, end: int) -> TensorDataset:
    """Return handwritten digits, gray images of 8 x 8 pixels, as a dataset of tensors and labels."""
    pixels, labels = load_digits(return_X_y=True)
    images = torch.tensor(pixels[start:end] / 16, dtype=torch.float32).reshape(-1, 8, 8)
    return TensorDataset(images, torch.tensor(labels[start:end]))


def data(n: int = 96, batch_size: int = 8, **kwargs: Any) -> ImageData:
    return ImageData(digits(0, n), batch_size, test=digits(1000, 1200), image_size=8, **kwargs)


def write_omniglot(data_dir: Path) -> None:
    """Write a zip file as Omniglot's, of noise: 4 alphabets of 5 characters of 20 drawings."""
    (data_dir / "omniglot").mkdir()
    with zipfile.ZipFile(data_dir / "omniglot" / "images_background_small1.zip", "w") as archive:
        for number in range(4 * 5 * 20):
            alphabet, character, drawing = number // 100, number // 20 % 5, number % 20
            image = as_png(Image.effect_noise((105, 105), 50))
            archive.writestr(f"images/alphabet{alphabet}/character{character}/{drawing}.png", image)


def write_cifar10(data_dir: Path, n: int = 60, n_test: int = 20) -> None:
    """Write parquet files as CIFAR-10's, whose classes are ten brightnesses."""
    (data_dir / "cifar10").mkdir()
    for name, size in (("train", n), ("test", n_test)):
        labels = [number % 10 for number in range(size)]
        images = [as_png(Image.new("RGB", (32, 32), (25 * label, 25 * label, 25 * label))) for label in labels]
        table = pyarrow.table({"img": [{"bytes": image, "path": None} for image in images], "label": labels})
        pyarrow.parquet.write_table(table, data_dir / "cifar10" / f"{name}-00000-of-00001.parquet")


def as_png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "png")
    return file.getvalue()


def train(name: str, folder: Path) -> None:
    """Train a recipe in two processes."""

    def noting(images: torch.Tensor) -> torch.Tensor:
        drawn.append(float(torch.rand(())))
        return images

    seed_everything(0)
    drawn: list[float] = []
    records, recipe = Records(), model(name, temperature=1e4)
    made = trainer(records, walker(48), strategy="ddp", devices=2, max_epochs=1)
    made.fit(recipe, datamodule=data(batch_size=4, augment=noting))
    weights = b"".join(parameter.detach().numpy().tobytes() for parameter in recipe.parameters())
    seen = {"epochs": list(records.epochs.values()), "losses": records.losses, "drawn": drawn}
    seen["logged"] = float(made.callback_metrics["train/loss"])
    seen["weights"] = hashlib.sha256(weights).hexdigest()
    folder.mkdir(exist_ok=True)
    (folder / f"rank{made.global_rank}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    for name in RECIPES:
        train(name, Path(sys.argv[1]) / name)
    torch.distributed.barrier()  # gloo may abort a process that leaves while the other is still there
    torch.distributed.destroy_process_group()
