"""SimCLR and MoCo v3 on CIFAR-10 and Omniglot: train each arm, and measure its features by probes and retrieval.

Arms of a seed differ in their batches only. The settings are the recipes', with a small encoder and some of the images
on two cores. The presets for a GPU have the paper's: ResNet-18, all images, batches of 256. The temperature is the
recipe's: 0.5 for SimCLR, 0.2 for MoCo v3.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning import seed_everything
from threadpoolctl import threadpool_limits
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from bs_lightning import BatchSamplerCallback
from bs_lightning.baselines import knn_batches
from bs_lightning.presets import public_code
from bs_lightning.recipes.augment import random_view
from bs_lightning.recipes.images import ImageData
from bs_lightning.recipes.moco_v3 import MoCoV3
from bs_lightning.recipes.resnet import ResNet18
from bs_lightning.recipes.simclr import SimCLR

from ..csv_files import Row
from ..runs import chosen_settings, run_missing, show, wanted
from ..trainers import make_trainer
from ..training import cifar10, omniglot
from ..training.evaluate import retrieval
from ..training.model import apply_in_chunks
from .last_epoch import LastBatches, describe

PRESETS: dict[str, Row] = {
    "two-cores": {"encoder": "small", "instances": 3840, "batch_size": 128, "epochs": 8},
    "gpu-200": {"encoder": "resnet18", "instances": 50_000, "batch_size": 256, "epochs": 200},
    "gpu-800": {"encoder": "resnet18", "instances": 50_000, "batch_size": 256, "epochs": 800},
}
TEMPERATURES = {"simclr": 0.5, "moco_v3": 0.2}
MODELS: dict[str, Callable[..., Any]] = {"simclr": SimCLR, "moco_v3": MoCoV3}
SMALL_WIDTH = 24


# Arms

ARMS: dict[str, Callable[[], BatchSamplerCallback | None]] = {
    "uniform": lambda: None,
    "untrained": lambda: None,
    "knn": lambda: BatchSamplerCallback(composer=knn_batches),  # in pools of ten batches, as the default
    "batchsampler": lambda: BatchSamplerCallback(),
    "auto": lambda: BatchSamplerCallback("auto"),
    "public-code": public_code,
}


# Data


class Images(NamedTuple):
    """Images to train on and images to test with, uint8 ``[n, 3, h, w]``, and their labels, int64 ``[n]``."""

    train: Tensor
    labels: Tensor
    test: Tensor
    test_labels: Tensor
    held_back: Tensor | None  # Omniglot's other alphabets, [characters, drawings, 3, h, w]
    augment: Callable[[Tensor], Tensor]


def read_cifar10(data_dir: Path, seed: int) -> Images:
    """Return the training images in a random order, and the test images."""
    folder = data_dir / "cifar10"
    train = cifar10.images(folder / "train-00000-of-00001.parquet", seed, None)
    test = cifar10.images(folder / "test-00000-of-00001.parquet", 0, None)
    return Images(*train, *test, None, random_view)


def read_omniglot(data_dir: Path, seed: int) -> Images:
    """Return drawings by character: of most alphabets, some people's to train on and others' to test with."""
    seen, held_back = (as_bytes(images) for images in omniglot.split(data_dir, seed))
    n = omniglot.N_TRAIN_DRAWINGS
    characters = torch.arange(len(seen))[:, None].expand(seen.shape[:2])
    order = torch.randperm(characters[:, :n].numel(), generator=torch.Generator().manual_seed(seed))
    train, labels = seen[:, :n].flatten(0, 1)[order], characters[:, :n].flatten()[order]
    test, test_labels = seen[:, n:].flatten(0, 1), characters[:, n:].flatten()
    return Images(train, labels, test, test_labels, held_back, omniglot.jittered)


def as_bytes(drawings: Tensor) -> Tensor:
    """Turn drawings ``[c, k, 1, h, w]`` from floats in ``[0, 1]`` into bytes of three equal colours."""
    return (drawings * 255).round().byte().expand(-1, -1, 3, -1, -1)


DATASETS: dict[str, Callable[[Path, int], Images]] = {"cifar10": read_cifar10, "omniglot": read_omniglot}


# One run


def make_encoder(name: str) -> nn.Module:
    """Return ResNet-18, or an encoder that two cores train in minutes."""
    if name == "resnet18":
        return ResNet18()
    encoder = cifar10.small_encoder(SMALL_WIDTH)
    encoder.num_features = 4 * SMALL_WIDTH  # type: ignore[assignment]
    return encoder


def run(data_dir: Path, device: str, chosen: Row) -> Row:
    """Train and measure once.

    Args:
        data_dir: Folder with the subfolders ``cifar10`` and ``omniglot``.
        device: Lightning's name of what to train on.
        chosen: Model, dataset, arm, seed and settings.

    Returns:
        The measures.
    """
    start = time.perf_counter()
    images = DATASETS[chosen["dataset"]](data_dir, chosen["seed"])
    n = chosen["instances"]
    if n > len(images.train):
        raise SystemExit(f"--instances: {chosen['dataset']} has {len(images.train)} images to train on, got {n}.")
    seed_everything(chosen["seed"], verbose=False)
    model = MODELS[chosen["model"]](make_encoder(chosen["encoder"]), temperature=chosen["temperature"])
    labels = images.labels[:n]
    data = ImageData(
        TensorDataset(images.train[:n], labels),
        chosen["batch_size"],
        test=TensorDataset(images.test, images.test_labels),
        image_size=images.train.shape[-1],
        augment=images.augment,
    )
    callback, last = ARMS[chosen["arm"]](), LastBatches()
    trainer = make_trainer(chosen["epochs"], [*([callback] if callback else []), last], device)
    began = time.perf_counter()
    if chosen["arm"] != "untrained":
        trainer.fit(model, datamodule=data)
    trained = time.perf_counter()
    trainer.test(model, datamodule=data, verbose=False)
    results = {name: float(trainer.callback_metrics[f"test/{name}"]) for name in ("linear_probe", "knn")}
    model.cpu()
    if images.held_back is not None:
        characters, drawings = images.held_back.shape[:2]
        features = apply_in_chunks(model.encoder, images.held_back.flatten(0, 1))
        found = retrieval(features, torch.arange(characters).repeat_interleave(drawings))
        results |= dict(zip(("r1_held_back", "map_held_back"), found, strict=True))
    described = {}
    if chosen["arm"] != "untrained":
        described = describe(last, partial(sides, model.train(), data.augment, images.train), labels)
    return {
        **{f"result/{name}": value for name, value in results.items()},
        **described,
        "seconds/train": trained - began,
        "seconds/all": time.perf_counter() - start,
    }


def sides(model: Any, augment: Callable[[Tensor], Tensor], images: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Return what the loss compares: two views' projections, or the queries of one view and the keys of the other."""
    views = augment(images[indices].repeat(2, 1, 1, 1) / 255)
    if isinstance(model, MoCoV3):
        first, second = views.chunk(2)
        return model.queries(first), model.keys(second)
    first, second = model.embed(views).chunk(2)
    return first, second


# The command line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this benchmark's arguments."""
    parser.add_argument("--data-dir", required=True, type=Path, help="folder with cifar10 and omniglot")
    parser.add_argument("--dataset", default="cifar10", choices=DATASETS)
    parser.add_argument("--model", default="simclr", choices=MODELS)
    parser.add_argument("--arms", nargs="+", default=["uniform", "knn", "batchsampler"], choices=ARMS, metavar="ARM")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    parser.add_argument("--results", required=True, type=Path, help="CSV file to add rows to")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--preset", default="two-cores", choices=PRESETS, help="settings to start from")
    group = parser.add_argument_group("settings", "instead of the preset's; recorded in the results")
    group.add_argument("--encoder", choices=["small", "resnet18"])
    group.add_argument("--temperature", type=float)
    for name in ("instances", "batch_size", "epochs"):
        group.add_argument(f"--{name.replace('_', '-')}", type=int)


def main(args: argparse.Namespace) -> None:
    """Train and measure, and print a line for each run."""
    torch.set_num_threads(args.threads)
    threadpool_limits(args.threads)  # the threads that scikit-learn uses
    settings = chosen_settings(args, PRESETS[args.preset] | {"temperature": TEMPERATURES[args.model]})
    runs = wanted({"model": args.model, "dataset": args.dataset}, args.arms, range(args.seeds), settings)
    show(run_missing(runs, partial(run, args.data_dir, args.device), args.results))
