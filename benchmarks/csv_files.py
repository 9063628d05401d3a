"""Result files: CSV, one row per measurement. All benchmarks read and write them here."""

import csv
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def read(path: Path) -> list[dict[str, str]]:
    """Return the rows of a file, or none if there is no such file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def append(path: Path, row: Row) -> None:
    """Add a row, and any columns that the file lacks; older rows leave those empty.

    The file is replaced as a whole, so that an interrupted write loses nothing. Only one process at a time may write.
    """
    rows = [*read(path), {column: text(value) for column, value in row.items()}]
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, dict.fromkeys(column for row in rows for column in row), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    partial.replace(path)


def text(value: object) -> str:
    """Return a value as a file holds it: floats have six significant digits."""
    return f"{value:.6g}" if isinstance(value, float) else str(value)
