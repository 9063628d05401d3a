"""Compare whole training epochs with and without the callback, and the training steps within them.

    python -m benchmarks.overhead
    python -m benchmarks.overhead --threads 1 2 --rounds 15
    python -m benchmarks.overhead --device cuda --network resnet18 --instances 25600 --batch-size 256

Each arm trains the same SimCLR model in a process of its own, and all arms train one epoch in turn, so that a machine
whose speed drifts is as fast for each. The first composed epochs, in which code is compiled, do not count. A row holds
medians over the rounds, of ratios to the uniform arm's epoch in the same round:

- epoch ratio: the whole epoch.
- step ratio: the epoch without the seconds that the callback logs for encode, graph and walk. It shows whether training
  itself is slowed, as it was when the first graph changed torch's number of threads.
- graph share: graph and walk by all that a refresh takes.

The "forward pass" arm trains uniform batches after a bare loop that embeds each instance once, in batches of the
callback's size. Composing from fresh embeddings may cost this much and 2% more.
"""

import argparse
import logging
import multiprocessing
import statistics
import time
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from bs_lightning import BatchSamplerCallback, BatchSamplerDataModule, ExactGraph, RWRComposer, graphs
from bs_lightning.recipes.resnet import ResNet18

from . import csv_files
from .markdown import print_row


def pynndescent() -> BatchSamplerCallback:
    """Return the default callback, whose pools are too small for pynndescent, and send them there. Call it once."""
    graphs._SMALL_POOL = graphs._SMALL_POOL_ON_GPU = 0
    return BatchSamplerCallback()


UNCOUNTED = 3  # epochs: uniform, and two composed ones
ARMS: dict[str, Callable[[], Callback]] = {
    "uniform": Callback,
    "forward pass": lambda: ForwardPass(),
    "exact graph": lambda: BatchSamplerCallback(composer=RWRComposer(ExactGraph(15))),
    "default": BatchSamplerCallback,
    "pynndescent": pynndescent,
    "recycled": lambda: BatchSamplerCallback(composer=RWRComposer(ExactGraph(15)), recycle=True),
}
STEPS = ("encode", "graph", "walk")


class Images(Dataset[Tensor]):
    """Random images; both views are the same, as augmentation is not what is measured."""

    def __init__(self, size: int) -> None:
        self.images = torch.rand(size, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, indices: list[int]) -> Tensor:
        return self.images[indices]


class Data(BatchSamplerDataModule):
    """The data of all arms."""

    def __init__(self, size: int, batch_size: int = 64, **kwargs: Any) -> None:
        super().__init__(batch_size, collate_fn=lambda batch: batch, **kwargs)
        self.size = size

    def train_dataset(self) -> Dataset[Tensor]:
        return Images(self.size)


class SimCLR(LightningModule):
    """A small convolutional net or a ResNet-18, trained with NT-Xent."""

    def __init__(self, network: str = "small") -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in ((3, 32), (32, 64), (64, 128)):
            layers += [nn.Conv2d(inputs, outputs, 3, stride=2, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
        small = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 64))
        self.net: nn.Module = ResNet18() if network == "resnet18" else small

    def forward(self, images: Tensor) -> Tensor:
        embeddings: Tensor = self.net(images)
        return embeddings

    def training_step(self, images: Tensor, batch_idx: int) -> dict[str, Tensor]:
        first, second = (nn.functional.normalize(self(images), dim=1) for _ in range(2))
        loss = nn.functional.cross_entropy(first @ second.T / 0.5, torch.arange(len(first), device=first.device))
        return {"loss": loss, "embeddings": first}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class ForwardPass(Callback):
    """Embeds every instance once before the first step of each epoch, in a bare loop."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx > 0:
            return
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        size = 256 if pl_module.device.type == "cpu" else 4 * data.batch_size
        batches = torch.randperm(data.size).split(size)
        loader: Any = DataLoader(data.pool_dataset(), batch_sampler=[batch.tolist() for batch in batches],
                                 collate_fn=lambda batch: batch)  # fmt: skip
        pl_module.eval()
        with torch.no_grad(), trainer.precision_plugin.forward_context():
            torch.cat([pl_module(images.to(pl_module.device)) for images in loader])
        pl_module.train()


class Turns(Callback):
    """Waits for its turn at the start of each epoch, and tells at the end how long the epoch took."""

    def __init__(self, connection: "Connection[Any, Any]") -> None:
        self.connection = connection

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.connection.recv()
        self.start = time.perf_counter()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - self.start
        logged = trainer.callback_metrics
        self.connection.send((seconds, *(float(logged.get(f"batch_sampler/{step}_seconds", 0.0)) for step in STEPS)))


def quiet_trainer(args: argparse.Namespace, callbacks: list[Callback], **limits: int) -> Trainer:
    """Return a Trainer that shows and keeps nothing, on one device and in the precision that were asked for."""
    return Trainer(
        callbacks=callbacks,
        accelerator="cpu" if args.device == "cpu" else "gpu",
        devices=1,
        precision=args.precision,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **limits,  # type: ignore[arg-type]
    )


def train(arm: str, threads: int, epochs: int, args: argparse.Namespace, connection: "Connection[Any, Any]") -> None:
    """Train one arm, an epoch at each turn."""
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "bs_lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(threads)
    seed_everything(0, verbose=False)
    trainer = quiet_trainer(args, [ARMS[arm](), Turns(connection)], max_epochs=epochs)
    trainer.fit(SimCLR(args.network), datamodule=Data(args.instances, args.batch_size))


def compare(threads: int, args: argparse.Namespace) -> None:
    """Let all arms train in turn, and print and store a row for each."""
    rounds = args.rounds
    context = multiprocessing.get_context("spawn")
    ends = {}
    for arm in ARMS:
        ours, theirs = context.Pipe()
        context.Process(target=train, args=(arm, threads, UNCOUNTED + rounds, args, theirs), daemon=True).start()
        ends[arm] = ours
    epochs: dict[str, list[tuple[float, ...]]] = {arm: [] for arm in ARMS}
    for _ in range(UNCOUNTED + rounds):
        for arm, end in ends.items():
            end.send("go")
            epochs[arm].append(end.recv())
    base = [seconds for seconds, *_ in epochs["uniform"]][UNCOUNTED:]
    for arm, measured in epochs.items():
        counted = measured[UNCOUNTED:]
        refreshes = [spent for _, *spent in counted if sum(spent)]
        row = {
            "device": torch.cuda.get_device_name() if args.device == "cuda" else "CPU",
            "network": args.network,
            "threads": threads,
            "batches": arm,
            "epoch seconds": statistics.median(seconds for seconds, *_ in counted),
            "epoch ratio": statistics.median(s / b for (s, *_), b in zip(counted, base, strict=True)),
            "step ratio": statistics.median((s - sum(spent)) / b for (s, *spent), b in zip(counted, base, strict=True)),
            "graph share": statistics.median(1 - encode / sum((encode, *rest)) for encode, *rest in refreshes)
            if refreshes
            else "",
        }
        print_row(row, with_header=arm == "uniform")
        if args.store:
            csv_files.append(args.store, row | {"torch": torch.__version__, "instances": args.instances})


def arguments() -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--threads", type=int, nargs="+", default=[1, 2], help="torch's numbers of threads to compare at"
    )
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--network", default="small", choices=["small", "resnet18"])
    parser.add_argument("--instances", type=int, default=2048)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--store", type=Path, help="a CSV file to add the rows to")
    parser.add_argument("--rounds", type=int, default=15, help="epochs of each arm that count")
    return parser.parse_args()


if __name__ == "__main__":
    chosen = arguments()
    for number in chosen.threads:
        compare(number, chosen)
