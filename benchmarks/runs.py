"""Runs that train and measure: which are wanted, and those of them that a CSV file lacks."""

import argparse
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from . import csv_files
from .csv_files import Row


def wanted(named: Row, arms: Iterable[str], seeds: Iterable[int], settings: Row) -> Iterator[Row]:
    """Yield what is set for each run; all arms of a seed come before the next seed.

    Args:
        named: What all runs share and comes first, such as the model and the dataset.
        arms: The arms.
        seeds: The seeds.
        settings: All other settings.
    """
    for seed in seeds:
        for arm in arms:
            yield {**named, "arm": arm, "seed": seed, **settings}


def run_missing(wanted: Iterable[Row], run: Callable[[Row], Row], results: Path) -> Iterator[Row]:
    """Do the runs that ``results`` lacks, one after the other, and add them there.

    Args:
        wanted: What is set for each run: the columns that tell runs apart.
        run: Trains and measures; returns the measures, whose names have a slash.
        results: A CSV file, made if it does not exist.

    Yields:
        The row of each finished run.
    """
    _silence_lightning()
    done = {_key(row) for row in csv_files.read(results)}
    for chosen in wanted:
        if _key(chosen) not in done:
            row = {**chosen, **run(chosen)}
            csv_files.append(results, row)
            yield row


def chosen_settings(args: argparse.Namespace, defaults: Row) -> Row:
    """Return the defaults, with those replaced that the command line gives."""
    return {name: value if getattr(args, name) is None else getattr(args, name) for name, value in defaults.items()}


def show(rows: Iterable[Row]) -> None:
    """Print a line for each run, as soon as it is finished."""
    for row in rows:
        chosen = " ".join(str(value) for name, value in row.items() if "/" not in name)
        results = ", ".join(f"{name[7:]} {value:.4f}" for name, value in row.items() if name.startswith("result/"))
        print(f"{chosen}: {results}, {row['seconds/all']:.0f} s", flush=True)


def _key(row: Row) -> frozenset[tuple[str, str]]:
    """Return all that was set for a run, as the file holds it; two runs with equal keys are the same."""
    return frozenset((name, csv_files.text(value)) for name, value in row.items() if "/" not in name and value != "")


def _silence_lightning() -> None:
    """Silence what Lightning says about every Trainer."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
