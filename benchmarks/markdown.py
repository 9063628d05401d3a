"""Tables as markdown, printed row by row."""

from typing import Any

HYPHENATED = ("false negative", "in degree", "in edge", "two step")


def print_row(row: dict[str, Any], *, with_header: bool = False) -> None:
    """Print the values of a row; floats have three decimals."""
    if with_header:
        print(f"| {' | '.join(map(title, row))} |\n{'|---' * len(row)}|")
    print(f"| {' | '.join(f'{v:.3f}' if isinstance(v, float) else str(v) for v in row.values())} |", flush=True)


def title(column: str) -> str:
    """Return the name of a CSV column in plain words.

    >>> title("batch/false_negative_rate")
    'batch: false-negative rate'
    """
    words = column.replace("/", ": ").replace("_", " ")
    for compound in HYPHENATED:
        words = words.replace(compound, compound.replace(" ", "-"))
    return words
