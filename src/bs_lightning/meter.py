"""Meter: how hard pools of each size would make the batches, before you train with them. No labels are needed.

    python -m bs_lightning.meter embeddings.npz --batch-size 128

The file holds one array, ``embeddings``: floats ``[N, 2, d]``, both sides of each instance as the loss compares them
(query and document, image and text, or two views), or ``[N, d]``, one side. To write it:

    numpy.savez("embeddings.npz", embeddings=numpy.stack([queries, documents], axis=1))

A row of the table is a pool size, from one batch, which gives uniform batches, to all data. Its columns:

- hardness: mean cosine similarity of an anchor and its negatives.
- accuracy: in-batch accuracy, the share of anchors whose positive is more similar than each negative.
- negatives above: share of the negatives that are more similar than the positive.
- loss: InfoNCE at ``--temperature``, from first to second sides.
- seconds: to compose an epoch, on this machine, without encoding and compilation.

The last line names the largest pools that keep in-batch accuracy at ``--target-accuracy``. They may still be too hard:
accuracy does not tell false negatives from hard ones, and no measurement supports the default, 0.7. With one side, only
hardness and seconds are known, as the positives are not.

Each row is the mean of up to 40 batches, from random pools as in training. So a row takes the time to compose some
pools, or one large pool. The table takes two to three times as long as composing all data. Pools of more than 4,096
instances compile for one to two minutes first.
"""

import argparse
import time
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from bs_lightning._checks import check_integer, check_seed
from bs_lightning._embeddings import as_embeddings, unit_rows
from bs_lightning._types import Batches, Embeddings, Order
from bs_lightning.compose import ComposeFunction, Composer, RWRComposer, as_composer, call_composer
from bs_lightning.losses import info_nce
from bs_lightning.losses._rows import check_temperature
from bs_lightning.metrics import in_batch_hardness
from bs_lightning.metrics._pairs import accuracy_and_negatives_above
from bs_lightning.permutation import KeyedPermutation, permutation
from bs_lightning.plan import pool_seed

_MEASURED_BATCHES = 40  # for each pool size
_WARM_UP = 8192  # instances: enough that a graph compiles all that it needs
_TARGET_ACCURACY = 0.7
_COLUMNS = {  # titles of the table and formats of its numbers, one for each field of a reading
    "pool size": "d",
    "hardness": ".3f",
    "accuracy": ".3f",
    "negatives above": ".3g",
    "loss": ".3g",
    "seconds": ".2f",
}


class Reading(NamedTuple):
    """What the batches of one pool size are like: means over the measured batches."""

    pool_size: int
    """Instances in a pool, a multiple of the batch size."""
    hardness: float
    """Mean cosine similarity of anchors and negatives, as :func:`~bs_lightning.metrics.in_batch_hardness` computes."""
    accuracy: float | None
    """In-batch accuracy, as :func:`~bs_lightning.metrics.in_batch_accuracy` computes; ``None`` with one side."""
    negatives_above: float | None
    """Share of negatives above the positive, as :func:`~bs_lightning.metrics.negatives_above_positive` computes;
    ``None`` with one side."""
    loss: float | None
    """InfoNCE loss from first to second sides; ``None`` with one side."""
    seconds: float
    """Seconds to compose an epoch of all instances, without encoding. Uniform batches take none."""


def measure(
    embeddings: Embeddings,
    batch_size: int,
    *,
    temperature: float = 0.05,
    pool_sizes: Sequence[int] | None = None,
    composer: Composer | ComposeFunction | None = None,
    seed: int = 0,
) -> list[Reading]:
    """Measure how hard pools of each size make the batches.

    Up to 40 batches of each size are measured, from as many pools as that takes. Pools are parts of a random
    permutation, as in training. With two sides, anchors are the first sides.

    Args:
        embeddings: A tensor on any device or a NumPy array, floats of shape ``[N, d]``, or ``[N, 2, d]`` for two sides.
        batch_size: Instances in a batch, at least 2; under several processes, in a global batch.
        temperature: The loss's temperature, above 0.
        pool_sizes: Instances in a pool, from ``batch_size`` to ``N``. They are rounded down to whole batches. ``None``
            measures pools of 1, 4, 10, 20, 40, ... batches, and of all data.
        composer: Composes the batches of a pool; ``None`` is ``RWRComposer()``.
        seed: The same seed gives the same batches.

    Returns:
        A reading for each pool size.

    Raises:
        TypeError: If an argument has a wrong type.
        ValueError: If the embeddings are not finite or have a different shape, or a number is out of range.

    Example:
        >>> import torch
        >>> from bs_lightning.meter import measure
        >>> queries = torch.randn(1000, 16)
        >>> documents = queries + torch.randn(1000, 16)
        >>> readings = measure(torch.stack([queries, documents], dim=1), batch_size=50)
        >>> [reading.pool_size for reading in readings]
        [50, 200, 500, 1000]
        >>> readings[0].accuracy > readings[-1].accuracy
        True
    """
    embeddings = as_embeddings(embeddings)
    batch_size = check_integer("batch_size", batch_size)
    check_temperature(temperature)
    sizes = _as_pool_sizes(pool_sizes, len(embeddings), batch_size)
    composer = as_composer(RWRComposer() if composer is None else composer)
    composer.check_batch_size(batch_size)
    return list(_readings(embeddings, batch_size, sizes, temperature, composer, check_seed(seed)))


def advise(readings: Iterable[Reading], batch_size: int, target_accuracy: float = _TARGET_ACCURACY) -> str:
    """Name the largest pools whose in-batch accuracy stays at or above a target. The best pools may be smaller.

    Args:
        readings: What :func:`measure` returned.
        batch_size: Instances in a batch.
        target_accuracy: A number in ``[0, 1]``.

    Returns:
        One line for a user.

    Example:
        >>> from bs_lightning.meter import Reading, advise
        >>> advise([Reading(50, 0.1, 0.9, 0.01, 0.3, 0.0), Reading(500, 0.2, 0.8, 0.02, 0.7, 0.1)], batch_size=50)
        'Pools of 500 instances keep in-batch accuracy at 0.800: at most BatchSamplerCallback(pool_size=500).'
    """
    known = sorted((reading.pool_size, reading.accuracy) for reading in readings if reading.accuracy is not None)
    if not known:
        return "No advice: in-batch accuracy needs two sides. Save embeddings of shape [N, 2, d]."
    kept = list(takewhile(lambda size_and_accuracy: size_and_accuracy[1] >= target_accuracy, known))
    if not kept:
        size, accuracy = known[0]
        return (
            f"Keep uniform batches: in-batch accuracy is {accuracy:.3f} in pools of {size} already, below the target "
            f"{target_accuracy:g}. Measure again when the model is better."
        )
    size, accuracy = kept[-1]
    if size < 2 * batch_size:
        return (
            f"Keep uniform batches: their in-batch accuracy is {accuracy:.3f}, and no larger pools that were measured "
            f"keep it at the target {target_accuracy:g}."
        )
    return (
        f"Pools of {size} instances keep in-batch accuracy at {accuracy:.3f}: at most "
        f"BatchSamplerCallback(pool_size={size})."
    )


def _readings(
    embeddings: Tensor, batch_size: int, sizes: Sequence[int], temperature: float, composer: Composer, seed: int
) -> Iterator[Reading]:
    """Yield the reading of each pool size as soon as it is there."""
    order = permutation(len(embeddings), seed, epoch=0)
    if max(sizes) > batch_size:
        warm_up = min(max(sizes), -(-_WARM_UP // batch_size) * batch_size)
        _compose(composer, embeddings, order[:warm_up], batch_size, seed)
    for size in sizes:
        yield _read(embeddings, order, batch_size, size, temperature, composer, seed)


def _read(
    embeddings: Tensor,
    order: Order | KeyedPermutation,
    batch_size: int,
    size: int,
    temperature: float,
    composer: Composer,
    seed: int,
) -> Reading:
    """Measure one pool size."""
    n_batches = size // batch_size
    n_pools = min(-(-_MEASURED_BATCHES // n_batches), len(order) // size)
    n_chosen = min(_MEASURED_BATCHES // n_pools, n_batches)  # in each pool
    rng = np.random.default_rng(seed)
    seconds = 0.0
    measured = []
    for number in range(n_pools):
        pool = order[number * size : (number + 1) * size]
        batches = pool[None]
        if n_batches > 1:
            start = time.perf_counter()
            composed = _compose(composer, embeddings, pool, batch_size, pool_seed(seed, 0, number * n_batches))
            seconds += time.perf_counter() - start
            batches = pool[composed]
        # Early and late batches of a pool differ: later walks take what earlier walks have left.
        for batch in batches[rng.choice(n_batches, n_chosen, replace=False)]:
            measured.append(_measure_batch(embeddings[torch.from_numpy(batch).to(embeddings.device)], temperature))
    hardness, *with_positives = np.mean(measured, axis=0).tolist()
    accuracy, above, loss = with_positives or (None, None, None)
    return Reading(size, hardness, accuracy, above, loss, seconds * len(order) / (n_pools * size))


def _compose(composer: Composer, embeddings: Tensor, pool: Order, batch_size: int, seed: int) -> Batches:
    """Compose a pool, given as dataset indices ``[P]``, into batches of positions in the pool."""
    indices = pool.astype(np.int64)
    rows = embeddings[torch.from_numpy(indices).to(embeddings.device)]
    return call_composer(composer, rows, batch_size, seed=seed, epoch=0, indices=indices)


def _measure_batch(rows: Tensor, temperature: float) -> list[float]:
    """Return a batch's hardness and, with two sides, in-batch accuracy, share of negatives above, and loss."""
    if rows.ndim == 2:
        return [float(in_batch_hardness(rows))]
    first, second = unit_rows(rows).unbind(1)
    loss = info_nce(first, second, temperature=temperature, symmetric=False)
    accuracy, above = accuracy_and_negatives_above(rows)
    return [float(value) for value in (in_batch_hardness(rows[None]), accuracy, above, loss)]


def _as_pool_sizes(pool_sizes: Sequence[int] | None, n_instances: int, batch_size: int) -> list[int]:
    """Return the pool sizes to measure, as multiples of the batch size."""
    if not 2 <= batch_size <= n_instances:
        raise ValueError(
            f"batch_size must be at least 2 and at most the {n_instances} instances that have embeddings, got "
            f"{batch_size}. Give the batch size that you train with, or embed more instances."
        )
    if pool_sizes is None:
        n_batches = n_instances // batch_size
        steps = [1, 4, *(10 * 2**step for step in range(n_batches.bit_length()))]
        return [step * batch_size for step in steps if step < n_batches] + [n_batches * batch_size]
    if not len(pool_sizes):
        raise ValueError(
            "pool_sizes must hold at least one number of instances, got none. Leave it out to measure all."
        )
    sizes = [check_integer("pool_sizes", size) for size in pool_sizes]
    for size in sizes:
        if not batch_size <= size <= n_instances:
            raise ValueError(
                f"pool_sizes must lie between one batch, {batch_size} instances, and all {n_instances}, got {size}."
            )
    return [size // batch_size * batch_size for size in sizes]


def _load(path: Path) -> Tensor:
    """Read the array ``embeddings`` of an .npz file.

    Raises:
        TypeError: If the array does not hold floats.
        ValueError: If the file cannot be read, or has no such array, or the array has a wrong shape or is not finite.
    """
    save = 'Save it with numpy.savez("embeddings.npz", embeddings=array), an array of floats [N, 2, d] or [N, d].'
    try:
        file = np.load(path)
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise ValueError("it holds a single array without a name")
        with file:
            if "embeddings" not in file:
                raise ValueError(f"it has no array `embeddings`, only {file.files}")
            array = file["embeddings"]
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} is no .npz file of embeddings: {error}. {save}") from None
    return as_embeddings(array)


def _line(cells: Iterable[str]) -> str:
    """Return a line of the table."""
    return "  ".join(cell.rjust(max(len(title), 8)) for cell, title in zip(cells, _COLUMNS, strict=True))


def _cells(reading: Reading) -> list[str]:
    """Return a reading as text. Unknown values stay empty."""
    return [
        "" if value is None else format(value, form) for value, form in zip(reading, _COLUMNS.values(), strict=True)
    ]


def _draw(readings: Sequence[Reading], batch_size: int, temperature: float, target_accuracy: float, path: Path) -> None:
    """Plot each column against the pool size."""
    from matplotlib.figure import Figure

    sizes = [reading.pool_size for reading in readings]
    lines: dict[str, list[float | None]] = {"hardness": [reading.hardness for reading in readings]}
    if readings[0].accuracy is not None:
        lines["in-batch accuracy"] = [reading.accuracy for reading in readings]
        lines["negatives above the positive"] = [reading.negatives_above for reading in readings]
        lines[f"InfoNCE loss at temperature {temperature:g}"] = [reading.loss for reading in readings]
    figure = Figure(figsize=(4 * len(lines), 4), layout="constrained")
    for axes, (title, values) in zip(figure.subplots(1, len(lines), squeeze=False)[0], lines.items(), strict=True):
        axes.semilogx(sizes, values, marker="o")
        axes.set(title=title, xlabel=f"pool size (batches of {batch_size})")
        axes.minorticks_off()
        axes.set_xticks(sizes, labels=[str(size) for size in sizes], rotation=90)
        axes.grid(alpha=0.3)
        if title == "in-batch accuracy":
            axes.axhline(target_accuracy, color="black", linestyle="--", label="target")
            axes.legend(frameon=False)
    figure.savefig(path)


def _check_plot(path: Path) -> None:
    """Refuse a plot that could not be saved, before minutes are spent on measuring.

    Raises:
        ValueError: Naming what is missing and what to do.
    """
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError:
        raise ValueError("--plot needs matplotlib: pip install 'bs-lightning[demo]'") from None
    formats = FigureCanvasBase.get_supported_filetypes()
    if path.suffix.removeprefix(".").lower() not in formats:
        raise ValueError(f"--plot {path} must end in one of {', '.join(f'.{name}' for name in formats)}.")
    if not path.parent.is_dir():
        raise ValueError(f"--plot {path}: there is no folder {path.parent}. Make it first.")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        arguments: The command line's arguments; ``None`` reads those of the process.
    """
    parser = argparse.ArgumentParser(
        prog="python -m bs_lightning.meter",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("embeddings", type=Path, help="an .npz file with an array `embeddings`, [N, 2, d] or [N, d]")
    parser.add_argument("--batch-size", type=int, default=256, help="instances in a global batch (%(default)s)")
    parser.add_argument("--temperature", type=float, default=0.05, help="the loss's temperature (%(default)s)")
    parser.add_argument(
        "--target-accuracy",
        type=float,
        default=_TARGET_ACCURACY,
        help="in-batch accuracy that the advised pools keep (%(default)s)",
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="save a plot too; needs matplotlib")
    args = parser.parse_args(arguments)
    try:
        if not 0 <= args.target_accuracy <= 1:
            raise ValueError(f"--target-accuracy must lie in [0, 1], got {args.target_accuracy}.")
        check_temperature(args.temperature)
        if args.plot is not None:
            _check_plot(args.plot)
        embeddings = _load(args.embeddings)
        sizes = _as_pool_sizes(None, len(embeddings), args.batch_size)
    except (TypeError, ValueError) as error:
        parser.error(str(error))
    sides = "one side" if embeddings.ndim == 2 else "two sides"
    print(f"{len(embeddings)} instances with {sides}, in batches of {args.batch_size}.", end=" ")
    print(f"Pools of {sizes[0]} are uniform batches.")
    if embeddings.ndim == 2:
        print("With one side the positives are not known. The columns that need them stay empty.")
    readings: list[Reading] = []
    print(_line(_COLUMNS))
    for reading in _readings(embeddings, args.batch_size, sizes, args.temperature, RWRComposer(), seed=0):
        readings.append(reading)
        print(_line(_cells(reading)), flush=True)
    print(advise(readings, args.batch_size, args.target_accuracy))
    if args.plot is not None:
        _draw(readings, args.batch_size, args.temperature, args.target_accuracy, args.plot)


if __name__ == "__main__":
    main()
