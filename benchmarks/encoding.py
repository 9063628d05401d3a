"""Compare how fast the callback encodes a pool with how fast a bare loop over the same batches is.

    python -m benchmarks.encoding
    python -m benchmarks.encoding --device cuda --precision bf16-mixed --network resnet18 --workers 8

Within one training step, the callback and a bare inference loop embed the same pool in turn: the same model, dataset,
workers, batch size and precision. A row holds medians over the rounds. The ratio is the bare loop's seconds by the
callback's, pair by pair; the goal is at least 0.95.
"""

import argparse
import statistics
import time
import warnings
from typing import Any

import numpy as np
import torch
from lightning import Callback, LightningModule, seed_everything
from torch import Tensor
from torch.utils.data import DataLoader

from bs_lightning import BatchSamplerCallback

from .markdown import print_row
from .overhead import Data, SimCLR, quiet_trainer


class Compare(Callback):
    """Embeds a pool by the callback and by a bare loop, in turn, before the first step."""

    def __init__(self, sampling: BatchSamplerCallback, args: argparse.Namespace) -> None:
        self.sampling, self.args = sampling, args
        self.pairs: list[tuple[float, float]] = []

    def on_train_batch_start(self, trainer: Any, module: LightningModule, batch: Any, batch_idx: int) -> None:
        planner: Any = self.sampling._planner
        pool = np.random.default_rng(0).permutation(self.args.instances)[: self.args.pool_size]
        size = planner.source._size
        batches = [pool[start : start + size].tolist() for start in range(0, len(pool), size)]
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
        print_row(
            {
                "device": torch.cuda.get_device_name() if module.device.type == "cuda" else "CPU",
                "network": self.args.network,
                "threads": torch.get_num_threads(),
                "workers": self.args.workers,
                "precision": self.args.precision,
                "embedded at a time": size,
                "callback seconds": statistics.median(ours for ours, _ in self.pairs[2:]),
                "bare seconds": statistics.median(bare for _, bare in self.pairs[2:]),
                "ratio": statistics.median(bare / ours for ours, bare in self.pairs[2:]),
            },
            with_header=True,
        )
        trainer.should_stop = True


def main() -> None:
    """Compare once, and print a row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--network", default="small", choices=["small", "resnet18"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--instances", type=int, default=8192)
    parser.add_argument("--pool-size", type=int, default=8192)
    parser.add_argument("--encode-batch-size", type=int, help="by default, the callback's")
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(args.threads)
    seed_everything(0, verbose=False)
    sampling = BatchSamplerCallback(args.pool_size, encode_batch_size=args.encode_batch_size)
    trainer = quiet_trainer(args, [sampling, Compare(sampling, args)], max_steps=1)
    workers = {"num_workers": args.workers, "persistent_workers": True} if args.workers else {}
    trainer.fit(SimCLR(args.network), datamodule=Data(args.instances, **workers))


if __name__ == "__main__":
    main()
