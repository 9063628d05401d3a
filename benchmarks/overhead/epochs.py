"""Whole training epochs with and without composed batches, and the training steps within them.

A row is one SimCLR run in a process of its own. In each round it trains one epoch of each kind, in random order, or as
many epochs of each kind as embeddings are kept for:

- uniform batches, while the callback plans nothing;
- uniform batches, each epoch after a bare loop that embeds each instance once, in batches of the callback's size;
- composed batches.

So kinds share model, process and memory, and differ by nothing else. The first rounds, in which code is compiled, do
not count. An epoch lasts from the end of the one before to its own end. Ratios are medians over the rounds:

- forward pass ratio: the epoch with a bare forward pass, by the uniform epoch.
- epoch ratio: the composed epoch, by the epoch in the column "compared with" of its round. "From" and "to" are a 95%
  interval of this median.
- extra share: the difference of these two epochs, by the uniform epoch. It may be 0.02: composing from fresh embeddings
  may cost a forward pass and 2% of a uniform epoch, and from recycled ones 2%. Embeddings that are kept are compared
  with uniform epochs, so this share holds a quarter of a forward pass.
- step ratio: the composed epoch without the seconds that the callback logs for encode, graph and walk, by the uniform
  epoch. It shows whether training itself is slowed, as it was when the first graph changed torch's number of threads.
- graph share: graph and walk by all that a refresh takes; and by a uniform epoch.
"""

import argparse
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer, seed_everything
from torch.utils.data import DataLoader

from bs_lightning import BatchSamplerCallback, ExactGraph, RWRComposer, graphs
from bs_lightning.plugin.encoder import default_batch_size

from ..csv_files import Row
from ..processes import in_new_process
from .model import Data, SimCLR, precision_columns, quiet_trainer
from .ratios import ratio_columns

UNCOUNTED = 3  # rounds
KINDS = ("uniform", "forward pass", "composed")
STEPS = ("encode", "graph", "walk")
ARMS: dict[str, dict[str, Any]] = {  # the callback's arguments
    "default": {},
    "pynndescent": {},
    "recycled": {"composer": RWRComposer(ExactGraph(15)), "recycle": True},
    "kept": {"pool_size": "all", "encode_every": 4},
}


class InTurn(BatchSamplerCallback):
    """Composes the batches of some epochs.

    Args:
        kinds: The kind of each epoch.
        options: As for :class:`BatchSamplerCallback`.
    """

    def __init__(self, kinds: list[str], **options: Any) -> None:
        super().__init__(**options)
        self.kinds = kinds

    def should_plan(self, trainer: Trainer) -> bool:
        return self.kinds[trainer.current_epoch] == "composed"

    # A uniform epoch is one without the callback: it keeps no embeddings, and describes no batches for the log.

    def on_train_batch_start(self, trainer: Trainer, *arguments: Any) -> None:
        if self.should_plan(trainer):
            super().on_train_batch_start(trainer, *arguments)

    def on_train_batch_end(self, trainer: Trainer, *arguments: Any) -> None:
        if self.should_plan(trainer):
            super().on_train_batch_end(trainer, *arguments)


class ForwardPass(Callback):
    """Embeds every instance once before the first step of some epochs, in a bare loop with workers of its own."""

    def __init__(self, kinds: list[str]) -> None:
        self.kinds = kinds
        self.batches: list[list[int]] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        device, kwargs = pl_module.device, data.dataloader_kwargs
        self.size = default_batch_size(data.batch_size, device, kwargs["num_workers"])
        settings: Any = {"batch_sampler": self.batches, "pin_memory": device.type == "cuda"} | kwargs
        self.loader: Any = DataLoader(data.train_dataset(), **settings)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx > 0 or self.kinds[trainer.current_epoch] != "forward pass":
            return
        self.batches[:] = [batch.tolist() for batch in torch.randperm(len(self.loader.dataset)).split(self.size)]
        pl_module.eval()
        with torch.no_grad(), trainer.precision_plugin.forward_context():
            torch.cat([pl_module(images.to(pl_module.device, non_blocking=True)) for images in self.loader])
        pl_module.train()


class Clock(Callback):
    """Keeps how long each epoch took, and what the callback logged. Put it behind the callback."""

    def __init__(self) -> None:
        self.epochs: list[list[float]] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.start = time.perf_counter()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize()
        end = time.perf_counter()
        logged = trainer.callback_metrics
        seconds = [float(logged.get(f"batch_sampler/{step}_seconds", 0.0)) for step in STEPS]
        self.epochs.append([end - self.start, *seconds])
        self.start = end


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.add_argument("--instances", type=int, default=2048)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--load-ms", type=float, default=0.0, help="how long an image takes to load, in milliseconds")
    parser.add_argument("--rounds", type=int, default=31, help="epochs of each kind that count")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS, metavar="ARM")


def rows(args: argparse.Namespace) -> Iterator[Row]:
    """Train each arm in a process of its own, and yield its row."""
    for arm in args.arms:
        yield in_new_process(measure, arm, args)


def measure(arm: str, args: argparse.Namespace) -> Row:
    """Train epochs of each kind in turn, and return an arm's row."""
    torch.set_num_threads(args.threads)
    if arm == "pynndescent":  # the pools are too small for it, send them there
        graphs._SMALL_POOL = graphs._SMALL_POOL_ON_GPU = 0
    seed_everything(0, verbose=False)
    rounds = UNCOUNTED + args.rounds
    n_epochs = ARMS[arm].get("encode_every", 1)  # of each kind in a round
    turns = np.random.default_rng(0).permuted(np.tile(KINDS, (rounds, 1)), axis=1).flatten()
    kinds = turns.repeat(n_epochs).tolist()
    clock = Clock()
    data = Data(args.instances, args.batch_size, args.load_ms / 1000, num_workers=args.workers)
    trainer = quiet_trainer(args, [InTurn(kinds, **ARMS[arm]), ForwardPass(kinds), clock], len(kinds))
    trainer.fit(SimCLR(args.network, args.channels_last), datamodule=data)
    epochs = np.array(clock.epochs).reshape(len(turns), n_epochs, -1).mean(axis=1)
    by_kind = {kind: epochs[turns == kind][UNCOUNTED:].T for kind in KINDS}
    seconds = {kind: of_kind[0] for kind, of_kind in by_kind.items()}
    uniform, forward_pass, composed = seconds.values()
    encode, graph, walk = by_kind["composed"][1:]
    refresh = encode + graph + walk
    base = "uniform" if arm in ("recycled", "kept") else "forward pass"
    return {
        "batches": arm,
        "compared with": base,
        "network": args.network,
        **precision_columns(args),
        "threads": args.threads,
        "instances": args.instances,
        "batch size": args.batch_size,
        "workers": args.workers,
        "ms to load": args.load_ms,
        "epoch seconds": float(np.median(composed)),
        "forward pass ratio": float(np.median(forward_pass / uniform)),
        **{f"epoch {name}": value for name, value in ratio_columns(composed / seconds[base]).items()},
        "extra share": float(np.median((composed - seconds[base]) / uniform)),
        "step ratio": float(np.median((composed - refresh) / uniform)),
        "graph share": float(np.median((graph + walk) / refresh)),
        "graph share of epoch": float(np.median((graph + walk) / uniform)),
    }
