"""What the recipes of texts share: files, tokens, groups, an encoder, and the evaluation on pairs of texts."""

import importlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler

from bs_lightning import BatchSamplerDataModule

Pooling = Literal["cls", "mean"]
"""How token vectors become the vector of a text; see :class:`TextEncoder`."""

Tokens = dict[str, Tensor]
"""``input_ids`` and ``attention_mask``, int64 ``[b, L]``."""


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


# Files


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
        >>> from bs_lightning.recipes.texts import read_sentences
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
        >>> from bs_lightning.recipes.texts import read_pairs
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
    names = lines[0].split("\t") if lines else []
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
            raise ValueError(f"{_place(path, number)}: score must be a number, got {row['score']!r}.") from None
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
    with open(path, encoding="utf-8-sig") as file:  # not `splitlines`, which also splits at characters of a text
        return [line.rstrip("\n") for line in file]


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
        >>> from bs_lightning.recipes.texts import text_groups
        >>> text_groups(["a", "b", "a"]).tolist()
        [0, 1, 0]
    """
    numbers: dict[str, int] = {}
    return torch.tensor([numbers.setdefault(text, len(numbers)) for text in texts])


def pair_groups(pairs: Sequence[tuple[Any, Any]]) -> Tensor:
    """Number pairs so that pairs with a common member, directly or through other pairs, have the same number.

    If two pairs have the same query, then the document of each answers the query of the other.

    Args:
        pairs: ``N`` pairs of hashable values.

    Returns:
        int64 of shape ``[N]``.

    Example:
        >>> from bs_lightning.recipes.texts import pair_groups
        >>> pair_groups([("a", "x"), ("b", "y"), ("c", "x")]).tolist()
        [0, 1, 0]
    """
    sparse, graphs = require("scipy.sparse"), require("scipy.sparse.csgraph")
    numbers: dict[Any, int] = {}
    ends = np.array([[numbers.setdefault(member, len(numbers)) for member in pair] for pair in pairs])
    links = sparse.coo_array((np.ones(len(pairs)), ends.T), shape=(len(numbers), len(numbers)))
    _, groups = graphs.connected_components(links, directed=False)
    return torch.from_numpy(groups[ends[:, 0]].astype(np.int64))


# Tokens and the encoder


def load_tokenizer(tokenizer: Any) -> Any:
    """Return a tokenizer that can pad.

    Args:
        tokenizer: A Hugging Face tokenizer, or its name or folder.

    Raises:
        ValueError: If it has no pad token.
    """
    if isinstance(tokenizer, str | Path):
        tokenizer = require("transformers").AutoTokenizer.from_pretrained(tokenizer)
    if tokenizer.pad_token is None:
        raise ValueError(
            f"The tokenizer {tokenizer.name_or_path!r} has no pad token, which batches of texts need. Load it, set "
            "tokenizer.pad_token = tokenizer.eos_token, and give the tokenizer itself, or the folder that "
            "tokenizer.save_pretrained(folder) writes."
        )
    return tokenizer


@dataclass(frozen=True)
class Tokenize:
    """Collate texts, or pairs of texts, into tokens.

    Args:
        tokenizer: A Hugging Face tokenizer with a pad token.
        max_length: Tokens that are kept of each text.
    """

    tokenizer: Any
    max_length: int

    def __call__(self, items: Sequence[Any]) -> Any:
        """Return the tokens of texts, or two such batches for pairs.

        Args:
            items: Strings, or pairs of strings.

        Returns:
            :data:`Tokens`, or a pair of them.
        """
        if isinstance(items[0], str):
            return self.tokens(items)
        return tuple(self.tokens(side) for side in zip(*items, strict=True))

    def tokens(self, texts: Sequence[str]) -> Tokens:
        """Return the tokens of ``b`` texts, padded to the longest text."""
        return dict(
            self.tokenizer(
                list(texts),
                padding=True,
                truncation=True,
                max_length=self.max_length,
                return_attention_mask=True,
                return_token_type_ids=False,  # zeros, which not every model takes
                return_tensors="pt",
            )
        )


class TextEncoder(nn.Module):
    """A Hugging Face transformer and pooling: tokens -> one vector for each text.

    Args:
        model: A Hugging Face model of texts with ``last_hidden_state``, or its name or folder. Its dropout is switched
            on, and its own pooler, which is not used, is frozen.
        pooling: ``"cls"`` takes the vector of the first token, ``"mean"`` the mean over tokens. Choose ``"mean"`` for a
            model whose first token cannot see the others, such as GPT-2.

    Raises:
        TypeError: While ``width`` is read, if the model has no ``config.hidden_size``.
        ValueError: If ``pooling`` is neither of them.
    """

    def __init__(self, model: str | nn.Module, pooling: Pooling) -> None:
        super().__init__()
        if pooling not in ("cls", "mean"):
            raise ValueError(f'pooling must be "cls" or "mean", got {pooling!r}.')
        self.transformer = load_model(model)
        self.pooling = pooling
        if getattr(self.transformer, "pooler", None) is not None:
            self.transformer.pooler.requires_grad_(False)  # else DDP waits for its gradient in vain

    @property
    def width(self) -> int:
        """Numbers in a text's vector."""
        return model_width(self.transformer, 'transformers.CLIPTextModel with pooling="mean"')

    def forward(self, tokens: Tokens) -> Tensor:
        """Return the vectors of texts.

        Args:
            tokens: ``input_ids`` and ``attention_mask``, int64 ``[b, L]``.

        Returns:
            Floats of shape ``[b, width]``, in the precision of the model's weights.
        """
        output: Tensor = self.transformer(**tokens).last_hidden_state
        return self._pooled(output.float(), tokens["attention_mask"]).to(next(self.transformer.parameters()).dtype)

    def _pooled(self, states: Tensor, mask: Tensor) -> Tensor:
        """Return one vector ``[b, width]`` for the tokens' vectors ``[b, L, width]``."""
        if self.pooling == "cls":  # some tokenizers pad on the left
            return states[torch.arange(len(states), device=states.device), mask.argmax(dim=1)]
        weights = mask.unsqueeze(2).to(states.dtype)
        return (states * weights).sum(dim=1) / weights.sum(dim=1).clamp_min(1)


def load_model(model: str | nn.Module) -> Any:
    """Return a model in training mode: itself, or loaded by its Hugging Face name or from its folder, in float32."""
    if not isinstance(model, nn.Module):
        # Saved weights may be in half precision, in which optimizers lose small steps.
        return load_model(require("transformers").AutoModel.from_pretrained(model).float())
    return model.train()  # `from_pretrained` returns a model without dropout, and Lightning leaves it so


def model_width(model: Any, of_one_side: str) -> int:
    """Return how many numbers a Hugging Face model gives for each token or patch.

    Args:
        model: The model.
        of_one_side: A model to name in the error, if this one has two sides.

    Raises:
        TypeError: If the model's configuration does not say it.
    """
    config = model.config
    if hasattr(config, "hidden_size"):
        return int(config.hidden_size)
    if hasattr(config, "hidden_sizes"):
        return int(config.hidden_sizes[-1])
    raise TypeError(
        f"{type(model).__name__} has no config.hidden_size. Give a model of one side, such as {of_one_side}."
    )


class TextDataModule(BatchSamplerDataModule):
    """Tokenizes texts or pairs of texts, and serves files of pairs for validation.

    Subclasses say what is trained on. Every process validates on all pairs: a process with a part of them could not
    tell the rank of a document.

    Args:
        tokenizer: A Hugging Face tokenizer, or its name or folder.
        batch_size: Instances per batch and process.
        evaluate_on: Paths of tab-separated files: scored pairs, or pairs to retrieve; see :func:`read_evaluation`.
        max_length: Tokens that are kept of each text.
        **kwargs: As for :class:`~bs_lightning.BatchSamplerDataModule`.

    Raises:
        ImportError: If transformers is not installed.
        ValueError: If the tokenizer has no pad token.
    """

    def __init__(
        self, tokenizer: Any, batch_size: int, *, evaluate_on: Sequence[str] = (), max_length: int, **kwargs: Any
    ) -> None:
        tokenize = Tokenize(load_tokenizer(tokenizer), max_length)
        super().__init__(batch_size, collate_fn=tokenize, **kwargs)
        self.evaluate_on = evaluate_on
        self.evaluation: list[EvaluationPairs] = []

    def setup(self, stage: str | None = None) -> None:
        """Read the files of ``evaluate_on``.

        Raises:
            ValueError: If a file is not as :func:`read_evaluation` expects, or two files have one name.
        """
        names = [Path(path).stem for path in self.evaluate_on]
        if len(set(names)) < len(names):
            raise ValueError(f"evaluate_on must hold files of different names, under which to log, got {names}.")
        self.evaluation = [read_evaluation(path) for path in self.evaluate_on]

    def val_dataloader(self) -> list[DataLoader[Any]]:
        """Return a loader for each file of ``evaluate_on``, in order."""
        return [evaluation_loader(self, each.pairs) for each in self.evaluation]


def evaluation_loader(data: BatchSamplerDataModule, pairs: Any) -> DataLoader[Any]:
    """Return a loader that gives every process all pairs, in order.

    Args:
        data: The DataModule, whose ``collate_fn`` and ``num_workers`` are used.
        pairs: A map-style dataset.
    """
    # Lightning would share the pairs out, and repeat some, if it did not find a distributed sampler here.
    sampler: DistributedSampler[Any] = DistributedSampler(pairs, num_replicas=1, rank=0, shuffle=False)
    return DataLoader(
        pairs,
        4 * data.batch_size,
        sampler=sampler,
        collate_fn=data.dataloader_kwargs["collate_fn"],
        num_workers=data.dataloader_kwargs.get("num_workers", 0),
    )


# Evaluation

Embedded = dict[int, list[tuple[Tensor, Tensor]]]
"""The number of a file in ``evaluate_on`` -> both sides of its pairs, batch by batch."""


def evaluate(evaluation: Sequence[EvaluationPairs], embedded: Embedded) -> dict[str, float]:
    """Return the scores of a model on all files.

    Args:
        evaluation: The files.
        embedded: The embeddings of their pairs. A file may have fewer than its pairs, such as in Lightning's sanity
            check.

    Returns:
        For each file of scored pairs ``NAME/spearman``, and the mean over these files as ``val/spearman``. For each
        other file ``NAME/r1`` and ``NAME/mrr``, of the second text found by the first, and their means as ``val/r1``
        and ``val/mrr``.
    """
    logged: dict[str, float] = {}
    for number, batches in embedded.items():
        file = evaluation[number]
        first, second = (torch.cat(side) for side in zip(*batches, strict=True))
        if file.scores is None:
            found = retrieval(first, second, pair_groups(file.pairs)[: len(first)])
        else:
            found = {"spearman": spearman(first, second, file.scores[: len(first)])}
        logged |= {f"{file.name}/{name}": value for name, value in found.items()}
    for name in ("spearman", "r1", "mrr"):
        values = [value for key, value in logged.items() if key.endswith(f"/{name}")]
        if values:
            logged[f"val/{name}"] = sum(values) / len(values)
    return logged


def spearman(first: Tensor, second: Tensor, scores: Sequence[float]) -> float:
    """Return the rank correlation between cosine similarities and people's scores.

    Args:
        first: Floats ``[n, d]``.
        second: Floats ``[n, d]``.
        scores: How similar people find the two texts, ``n`` numbers.

    Returns:
        Spearman's correlation in [-1, 1]; NaN if all similarities, or all scores, are equal.

    Example:
        >>> import torch
        >>> from bs_lightning.recipes.texts import spearman
        >>> round(spearman(torch.eye(2), torch.tensor([[1.0, 0], [1, 0]]), [5, 1]), 3)
        1.0
    """
    similarity = torch.nn.functional.cosine_similarity(first.float(), second.float())
    return float(require("scipy.stats").spearmanr(similarity.detach().cpu().numpy(), scores).statistic)


def retrieval(queries: Tensor, documents: Tensor, groups: Sequence[int] | Tensor) -> dict[str, float]:
    """Return how well queries find their documents among all documents, by cosine similarity.

    A document of the query's group is right, and the best of them counts. A wrong document that is equally similar
    is ranked before it. So a model that has collapsed finds nothing.

    Args:
        queries: Floats ``[n, d]``.
        documents: Floats ``[n, d]``; row ``i`` is the document of query ``i``.
        groups: The group of each pair, ``n`` integers; see :func:`pair_groups`.

    Returns:
        ``"r1"``, the share of queries whose first document is right, and ``"mrr"``, the mean of 1 / rank of the first
        right document.

    Example:
        >>> import torch
        >>> from bs_lightning.recipes.texts import retrieval
        >>> retrieval(torch.eye(2), torch.tensor([[1.0, 0], [1, 0.5]]), [0, 1])
        {'r1': 1.0, 'mrr': 1.0}
    """
    queries, documents = (torch.nn.functional.normalize(side.float(), dim=1) for side in (queries, documents))
    group = torch.as_tensor(groups, device=queries.device)
    ranks = []
    for rows, of_rows in zip(queries.split(1024), group.split(1024), strict=True):
        similarity = rows @ documents.T
        is_right = of_rows[:, None] == group
        best = similarity.masked_fill(~is_right, -torch.inf).amax(dim=1, keepdim=True)
        ranks.append(1 + (~is_right & ~(similarity < best)).sum(dim=1))  # NaN is a loss too
    rank = torch.cat(ranks).double()
    return {"r1": float((rank == 1).double().mean()), "mrr": float((1 / rank).mean())}


class EvaluatedModule(LightningModule):
    """Embeds the pairs of its DataModule's evaluation files in validation, and logs the scores of :func:`evaluate`.

    Subclasses define ``embed_pairs(batch)``, which returns the embeddings of both sides.
    """

    def embed_pairs(self, batch: tuple[Tokens, Tokens]) -> tuple[Tensor, Tensor]:
        """Return the embeddings of both sides of pairs, floats ``[b, d]`` each."""
        raise NotImplementedError

    def on_validation_epoch_start(self) -> None:
        """Forget the embeddings of the last validation."""
        self.embedded: Embedded = defaultdict(list)

    def validation_step(self, batch: tuple[Tokens, Tokens], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Embed both sides of pairs."""
        self.embedded[dataloader_idx].append(self.embed_pairs(batch))

    def on_validation_epoch_end(self) -> None:
        """Log the scores."""
        scores = evaluate(self.trainer.datamodule.evaluation, self.embedded)
        self.embedded.clear()
        self.log_dict(scores, sync_dist=True)
