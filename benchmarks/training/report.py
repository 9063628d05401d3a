"""Tables: each arm's mean, and its difference to uniform batches by seed."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from scipy import stats

from .study import read

BASELINE = "uniform"
SECTIONS = {
    "result/": "Results",
    "batch/": "The arm's own batches, of the trained model",
    "last_epoch/": "As the callback logged them in the last epoch",
    "seconds/": "Seconds",
}


def paired_interval(
    values: Sequence[float], baseline: Sequence[float], confidence: float = 0.95
) -> tuple[float, float]:
    """Mean difference of pairs, and the half width of its t-interval (NaN for one pair)."""
    difference = np.subtract(values, baseline)
    n = len(difference)
    if n < 2:
        return float(difference.mean()), float("nan")
    half = stats.t.ppf((1 + confidence) / 2, n - 1) * difference.std(ddof=1) / np.sqrt(n)
    return float(difference.mean()), float(half)


def tables(path: Path) -> Iterator[str]:
    """Markdown: for each task and its settings, tables of arms by measures."""
    studies = defaultdict(list)
    for row in read(path):
        settings = tuple((k, v) for k, v in row.items() if "/" not in k and k not in ("arm", "seed") and v)
        studies[settings].append(row)
    for settings, rows in studies.items():
        (_, task), *others = settings
        yield f"### {task}\n"
        yield ", ".join(f"{name} {value}" for name, value in others) + "\n"
        for prefix, title in SECTIONS.items():
            measures = [name for name in rows[0] if name.startswith(prefix) and any(row[name] for row in rows)]
            if measures:
                yield f"{title}: mean over the arm's seeds (difference to {BASELINE} by seed ± 95% t-interval).\n"
                yield table(rows, measures) + "\n"


def table(rows: list[dict[str, str]], measures: list[str]) -> str:
    """One table: a row per arm, a column per measure."""
    lines = [["arm", "seeds", *(name.split("/")[1] for name in measures)]]
    lines.append(["---"] * len(lines[0]))
    for arm in dict.fromkeys(row["arm"] for row in rows):
        n_seeds = len({row["seed"] for row in rows if row["arm"] == arm})
        lines.append([arm, str(n_seeds), *(cell(rows, arm, name) for name in measures)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(rows: list[dict[str, str]], arm: str, measure: str) -> str:
    """Mean, and the paired difference over the seeds that the baseline has too."""
    values = {row["seed"]: float(row[measure]) for row in rows if row["arm"] == arm and row[measure]}
    baseline = {row["seed"]: float(row[measure]) for row in rows if row["arm"] == BASELINE and row[measure]}
    if not values:
        return ""
    text = f"{np.mean(list(values.values())):.4g}"
    shared = [seed for seed in values if seed in baseline]
    if arm == BASELINE or not shared:
        return text
    difference, half = paired_interval([values[seed] for seed in shared], [baseline[seed] for seed in shared])
    return f"{text} ({difference:+.3g})" if np.isnan(half) else f"{text} ({difference:+.3g} ± {half:.2g})"
