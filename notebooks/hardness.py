# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Find the right hardness for your data
#
# You train by contrast with in-batch negatives, and you have a half-trained model. You want to add
# `BatchSamplerCallback`, which composes batches of instances that the model confuses. Its main setting is `pool_size`:
# how many random instances are planned together. Larger pools make harder batches. How large should yours be?
#
# The answer depends on two things that you can measure in seconds, before you train on:
#
# - Does the model still make mistakes in random batches? If so, it has no use for harder ones yet.
# - Are the hardest negatives true negatives? If not, harder batches teach the wrong thing.
#
# This notebook measures both on two small datasets that stand for the two ends. One has true negatives, the other has
# false negatives that nobody has marked.

# %%
import warnings

warnings.filterwarnings("ignore", message="IProgress not found")  # about progress bars, on import

# %%
import csv
import logging
import tempfile
import unicodedata
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from lightning import LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import Dataset

from bs_lightning import (
    BatchFetcher,
    BatchSamplerCallback,
    BatchSamplerDataModule,
    ExactGraph,
    PlannedPool,
    Planning,
    PoolBatchSampler,
    Pools,
    RWRComposer,
    encode,
)
from bs_lightning.losses import info_nce
from bs_lightning.meter import advise, measure

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", module="lightning")
torch.set_num_threads(1)  # so small a model gains nothing by more
BATCH_SIZE, TEMPERATURE = 64, 0.1

# %% [markdown]
# ## Two datasets
#
# **Characters.** matplotlib comes with fonts. A character in an upright and in an italic typeface is a positive pair.
# Each character is one instance, so another character is a *true* negative. There are a few exceptions: the Latin A and
# the Greek Alpha are drawn alike. We know them, as their images are equal, and give them one group.
#
# **Digits.** Two random distortions of a handwritten digit are a positive pair. Every tenth negative is the same digit:
# a *false* negative. Training does not know the labels. We use them to see what happens.


# %%
@dataclass
class Case:
    """Images to train on and to test on, and what is known about them."""

    first: torch.Tensor  # [N, size, size]
    second: torch.Tensor  # the same instances, the other side
    labels: torch.Tensor  # the truth, int64 [N]
    groups: torch.Tensor  # what training knows: never negatives of each other, int64 [N]
    is_distorted: bool
    is_test: np.ndarray  # bool [N]

    def part(self, rows):
        return [values[torch.from_numpy(rows)] for values in (self.first, self.second, self.labels, self.groups)]


def draw(character, font):
    image = Image.new("L", (16, 16))
    ImageDraw.Draw(image).text((8, 8), character, fill=255, font=font, anchor="mm")
    return np.asarray(image) / np.float32(255)


fonts = [Path(matplotlib.get_data_path(), "fonts/ttf", f"{name}.ttf") for name in ("DejaVuSans", "DejaVuSerif-Italic")]
codes = sorted(set.intersection(*(set(FT2Font(font).get_charmap()) for font in fonts)))
codes = [code for code in codes if unicodedata.category(chr(code))[0] in "LNPS"]  # letters, numbers, signs
sides = [np.stack([draw(chr(code), ImageFont.truetype(font, 10)) for code in codes]) for font in fonts]
drawn = sides[0].any(axis=(1, 2)) & sides[1].any(axis=(1, 2))
codes = np.array(codes)[drawn]
upright, italic = (torch.from_numpy(side[drawn]) for side in sides)
alike = torch.unique(upright, dim=0, return_inverse=True)[1]  # equal images have the same number

rng = np.random.default_rng(0)
characters = Case(
    upright, italic, alike, alike, False, np.isin(alike, rng.choice(int(alike.max()) + 1, 600, replace=False))
)
pixels, digits = load_digits(return_X_y=True)
pixels, digits = torch.tensor(pixels / 16, dtype=torch.float32).reshape(-1, 8, 8), torch.from_numpy(digits).long()
handwriting = Case(pixels, pixels, digits, torch.arange(len(digits)), True, rng.random(len(digits)) < 0.25)
cases = {"characters": characters, "digits": handwriting}


def distort(images):
    """Turn, zoom and shift each image at random, and add noise."""
    n = len(images)
    angle = torch.empty(n).uniform_(-0.3, 0.3)
    zoom = torch.empty(n, 1, 1).uniform_(0.8, 1.2)
    shift = torch.empty(n, 2, 1).uniform_(-0.25, 0.25)
    rotation = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], dim=1).reshape(n, 2, 2)
    grid = F.affine_grid(torch.cat([zoom * rotation, shift], dim=2), [n, 1, *images.shape[1:]], align_corners=False)
    return F.grid_sample(images[:, None], grid, align_corners=False)[:, 0] + 0.1 * torch.randn_like(images)


# %%
figure, axes = plt.subplots(2, 1, figsize=(9, 2.6), layout="constrained")
for axis, (name, case) in zip(axes, cases.items(), strict=True):
    chosen = rng.choice(len(case.first), 30, replace=False)
    views = [distort(side[chosen]) if case.is_distorted else side[chosen] for side in (case.first, case.second)]
    axis.imshow(torch.cat([torch.cat(list(view), dim=1) for view in views]), cmap="gray_r", vmin=0, vmax=1)
    axis.set_title(f"{name}: {len(case.first):,} instances, a column is a pair", fontsize=10)
    axis.axis("off")
plt.show()

# %% [markdown]
# ## DataModule and model
#
# Subclass `BatchSamplerDataModule` and return the dataset to train on. `train_groups` says which instances are never
# negatives of each other. `train_labels` is the truth, and serves only to log the share of false negatives.


# %%
class Views(Dataset):
    """Item i is two views of instance i."""

    def __init__(self, first, second, is_distorted):
        self.sides = first, second
        self.is_distorted = is_distorted

    def __len__(self):
        return len(self.sides[0])

    def __getitems__(self, rows):  # a whole batch at once
        return [distort(side[rows]) if self.is_distorted else side[rows] for side in self.sides]


class Data(BatchSamplerDataModule):
    def __init__(self, case):
        super().__init__(BATCH_SIZE, collate_fn=lambda views: views)
        self.first, self.second, self.labels, self.groups = case.part(np.flatnonzero(~case.is_test))
        self.is_distorted = case.is_distorted

    def train_dataset(self):
        return Views(self.first, self.second, self.is_distorted)

    def train_labels(self):
        return self.labels

    def train_groups(self):
        return self.groups


# %% [markdown]
# The network is a small perceptron for both datasets. `embed` returns both sides, as the loss compares them. The loss
# leaves out the pairs of a group.


# %%
class Contrast(LightningModule):
    def __init__(self, n_pixels):
        super().__init__()
        self.network = nn.Sequential(nn.Flatten(), nn.Linear(n_pixels, 256), nn.ReLU(), nn.Linear(256, 64))

    def embed(self, views):
        return self.network(views[0]), self.network(views[1])

    def training_step(self, views, batch_idx):
        masked = self.trainer.datamodule.likely_false_negatives()
        loss = info_nce(*self.embed(views), temperature=TEMPERATURE, masked=masked)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def fit(case, epochs, *callbacks, seed=0):
    seed_everything(seed, verbose=False)
    model = Contrast(case.first[0].numel())
    trainer = Trainer(
        max_epochs=epochs,
        callbacks=list(callbacks),
        logger=CSVLogger(tempfile.mkdtemp()),
        log_every_n_steps=1,
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, datamodule=Data(case))
    with open(f"{trainer.logger.log_dir}/metrics.csv") as file:
        return model.eval(), list(csv.DictReader(file))


def column(log, name):
    return np.array([float(row[name]) for row in log if row.get(name)])


half_trained = {}
for name, case in cases.items():
    half_trained[name], log = fit(case, 6)
    print(
        f"{name}: loss of the first 20 batches {column(log, 'loss')[:20].mean():.2f}, "
        f"of the last 20 {column(log, 'loss')[-20:].mean():.2f}"
    )

# %% [markdown]
# ## Read the meter
#
# Embed both sides of the training data with the half-trained model. `measure` composes batches from pools of each size,
# and reads them. It needs no labels. From the command line the same is `python -m bs_lightning.meter embeddings.npz`.

# %%
embeddings, readings = {}, {}
for name, case in cases.items():
    data = Data(case)
    load = BatchFetcher(data.train_dataset(), collate_fn=lambda views: views)
    torch.manual_seed(0)
    embeddings[name] = encode(range(len(data.labels)), load, half_trained[name].embed, batch_size=512)  # [N, 2, d]
    readings[name] = measure(embeddings[name], BATCH_SIZE, temperature=TEMPERATURE)
    print(name)
    print("  pool size  hardness  accuracy  negatives above  loss")
    for size, hardness, accuracy, above, loss, _ in readings[name]:
        print(f"  {size:9}  {hardness:8.2f}  {accuracy:8.2f}  {above:15.2%}  {loss:4.2f}")
    print(" ", advise(readings[name], BATCH_SIZE))

# %% [markdown]
# The first row is uniform batches: a pool of one batch. Characters are easy: nearly all in-batch mistakes are gone, the
# loss is small, and even in the largest pools the positive wins four times of five. `advise` names the largest pools
# that keep in-batch accuracy at 0.7: all data. Digits are not: in uniform batches two of three anchors have a negative
# above their positive. `advise` says to keep uniform batches.
#
# ## Which of the hard negatives are false?
#
# The meter cannot know. Here we can: both datasets have labels. We compose batches from pools of each size as training
# would, and count the pairs of equal labels. Then we ask the same of the negatives above the positive, which are the
# hardest.


# %%
def batches_of(rows, pool_size):
    """Compose the batches of an epoch, int64 [n, B]."""

    def plan(indices, *, seed, epoch):
        return PlannedPool(RWRComposer(ExactGraph())(rows[indices], BATCH_SIZE, seed=seed, epoch=epoch))

    sampler = PoolBatchSampler(len(rows), BATCH_SIZE, planning=Planning(plan, Pools(pool_size)), seed=0)
    return torch.tensor(list(sampler))


def look(rows, labels, groups, batches):
    """Return the share of false negatives among all negatives, and among those above the positive."""
    first, second = rows[batches].unbind(2)
    similarity = first @ second.mT
    same, masked = (values[batches][:, :, None] == values[batches][:, None, :] for values in (labels, groups))
    above = similarity > similarity.diagonal(dim1=1, dim2=2)[:, :, None]
    others = ~torch.eye(BATCH_SIZE, dtype=torch.bool)
    hardest = above & others
    return {
        "false negatives": (same & others).sum() / others.expand_as(same).sum(),
        "not masked": (same & ~masked & others).sum() / others.expand_as(same).sum(),
        "false among the hardest": (same & hardest).sum() / hardest.sum(),
    }


looks = {}
for name, case in cases.items():
    data = Data(case)
    looks[name] = [
        look(embeddings[name], data.labels, data.groups, batches_of(embeddings[name], each.pool_size))
        for each in readings[name]
    ]

# %% [markdown]
# Look at how fast each curve rises from its left end, which is uniform batches.

# %%
figure, axes = plt.subplots(1, 4, figsize=(12, 3), layout="constrained")
for name, color in (("characters", "tab:red"), ("digits", "tab:blue")):
    sizes = [each.pool_size for each in readings[name]]
    axes[0].semilogx(sizes, [each.accuracy for each in readings[name]], "o-", color=color, label=name)
    axes[1].semilogx(sizes, [each.loss for each in readings[name]], "o-", color=color)
    axes[2].semilogx(sizes, [float(each["false negatives"]) for each in looks[name]], "o-", color=color)
    axes[3].semilogx(sizes, [float(each["false among the hardest"]) for each in looks[name]], "o-", color=color)
titles = "in-batch accuracy", "loss", "false negatives", "false among negatives\nabove the positive"
for axis, title in zip(axes, titles, strict=True):
    axis.set(title=title, xlabel="pool size", ylim=(0, None))
    axis.spines[["top", "right"]].set_visible(False)
axes[0].legend(frameon=False)
plt.show()

# %% [markdown]
# With the pool size, accuracy falls and loss rises for both, and hardness comes at a price. For digits the price is
# high: the share of false negatives rises from a tenth to a third, and of the negatives above the positive from four to
# six in ten. For characters both shares stay near zero, though the batches become much harder.
#
# ## What a mask takes away
#
# Groups take the known false negatives out of the loss. `own_rule=AbovePositive()` takes out what the model itself
# calls more alike than the positive. The table says, for batches from all data, what each of them finds.

# %%
print("              false negatives   after groups    of the pairs above the positive")
for name in cases:
    last = looks[name][-1]
    print(
        f"{name:12}  {last['false negatives']:15.1%}  {last['not masked']:13.1%}    "
        f"{last['false among the hardest']:.0%} are false, {1 - last['false among the hardest']:.0%} are true"
    )

# %% [markdown]
# For characters nothing is left to mask after groups. `own_rule` would do harm: nearly all pairs above the positive are
# true negatives, which the model has yet to learn. For digits no group is known. `own_rule` would take out more false
# negatives than true ones, but would take out the hardest true ones with them.
#
# ## Let the loss decide: `pool_size="auto"`
#
# A reading holds for one moment. `"auto"` reads the training loss all the time. It starts with uniform batches, makes
# pools larger while the loss is below a target, and smaller while it is above. With groups the target is 0.3.
#
# We train from the start: uniform batches, pools of ten batches (the default), all data, and auto. The measure is
# held-out retrieval for characters: the italic image is found by the upright one, among all characters. For digits it
# is the label of the nearest training image.


# %%
def score(name, model):
    case = cases[name]
    test, candidates = case.is_test, np.ones(len(case.is_test), bool) if name == "characters" else ~case.is_test
    with torch.no_grad():
        queries, found = (
            F.normalize(model.network(case.first[test])),
            F.normalize(model.network(case.second[candidates])),
        )
    nearest = (queries @ found.T).argmax(dim=1)
    return float((case.labels[candidates][nearest] == case.labels[test]).float().mean())


def arms():
    near = RWRComposer(ExactGraph(n_neighbors=5), restart_probability=0.5)  # the hardest: docs/choosing.md
    return {
        "uniform": (),
        "ten batches": (BatchSamplerCallback(),),
        "all": (BatchSamplerCallback("all", near),),
        "auto": (BatchSamplerCallback("auto", near),),
    }


SEEDS = range(2)
logs, scores = {}, {}
for name, case in cases.items():
    for arm in arms():
        fits = [fit(case, 12, *arms()[arm], seed=seed) for seed in SEEDS]
        logs[name, arm] = fits[0][1]
        scores[name, arm] = [score(name, model) for model, _ in fits]

# %% [markdown]
# Look at the two blue lines: the loss under auto, and the pool size that it chose.

# %%
figure, axes = plt.subplots(2, 2, figsize=(9, 5), layout="constrained", sharex="col")
colors = {"uniform": "tab:gray", "ten batches": "tab:orange", "all": "tab:red", "auto": "tab:blue"}
for (loss_axis, size_axis), name in zip(axes.T, cases, strict=True):
    for arm, color in colors.items():
        loss = column(logs[name, arm], "loss")
        loss = loss[: len(loss) // 20 * 20].reshape(-1, 20).mean(axis=1)
        loss_axis.plot(20 * np.arange(1, len(loss) + 1), loss, color=color, label=arm)
    rows = [row for row in logs[name, "auto"] if row.get("batch_sampler/pool_size")]
    steps = [int(row["step"]) for row in rows]
    size_axis.step(steps, [float(row["batch_sampler/pool_size"]) for row in rows], color="tab:blue", where="pre")
    loss_axis.axhline(0.3, color="black", linestyle=":", linewidth=1)
    loss_axis.set(title=f"{name}: training loss", ylim=(0, None))
    size_axis.set(title="pool size of auto", xlabel="step", ylim=(0, None))
axes[0, 0].legend(frameon=False)
for axis in axes.flat:
    axis.spines[["top", "right"]].set_visible(False)
plt.show()

for (name, arm), values in scores.items():
    differences = 100 * (np.array(values) - scores[name, "uniform"])
    print(f"{name:11} {arm:12} {np.mean(values):.3f}   points against uniform batches, by seed: {differences.round(1)}")

# %% [markdown]
# For characters the loss of uniform batches falls below the target within three epochs. From then on auto makes pools
# larger, up to about ten batches, and the loss stays at the dotted line while that of uniform batches falls on. For
# digits the loss never comes near the target. Auto serves uniform batches throughout, and equals them to the last
# digit.
#
# The scores are of two seeds, and a point is six characters or four to five digits. For characters batches from all
# data and auto are a little ahead in both seeds. For digits batches from all data are about a point ahead in both
# seeds, in spite of the meter and of their false negatives. So the meter gives a place to start from, and no verdict:
# it cannot know what the measure that you care about rewards. In longer trainings on larger images, harder batches
# without labels lost: [When harder batches help](../docs/when-it-helps.md).
#
# ## Decide
#
# | uniform batches (first row of the meter) | the hardest negatives are | take |
# |---|---|---|
# | accuracy near 1, loss near zero | true, or in known groups | `"all"` with walks close to their start, or `"auto"` |
# | accuracy near 1, loss near zero | often false, unknown which | the same with `own_rule`, and the mask in the loss |
# | in between | mostly true | what `advise` says, or ten batches, the default |
# | accuracy low, or loss of one or more, at a temperature of about 0.1 or below | either | uniform batches |
#
# Then compare with uniform batches on held-out data, over some seeds. [Choosing settings](../docs/choosing.md) has the
# code for each kind of data. [When harder batches help](../docs/when-it-helps.md) has the measurements.
