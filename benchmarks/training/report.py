"""Tables and plots of the arms: means, and differences to uniform batches by seed."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import stats

from .. import csv_files
from ..markdown import title
from .arms import ARMS
from .study import TASKS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

UNIFORM = "uniform"  # plots show differences to this arm; tables do by default
NAMED = {"pool10", "pool20", "all-near", "own-all", "own-auto", "auto", "reference-all", "weighted", "weighted-all"}
UNIFORM_BATCHES = {UNIFORM, "own-uniform"}  # under the plain loss, and under the model's own mask
KEPT = {"pool10-kept", "all-near-kept", "own-all-kept"}
COMPOSED = {  # drawn against the loss
    "pool10": "o",
    "pool20": "s",
    "all-near": "^",
    "own-all": "D",
    "reference-all": "X",
    "auto": "v",
    "own-auto": "P",
}
MIN_SEEDS = 3  # in plots: the intervals of two seeds are too wide to show
SECTIONS = {
    "result/": "Results",
    "batch/": "The arm's own batches, seen by its trained model",
    "last_epoch/": "Logged by the callback in the last epoch",
    "seconds/": "Seconds",
}

Study = tuple[dict[str, str], list[dict[str, str]]]  # a task and its settings, and the runs


def studies(paths: Sequence[Path]) -> list[Study]:
    """Return the runs of results files by task and settings."""
    found: dict[tuple[tuple[str, str], ...], list[dict[str, str]]] = defaultdict(list)
    for path in paths:
        for row in csv_files.read(path):
            settings = tuple((k, v) for k, v in row.items() if "/" not in k and k not in ("arm", "seed") and v)
            found[settings].append(row)
    return [(dict(settings), rows) for settings, rows in found.items()]


def paired_interval(values: Sequence[float], others: Sequence[float]) -> tuple[float, float]:
    """Return the mean difference of pairs, and the half width of its 95% t-interval (NaN for a single pair)."""
    difference = np.subtract(values, others)
    n = len(difference)
    if n < 2:
        return float(difference.mean()), float("nan")
    half = stats.t.ppf(0.975, n - 1) * difference.std(ddof=1) / np.sqrt(n)
    return float(difference.mean()), float(half)


def by_seed(rows: list[dict[str, str]], arm: str, measure: str) -> dict[str, float]:
    """Return an arm's values of a measure by seed."""
    return {row["seed"]: float(row[measure]) for row in rows if row["arm"] == arm and row.get(measure)}


def difference(
    rows: list[dict[str, str]], arm: str, measure: str, other: str = UNIFORM
) -> tuple[float, float, int] | None:
    """Return the mean difference of two arms over the seeds that both have, its half width, and how many seeds."""
    values, others = by_seed(rows, arm, measure), by_seed(rows, other, measure)
    shared = [seed for seed in values if seed in others]
    if arm == other or not shared:
        return None
    return *paired_interval([values[seed] for seed in shared], [others[seed] for seed in shared]), len(shared)


# Tables


def tables(paths: Sequence[Path], other: str = UNIFORM) -> Iterator[str]:
    """Yield markdown: for each task and its settings, tables of all measures by arm."""
    for settings, rows in studies(paths):
        yield heading(settings)
        for prefix, section in SECTIONS.items():
            measures = [name for name in rows[0] if name.startswith(prefix) and any(row[name] for row in rows)]
            if measures and prefix in ("result/", "batch/"):
                yield f"{section}: the mean of {other}; other arms' difference to it by seed ± 95% t-interval.\n"
                yield table(rows, measures, [], other) + "\n"
            elif measures:
                yield f"{section}: mean over the arm's seeds.\n"
                yield table(rows, [], measures, other) + "\n"


def overview(paths: Sequence[Path], other: str = UNIFORM) -> Iterator[str]:
    """Yield markdown: for each task and its settings, one short table of the main measures."""
    why = ["last_epoch/hardness", "batch/hardness", "batch/false_negative_rate", "batch/false_negative_mass"]
    for settings, rows in studies(paths):
        yield heading(settings)
        main = [f"result/{name}" for name in TASKS[settings["task"]].main]
        yield table(rows, main, [name for name in why if any(row.get(name) for row in rows)], other) + "\n"


def worth(paths: Sequence[Path], other: str = UNIFORM) -> Iterator[str]:
    """Yield markdown: for each task, what arms gain beside larger uniform batches, and beside longer trainings.

    All are compared with an arm at the task's own settings, by seed. Larger batches are printed for as many steps, and
    for as many epochs where there are such runs.
    """
    found = studies(paths)
    for settings, rows in found:
        task = TASKS[settings["task"]]
        size, steps = task.defaults["batch_size"], task.defaults["steps"]
        of_others = {}
        for changed, each in found:
            if changed["task"] != settings["task"] or has_defaults(changed):
                continue
            if has_defaults(changed | {"batch_size": str(size), "steps": str(steps)}):
                larger = [f"{int(changed['batch_size']) / size:g} x"] if changed["batch_size"] != str(size) else []
                longer = [f"{changed['steps']} steps"] if changed["steps"] != str(steps) else []
                of_others[", ".join(larger + longer)] = each
        if not has_defaults(settings) or not of_others:
            continue
        together = [row for row in rows if row["arm"] in {*UNIFORM_BATCHES, *NAMED, *KEPT}]
        for name, each in of_others.items():
            together += [row | {"arm": f"{row['arm']}, {name}"} for row in each if row["arm"] in UNIFORM_BATCHES]
        yield heading(settings)
        yield table(together, [f"result/{name}" for name in task.main], ["seconds/all_cpu"], other) + "\n"


def heading(settings: dict[str, str]) -> str:
    """Return a heading with the task, and a line with its settings."""
    task, *others = settings.items()
    return f"### {task[1]}\n\n" + ", ".join(f"{name} {value}" for name, value in others) + "\n"


def table(rows: list[dict[str, str]], compared: Sequence[str], means: Sequence[str], other: str) -> str:
    """Return a table of arms: differences to the arm ``other`` for ``compared``, and ``means``."""
    titles = [title(name.removeprefix("result/")) for name in [*compared, *means]]
    lines = [["arm", "seeds", *titles]]
    lines.append(["---"] * len(lines[0]))
    for arm in dict.fromkeys(row["arm"] for row in rows):
        n_seeds = len({row["seed"] for row in rows if row["arm"] == arm})
        values = [mean(rows, arm, name) for name in means]
        lines.append([arm, str(n_seeds), *(cell(rows, arm, name, other) for name in compared), *values])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def mean(rows: list[dict[str, str]], arm: str, measure: str) -> str:
    """Return an arm's mean over its seeds, or an empty cell."""
    values = by_seed(rows, arm, measure)
    return f"{np.mean(list(values.values())):.4g}" if values else ""


def cell(rows: list[dict[str, str]], arm: str, measure: str, other: str) -> str:
    """Return the mean of ``other`` itself, and of other arms the difference: their seeds may not be the same."""
    found = difference(rows, arm, measure, other)
    if found is None:
        return mean(rows, arm, measure) if arm == other else ""
    middle, half, _ = found
    return f"{middle:+.4f}" + ("" if np.isnan(half) else f" ± {half:.4f}")


# Plots


def plot(paths: Sequence[Path]) -> "Figure":
    """Draw every arm's differences with their intervals, a panel for each task at its default settings."""
    shown, _ = drawn(paths)
    arms_of = {settings["task"]: drawn_arms(settings, rows) for settings, rows in shown}
    rows_of = {settings["task"]: rows for settings, rows in shown}
    heights_of = {task: len(arms) + 4 for task, arms in arms_of.items()}  # with the title and the axis
    columns: tuple[list[str], list[str]] = ([], [])  # of about the same height
    for task in sorted(heights_of, key=lambda task: -heights_of[task]):
        min(columns, key=lambda column: sum(heights_of[each] for each in column)).append(task)
    heights = [[heights_of[task] for task in column] for column in columns if column]
    figure = pyplot().figure(figsize=(5.2 * len(heights), 0.2 * max(map(sum, heights))), layout="constrained")
    parts = figure.subfigures(1, len(heights), squeeze=False)[0]
    for part, column, ratios in zip(parts, columns, heights, strict=False):
        panels = part.subplots(len(column), 1, height_ratios=ratios, squeeze=False)[:, 0]
        for axes, task in zip(panels, column, strict=True):
            plot_task(axes, task, rows_of[task], arms_of[task])
    return figure


def plot_task(axes: "Axes", task: str, rows: list[dict[str, str]], arms: list[str]) -> None:
    """Draw the differences of arms in a task."""
    axes.axvline(0, color="0.6", linewidth=1)
    for number, name in enumerate(TASKS[task].main):
        found = [(drawn_difference(rows, arm, f"result/{name}"), y) for y, arm in enumerate(arms)]
        x, half, y = np.array([(*each, y) for each, y in found if each]).T
        axes.errorbar(100 * x, y + 0.2 * number - 0.1, xerr=100 * half, fmt="os"[number], label=name, markersize=4)
    axes.set_title(task, fontsize="medium", loc="left")
    axes.set_xlabel(f"points above {UNIFORM}")
    beside_title: dict[str, Any] = {
        "loc": "lower right",
        "bbox_to_anchor": (1.03, 0.97),
        "ncols": 2,
        "columnspacing": 0.5,
    }
    axes.legend(frameon=False, fontsize="small", handletextpad=0.1, **beside_title)
    axes.grid(axis="y", alpha=0.3)
    axes.set_yticks(range(len(arms)), arms)
    axes.set_ylim(len(arms) - 0.5, -0.5)


def plot_uniformity(paths: Sequence[Path]) -> "Figure":
    """Draw what every arm gains against how it changes uniformity, a panel for each task at its default settings.

    The figure leaves out the debiased loss, which may break training and would be far from all other points.
    """
    shown, arms = drawn(paths)
    arms = [arm for arm in arms if ARMS[arm].loss != "debiased"]
    figure, panels = figure_of(shown, (3.2 * len(shown) + 0.5, 3.8))
    for axes, (settings, rows) in zip(panels, shown, strict=True):
        measure = TASKS[settings["task"]].main[0]
        points = {UNIFORM: (0.0, 0.0)}
        for arm in arms:
            gain = drawn_difference(rows, arm, f"result/{measure}")
            change = drawn_difference(rows, arm, "batch/uniformity_mixed")
            if gain and change:
                points[arm] = change[0], 100 * gain[0]
        x, y = np.array(list(points.values())).T
        kinds = ["C1" if arm != UNIFORM and ARMS[arm].loss is not None else "C0" for arm in points]
        axes.scatter(x, y, c=kinds, s=16)
        for arm in NAMED & points.keys():
            axes.annotate(arm, points[arm], xytext=(4, 2), textcoords="offset points", fontsize=7)
        axes.set_title(f"{settings['task']}, Spearman {stats.spearmanr(x, y).statistic:.2f}", fontsize="medium")
        axes.set(xlabel="uniformity: change (lower is better)", ylabel=f"{measure}: points above {UNIFORM}")
        axes.grid(alpha=0.3)
    return figure


def plot_loss(paths: Sequence[Path]) -> "Figure":
    """Draw what composed batches gain against the loss of uniform batches at the end of training.

    A point is an arm in a task at its default settings, for the first of the task's main measures.
    """
    shown, _ = drawn(paths)
    figure, (axes,) = figure_of(shown[:1], (7, 4.5))
    axes.axhline(0, color="0.6", linewidth=1)
    for number, (settings, rows) in enumerate(shown):
        measure = f"result/{TASKS[settings['task']].main[0]}"
        losses = by_seed(rows, UNIFORM, "batch/loss")
        x = max(float(np.mean(list(losses.values()))), 1e-4)
        for arm, marker in COMPOSED.items():
            gain = drawn_difference(rows, arm, measure)
            if gain:
                shifted = x * 1.06 ** list(COMPOSED).index(arm)  # so that intervals do not cover each other
                axes.errorbar(
                    shifted,
                    100 * gain[0],
                    yerr=100 * gain[1],
                    fmt=marker,
                    color=f"C{number}",
                    markersize=5,
                    elinewidth=1,
                )
        axes.plot([], [], "o", color=f"C{number}", label=settings["task"])
    for arm, marker in COMPOSED.items():
        axes.plot([], [], marker, color="0.3", label=arm)
    axes.set(
        xscale="log",
        xlabel="loss of uniform batches at the end of training",
        ylabel=f"first measure: points above {UNIFORM}",
    )
    axes.set_ylim(-3.5, 3.5)  # one arm's interval is far wider
    axes.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    axes.grid(alpha=0.3)
    return figure


def drawn(paths: Sequence[Path]) -> tuple[list[Study], list[str]]:
    """Return the studies of tasks at their default settings, and the arms, that have enough seeds to draw.

    Raises:
        SystemExit: If no arm has enough seeds.
    """
    shown = [(settings, rows) for settings, rows in studies(paths) if has_defaults(settings)]
    known = [drawn_arms(settings, rows) for settings, rows in shown]
    shown = [study for study, of_study in zip(shown, known, strict=True) if of_study]
    arms = [arm for arm in ARMS if any(arm in of_study for of_study in known)]
    if not shown:
        raise SystemExit(
            f"Nothing to draw: no arm but {UNIFORM} has {MIN_SEEDS} seeds yet at a task's default settings."
        )
    return shown, arms


def drawn_arms(settings: dict[str, str], rows: list[dict[str, str]]) -> list[str]:
    """Return the arms of a study that have enough seeds to draw."""
    measure = f"result/{TASKS[settings['task']].main[0]}"
    return [arm for arm in ARMS if drawn_difference(rows, arm, measure)]


def figure_of(shown: list[Study], size: tuple[float, float]) -> "tuple[Figure, list[Axes]]":
    """Return a figure with a panel for each study."""
    figure, panels = pyplot().subplots(1, len(shown), figsize=size, squeeze=False, layout="constrained")
    return figure, list(panels[0])


def pyplot() -> Any:
    """Return matplotlib's ``pyplot``, which draws into files."""
    from matplotlib import pyplot as plt

    plt.switch_backend("Agg")
    return plt


def drawn_difference(rows: list[dict[str, str]], arm: str, measure: str) -> tuple[float, float] | None:
    """Return an arm's mean difference to uniform batches and its half width, if both have enough seeds in common."""
    found = difference(rows, arm, measure)
    return found[:2] if found and found[2] >= MIN_SEEDS else None


def has_defaults(settings: dict[str, str]) -> bool:
    """Tell whether a task's settings are its defaults."""
    return all(str(value) == settings[name] for name, value in TASKS[settings["task"]].defaults.items())
