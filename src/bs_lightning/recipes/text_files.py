"""Files of texts: sentences, pairs, and scored pairs to evaluate on; and groups of what belongs together."""

import importlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor


def require(package: str) -> Any:
    """Import a package of the extra ``language``.

    Args:
        package: The package, such as ``"transformers"``.

    Returns:
        The module.

    Raises:
        ImportError: If it is not installed. The message names the extra.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(
            f"The recipes of texts need {package}: {error}. Install it with: pip install 'bs-lightning[language]'"
        ) from error


def read_sentences(source: Any, column: str = "text") -> list[str]:
    """Read sentences. Blank lines and blank texts are dropped, and a line in the log counts them.

    Args:
        source: The path of a UTF-8 text file with a sentence a line, a ``datasets.Dataset``, or strings.
        column: The column of a ``datasets.Dataset``.

    Returns:
        The sentences, without white space at both ends.

    Raises:
        TypeError: If a sentence is not a string.
        ValueError: If there is no sentence, or no such column.

    Example:
        >>> from bs_lightning.recipes.text_files import read_sentences
        >>> read_sentences(["A man walks.", "A dog barks. "])
        ['A man walks.', 'A dog barks.']
    """
    if isinstance(source, str | Path):
        rows, first_row = _lines(source), 1
    else:
        rows, first_row = _rows(source, [column]), 0
    for number, row in enumerate(rows, first_row):
        if not isinstance(row, str):
            raise TypeError(f"{_place(source, number)} must hold a string, got {type(row).__name__}: {row!r}.")
    sentences = [text for row in rows if (text := row.strip())]
    if not sentences:
        raise ValueError(f"{_name(source)} holds no sentence. Give one sentence a line.")
    _count_blank(source, len(rows) - len(sentences))
    return sentences


def read_pairs(
    source: Any, columns: Sequence[str] = ("anchor", "positive"), header: bool = True
) -> list[tuple[str, str]]:
    """Read pairs of texts. Blank lines are dropped, and a line in the log counts them.

    Args:
        source: The path of a UTF-8 file with two fields a line and a tab between them, a ``datasets.Dataset``, or
            pairs of strings. Quotation marks in a file are part of the text.
        columns: The two columns of a ``datasets.Dataset``.
        header: Whether the first line of a file holds names of columns. It is then left out.

    Returns:
        The pairs, without white space at both ends of a text.

    Raises:
        ValueError: If a row does not hold two texts, or one of them is blank. The message names the line of a file, or
            the index of a row. Also if there is no pair, or no such column.

    Example:
        >>> from bs_lightning.recipes.text_files import read_pairs
        >>> read_pairs([("what barks?", "A dog barks.")])
        [('what barks?', 'A dog barks.')]
    """
    rows: list[Any]
    if isinstance(source, str | Path):
        rows, first_row = [line.split("\t") if line.strip() else None for line in _lines(source)], 1
        if header:
            rows, first_row = rows[1:], 2
    else:
        rows, first_row = _rows(source, columns), 0
    pairs = []
    for number, row in enumerate(rows, first_row):
        if row is None:
            continue
        if isinstance(row, str) or len(row) != 2:
            found = "a string" if isinstance(row, str) else f"{len(row)} fields"
            hint = " with a tab between them" if first_row else ""
            raise ValueError(f"{_place(source, number)} must hold two texts{hint}, got {found}: {row!r}.")
        if not all(isinstance(text, str) and text.strip() for text in row):
            raise ValueError(f"{_place(source, number)} must hold two texts that are not blank, got {row!r}.")
        pairs.append((row[0].strip(), row[1].strip()))
    if not pairs:
        raise ValueError(f"{_name(source)} holds no pair. Give two texts a line, with a tab between them.")
    _count_blank(source, len(rows) - len(pairs))
    return pairs


@dataclass(frozen=True)
class EvaluationPairs:
    """Pairs of texts to evaluate on.

    Args:
        name: The name of the file, without its ending.
        pairs: The pairs, ``n`` of them.
        scores: How similar people find the two texts of a pair, ``n`` numbers; ``None`` if the pairs are queries and
            what they should find.
    """

    name: str
    pairs: list[tuple[str, str]]
    scores: list[float] | None


def read_evaluation(path: str | Path) -> EvaluationPairs:
    """Read pairs to evaluate on from a tab-separated file with a header.

    A file whose header names ``score``, ``sentence1`` and ``sentence2`` holds scored pairs, such as STS. Each other
    file holds pairs, as :func:`read_pairs` reads them.

    Args:
        path: The file.

    Returns:
        The pairs, and the scores if there are any.

    Raises:
        ValueError: If a line has a wrong number of fields, or a score is not a number. The message names the line. Also
            if there is no pair.
    """
    lines = _lines(path)
    names = [name.strip() for name in lines[0].split("\t")] if lines else []
    if not {"score", "sentence1", "sentence2"} <= set(names):
        return EvaluationPairs(Path(path).stem, read_pairs(path), None)
    pairs, scores = [], []
    for number, line in enumerate(lines[1:], 2):
        if not line.strip():
            continue
        fields = line.split("\t")
        if len(fields) != len(names):
            raise ValueError(
                f"{_place(path, number)} must hold {len(names)} fields with tabs between them, as the header does, got "
                f"{len(fields)}: {line!r}."
            )
        row = dict(zip(names, fields, strict=True))
        try:
            scores.append(float(row["score"]))
        except ValueError:
            scores.append(math.nan)
        if not math.isfinite(scores[-1]):
            raise ValueError(f"{_place(path, number)}: score must be a finite number, got {row['score']!r}.")
        pairs.append((row["sentence1"], row["sentence2"]))
    if not pairs:
        raise ValueError(f"{path} holds no pair. Give two sentences and a score a line.")
    return EvaluationPairs(Path(path).stem, pairs, scores)


def is_table(source: Any) -> bool:
    """Return whether the source has columns, as a ``datasets.Dataset`` has."""
    return hasattr(source, "column_names")


def check_columns(source: Any, names: Sequence[str]) -> None:
    """Check that a ``datasets.Dataset`` has columns.

    Raises:
        TypeError: If the dataset is streamed.
        ValueError: If it lacks a column.
    """
    if not hasattr(source, "__len__"):
        raise TypeError(f"{_name(source)} is streamed. Batches are chosen by index: load it without streaming.")
    for name in names:
        if name not in source.column_names or isinstance(source.column_names, dict):
            raise ValueError(
                f"{_name(source)} has no column {name!r}, but {list(source.column_names)}. Name its column, or choose "
                "a split."
            )


def _rows(source: Any, columns: Sequence[str]) -> list[Any]:
    """Return what a ``datasets.Dataset`` holds in a column, or in several columns; or the items of a sequence."""
    if not is_table(source):
        return list(source)
    check_columns(source, columns)
    values = [source[name] for name in columns]
    return list(values[0]) if len(values) == 1 else list(zip(*values, strict=True))


def _lines(path: str | Path) -> list[str]:
    kind = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}.get(Path(path).suffix)
    if kind is not None:
        raise ValueError(
            f"{path} holds no plain lines of text. Give datasets.load_dataset({kind!r}, data_files={str(path)!r})"
            "['train'] instead of the path."
        )
    # Not `splitlines`, nor the default newlines: both also split at characters of a text.
    with open(path, encoding="utf-8-sig", newline="\n") as file:
        return [line.removesuffix("\n").removesuffix("\r") for line in file]


def _name(source: Any) -> str:
    return str(source) if isinstance(source, str | Path) else f"The {type(source).__name__}"


def _place(source: Any, number: int) -> str:
    return f"{source}, line {number}" if isinstance(source, str | Path) else f"Row {number} of the data"


def _count_blank(source: Any, count: int) -> None:
    if count:
        rank_zero_info(f"{_name(source)}: {count} blank line{'s' * (count > 1)} dropped.")


# Groups


def text_groups(texts: Iterable[str]) -> Tensor:
    """Number texts so that equal texts, and no others, have the same number.

    Args:
        texts: ``N`` texts.

    Returns:
        int64 of shape ``[N]``.

    Example:
        >>> from bs_lightning.recipes.text_files import text_groups
        >>> text_groups(["a", "b", "a"]).tolist()
        [0, 1, 0]
    """
    numbers: dict[str, int] = {}
    return torch.tensor([numbers.setdefault(text, len(numbers)) for text in texts])


def pair_groups(pairs: Sequence[tuple[Any, Any]]) -> Tensor:
    """Number the members of pairs so that equal members, and no others, have the same number.

    If two pairs have the same query, then the document of each answers the query of the other.

    Args:
        pairs: ``N`` pairs of hashable values.

    Returns:
        int64 of shape ``[N, 2]``, from 0 without a gap.

    Example:
        >>> from bs_lightning.recipes.text_files import pair_groups
        >>> pair_groups([("a", "x"), ("x", "a")]).tolist()
        [[0, 1], [1, 0]]
    """
    numbers: dict[Any, int] = {}
    return torch.tensor([[numbers.setdefault(member, len(numbers)) for member in pair] for pair in pairs])
