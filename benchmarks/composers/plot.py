"""`plot`: the figures of docs/composers.md."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from .. import csv_files
from .catalog import FAMILIES, SCALED

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Rows = list[dict[str, str]]

MARKERS = dict(zip(FAMILIES, "oXsDdhHPv^*<op>", strict=True))
LOOK = {family: (f"C{number % 10}", MARKERS[family]) for number, family in enumerate(FAMILIES)}
LOOK["paper's graph"] = ("black", "*")


def run(args: argparse.Namespace) -> None:
    """Draw what there are rows for, and say what cannot be drawn."""
    from matplotlib import pyplot as plt

    plt.switch_backend("Agg")
    table, scale = args.results / "table.csv", args.results / "scale.csv"
    labelled = [row for row in newest(table, "instances", "batch_size", "temperature") if row["false_negative_rate"]]
    measured = newest(scale, "batch_size")
    drawn, missing = 0, []
    for path, rows, draw, name in (
        (table, labelled, plot_table, "composers.png"),
        (scale, measured, plot_scale, "composers_scale.png"),
    ):
        if rows:
            draw(rows).savefig(args.out / name)
            print(args.out / name)
            drawn += 1
        elif path.exists():
            missing.append(
                f"No plot of the false-negative rate: the newest rows of {path} have no labels. "
                "Give `table` an .npz file with y."
            )
        else:
            missing.append(f"No {path} to draw. Run `{path.stem}` first, or give its folder as --results.")
    if not drawn:
        raise SystemExit("\n".join(missing))
    print(*missing, sep="\n", end="\n" if missing else "")


def newest(path: Path, *settings: str) -> Rows:
    """Return each composer's last row per size, of the rows with the same settings as the file's last row."""
    rows = csv_files.read(path)
    alike = [row for row in rows if all(row[name] == rows[-1][name] for name in settings)]
    return list({(row["composer"], row["instances"]): row for row in alike}.values())


def plot_table(rows: Rows) -> "Figure":
    """Draw the false-negative rate against hardness: every composer, then the paper's letters if there are any."""
    from matplotlib import pyplot as plt

    varied = [f"paper's graph, {letter}" for letter in ("M", "K", "alpha")]
    families_of = {
        f"every composer, N {rows[0]['instances']}": [family for family in FAMILIES if family not in varied],
        "the paper's graph: M 1000, K 100, alpha 0.2, one of them varied": ["paper's graph", *varied],
    }
    rows_of = {title: [row for row in rows if row["family"] in of] for title, of in families_of.items()}
    titles = [title for title in rows_of if rows_of[title]]
    figure, panels = plt.subplots(
        1, len(titles), figsize=(7 * len(titles), 8), sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    for axes, title in zip(panels[0], titles, strict=True):
        for family in FAMILIES:
            points = [place_of(row) for row in rows_of[title] if row["family"] == family]
            if points:
                colour, marker = LOOK[family]
                axes.scatter(*zip(*points, strict=True), s=60, c=colour, marker=marker, label=family, zorder=2)
        axes.set(
            title=title, xlabel="hardness (mean cosine similarity of true negatives)", ylabel="false-negative rate"
        )
        axes.legend(loc="upper left", frameon=False)
        axes.grid(alpha=0.3)
    figure.draw_without_rendering()  # settles where the points are
    figure.set_layout_engine("none")  # or the labels would move the points
    for axes, title in zip(panels[0], titles, strict=True):
        label_points(axes, rows_of[title])
    return figure


def plot_scale(rows: Rows) -> "Figure":
    """Draw the seconds that an epoch's batches take, against N."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(10, 6), layout="constrained")
    for family in SCALED:
        for name in dict.fromkeys(row["composer"] for row in rows if row["composer"].startswith(family)):
            line = sorted((int(row["instances"]), float(row["seconds"])) for row in rows if row["composer"] == name)
            sizes, seconds = zip(*line, strict=True)
            colour, marker = LOOK[family]
            axes.loglog(sizes, seconds, c=colour, marker=marker, label=name)
    axes.set(xlabel="N", ylabel="seconds to compose an epoch")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    axes.grid(alpha=0.3)
    return figure


def place_of(row: dict[str, str]) -> tuple[float, float]:
    """Return where a row's point is."""
    return float(row["hardness"]), float(row["false_negative_rate"])


def label_points(axes: "Axes", rows: Rows) -> None:
    """Write each point's setting beside the point, on a side that is free."""
    places = axes.transData.transform([place_of(row) for row in rows])
    taken = [(x, y, 10.0) for x, y in places]  # with half the width, in pixels
    for row, (x, y) in zip(rows, places, strict=True):
        half = 5 * len(row["label"])
        around = [(a * (12 + half), b * 20) for a, b in ((1, 0), (0, 1), (-1, 0), (0, -1), (1, -1), (-1, 1))]
        inside = [
            (x + a, y + b)
            for a, b in around
            if all(axes.bbox.contains(x + a + end, y + b - 5) for end in (-half, half))
        ]
        free = [(a, b) for a, b in inside if all(abs(a - c) > half + w or abs(b - d) > 14 for c, d, w in taken)]
        place = [*free, *inside][0]
        taken.append((*place, half))
        axes.text(*place, row["label"], ha="center", va="center", color=LOOK[row["family"]][0], transform=None)
