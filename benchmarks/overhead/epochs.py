"""Whole training epochs with and without the callback, and the training steps within them.

Each arm trains the same SimCLR model in a process of its own, and all arms train one epoch in turn, so that a machine
whose speed drifts is as fast for each. The first composed epochs, in which code is compiled, do not count. A row holds
medians over the rounds:

- epoch ratio: the whole epoch, by the epoch in the same round of the arm in "compared with". "From" and "to" are a 95%
  interval of this median.
- step ratio: the epoch without the seconds that the callback logs for encode, graph and walk, by the uniform epoch. It
  shows whether training itself is slowed, as it was when the first graph changed torch's number of threads.
- graph share: graph and walk by all that a refresh takes; and by a uniform epoch.

A process is faster or slower than another of the same arm by some hundredths, all its life. The interval does not hold
this. The last column does not suffer from it.

The "forward pass" arm trains uniform batches after a bare loop that embeds each instance once, in batches of the
callback's size. Composing from fresh embeddings may cost this much and 2% of a uniform epoch more, and from recycled
ones 2%.

All arms start with the same fixed thresholds of glibc's malloc. By default glibc raises them when a process frees a
large block. Only arms that embed free such blocks, and their steps were then faster by a tenth.
"""

import argparse
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any
from unittest import mock

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer, seed_everything
from torch.utils.data import DataLoader

from bs_lightning import BatchSamplerCallback, ExactGraph, RWRComposer, graphs

from ..csv_files import Row
from .model import Data, SimCLR, as_loaded, quiet_trainer
from .ratios import ratio_columns


def pynndescent() -> BatchSamplerCallback:
    """Return the default callback, whose pools are too small for pynndescent, and send them there. Call it once."""
    graphs._SMALL_POOL = graphs._SMALL_POOL_ON_GPU = 0
    return BatchSamplerCallback()


MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(2**25), "MALLOC_TRIM_THRESHOLD_": str(2**30)}  # bytes
UNCOUNTED = 3  # epochs: uniform, and two composed ones
ARMS: dict[str, Callable[[], Callback]] = {
    "uniform": Callback,
    "forward pass": lambda: ForwardPass(),
    "exact graph": lambda: BatchSamplerCallback(composer=RWRComposer(ExactGraph(15))),
    "default": BatchSamplerCallback,
    "pynndescent": pynndescent,
    "recycled": lambda: BatchSamplerCallback(composer=RWRComposer(ExactGraph(15)), recycle=True),
}
FRESH = ("exact graph", "default", "pynndescent")  # compared with the forward pass, which they need
STEPS = ("encode", "graph", "walk")


class ForwardPass(Callback):
    """Embeds every instance once before the first step of each epoch, in a bare loop."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx > 0:
            return
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        size = 256 if pl_module.device.type == "cpu" else 4 * data.batch_size
        batches = torch.randperm(data.size).split(size)
        settings: Any = {"batch_sampler": [batch.tolist() for batch in batches], "collate_fn": as_loaded}
        loader = DataLoader(data.pool_dataset(), **settings)
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
        self.connection.send([seconds, *(float(logged.get(f"batch_sampler/{step}_seconds", 0.0)) for step in STEPS)])


def train(arm: str, epochs: int, args: argparse.Namespace, connection: "Connection[Any, Any]") -> None:
    """Train one arm, an epoch at each turn."""
    torch.set_num_threads(args.threads)
    seed_everything(0, verbose=False)
    trainer = quiet_trainer(args, [ARMS[arm](), Turns(connection)], epochs)
    trainer.fit(SimCLR(args.network), datamodule=Data(args.instances, args.batch_size))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.add_argument("--instances", type=int, default=2048)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=31, help="epochs of each arm that count")


def rows(args: argparse.Namespace) -> Iterator[Row]:
    """Let all arms train in turn, and yield a row for each."""
    context = multiprocessing.get_context("spawn")
    ends = {}
    with mock.patch.dict(os.environ, MALLOC):
        for arm in ARMS:
            ours, theirs = context.Pipe()
            context.Process(target=train, args=(arm, UNCOUNTED + args.rounds, args, theirs), daemon=True).start()
            ends[arm] = ours
    measured: dict[str, list[list[float]]] = {arm: [] for arm in ARMS}
    for _ in range(UNCOUNTED + args.rounds):
        for arm, end in ends.items():
            end.send("go")
            measured[arm].append(end.recv())
    counted = {arm: np.array(epochs[UNCOUNTED:]).T for arm, epochs in measured.items()}
    for arm, (seconds, encode, graph, walk) in counted.items():
        base = "forward pass" if arm in FRESH else "uniform"
        refresh = encode + graph + walk
        ratios = ratio_columns(seconds / counted[base][0])
        yield {
            "batches": arm,
            "compared with": base,
            "network": args.network,
            "threads": args.threads,
            "instances": args.instances,
            "epoch seconds": float(np.median(seconds)),
            **{f"epoch {name}": value for name, value in ratios.items()},
            "step ratio": float(np.median((seconds - refresh) / counted["uniform"][0])),
            "graph share": float(np.median((graph + walk) / refresh)) if refresh.all() else "",
            "graph share of epoch": float(np.median((graph + walk) / counted["uniform"][0])),
        }
