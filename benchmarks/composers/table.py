"""`table`: every composer on the same embeddings."""

import argparse

import numpy as np

from .. import csv_files
from ..csv_files import Row
from ..markdown import print_row
from ..processes import in_new_process
from . import measure
from .catalog import FAMILIES, Key, composers, name_of, too_few


def table_row(key: Key, args: argparse.Namespace) -> Row:
    """Measure one composer."""
    z, y = measure.load(args)
    composer = composers(args.batch_size)[key]
    batches, seconds, growth = measure.compose(composer, z, args.batch_size)
    steps = getattr(composer, "seconds", None) or {"walk": seconds}
    to_all = len(z) / batches.size
    return {
        "composer": name_of(key, args.batch_size),
        "graph_seconds": steps["graph"] * to_all if "graph" in steps else "",
        "batch_seconds": steps["walk"] * to_all,
        **measure.describe(batches, z, y, args.temperature),
        "seen": len(np.unique(batches)) / batches.size,
        "peak_megabytes": round(growth / 2**20),
    }


def run(args: argparse.Namespace) -> None:
    """Measure, print and keep a row for each chosen composer; then list the skipped composers."""
    size = len(measure.load(args)[0])
    names = {key: name_of(key, args.batch_size) for key in composers(args.batch_size)}
    if unknown := set(args.only) - {*FAMILIES, *names.values()}:
        raise SystemExit(f"--only {sorted(unknown)}: no such composers. Give printed names, or families: {FAMILIES}.")
    settings = {"instances": size, "batch_size": args.batch_size, "temperature": args.temperature}
    shown, skipped = 0, []
    for key, composer in composers(args.batch_size).items():
        family, label = key
        if args.only and not {family, names[key]} & set(args.only):
            continue
        why = too_few(composer, size // args.batch_size * args.batch_size)
        if not why:
            try:
                row = in_new_process(table_row, key, args)
            except ValueError as error:
                why = str(error)
        if why:
            skipped.append(f"- {names[key]}: {why}")
            continue
        print_row(row, with_header=not shown)
        csv_files.append(args.results / "table.csv", {**row, **settings, "family": family, "label": label})
        shown += 1
    if skipped:
        print("\nSkipped:", *skipped, sep="\n")
    if not shown:
        raise SystemExit(f"No row for {size} embeddings and --batch-size {args.batch_size}: see above.")
