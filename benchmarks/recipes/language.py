"""SimCSE and dual encoders of pairs: train each arm from scratch, and measure it on STS and by retrieval.

Arms of a seed differ in their batches, and some in the mask of the loss. All start from the same weights. The
transformer is small, and its tokenizer is trained on the unlabeled sentences, so nothing was seen before. Pairs with a
sentence of an STS set are left out of training.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning import seed_everything
from threadpoolctl import threadpool_limits
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from bs_lightning import BatchSamplerCallback, ExactGraph, RWRComposer, encode_dataset
from bs_lightning.baselines import B3Composer, UniformComposer, knn_batches
from bs_lightning.recipes.dual_encoder import DualEncoder, PairData
from bs_lightning.recipes.simcse import SentenceData, SimCSE
from bs_lightning.recipes.text_files import read_evaluation, read_pairs, read_sentences
from bs_lightning.rules import AbovePositive

from ..csv_files import Row
from ..runs import chosen_settings, run_missing, show, wanted
from ..trainers import make_trainer
from ..training.arms import walk
from ..training.text import STS, same_meaning
from .last_epoch import LastBatches, describe

SETTINGS: dict[str, Row] = {
    # As transformer-simcse in benchmarks/training, with fewer sentences, so that a run takes a minute or two of a core.
    "simcse": {"one_in": 8, "batch_size": 64, "epochs": 3, "learning_rate": 1e-3, "width": 64, "n_layers": 2},
    "dual_encoder": {"batch_size": 64, "epochs": 6, "learning_rate": 1e-3, "width": 64, "n_layers": 2},
}
VOCABULARY = 8192
MAX_LENGTH = 32  # tokens
LARGER = 4  # times the batch size, in the arm "large"
TEACHERS_SEED = 1000  # a teacher has other weights than all students


# Arms


def near() -> RWRComposer:
    """Return a composer whose walks stay close to their start, on an exact graph, which needs no compilation."""
    return walk(ExactGraph(5), restart_probability=0.5)


UNCOMPOSED = ("uniform", "large", "untrained")
COMPOSED: dict[str, Callable[[], BatchSamplerCallback]] = {
    "knn": lambda: BatchSamplerCallback("all", knn_batches),
    "batchsampler": lambda: BatchSamplerCallback("all", near()),
    "auto": lambda: BatchSamplerCallback("auto", near()),
    # The loss leaves out the pairs that the model in training calls more alike than the positive pair.
    "own-uniform": lambda: BatchSamplerCallback("all", UniformComposer(ExactGraph(5)), own_rule=AbovePositive()),
    "own-batchsampler": lambda: BatchSamplerCallback("all", near(), own_rule=AbovePositive()),
    "own-auto": lambda: BatchSamplerCallback("auto", near(), own_rule=AbovePositive()),
    # The public models of B3 skip 30 ranks, keep 100, and fill batches of 1024 with 32 communities of 32. Here batches
    # are of 64, from some thousand pairs: ranks and communities are scaled down.
    "b3": lambda: BatchSamplerCallback("all", B3Composer(5, 15, 8), warmup_epochs=0, from_reference=True),
}
ARMS = (*UNCOMPOSED, *COMPOSED)
OF_PAIRS = ("own-uniform", "own-batchsampler", "own-auto", "b3")  # arms that need two sides


# Data


class Texts(NamedTuple):
    """What the folder holds, and the tokenizer of its sentences."""

    sentences: list[str]
    pairs: list[tuple[str, str]]  # without those that share a sentence with an STS set
    evaluation: list[str]  # paths of the STS sets, and of the pairs to retrieve
    tokenizer: PreTrainedTokenizerFast


@lru_cache(maxsize=1)
def read(folder: Path) -> Texts:
    """Read the texts, and train the tokenizer on the unlabeled sentences."""
    scored = [folder / f"{name}.tsv" for name in STS]
    tested = {sentence for path in scored for pair in read_evaluation(path).pairs for sentence in pair}
    pairs = [pair for pair in read_pairs(folder / "paraphrase_train.tsv") if tested.isdisjoint(pair)]
    sentences = read_sentences(folder / "unlabeled_sentences.txt")
    files = [str(path) for path in (*scored, folder / "paraphrase_test.tsv")]
    return Texts(sentences, pairs, files, train_tokenizer(sentences))


def train_tokenizer(sentences: list[str]) -> PreTrainedTokenizerFast:
    """Return a tokenizer of byte pairs in lower case. WordPiece's training would differ from process to process."""
    pieces = Tokenizer(models.BPE())
    pieces.normalizer = normalizers.BertNormalizer()
    pieces.pre_tokenizer = pre_tokenizers.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["[PAD]"], initial_alphabet=alphabet, show_progress=False
    )
    pieces.train_from_iterator(sentences, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=pieces, pad_token="[PAD]")


class Pairs(PairData):
    """Pairs, and a teacher's embeddings of both sides if there is a teacher."""

    taught: Any = None

    def reference_embeddings(self) -> Any:
        """Return the teacher's embeddings."""
        return self.taught


# One run


def make(texts: Texts, arm: str, chosen: Row) -> tuple[Any, Any]:
    """Return a recipe's model and its data."""
    transformer = BertModel(
        BertConfig(
            vocab_size=len(texts.tokenizer),
            hidden_size=chosen["width"],
            num_hidden_layers=chosen["n_layers"],
            num_attention_heads=4,
            intermediate_size=4 * chosen["width"],
            max_position_embeddings=MAX_LENGTH,
        )
    )
    size = chosen["batch_size"] * (LARGER if arm == "large" else 1)
    options: Any = {"evaluate_on": texts.evaluation, "max_length": MAX_LENGTH}
    rate = chosen["learning_rate"]
    if chosen["model"] == "simcse":
        sentences = texts.sentences[:: chosen["one_in"]]
        model = SimCSE(transformer, pooling="mean", learning_rate=rate)
        return model, SentenceData(sentences, texts.tokenizer, size, **options)
    return DualEncoder(transformer, learning_rate=rate), Pairs(texts.pairs, texts.tokenizer, size, **options)


def train(texts: Texts, arm: str, seed: int, chosen: Row, taught: Any = None) -> tuple[Any, Any, LastBatches]:
    """Train an arm, and return model, data and the last epoch's batches.

    Args:
        texts: The texts.
        arm: One of :data:`ARMS`.
        seed: Of weights, batches and dropout.
        chosen: The settings.
        taught: A teacher's embeddings of the pairs, for ``"b3"``.
    """
    seed_everything(seed, verbose=False)
    model, data = make(texts, arm, chosen)
    data.taught = taught
    last = LastBatches()
    if arm == "untrained":
        data.setup()
        return model, data, last
    epochs = chosen["epochs"] * (LARGER if arm == "large" else 1)  # as many steps
    callbacks = [COMPOSED[arm]()] if arm in COMPOSED else []
    make_trainer(epochs, [*callbacks, last], limit_val_batches=0).fit(model, datamodule=data)
    return model, data, last


def teach(texts: Texts, seed: int, chosen: Row) -> Any:
    """Return a finished teacher's embeddings of the pairs: a model that was trained in uniform batches."""
    teacher, data, _ = train(texts, "uniform", seed + TEACHERS_SEED, chosen)
    with tempfile.TemporaryDirectory() as scratch:
        path, collate = Path(scratch) / "taught.npy", data.dataloader_kwargs["collate_fn"]
        return torch.tensor(encode_dataset(teacher, data.pairs, path, progress=False, collate_fn=collate)).float()


def run(data_dir: Path, chosen: Row) -> Row:
    """Train and measure once.

    Args:
        data_dir: Folder with the STS sets and the texts to train on.
        chosen: Model, arm, seed and settings.

    Returns:
        The measures.
    """
    start = time.perf_counter()
    texts, arm, seed = read(data_dir), chosen["arm"], chosen["seed"]
    taught = teach(texts, seed, chosen) if arm == "b3" else None
    began = time.perf_counter()
    model, data, last = train(texts, arm, seed, chosen, taught)
    trained = time.perf_counter()
    evaluator = make_trainer(1, [])
    evaluator.validate(model, datamodule=data, verbose=False)
    scores = {name: float(score) for name, score in evaluator.callback_metrics.items()}
    described = {} if arm == "untrained" else describe(last, partial(sides, model.train(), data), classes(data))
    of_sets = {name: scores[f"{name}/spearman"] for name in STS}
    means = {name: scores[f"val/{name}"] for name in ("spearman", "r1", "mrr")}
    return {
        **{f"result/{name}": value for name, value in (means | of_sets).items()},
        **described,
        "seconds/train": trained - began,
        "seconds/all": time.perf_counter() - start,
    }


def sides(model: Any, data: Any, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Return what the loss compares: both sides of pairs, or sentences under two dropouts."""
    dataset = data.train_dataset()
    batch = data.dataloader_kwargs["collate_fn"]([dataset[index] for index in indices.tolist()])
    return (model.embed(batch), model.embed(batch)) if isinstance(model, SimCSE) else model.embed(batch)


def classes(data: Any) -> Tensor:
    """Return the number of what each instance means: pairs that others join share one, too."""
    if isinstance(data, SentenceData):
        return data.train_groups()
    numbers = same_meaning(*zip(*data.pairs, strict=True))
    return torch.tensor([numbers[first] for first, _ in data.pairs])


# The command line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this benchmark's arguments."""
    parser.add_argument(
        "--data-dir", required=True, type=Path, help="folder with STS12.tsv, unlabeled_sentences.txt .."
    )
    parser.add_argument("--model", default="simcse", choices=SETTINGS)
    parser.add_argument("--arms", nargs="+", default=["uniform", "knn", "batchsampler"], choices=ARMS, metavar="ARM")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    parser.add_argument("--results", required=True, type=Path, help="CSV file to add rows to")
    parser.add_argument("--threads", type=int, default=1)
    group = parser.add_argument_group("settings", "recorded in the results")
    for name in SETTINGS["simcse"]:
        group.add_argument(f"--{name.replace('_', '-')}", type=float if name == "learning_rate" else int)


def main(args: argparse.Namespace) -> None:
    """Train and measure, and print a line for each run."""
    torch.set_num_threads(args.threads)
    threadpool_limits(args.threads)
    if args.model == "simcse" and (unfit := set(args.arms) & set(OF_PAIRS)):
        raise SystemExit(f"--arms: {', '.join(sorted(unfit))} need two sides, which only dual_encoder has.")
    if args.model != "simcse" and args.one_in is not None:
        raise SystemExit(f"--one-in: {args.model} trains on all pairs. Only simcse trains on one in so many sentences.")
    settings = chosen_settings(args, SETTINGS[args.model])
    runs = wanted({"model": args.model}, args.arms, range(args.seeds), settings)
    show(run_missing(runs, partial(run, args.data_dir), args.results))
