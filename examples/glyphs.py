"""Name the letters of a font that was never seen: a small CLIP, with uniform batches and with walked batches.

Uniform batches are trained for as many epochs, and for as many seconds.

`make demo` runs this script. An instance is a letter: its picture, and its Unicode name, such as LATIN SMALL LETTER A
WITH ACUTE. Fonts come with matplotlib, names come with Python. The model is trained on the four styles of DejaVu Sans.
Then it must find the names of the letters of DejaVu Serif among all names.

The learning rate and the temperature are those that were best for uniform batches on DejaVu Sans Mono, with seed 0. The
walks were chosen there, too, with other seeds: `python examples/glyphs.py --validation` measures there.

`--weighted` trains all arms with the weighted loss, which gives more weight to hard negatives of any batch.
"""

import argparse
import logging
import time
import unicodedata
import warnings
from collections import Counter
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from lightning import LightningModule, Trainer, seed_everything
from matplotlib import get_data_path
from matplotlib.ft2font import FT2Font
from matplotlib.transforms import Bbox
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from scipy import stats
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from bs_lightning import BatchSamplerCallback, BatchSamplerDataModule, NNDescentGraph, RWRComposer
from bs_lightning.losses import info_nce, weighted
from bs_lightning.metrics import in_batch_hardness

TRAIN_FONTS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique")
VALIDATION_FONT, TEST_FONT = "DejaVuSansMono", "DejaVuSerif"
PIXELS = 24  # width and height of a picture
BATCH_SIZE = 64
EPOCHS = 30
LONGER = 38  # epochs of uniform batches that take as many seconds as EPOCHS of walked ones
ENCODE_EVERY = 5  # epochs for which embeddings and their graph are kept
FIGURE = Path("build/glyphs.png")
BATCHES = Path("build/batches.png")  # the figure's upper part; docs/batches.png is a copy of it
LETTER = "É"  # whose batches are drawn
NEGATIVES, POSITIVES = "picture and another letter's name (negatives)", "picture and its own name (positives)"
MEASURES = ("recall at 1, %", "mean reciprocal rank, %", "seconds of training")
NOTES = """\
Mean ± standard deviation over seeds. With the same seed, all arms have the same initial weights. Composing takes time,
so uniform batches also get as many seconds."""

Batch = tuple[Tensor, Tensor]
"""Pictures, floats ``[B, 24, 24]``, and the words of their names, integers ``[B, length]``, 0 after the last word."""
Loss = Callable[..., Tensor]
"""Both sides, floats ``[B, d]`` each, and ``temperature`` -> the loss."""


# The data: letters, and what they are called


class Letters(NamedTuple):
    """Letters, their pictures in each training font ``[fonts, N, 24, 24]``, and the words of their names."""

    characters: list[str]
    pictures: Tensor
    words: Tensor


def read_letters() -> Letters:
    """Return the letters that all training fonts have.

    Some letters look the same, such as the Latin A, the Greek Alpha and the Cyrillic A. They would be false negatives.
    Only the first of them is kept.
    """
    codes = set.intersection(*(font_codes(font) for font in TRAIN_FONTS))
    letters = [chr(code) for code in sorted(codes) if unicodedata.category(chr(code)).startswith("L")]
    unique: dict[bytes, str] = {}
    for letter in letters:
        unique.setdefault(draw_letter(letter, TRAIN_FONTS[0]).tobytes(), letter)
    letters = list(unique.values())
    pictures = torch.stack([draw_letters(letters, font) for font in TRAIN_FONTS])
    names = [unicodedata.name(letter).replace("-", " ").split() for letter in letters]
    numbers = {word: number for number, word in enumerate(sorted({word for name in names for word in name}), 1)}
    words = [torch.tensor([numbers[word] for word in name]) for name in names]
    return Letters(letters, pictures, nn.utils.rnn.pad_sequence(words, batch_first=True))


def held_out(letters: Letters, font: str) -> tuple[Tensor, Tensor]:
    """Return the indices of the letters that a held-out font has, and their pictures.

    Letters that look like another letter, or as in a training font, are left out.
    """
    codes = font_codes(font)
    indices = torch.tensor([index for index, letter in enumerate(letters.characters) if ord(letter) in codes])
    pictures = draw_letters([letters.characters[index] for index in indices], font)
    seen = Counter(picture.numpy().tobytes() for picture in (*letters.pictures.flatten(0, 1), *pictures))
    new = torch.tensor([seen[picture.numpy().tobytes()] == 1 for picture in pictures])
    return indices[new], pictures[new]


def font_path(font: str) -> Path:
    """Return the path of one of matplotlib's own fonts."""
    return Path(get_data_path(), "fonts/ttf", f"{font}.ttf")


def font_codes(font: str) -> set[int]:
    """Return the code points that a font has."""
    return set(FT2Font(str(font_path(font))).get_charmap())


@cache
def load_font(font: str, size: int) -> ImageFont.FreeTypeFont:
    """Return a font of a size in pixels."""
    return ImageFont.truetype(font_path(font), size, layout_engine=ImageFont.Layout.BASIC)


def draw_letter(letter: str, font: str, pixels: int = PIXELS) -> NDArray[np.uint8]:
    """Return a square picture of a letter, white on black."""
    picture = Image.new("L", (pixels, pixels))
    where = pixels // 2, 3 * pixels // 4  # the middle of the baseline
    ImageDraw.Draw(picture).text(where, letter, fill=255, font=load_font(font, int(0.69 * pixels)), anchor="ms")
    return np.array(picture)


def draw_letters(letters: list[str], font: str) -> Tensor:
    """Return pictures of letters, floats from 0 to 1."""
    return torch.tensor(np.stack([draw_letter(letter, font) for letter in letters])) / 255


# What is trained: a small CLIP


class PicturesAndNames(Dataset[tuple[Tensor, Tensor]]):
    """Item ``i`` is letter ``i`` in a training font, another one each time, and the words of its name."""

    def __init__(self, letters: Letters) -> None:
        self.letters = letters

    def __len__(self) -> int:
        return len(self.letters.characters)

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, Tensor]]:  # faster than letter by letter
        fonts = torch.randint(len(TRAIN_FONTS), (len(indices),))
        return list(zip(self.letters.pictures[fonts, indices], self.letters.words[indices], strict=True))


class CLIP(LightningModule):
    """A tower for pictures and a tower for names, trained with a loss in both directions."""

    def __init__(
        self, n_words: int, loss: Loss, width: int = 128, learning_rate: float = 8e-3, temperature: float = 0.1
    ) -> None:
        super().__init__()
        self.loss = loss
        self.learning_rate, self.temperature = learning_rate, temperature
        self.picture_tower = nn.Sequential(nn.Flatten(), nn.Linear(PIXELS**2, 512), nn.ReLU(), nn.Linear(512, width))
        self.words = nn.EmbeddingBag(n_words + 1, width, padding_idx=0)
        self.name_tower = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))

    def embed(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return both sides, as the loss compares them: the callback builds its graph on them."""
        pictures, words = batch
        bags = self.words(words)
        return self.picture_tower(pictures), bags + self.name_tower(bags)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self.loss(*self.embed(batch), temperature=self.temperature)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), self.learning_rate, fused=True)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.learning_rate, steps, pct_start=0.1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


# What bs-lightning adds: a DataModule to subclass, and a callback


class Data(BatchSamplerDataModule):
    """Letters in all training fonts to train on, and in the first one to embed."""

    def __init__(self, letters: Letters, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.letters = letters

    def train_dataset(self) -> Dataset[tuple[Tensor, Tensor]]:
        return PicturesAndNames(self.letters)

    def pool_dataset(self) -> Dataset[tuple[Tensor, ...]]:
        return TensorDataset(self.letters.pictures[0], self.letters.words)


def walks() -> RWRComposer:
    """Return a composer whose walks stay close to their start: each name belongs to one letter."""
    return RWRComposer(NNDescentGraph(n_neighbors=5), restart_probability=0.5)


def train(letters: Letters, walked: bool, epochs: int, seed: int, loss: Loss = info_nce) -> CLIP:
    """Return a model trained in uniform or in walked batches."""
    seed_everything(seed, verbose=False)
    torch.set_num_threads(1)  # more threads do not speed up so small a model, and slow it down on shared cores
    model = CLIP(int(letters.words.max()), loss)
    trainer = Trainer(
        max_epochs=epochs,
        callbacks=[BatchSamplerCallback("all", walks(), encode_every=ENCODE_EVERY)] if walked else [],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, datamodule=Data(letters, batch_size=BATCH_SIZE))
    return model.eval()


# What comes out


def find_names(model: CLIP, letters: Letters, indices: Tensor, pictures: Tensor) -> tuple[float, float]:
    """Return recall at 1 and mean reciprocal rank, in percent, of letters' own names among all names."""
    with torch.no_grad():
        found, names = (
            model.embed((pictures, letters.words[indices]))[0],
            model.embed((letters.pictures[0], letters.words))[1],
        )
    similarity = F.normalize(found, dim=1) @ F.normalize(names, dim=1).T
    own = similarity.gather(1, indices[:, None])
    ranks = (similarity >= own).sum(dim=1)
    return 100 * (ranks == 1).float().mean().item(), 100 * (1 / ranks).mean().item()


def draw(letters: Letters, embeddings: Tensor) -> None:
    """Draw one letter's uniform batch and its walked batch, of the same model, above the similarities of their pairs.

    Letters are sorted by the similarity of their names to the picture of that letter, and the first names are written.
    """
    anchor = letters.characters.index(LETTER)
    n = len(embeddings) // BATCH_SIZE * BATCH_SIZE
    pool = torch.randperm(len(embeddings), generator=torch.Generator().manual_seed(0))[:n]
    walked = torch.from_numpy(walks()(embeddings[pool], BATCH_SIZE, seed=0, epoch=0))
    figure, axes = plt.subplots(3, 2, figsize=(9, 8.6), height_ratios=[42, 13, 15], sharey="row", layout="constrained")
    for name, batches, (grid, names, histogram) in zip(
        ("Uniform", "Walked"), (pool.reshape(-1, BATCH_SIZE), pool[walked]), axes.T, strict=True
    ):
        batch = batches[(batches == anchor).any(dim=1)][0]
        batch = batch[(embeddings[batch, 1] @ embeddings[anchor, 0]).argsort(descending=True)]
        characters = [letters.characters[index] for index in batch]
        tiles = torch.tensor(np.stack([draw_letter(character, TRAIN_FONTS[0], 80) for character in characters]))
        grid.imshow(tiles.unflatten(0, (8, 8)).transpose(1, 2).flatten(0, 1).flatten(1, 2), cmap="gray_r")
        hardness = in_batch_hardness(embeddings[batch][None])
        grid.set_title(f"{name} batch of {LETTER}\nmean similarity of its negatives: {hardness:z.2f}")
        for line, character in enumerate(characters[:6]):
            for x, text, size in ((0.0, character, 11), (0.08, unicodedata.name(character), 7)):
                names.text(x, 1 - (line + 0.5) / 6, text, size=size, va="center")
        grid.set(xticks=[], yticks=[])
        grid.spines[:].set_color("lightgray")
        names.axis("off")

        similarity = embeddings[batch, 0] @ embeddings[batch, 1].T
        negative = ~torch.eye(BATCH_SIZE, dtype=torch.bool)
        for values, label in ((similarity[negative], NEGATIVES), (similarity[~negative], POSITIVES)):
            weights = torch.full_like(values, 1 / len(values))
            histogram.hist(values, np.linspace(-1, 1, 41), weights=weights, label=label, alpha=0.6)
        histogram.set_xlabel("cosine similarity in the batch")
        histogram.spines[["top", "right"]].set_visible(False)
    axes[2, 0].set_ylabel("share")
    legend = figure.legend(*axes[2, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    FIGURE.parent.mkdir(exist_ok=True)
    figure.savefig(FIGURE, dpi=120)
    figure.set_layout_engine("none")  # or it would move the axes as the legend leaves
    legend.remove()
    boxes = [panel.get_tightbbox() for panel in axes[:2].flat]
    upper_half = Bbox.union(boxes).transformed(figure.dpi_scale_trans.inverted())
    figure.savefig(BATCHES, dpi=120, bbox_inches=upper_half.padded(0.05))


def report(arms: dict[str, NDArray[np.float64]]) -> None:
    """Print means ± deviations over seeds, and what walked batches gain by seed, with intervals: [seeds, measures]."""
    print(f"\n{'':24}" + "".join(f"{arm:>20}" for arm in arms))
    for name, *runs in zip(MEASURES, *(results.T for results in arms.values()), strict=True):
        print(f"{name:24}" + "".join(f"{f'{run.mean():.1f} ± {run.std(ddof=1):.1f}':>20}" for run in runs))
    *others, walked = arms
    print("\nWalked batches gain, with a 95% interval:")
    for other in others:
        for name, differences in zip(MEASURES, (arms[walked] - arms[other]).T, strict=True):
            low, high = stats.t.interval(0.95, len(differences) - 1, differences.mean(), stats.sem(differences))
            print(f"{name:24}{differences.mean():+.1f} [{low:+.1f}, {high:+.1f}] against {other}")


def main() -> None:
    """Train in both kinds of batches with every seed, print the table and draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--validation", action="store_true", help="measure on the font on which settings were chosen")
    parser.add_argument("--weighted", action="store_true", help="train with the weighted loss instead of InfoNCE")
    parser.add_argument("--seeds", type=int, default=5, help="train with this many seeds, 0 and up (%(default)s)")
    args = parser.parse_args()
    if args.seeds < 2:
        parser.error(f"--seeds must be at least 2, as intervals need two differences, got {args.seeds}.")
    font = VALIDATION_FONT if args.validation else TEST_FONT
    loss = partial(weighted, negatives="other_side") if args.weighted else info_nce
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")

    letters = read_letters()
    indices, pictures = held_out(letters, font)
    print(f"Trained on {len(letters.characters):,} letters of DejaVu Sans, to name {len(indices):,} letters of {font}.")
    print(f"{args.seeds} seeds, {EPOCHS} epochs, batches of {BATCH_SIZE}.", flush=True)
    arms = {"uniform": (False, EPOCHS), f"uniform, {LONGER} epochs": (False, LONGER), "walked": (True, EPOCHS)}
    runs: dict[str, list[list[float]]] = {arm: [] for arm in arms}
    for seed in range(args.seeds):
        for arm, (walked, epochs) in arms.items():
            start = time.perf_counter()
            model = train(letters, walked, epochs, seed, loss)
            seconds = time.perf_counter() - start
            runs[arm].append([*find_names(model, letters, indices, pictures), seconds])
        found = "; ".join(f"{arm} {results[-1][0]:.1f}%" for arm, results in runs.items())
        print(f"seed {seed}, recall at 1: {found}", flush=True)

    report({arm: np.array(results) for arm, results in runs.items()})
    print(NOTES)
    with torch.no_grad():  # of the last walked model
        sides = model.embed((letters.pictures[0], letters.words))
    draw(letters, F.normalize(torch.stack(sides, dim=1), dim=2))
    print(f"Figures: {FIGURE}, {BATCHES}")


if __name__ == "__main__":
    main()
