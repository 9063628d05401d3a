"""Count how often training on two processes hangs because loader workers are forked beside running threads.

    python -m benchmarks.worker_hangs

Each arm trains 300 epochs on two gloo processes with two loader workers each, and restarts where it hangs:

- ``fresh``: new workers are forked twice an epoch, for training and for encoding (``persistent_workers=False``).
- ``fresh, no callback``: new workers are forked once an epoch, as by Lightning alone.
- ``kept``: workers are forked once and kept (``persistent_workers=True``).
- ``forkserver``: new workers come twice an epoch from a small process without threads.

A run that trains no step for 60 seconds counts as a hang and is killed. The script prints a table row for each arm.
"""

import multiprocessing
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from tests.parts import Data, Model, fit, walker
from tests.processes import Hung, finish

from .command_line import make_parser

ARMS: dict[str, dict[str, Any]] = {
    "fresh": {"persistent_workers": False},
    "fresh, no callback": {"persistent_workers": False},
    "kept": {"persistent_workers": True},
    "forkserver": {"persistent_workers": False, "multiprocessing_context": "forkserver"},
}


class NotesSteps(Callback):
    """Write a line for each step, by which another process sees progress."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if trainer.is_global_zero:
            with self.file.open("a") as file:
                file.write(f"{trainer.current_epoch}\n")


def train(arm: str, file: Path, epochs: int) -> None:
    """Train in this process and a second one, four steps an epoch."""
    torch.set_num_threads(1)
    # Without this line each new worker imports torch again, which takes seconds.
    multiprocessing.set_forkserver_preload(["bs_lightning", "tests.parts"])
    data = Data(8, 64, seed=0, num_workers=2, **ARMS[arm])
    callbacks: list[Callback] = [NotesSteps(file)]
    if arm != "fresh, no callback":
        callbacks.append(walker(32))
    fit(Model(), data, *callbacks, max_epochs=epochs, strategy="ddp", devices=2)
    torch.distributed.destroy_process_group()


def run_once(arm: str, file: Path, epochs: int, deadline: float) -> str:
    """Train until the end, a hang or the deadline, and say which of them came first."""
    command = [sys.executable, "-m", "benchmarks.worker_hangs", "--train", str(file), "--epochs", str(epochs)]
    try:
        done = finish([*command, "--arms", arm], timeout=deadline - time.monotonic(), watched=file.parent)
    except Hung:
        return "hang"
    except subprocess.TimeoutExpired:
        return "deadline"
    return "end" if done.returncode == 0 else "failure"


def count_lines(file: Path) -> int:
    """Return how many steps were noted."""
    return len(file.read_text().splitlines()) if file.exists() else 0


def measure(arm: str, epochs: int, minutes: float) -> None:
    """Print the arm's row: epochs trained, hangs, failures and the epoch at which each hang came."""
    start = time.monotonic()
    trained = hangs = failures = 0
    hung_at: list[int] = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(epochs):
            file = Path(folder) / f"run{number}.txt"
            end = run_once(arm, file, epochs - trained, start + 60 * minutes)
            done = count_lines(file) // 4
            trained += done
            if end == "hang":
                hangs += 1
                hung_at.append(done)
            failures += end == "failure"
            if end in ("end", "deadline") or trained >= epochs:
                break
    seconds = time.monotonic() - start
    print(f"| {arm} | {trained} | {hangs} | {hung_at or ''} | {failures} | {seconds:.0f} |", flush=True)


def main() -> None:
    """Measure the arms one after the other."""
    parser = make_parser("worker_hangs", __doc__)
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--epochs", type=int, default=300, help="epochs to train in each arm")
    parser.add_argument("--minutes", type=float, default=10, help="time limit of each arm")
    parser.add_argument("--train", type=Path, help="train in this process, and note the steps in this file")
    arguments = parser.parse_args()
    if arguments.train is not None:
        train(arguments.arms[0], arguments.train, arguments.epochs)
        return
    print("| workers | epochs | hangs | epochs before each hang | failures | seconds |\n|---|---|---|---|---|---|")
    for arm in arguments.arms:
        measure(arm, arguments.epochs, arguments.minutes)


if __name__ == "__main__":
    main()
