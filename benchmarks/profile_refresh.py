"""Profile the refresh of one pool, and print where its time goes.

    python -m benchmarks.profile_refresh
    python -m benchmarks.profile_refresh --device cuda --network resnet18 --pool-size 25600

The third pool is profiled: code is compiled and workers are warm by then.
"""

import argparse
import time
import warnings
from typing import Any

import numpy as np
from lightning import Callback, LightningModule, seed_everything
from torch.profiler import ProfilerActivity, profile

from bs_lightning import BatchSamplerCallback

from .overhead import Data, SimCLR, quiet_trainer


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
        on = module.device.type
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on == "cuda" else [])]
        planner.seconds = {}
        start = time.perf_counter()
        with profile(activities=activities) as profiler:
            planner.plan_pool(pool, seed=2, epoch=0)
        print(f"{time.perf_counter() - start:.3f} s; seconds of the steps: {planner.seconds}")
        print(profiler.key_averages().table(sort_by=f"self_{on}_time_total", row_limit=15, max_name_column_width=40))
        trainer.should_stop = True


def main() -> None:
    """Profile once."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--network", default="small", choices=["small", "resnet18"])
    parser.add_argument("--instances", type=int, default=25_600)
    parser.add_argument("--pool-size", type=int, default=2560)
    parser.add_argument("--batch-size", type=int, default=256)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    seed_everything(0, verbose=False)
    sampling = BatchSamplerCallback(args.pool_size)
    trainer = quiet_trainer(args, [sampling, Profile(sampling, args)], max_steps=1)
    trainer.fit(SimCLR(args.network), datamodule=Data(args.instances, args.batch_size))


if __name__ == "__main__":
    main()
