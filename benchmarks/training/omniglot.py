"""Omniglot: drawings of characters from many alphabets. Two alphabets are held back from training."""

import io
import zipfile
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from . import augment
from .evaluate import retrieval
from .model import convolution, perceptron
from .task import Encode, Task

SIZE = 28
N_HELD_BACK = 2  # alphabets
N_TRAIN_DRAWINGS = 15  # of the 20 of each character


@lru_cache(maxsize=1)
def drawings(data_dir: Path) -> tuple[Tensor, Tensor]:
    """Return drawings, floats ``[characters, 20, 1, SIZE, SIZE]`` (ink is 1), and each character's alphabet."""
    found = {}
    for path in sorted((data_dir / "omniglot").glob("images_background_small*.zip")):
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if name.endswith(".png"):
                    _, alphabet, character, drawing = name.split("/")
                    found[alphabet, character, drawing] = archive.read(name)  # some drawings are in both archives
    if not found:
        raise FileNotFoundError(
            f"{data_dir / 'omniglot'} has no images_background_small*.zip. Copy them there from Omniglot's repository."
        )
    images, characters = [], []
    for alphabet, character, drawing in sorted(found):
        image = Image.open(io.BytesIO(found[alphabet, character, drawing])).convert("L")
        images.append(1 - np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BOX), dtype=np.float32) / 255)
        characters.append((alphabet, character))
    names = sorted(set(characters))
    _, alphabets = np.unique([alphabet for alphabet, _ in names], return_inverse=True)
    return torch.from_numpy(np.stack(images)).reshape(len(names), -1, 1, SIZE, SIZE), torch.from_numpy(alphabets)


def split(data_dir: Path, seed: int) -> tuple[Tensor, Tensor]:
    """Return the drawings of training and of held-back characters, each ``[characters, 20, 1, SIZE, SIZE]``."""
    images, alphabets = drawings(data_dir)
    held_back = np.random.default_rng(seed).permutation(int(alphabets.max()) + 1)[:N_HELD_BACK]
    is_held_back = torch.isin(alphabets, torch.from_numpy(held_back))
    return images[~is_held_back], images[is_held_back]


def jittered(images: Tensor) -> Tensor:
    """Return a random view of each drawing ``[n, c, h, w]``: turned, scaled, sheared, shifted, with noise."""
    images = augment.affine(images, angle=0.35, zoom=0.25, shift=0.1, shear=0.35)
    return images + 0.1 * torch.randn_like(images)


class Omniglot(Task):
    """The network and the retrieval by character that the Omniglot tasks share."""

    main = ("r1_held_back", "map_held_back")
    norm: Callable[[int], nn.Module] = nn.BatchNorm2d
    seen: Tensor  # drawings of training characters to evaluate with, [characters, drawings, 1, SIZE, SIZE]
    held_back: Tensor  # drawings of the other characters

    def encoder(self, width: int) -> nn.Module:
        """Return an encoder to ``4 * width`` features."""
        return nn.Sequential(
            convolution(1, width, 2, self.norm),
            convolution(width, 2 * width, 2, self.norm),
            convolution(2 * width, 2 * width, 1, self.norm),
            convolution(2 * width, 4 * width, 2, self.norm),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(16 * width, 4 * width),
        )

    def evaluate(self, encode: Encode) -> dict[str, float]:
        """Return recall at 1 and mean average precision, on training and on held-back characters."""
        results = {}
        for name, images in (("seen", self.seen), ("held_back", self.held_back)):
            labels = torch.arange(len(images)).repeat_interleave(images.shape[1])
            results[f"r1_{name}"], results[f"map_{name}"] = retrieval(encode(images.flatten(0, 1)), labels)
        return results


class OmniglotPairs(Omniglot):
    """Supervised: the positive pair is two drawings of one character, so hard negatives are true negatives.

    An instance is a character in one of four directions. Each batch takes two random drawings of it. The evaluation
    retrieves drawings of the same character and direction: new drawings of training characters, and held-back
    characters.

    An O or an S looks the same after a turn of 180 degrees, so nobody can tell such a negative from the anchor. Pairs
    of one character in two directions therefore count as false negatives.
    """

    name = "omniglot-pairs"
    defaults: ClassVar[dict[str, Any]] = {
        "steps": 3000,
        "batch_size": 32,
        "temperature": 0.1,
        "learning_rate": 2e-3,
        "width": 16,
        "rotations": 4,
    }
    class_prior = 0.0

    def __init__(self, data_dir: Path, seed: int, settings: dict[str, Any]) -> None:
        self.width = settings["width"]
        seen, held_back = (turned(images, settings["rotations"]) for images in split(data_dir, seed))
        self.train, self.seen = seen[:, :N_TRAIN_DRAWINGS], seen[:, N_TRAIN_DRAWINGS:]
        self.held_back = held_back
        self.size = len(seen)
        self.labels = torch.arange(self.size // settings["rotations"]).repeat(settings["rotations"])

    def views(self, indices: Tensor) -> Tensor:
        two = torch.rand(len(indices), N_TRAIN_DRAWINGS).topk(2, dim=1).indices.T
        return self.train[indices, two]

    def clean(self, indices: Tensor) -> Tensor:
        return self.train[indices, torch.randint(N_TRAIN_DRAWINGS, (len(indices),))]

    def networks(self) -> tuple[nn.Module, nn.Module]:
        return self.encoder(self.width), nn.Identity()


class OmniglotPairsGroupNorm(OmniglotPairs):
    """The same task with group norm: batch norm subtracts a batch's mean, and so a part of its hardness."""

    name = "omniglot-pairs-groupnorm"
    norm = partial(nn.GroupNorm, 8)


class OmniglotSimCLR(Omniglot):
    """Unsupervised: an instance is a drawing; its positive pair is two augmentations of it."""

    name = "omniglot-simclr"
    defaults: ClassVar[dict[str, Any]] = {
        "steps": 1500,
        "batch_size": 128,
        "temperature": 0.2,
        "learning_rate": 2e-3,
        "width": 16,
    }
    class_prior = 1 / 180

    def __init__(self, data_dir: Path, seed: int, settings: dict[str, Any]) -> None:
        self.width = settings["width"]
        self.seen, self.held_back = split(data_dir, seed)
        self.images = self.seen.flatten(0, 1)
        self.size = len(self.images)
        self.labels = torch.arange(len(self.seen)).repeat_interleave(self.seen.shape[1])

    def views(self, indices: Tensor) -> Tensor:
        return jittered(self.images[indices].repeat(2, 1, 1, 1)).unflatten(0, (2, -1))

    def clean(self, indices: Tensor) -> Tensor:
        return self.images[indices]

    def networks(self) -> tuple[nn.Module, nn.Module]:
        return self.encoder(self.width), perceptron(4 * self.width, 4 * self.width, 64)


def turned(images: Tensor, n: int) -> Tensor:
    """Turn characters ``[c, k, 1, h, w]`` in ``n`` directions, each a new character: ``[n * c, k, 1, h, w]``."""
    return torch.cat([images.rot90(quarters, dims=(3, 4)) for quarters in range(n)])
