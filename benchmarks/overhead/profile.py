"""Where the time of one refresh goes, by torch.profiler.

The third pool is profiled: code is compiled and workers are warm by then. Each row is an operator: its own time on the
device, and that time's share of all operators' time.
"""

import argparse
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from lightning import Callback, LightningModule, seed_everything
from torch.profiler import ProfilerActivity, profile

from bs_lightning import BatchSamplerCallback

from ..csv_files import Row
from .model import Data, SimCLR, precision_columns, quiet_trainer

SHOWN = 15


class Profile(Callback):
    """Plans pools before the first step, and profiles the last of them."""

    def __init__(self, sampling: BatchSamplerCallback, args: argparse.Namespace) -> None:
        self.sampling, self.args = sampling, args

    def on_train_batch_start(self, trainer: Any, module: LightningModule, batch: Any, batch_idx: int) -> None:
        planner: Any = self.sampling._planner
        pool = np.random.default_rng(0).permutation(self.args.instances)[: self.args.pool_size]
        module.eval()
        for seed in range(2):
            planner.plan_pool(pool, seed=seed, epoch=0)
        on_gpu = module.device.type == "cuda"
        planner.seconds = {}
        with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
            start = time.perf_counter()
            planner.plan_pool(pool, seed=2, epoch=0)
            self.seconds, self.steps = time.perf_counter() - start, dict(planner.seconds)
        name = "self_device_time_total" if on_gpu else "self_cpu_time_total"
        self.spent = {event.key: (event.count, getattr(event, name) / 1e6) for event in profiler.key_averages()}
        trainer.should_stop = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.add_argument("--instances", type=int, default=25_600)
    parser.add_argument("--pool-size", type=int, default=2560)
    parser.add_argument("--batch-size", type=int, default=256)


def rows(args: argparse.Namespace) -> Iterator[Row]:
    """Profile once, and yield the whole refresh, its steps, and the operators that take most time."""
    seed_everything(0, verbose=False)
    sampling = BatchSamplerCallback(args.pool_size)
    profiled = Profile(sampling, args)
    quiet_trainer(args, [sampling, profiled], None, max_steps=1).fit(
        SimCLR(args.network, args.channels_last), datamodule=Data(args.instances, args.batch_size)
    )
    settings = {"network": args.network, **precision_columns(args), "P": args.pool_size}
    parts = {"refresh": (1, profiled.seconds)} | {name: (1, seconds) for name, seconds in profiled.steps.items()}
    for name, (count, seconds) in parts.items():
        yield settings | {"what": name, "calls": count, "ms": 1000 * seconds, "share": seconds / profiled.seconds}
    total = sum(seconds for _, seconds in profiled.spent.values())
    slowest = sorted(profiled.spent.items(), key=lambda item: -item[1][1])[:SHOWN]
    for name, (count, seconds) in slowest:
        yield settings | {"what": name[:50], "calls": count, "ms": 1000 * seconds, "share": seconds / total}
