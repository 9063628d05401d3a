"""Train with random settings, kill the runs at random places, resume them, and compare the batches they served.

Each training run (``tests/run.py``) is made twice. The first is never interrupted. The second is killed (SIGKILL) in a
training step, while it encodes or composes a pool, in validation, or while it writes a checkpoint. Then it is resumed
from its last checkpoint, with other loader settings, until it is killed again or ends. Each batch that it has served
must be the batch of the uninterrupted run at the same place.
"""

import json
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from subprocess import TimeoutExpired
from typing import Any

from bs_lightning.layout import BatchLayout
from tests.processes import SCRIPT, Finished, Hung, finish, seen

Settings = dict[str, Any]
Served = dict[tuple[int, int], list[list[int]]]
"""By epoch and number of the batch: what was served there, in every attempt."""

EPOCHS = 3
KILLS = 4  # of a run, at most
FITS = 5  # of a single process, made in one process before one of them is made again and killed
LOADERS: list[Settings] = [
    {"num_workers": 0},
    {"num_workers": 1, "prefetch_factor": 1, "persistent_workers": False},
    {"num_workers": 2, "prefetch_factor": 8, "persistent_workers": False},
    {"num_workers": 2, "prefetch_factor": 8, "persistent_workers": True},
]
KINDS = ["lost", "doubled", "at a different place", "different weights", "hangs", "crashes"]


def draw_settings(rng: random.Random, devices: int) -> Settings:
    """Draw what ``tests/run.py`` is given, except the loader settings."""
    batch_size = rng.randint(2, 16 // devices)
    size = batch_size * devices
    n = rng.randint(4 * size, 4 * size + 100)
    settings: Settings = {"devices": devices, "n": n, "batch_size": batch_size, "max_epochs": EPOCHS}
    settings["drop_last"] = 0 < n % size < 2 * devices or rng.random() < 0.5
    settings["warmup_epochs"] = rng.choice([0, 0, 1])
    settings["recycle"] = rng.random() < 0.25
    settings["encode_every"] = rng.choice([None, None, 1, 2]) if not settings["recycle"] else None
    settings["per_rank"] = rng.random() < 0.25
    if rng.random() < 0.25:
        settings |= {"pool_size": None, "refresh_every": rng.randint(1, n // size + 2), "encode_every": None}
    else:
        settings["pool_size"] = rng.choice([rng.randint(size, n + size)] * 3 + ["all", rng.uniform(0.3, 1.0), "auto"])
        settings["groups"] = rng.random() < 0.25
    if settings["pool_size"] == "auto":
        settings["target_loss"] = rng.choice([0.5, 2.0, 5.0])  # uniform, both, and composed batches
    if rng.random() < 0.25:
        settings["mask_nearest"] = rng.randint(1, 5)
    settings["two_sides"] = not settings["recycle"] and rng.random() < 0.25  # with the model's own rule
    kind = rng.random()
    if kind < 0.2:
        settings["limit_train_batches"] = rng.choice([rng.randint(2, n // size), 0.7])
    elif kind < 0.3:
        settings["overfit_batches"] = rng.randint(2, n // size)
    elif kind < 0.5:
        # A resumed run lacks accumulated gradients. So compose without regard to the weights.
        settings |= {"accumulate_grad_batches": rng.randint(2, 4), "composer": "uniform"}
        settings |= {"pool_size": 2 * size, "target_loss": None, "refresh_every": None}
        settings |= {"mask_nearest": None, "two_sides": False}
    settings["checkpoint"] = rng.choice(
        [{"every_n_train_steps": rng.randint(1, 7)}] * 3 + [{"every_n_epochs": 1, "save_on_train_epoch_end": True}]
    )
    if rng.random() < 0.4 and not settings.get("groups"):
        settings |= {
            "validate": True,
            "val_check_interval": rng.choice([1.0, rng.randint(1, trained_batches(settings))]),
        }
        if rng.random() < 0.5:
            settings["checkpoint"] = {"every_n_epochs": 1, "save_on_train_epoch_end": False}
    return settings


def layout(settings: Settings) -> BatchLayout:
    """Return how the data is cut into batches."""
    return BatchLayout(*(settings[name] for name in ("n", "batch_size", "devices", "drop_last")))


def trained_batches(settings: Settings) -> int:
    """Return the number of batches that each epoch trains."""
    n_batches = layout(settings).n_batches
    limit: Any = settings.get("limit_train_batches", settings.get("overfit_batches", 1.0))
    return int(limit * n_batches) if isinstance(limit, float) else min(int(limit), n_batches)


def draw_kill(rng: random.Random, settings: Settings) -> Settings:
    """Draw where a run kills itself."""
    most = {"step": 14, "save": 5}
    if not settings["recycle"]:
        most["encode"] = 8
    if settings.get("composer") != "uniform":
        most["compose"] = 5
    if settings.get("validate"):
        most["validation"] = 6
    place = rng.choice(list(most))
    only_first = place == "save" or (place == "compose" and not settings["per_rank"])
    rank = 0 if only_first else rng.randrange(settings["devices"])
    return {"place": place, "arrivals": rng.randint(1, most[place]), "rank": rank}


def served(folder: Path, rank: int) -> Served:
    """Read what a process has served."""
    found: Served = {}
    file = folder / f"rank{rank}.batches"
    for line in file.read_text().splitlines() if file.exists() else ():
        epoch, batch, indices = json.loads(line)
        found.setdefault((epoch, batch), []).append(indices)
    return found


def compare(again: Path, whole: Path, settings: Settings) -> Counter[str]:
    """Count the failures of a run that was made again, perhaps with kills, beside the uninterrupted run."""
    failures: Counter[str] = Counter()
    ranks = range(settings["devices"])
    pairs = [(served(again, rank), served(whole, rank)) for rank in ranks]
    for epoch in range(EPOCHS):
        was, expected = (Counter(_indices([pair[side] for pair in pairs], epoch)) for side in (0, 1))
        failures["lost"] += (expected - was).total()
        failures["doubled"] += (was - expected).total()
    for was_served, should_be_served in pairs:
        for place, attempts in was_served.items():
            failures["at a different place"] += any([batch] != should_be_served.get(place) for batch in attempts)
    if "accumulate_grad_batches" not in settings:
        weights = [[rank["weights"] for rank in seen(folder, len(ranks))] for folder in (again, whole)]
        failures["different weights"] += weights[0] != weights[1]
    return failures


def _indices(ranks: list[Served], epoch: int) -> list[int]:
    """List what all processes have served in an epoch. Of a batch that was trained twice, the last counts."""
    return [index for rank in ranks for place in rank if place[0] == epoch for index in rank[place][-1]]


def check_whole(folder: Path, settings: Settings) -> Counter[str]:
    """Count the failures of an uninterrupted run: what each epoch must serve is known."""
    failures: Counter[str] = Counter()
    ranks = [served(folder, rank) for rank in range(settings["devices"])]
    cut, n_batches = layout(settings), trained_batches(settings)
    expected = min(n_batches, cut.n_full) * cut.global_batch_size + cut.n_last * (n_batches > cut.n_full)
    for epoch in range(EPOCHS):
        batches = [sum((rank.get((epoch, batch), [[]])[0] for rank in ranks), []) for batch in range(n_batches)]
        failures["lost"] += max(0, expected - sum(map(len, batches)))
        once = batches if settings.get("refresh_every") else [sum(batches, [])]  # what must not repeat an instance
        failures["doubled"] += sum(len(indices) - len(set(indices)) for indices in once)
        failures["at a different place"] += sum(
            place[1] >= n_batches for rank in ranks for place in rank if place[0] == epoch
        )
    return failures


class Failed(Exception):
    """A run that has hung or crashed."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


def start(*runs: tuple[Path, Settings]) -> Finished:
    """Make training runs, one after the other in one process. A run of two processes must be alone."""
    command: list[Any] = [sys.executable, SCRIPT]
    for folder, settings in runs:
        folder.mkdir(exist_ok=True)
        strategy = {"strategy": "ddp"} if settings["devices"] > 1 else {}
        command += [folder, json.dumps(settings | strategy)]
    try:
        return finish(command, timeout=600, watched=runs[0][0] if len(runs) == 1 else runs[0][0].parent)
    except (Hung, TimeoutExpired) as error:
        raise Failed("hangs", str(error)) from None


def train(*runs: tuple[Path, Settings]) -> None:
    """Train to the end."""
    done = start(*runs)
    if done.returncode != 0:
        raise Failed("crashes", done.error)


def train_until_killed(folder: Path, settings: Settings) -> bool:
    """Train until the run kills itself. Return ``False`` if it has reached its end before."""
    mark = folder / "killed"
    mark.unlink(missing_ok=True)
    done = start((folder, settings))
    if not mark.exists() and done.returncode != 0:
        raise Failed("crashes", done.error)
    return mark.exists()


class Fits:
    """Makes training runs, and counts them and their failures."""

    def __init__(self, scratch: Path, kills: int, seed: int, stop: float) -> None:
        self.scratch, self.kills_left, self.stop = scratch, kills, stop
        self.rng = random.Random(seed)
        self.runs = 0
        self.kills: Counter[str] = Counter()
        self.failures: Counter[str] = Counter()

    def may_go_on(self) -> bool:
        return self.kills_left > 0 and time.monotonic() < self.stop

    def round(self, number: int) -> None:
        """Make some runs, and then one of them again with kills: in turn in one process and in two processes."""
        devices = 1 + number % 2
        folder = self.scratch / str(number)
        folder.mkdir()
        drawn = [draw_settings(self.rng, devices) for _ in range(FITS if devices == 1 else 1)]
        wholes = [(folder / f"whole{index}", each | {"loader": LOADERS[0]}) for index, each in enumerate(drawn)]
        others = [(folder / f"again{index}", each | {"loader": self.loader()}) for index, each in enumerate(drawn)]
        try:
            train(*wholes, *(others if devices == 1 else ()))
        except Failed as error:
            self.note(Counter([error.kind]), drawn, str(error))
            return
        for (whole, settings), (again, _) in zip(wholes, others, strict=True):
            self.note(check_whole(whole, settings), settings)
            if devices == 1:
                self.note(compare(again, whole, settings), settings)
        self.runs += len(wholes) + len(others) * (devices == 1)
        if self.kill_and_resume(folder / "killed", drawn[0]):
            self.runs += 1
            self.note(compare(folder / "killed", wholes[0][0], drawn[0]), drawn[0])

    def kill_and_resume(self, folder: Path, settings: Settings) -> bool:
        """Kill a run some times, and then let it reach its end. Return whether it has reached its end."""
        for _ in range(self.rng.randint(1, KILLS)):
            if not self.may_go_on():
                break
            kill = draw_kill(self.rng, settings)
            resumed = settings | {"loader": self.loader(), "kill": kill}
            try:
                if not train_until_killed(folder, resumed):
                    return True
            except Failed as error:
                self.note(Counter([error.kind]), resumed, str(error))
                if error.kind == "crashes":
                    return False
                continue
            self.kills_left -= 1
            self.kills[f"{kill['place']}, {settings['devices']} processes"] += 1
        try:
            train((folder, settings | {"loader": self.loader()}))
        except Failed as error:
            self.note(Counter([error.kind]), settings, str(error))
            return False
        return True

    def loader(self) -> Settings:
        return self.rng.choice(LOADERS)

    def note(self, failures: Counter[str], settings: object, text: str = "") -> None:
        """Add failures, and print what they were found in."""
        self.failures += failures
        if failures.total():
            print(f"{dict(+failures)} with {json.dumps(settings)}\n{text[-6000:]}", flush=True)


def main(kills: int, seed: int, seconds: float) -> int:
    """Make runs until there were enough kills or the time is over. Return the exit status."""
    with tempfile.TemporaryDirectory() as scratch:
        fits = Fits(Path(scratch), kills, seed, time.monotonic() + seconds)
        number = 0
        while fits.may_go_on():
            fits.round(number)
            number += 1
            print(f"{fits.runs} runs, {fits.kills.total()} kills: {_in_words(fits.failures)}", flush=True)
    for place, count in sorted(fits.kills.items()):
        print(f"{count} kills in {place}")
    print(f"{fits.runs} runs, {fits.kills.total()} kills: {_in_words(fits.failures)}")
    return int(fits.failures.total() > 0)


def _in_words(failures: Counter[str]) -> str:
    return ", ".join(f"{failures[kind]} {kind}" for kind in KINDS)
