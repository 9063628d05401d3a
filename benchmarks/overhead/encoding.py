"""How fast the callback encodes a pool, compared with a bare loop over the same batches.

Within one training step, the callback and a bare inference loop embed the same pool in turn: the same model, dataset,
workers, batch size and precision. A row holds medians over the rounds. The ratio is the bare loop's seconds by the
callback's, pair by pair; the goal is at least 0.95. "From" and "to" are a 95% interval of this median.
"""

import argparse
import statistics
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from lightning import Callback, LightningModule, seed_everything
from torch import Tensor
from torch.utils.data import DataLoader

from bs_lightning import BatchSamplerCallback, ExactGraph, RWRComposer

from ..csv_files import Row
from .model import Data, SimCLR, precision_columns, quiet_trainer
from .ratios import ratio_columns


class Compare(Callback):
    """Embeds a pool by the callback and by a bare loop, in turn, before the first step."""

    def __init__(self, sampling: BatchSamplerCallback, args: argparse.Namespace) -> None:
        self.sampling, self.args = sampling, args
        self.pairs: list[tuple[float, float]] = []

    def on_train_batch_start(self, trainer: Any, module: LightningModule, batch: Any, batch_idx: int) -> None:
        planner: Any = self.sampling._planner
        pool = np.random.default_rng(0).permutation(self.args.instances)
        self.size = planner.source._size
        batches = [pool[start : start + self.size].tolist() for start in range(0, len(pool), self.size)]
        settings = trainer.datamodule.dataloader_kwargs | {"pin_memory": module.device.type == "cuda"}
        loader: Any = DataLoader(trainer.datamodule.pool_dataset(), batch_sampler=batches, **settings)

        def bare() -> Tensor:
            pieces = []
            with torch.no_grad(), trainer.precision_plugin.forward_context():
                for images in loader:
                    pieces.append(module(images.to(module.device, non_blocking=True)))
            return torch.cat(pieces)

        def timed(encode: Any) -> float:
            start = time.perf_counter()
            embeddings = encode()
            if embeddings.is_cuda:
                torch.cuda.synchronize()
            return time.perf_counter() - start

        module.eval()
        for _ in range(self.args.rounds + 2):  # the first ones start workers and choose kernels
            self.pairs.append((timed(lambda: planner.source.read(pool)), timed(bare)))
        module.train()
        trainer.should_stop = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--instances", type=int, default=8192)
    parser.add_argument("--encode-batch-size", type=int, help="by default, the callback's")
    parser.add_argument("--rounds", type=int, default=21)


def rows(args: argparse.Namespace) -> Iterator[Row]:
    """Compare once."""
    seed_everything(0, verbose=False)
    composer = RWRComposer(ExactGraph())  # compiles nothing beside what is timed
    sampling = BatchSamplerCallback("all", composer, encode_batch_size=args.encode_batch_size)
    compare = Compare(sampling, args)
    trainer = quiet_trainer(args, [sampling, compare], None, max_steps=1)
    workers = {"num_workers": args.workers, "persistent_workers": True} if args.workers else {}
    trainer.fit(SimCLR(args.network, args.channels_last), datamodule=Data(args.instances, **workers))
    pairs = compare.pairs[2:]
    yield {
        "network": args.network,
        **precision_columns(args),
        "threads": args.threads,
        "workers": args.workers,
        "instances": args.instances,
        "embedded at a time": compare.size,
        "callback seconds": statistics.median(ours for ours, _ in pairs),
        "bare seconds": statistics.median(bare for _, bare in pairs),
        **ratio_columns([bare / ours for ours, bare in pairs]),
    }
