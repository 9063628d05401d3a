"""Kills training runs at random steps, resumes them from the last checkpoint, and compares what they served.

    python benchmarks/stress.py --cycles 100

Each cycle goes on, with default arguments, with one of two runs of ``tests/run.py``, in one process or in two, with
random loader settings, and lets it kill itself hard at a random step. A run that has come to its end is compared, batch
by batch, with an uninterrupted one. Prints how many instances were lost, doubled (within an epoch) and how many batches
stood elsewhere; exits with 1 if any.
"""

import argparse
import random
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from processes import batches_by_step, run

N, GLOBAL_BATCH, EPOCHS = 203, 8, 3
STEPS = N // GLOBAL_BATCH * EPOCHS
SAVE_EVERY = [3, 5]  # within pools and epochs, and at their ends
LOADERS = [
    {"num_workers": 0},
    {"num_workers": 1, "prefetch_factor": 1},
    {"num_workers": 2, "prefetch_factor": 8},
    {"num_workers": 2, "prefetch_factor": 8, "persistent_workers": True},
]


def settings(world_size: int, loader: dict) -> dict:
    return {
        "devices": world_size,
        "n": N,
        "batch_size": GLOBAL_BATCH // world_size,
        "max_epochs": EPOCHS,
        "warmup_epochs": 1,
        "loader": loader,
    }


def compare(killed: dict[int, list[int]], whole: dict[int, list[int]]) -> tuple[int, int, int]:
    """Instances lost and doubled, batches that differ."""
    per_epoch = N // GLOBAL_BATCH
    lost = doubled = 0
    for epoch in range(EPOCHS):
        steps = range(epoch * per_epoch, (epoch + 1) * per_epoch)
        served = [index for step in steps for index in killed.get(step, [])]
        lost += len({index for step in steps for index in whole[step]} - set(served))
        doubled += len(served) - len(set(served))
    return lost, doubled, sum(killed.get(step) != whole[step] for step in whole)


class KilledRun:
    """A run that is killed now and then, in always as many processes."""

    def __init__(self, scratch: Path, world_size: int, rng: random.Random) -> None:
        self.scratch, self.world_size, self.rng = scratch, world_size, rng
        self.whole = self.scratch / f"whole{world_size}"
        run(self.whole, **settings(world_size, LOADERS[0]))
        self.ended = self.kills = 0
        self.begin()

    def begin(self) -> None:
        self.folder = self.scratch / f"killed{self.world_size}-{self.ended}"
        self.saved = 0
        self.save_every = self.rng.choice(SAVE_EVERY)

    def kill(self) -> None:
        """Go on, to be killed at a step that is not far."""
        step = self.rng.randint(self.saved, min(self.saved + STEPS // 4, STEPS - 1))
        self.go_on(kill_at=step, fails=True)
        self.saved = step // self.save_every * self.save_every
        self.kills += 1

    def end(self) -> tuple[int, int, int]:
        """Go on to the end and compare; then begin another."""
        self.go_on()
        folders = self.folder, self.whole
        found = compare(*(batches_by_step(folder, self.world_size) for folder in folders))
        self.ended += 1
        self.begin()
        return found

    def go_on(self, **how) -> None:
        chosen = settings(self.world_size, self.rng.choice(LOADERS))
        run(self.folder, save_every=self.save_every, **chosen, **how)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cycles", type=int, default=100, help="kills")
    parser.add_argument("--seed", type=int, default=0)
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
            kills = " and ".join(f"{each.kills} of {each.world_size}" for each in runs)
            print(f"killed {kills} processes: {totals} lost, doubled, reordered", flush=True)
    print(f"{arguments.cycles} kill-and-resume cycles: {totals[0]} lost, {totals[1]} doubled, {totals[2]} reordered")
    return int(any(totals))


if __name__ == "__main__":
    sys.exit(main())
