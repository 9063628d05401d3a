"""Kill training runs at random steps, resume them from the last checkpoint, and compare the batches they served.

    python -m benchmarks.stress --cycles 100

There are two training runs (``tests/run.py``): one in a single process and one in two processes. Each cycle resumes one
of them with random loader settings, until the run kills itself at a random step. A run that has reached its end is
compared, batch by batch, with an uninterrupted run. The script prints how many instances were lost, how many were
doubled within an epoch, and how many batches differ. It exits with status 1 if any of these counts is above zero.
"""

import argparse
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.processes import batches_by_step, run

N, GLOBAL_BATCH, EPOCHS = 203, 8, 3
STEPS = N // GLOBAL_BATCH * EPOCHS
SAVE_EVERY = [3, 5]  # steps; saves within pools and epochs, and at their ends
LOADERS: list[dict[str, Any]] = [
    {"num_workers": 0},
    {"num_workers": 1, "prefetch_factor": 1},
    {"num_workers": 2, "prefetch_factor": 8},
    {"num_workers": 2, "prefetch_factor": 8, "persistent_workers": True},
]


def settings(world_size: int, loader: dict[str, Any]) -> dict[str, Any]:
    """Return what ``tests/run.py`` is given."""
    return {
        "devices": world_size,
        "n": N,
        "batch_size": GLOBAL_BATCH // world_size,
        "max_epochs": EPOCHS,
        "warmup_epochs": 1,
        "loader": loader,
    }


def compare(killed: dict[int, list[int]], whole: dict[int, list[int]]) -> tuple[int, int, int]:
    """Return how many instances were lost, how many were doubled, and how many batches differ."""
    per_epoch = N // GLOBAL_BATCH
    lost = doubled = 0
    for epoch in range(EPOCHS):
        steps = range(epoch * per_epoch, (epoch + 1) * per_epoch)
        served = [index for step in steps for index in killed.get(step, [])]
        lost += len({index for step in steps for index in whole[step]} - set(served))
        doubled += len(served) - len(set(served))
    return lost, doubled, sum(killed.get(step) != whole[step] for step in whole)


class KilledRun:
    """A run that is killed and resumed until its end, always with the same number of processes."""

    def __init__(self, scratch: Path, world_size: int, rng: random.Random) -> None:
        self.scratch, self.world_size, self.rng = scratch, world_size, rng
        self.whole = self.scratch / f"whole{world_size}"
        run(self.whole, **settings(world_size, LOADERS[0]))
        self.ended = self.kills = 0
        self.begin()

    def begin(self) -> None:
        """Choose a new folder, so that the next process starts a new run."""
        self.folder = self.scratch / f"killed{self.world_size}-{self.ended}"
        self.saved = 0
        self.save_every = self.rng.choice(SAVE_EVERY)

    def kill(self) -> None:
        """Resume the run until it kills itself, at most a quarter of its steps later."""
        step = self.rng.randint(self.saved, min(self.saved + STEPS // 4, STEPS - 1))
        self.resume(kill_at=step, fails=True)
        self.saved = step // self.save_every * self.save_every
        self.kills += 1

    def end(self) -> tuple[int, int, int]:
        """Resume the run, let it reach its end, compare it, and begin a new one."""
        self.resume()
        folders = self.folder, self.whole
        found = compare(*(batches_by_step(folder, self.world_size) for folder in folders))
        self.ended += 1
        self.begin()
        return found

    def resume(self, **options: Any) -> None:
        """Train from the last checkpoint with random loader settings."""
        chosen = settings(self.world_size, self.rng.choice(LOADERS))
        run(self.folder, save_every=self.save_every, **chosen, **options)


def main() -> int:
    """Run the cycles and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.stress",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--cycles", type=int, default=100, help="number of kills")
    parser.add_argument("--seed", type=int, default=0, help="chooses the steps and the loader settings")
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    totals = [0, 0, 0]
    with tempfile.TemporaryDirectory() as scratch:
        runs = [KilledRun(Path(scratch), world_size, rng) for world_size in (1, 2)]
        for cycle in range(arguments.cycles):
            chosen = runs[cycle] if cycle < 2 else rng.choice(runs)
            chosen.kill()
            last = cycle + 1 == arguments.cycles
            for each in runs:
                if each.saved >= STEPS - max(SAVE_EVERY) or (last and each.folder.exists()):
                    totals = [total + new for total, new in zip(totals, each.end(), strict=True)]
            single, double = (each.kills for each in runs)
            print(
                f"{single} kills of the single process, {double} of the two processes: "
                f"{totals} lost, doubled, different",
                flush=True,
            )
    lost, doubled, different = totals
    print(f"{arguments.cycles} cycles: {lost} instances lost, {doubled} doubled, {different} batches different")
    return int(any(totals))


if __name__ == "__main__":
    sys.exit(main())
