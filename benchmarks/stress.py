"""Kills training runs at random steps, resumes them from the last checkpoint, and compares what they served.

    python benchmarks/stress.py --cycles 100

Each cycle starts a run of ``tests/run.py`` in one or two processes with random loader settings, which kills itself
hard at a random step; the next one goes on with default arguments. A run that has come to its end is compared, batch by
batch, with an uninterrupted one. Prints how many instances were lost, doubled (within an epoch) and how many batches
stood elsewhere; exits with 1 if any.
"""

import argparse
import random
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from processes import batches_by_step, run

N, GLOBAL_BATCH, EPOCHS, SAVE_EVERY = 203, 8, 3, 3
STEPS = N // GLOBAL_BATCH * EPOCHS
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cycles", type=int, default=100, help="runs that are killed")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    totals = [0, 0, 0]
    with tempfile.TemporaryDirectory() as scratch:
        whole = {}
        for world_size in (1, 2):
            folder = Path(scratch) / f"whole{world_size}"
            run(folder, **settings(world_size, LOADERS[0]))
            whole[world_size] = batches_by_step(folder, world_size)
        cycles = runs = 0
        while cycles < arguments.cycles:
            world_size = 1 + runs % 2
            folder = Path(scratch) / f"killed{runs}"
            step, runs = 0, runs + 1
            while cycles < arguments.cycles and step < STEPS - SAVE_EVERY:
                step = rng.randint(step, min(step + STEPS // 4, STEPS - 1))
                one = settings(world_size, rng.choice(LOADERS))
                run(folder, fails=True, kill_at=step, save_every=SAVE_EVERY, **one)
                step = step // SAVE_EVERY * SAVE_EVERY  # where the last checkpoint was taken
                cycles += 1
            run(folder, save_every=SAVE_EVERY, **settings(world_size, rng.choice(LOADERS)))
            found = compare(batches_by_step(folder, world_size), whole[world_size])
            totals = [total + new for total, new in zip(totals, found, strict=True)]
            print(f"{cycles} kills, {runs} runs ended: {totals} lost, doubled, reordered", flush=True)
    print(f"{cycles} kill-and-resume cycles: {totals[0]} lost, {totals[1]} doubled, {totals[2]} reordered")
    return int(any(totals))


if __name__ == "__main__":
    sys.exit(main())
