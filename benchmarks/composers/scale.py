"""`scale`: time and memory for growing synthetic data."""

import argparse

from .. import csv_files
from ..csv_files import Row
from ..markdown import print_row
from ..processes import in_new_process
from . import measure
from .catalog import Key, composers, name_of, scaled

SIZES = [10_000, 20_000, 50_000, 100_000, 200_000, 500_000, 1_280_000]
BASE_SIZE = 50_000  # the printed times per instance are relative to the time per instance at this size


def scale_row(key: Key, size: int, args: argparse.Namespace) -> Row:
    """Measure one composer at one size."""
    _, seconds, growth = measure.compose(composers(args.batch_size)[key], measure.mixture(size), args.batch_size)
    return {
        "composer": name_of(key, args.batch_size),
        "instances": size,
        "seconds": seconds,
        "peak_bytes_per_instance": round(growth / size),
    }


def run(args: argparse.Namespace) -> None:
    """Measure each composer at growing sizes, until it takes more than `--seconds`."""
    sizes = [size for size in SIZES if 10 * args.batch_size <= size <= args.largest]
    if not sizes:
        raise SystemExit(
            f"No N of {SIZES} is between ten batches of --batch-size {args.batch_size} and --largest {args.largest}. "
            "Lower --batch-size or raise --largest."
        )
    print(f"A composer stops after the first N that takes more than {args.seconds:g} s.")
    print(f"Times per instance are relative to N {BASE_SIZE}.\n")
    chosen = [key for key in scaled(args.batch_size) if key[0] in args.only]
    for key in chosen:
        rows: list[Row] = []
        for size in sizes:
            if not rows or rows[-1]["seconds"] <= args.seconds:
                rows.append(in_new_process(scale_row, key, size, args))
                csv_files.append(args.results / "scale.csv", {**rows[-1], "batch_size": args.batch_size})
        base = next((row["seconds"] / BASE_SIZE for row in rows if row["instances"] == BASE_SIZE), None)
        for row in rows:
            row["relative_time_per_instance"] = row["seconds"] / row["instances"] / base if base else ""
            print_row(row, with_header=key == chosen[0] and row is rows[0])
