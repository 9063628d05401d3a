# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Images: what false negatives do
#
# You train SimCLR on images without labels. The other images of a batch are the negatives. Harder negatives teach
# more, as long as they are *true* negatives. But your images may fall into a few classes. Then the images that look
# most alike mostly show the same thing. As negatives they are *false*: the loss pushes apart what belongs together.
#
# This notebook is the tutorial of that case. It uses scikit-learn's handwritten digits, 1,797 images of ten classes.
# Here composed batches gain nothing, and mostly do harm. You will see how to notice it, what the cause is, and what to
# do. The [graphs notebook](graphs.ipynb) has data whose hard negatives are mostly true.

# %%
import warnings

warnings.filterwarnings("ignore", message="IProgress not found")  # about progress bars, on import

# %%
import csv
import logging
import tempfile

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from lightning import Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from scipy import stats
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import TensorDataset

from bs_lightning import BatchSamplerCallback, PlannedPool, Planning, PoolBatchSampler, Pools, RWRComposer
from bs_lightning.metrics import in_batch_false_negative_rate, in_batch_hardness
from bs_lightning.recipes.images import ImageData
from bs_lightning.recipes.simclr import SimCLR

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", module="lightning")
warnings.filterwarnings("ignore", message="BatchSamplerCallback composes no batch")  # as one run below intends
torch.set_num_threads(1)  # so small a model gains nothing by more
plt.rcParams.update({"figure.dpi": 90, "axes.spines.top": False, "axes.spines.right": False})

# %% [markdown]
# ## Images and views
#
# A quarter of the images is kept for the test. A view is turned, zoomed and shifted a little, and gets some noise. It
# is not mirrored, because a mirrored digit is a different sign.

# %%
pixels, digits = load_digits(return_X_y=True)
pixels = torch.tensor(pixels * 255 / 16).round().to(torch.uint8).reshape(-1, 8, 8)
digits = torch.tensor(digits)


def split(seed):
    """Return training images, test images, training labels, test labels."""
    return train_test_split(pixels, digits, test_size=0.25, stratify=digits, random_state=seed)


def augment(images):
    """Turn, zoom and shift each image at random, and add noise."""
    n = len(images)
    angle = torch.empty(n).uniform_(-0.3, 0.3)
    zoom = torch.empty(n, 1, 1).uniform_(0.8, 1.2)
    shift = torch.empty(n, 2, 1).uniform_(-0.25, 0.25)
    rotation = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], dim=1).reshape(n, 2, 2)
    grid = F.affine_grid(torch.cat([zoom * rotation, shift], dim=2), list(images.shape), align_corners=False)
    views = F.grid_sample(images, grid, align_corners=False)
    return views + 0.1 * torch.randn_like(views)


# %% [markdown]
# ## DataModule
#
# The recipe's `ImageData` is a `BatchSamplerDataModule` for images: two views of each image to train on, and the clean
# image to embed. The subclass adds the labels. Training never sees them. They only let the callback log how many
# negatives are false.


# %%
class Digits(ImageData):
    def train_labels(self):
        return self.train_images.tensors[1]


# %% [markdown]
# ## Model
#
# The recipe `SimCLR` takes any encoder that has a `num_features`. A small one will do.


# %%
def block(n_in, n_out, stride):
    return nn.Sequential(nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False), nn.BatchNorm2d(n_out), nn.ReLU())


class Encoder(nn.Sequential):
    num_features = 32

    def __init__(self):
        super().__init__(block(3, 16, 1), block(16, 32, 2), block(32, 32, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten())


# %% [markdown]
# ## Fit
#
# `BatchSamplerCallback("all")` composes batches from the whole dataset: the hardest batches. Its first epoch is
# uniform. Nothing else changes in your training. The uniform run below has the callback, too, but all its epochs are
# warm-up epochs. So the callback only logs how hard uniform batches are.
#
# `trainer.test` is the recipe's evaluation on the test images. `linear_probe` is the accuracy of a linear classifier
# on the frozen encoder, `knn` that of a vote of nearest neighbours.

# %%
BATCH_SIZE, EPOCHS = 64, 15
MEASURES = {"linear_probe": "linear probe", "knn": "nearest neighbours"}


def fit(seed, callback, data_class=Digits, masked=False):
    """Return the trained model, its accuracies on the test images in percent, and what was logged."""
    images, test_images, labels, test_labels = split(seed)
    train, test = TensorDataset(images, labels), TensorDataset(test_images, test_labels)
    seed_everything(seed, verbose=False)
    data = data_class(train, BATCH_SIZE, test=test, image_size=8, augment=augment)
    trainer = Trainer(
        max_epochs=EPOCHS,
        callbacks=callback,
        logger=CSVLogger(tempfile.mkdtemp()),
        log_every_n_steps=1,
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model = SimCLR(Encoder(), embedding_width=64, masked=masked)
    trainer.fit(model, datamodule=data)
    trainer.test(model, datamodule=data, verbose=False)
    accuracies = {name: round(100 * float(trainer.callback_metrics[f"test/{name}"]), 2) for name in MEASURES}
    with open(f"{trainer.logger.log_dir}/metrics.csv") as file:
        log = list(csv.DictReader(file))
    return model.eval(), accuracies, log


uniform_model, uniform_accuracies, uniform_log = fit(0, BatchSamplerCallback(warmup_epochs=EPOCHS))
walked_model, walked_accuracies, walked_log = fit(0, BatchSamplerCallback("all"))

print("uniform", uniform_accuracies)
print("walked ", walked_accuracies)

# %% [markdown]
# ## What is logged
#
# Look at the right panel first. The false-negative rate is the share of a batch's pairs that show the same digit. Then
# look at hardness, the mean cosine similarity of the *true* negatives.


# %%
def curve(log, name):
    """Return the epochs in which a value was logged, and its mean in each."""
    rows = np.array([(int(row["epoch"]), float(row[name])) for row in log if row.get(name)])
    epochs = np.unique(rows[:, 0])
    return epochs, [rows[rows[:, 0] == epoch, 1].mean() for epoch in epochs]


panels = {
    "loss": "train/loss",
    "hardness": "batch_sampler/hardness",
    "false-negative rate": "batch_sampler/false_negative_rate",
}
figure, axes = plt.subplots(1, 3, figsize=(10, 3), layout="constrained")
for axis, (title, name) in zip(axes, panels.items(), strict=True):
    axis.plot(*curve(uniform_log, name), color="tab:gray", label="uniform")
    axis.plot(*curve(walked_log, name), color="tab:red", label="walked")
    axis.set_title(title)
    axis.set_xlabel("epoch")
    axis.set_xticks(range(0, EPOCHS, 5))
axes[0].legend(frameon=False)
axes[2].set_ylim(0)
plt.show()

# %% [markdown]
# Nearly half of the negatives in a walked batch are false, and about one in ten in a uniform batch. The true negatives
# are much harder, too. Both begin with the second epoch, after the warm-up. The loss is no warning here. At this
# temperature, 0.5, it never comes near zero: with perfect views and all other images at a right angle it is still 2.9.
# The warning is the data: there are ten kinds of images, so many of the hardest negatives are false.
#
# ## Batches, looked at
#
# What would a walked batch hold? The next cells take one model, the one trained on uniform batches, and compose an
# epoch for it. Without Lightning, `PoolBatchSampler` cuts an epoch into pools, and any composer arranges them.

# %%
images, _, labels, _ = split(0)
with torch.no_grad():
    embeddings = F.normalize(uniform_model.embed(images[:, None].expand(-1, 3, -1, -1)), dim=1)
compose = RWRComposer()


def plan(indices, *, seed, epoch):
    return PlannedPool(compose(embeddings[indices], BATCH_SIZE, seed=seed, epoch=epoch))


def epoch_of_batches(pool_size, seed=0):
    """Return the batches of an epoch, [n, BATCH_SIZE]. Pools of one batch are uniform batches."""
    planning = Planning(plan, Pools(pool_size))
    return torch.tensor(list(PoolBatchSampler(len(images), BATCH_SIZE, planning=planning, seed=seed)))


def measure(batches):
    """Return the false-negative rate and the hardness."""
    rate = in_batch_false_negative_rate(labels[batches])
    return float(rate), float(in_batch_hardness(embeddings[batches], labels[batches]))


def of_median_hardness(batches):
    return sorted(batches, key=lambda batch: measure(batch)[1])[len(batches) // 2]


shown = {
    "Uniform": of_median_hardness(epoch_of_batches(BATCH_SIZE)),
    "Walked, pools of 256": of_median_hardness(epoch_of_batches(256)),
    "Walked, all data": of_median_hardness(epoch_of_batches(1344)),
}

# %% [markdown]
# Each panel is one batch, sorted by digit. Look at how many different digits it holds. It is the batch of median
# hardness: the first walks in a pool make harder batches than the last ones, which get the leftovers.

# %%
figure, axes = plt.subplots(1, 3, figsize=(10, 3.7), layout="constrained")
figure.get_layout_engine().set(wspace=0.08)
for axis, (name, batch) in zip(axes, shown.items(), strict=True):
    batch = batch[labels[batch].argsort(stable=True)]
    tiles = F.pad(images[batch], (1, 1, 1, 1)).unflatten(0, (8, 8))
    axis.imshow(tiles.transpose(1, 2).flatten(0, 1).flatten(1, 2), cmap="gray_r")
    axis.set_title(name)
    axis.axis("off")
plt.show()

# %% [markdown]
# The uniform batch holds every digit about equally often. The walked batches hold groups that look alike, and leave
# other digits out. The larger the pool, the fewer digits share a batch.
#
# The same batches as numbers: how alike are the pairs of a batch? Watch two things from left to right: how far the
# true negatives move to the right, and how much orange there is.

# %%
figure, axes = plt.subplots(1, 3, figsize=(10, 3.2), sharey=True, layout="constrained")
for axis, (name, batch) in zip(axes, shown.items(), strict=True):
    first, second = batch[torch.triu_indices(BATCH_SIZE, BATCH_SIZE, offset=1)]
    similarity = (embeddings[first] * embeddings[second]).sum(dim=1)
    same = labels[first] == labels[second]
    axis.hist([similarity[~same], similarity[same]], bins=np.linspace(-1, 1, 41), stacked=True)
    rate, hardness = measure(batch)
    axis.set_title(f"{name}\nfalse negatives {rate:.0%}, hardness {hardness:z.2f}", fontsize=10)
    axis.set_xlabel("cosine similarity of a pair")
axes[0].set_ylabel("pairs")
names = ["true negatives (different digits)", "false negatives (same digit)"]
figure.legend(names, loc="outside lower center", ncols=2, frameon=False)
plt.show()

# %% [markdown]
# True negatives move to the right: this is the purpose. The orange part grows much faster: this is the price. And the
# most similar pairs of all, which the loss pushes apart hardest, are nearly all false.
#
# ## How hard: `pool_size`
#
# In a larger pool a walk finds nearer neighbours. Each point is an epoch of batches, averaged over five seeds. Look at
# whether you can move to the right without moving up.

# %%
pool_sizes = [64, 128, 256, 448, 640, 1344]
points = [np.mean([measure(epoch_of_batches(size, seed)) for seed in range(5)], axis=0) for size in pool_sizes]
rates, hardness = np.array(points).T

figure, axis = plt.subplots(figsize=(6, 3.6), layout="constrained")
axis.plot(hardness, rates, "o-", color="tab:red")
for size, x, y in zip(pool_sizes, hardness, rates, strict=True):
    axis.annotate(f"{size:,}", (x, y), xytext=(-6, 4), textcoords="offset points", ha="right")
axis.set_title("Larger pools: harder negatives, more false ones")
axis.set_xlabel("hardness: mean similarity of true negatives")
axis.set_ylabel("false-negative rate")
axis.margins(x=0.1)
axis.set_ylim(0)
plt.show()

# %% [markdown]
# You cannot. `pool_size` chooses a point on a curve. A pool of one batch, 64 images, gives uniform batches. With few
# classes the curve is steep, because an image has many others of its own class near it.
#
# ## Do the false negatives do the harm?
#
# To find out, the next runs tell the model the truth: `train_groups` says which images show the same digit. Walks then
# take no edge between such images. With `masked=True` the loss leaves their pairs out. This uses the labels, so it is
# no method for unlabelled data. It is an experiment that shows what false negatives cost.
#
# Two remedies need no labels:
#
# - `mask_nearest=5` treats two images as a likely false negative if each is among the other's five nearest. The loss
#   leaves these pairs out.
# - `pool_size="auto"` begins with uniform batches. It composes only when their loss is next to zero.


# %%
class GroupedDigits(Digits):
    def train_groups(self):
        return self.train_labels()


SEEDS = range(3)
known = {"data_class": GroupedDigits, "masked": True}
accuracies = {
    "uniform": [uniform_accuracies, *(fit(seed, None)[1] for seed in SEEDS[1:])],
    "walked": [walked_accuracies, *(fit(seed, BatchSamplerCallback("all"))[1] for seed in SEEDS[1:])],
    "walked, mask_nearest": [fit(seed, BatchSamplerCallback("all", mask_nearest=5), masked=True)[1] for seed in SEEDS],
    "walked, true groups": [fit(seed, BatchSamplerCallback("all"), **known)[1] for seed in SEEDS],
    "uniform, true groups": [fit(seed, None, **known)[1] for seed in SEEDS],
}
_, auto_accuracies, auto_log = fit(0, BatchSamplerCallback("auto"))

# %% [markdown]
# With the same seed all arms have the same initial weights and the same test images. So the figure shows differences
# to uniform batches of the same seed. Look at "walked", and at what the true groups do to it.

# %%
others = list(accuracies)[1:]
figure, axes = plt.subplots(1, 2, figsize=(10, 3), sharey=True, layout="constrained")
for axis, (measure_name, title) in zip(axes, MEASURES.items(), strict=True):
    values = {name: np.array([run[measure_name] for run in runs]) for name, runs in accuracies.items()}
    print(f"{title}: uniform {values['uniform'].mean():.1f}%; differences in points, with a 95% interval")
    axis.axvline(0, color="tab:gray")
    for row, name in enumerate(others):
        difference = values[name] - values["uniform"]
        reach = stats.t.ppf(0.975, len(difference) - 1) * stats.sem(difference)
        print(f"  {name:22} {difference.mean():+5.1f} ± {reach:.1f}")
        axis.plot(difference, np.full(len(difference), row), "o", color="tab:red", alpha=0.5)
        axis.plot(difference.mean(), row, "|", color="black", markersize=18)
    axis.set_title(title)
    axis.set_xlabel("points against uniform batches")
axes[0].set_yticks(range(len(others)), others)
axes[0].invert_yaxis()
plt.show()

sizes = {float(row["batch_sampler/pool_size"]) for row in auto_log if row.get("batch_sampler/pool_size")}
print(f'"auto": pools of {sizes} images; as good as uniform with seed 0: {auto_accuracies == accuracies["uniform"][0]}')

# %% [markdown]
# - **Walked batches** lose in the linear probe: the interval lies below zero. Among nearest neighbours it holds zero.
# - **The true groups** turn this into a gain over uniform batches. So false negatives do the harm.
# - **Uniform batches with the true groups** gain as much. So what gains is the mask, not the harder batches: with the
#   false negatives gone, this small model still learns enough from random ones.
# - **`mask_nearest`** is no remedy here. It marks at most five pairs of an image. In a walked batch an image has
#   dozens of false negatives.
# - **`"auto"`** never composed a batch, because the loss stayed far above its target. Its accuracies are those of
#   uniform batches.
#
# ## What to do with data of few classes
#
# - Keep uniform batches, and try the loss `bs_lightning.losses.weighted`. `pool_size="auto"` composes nothing at this
#   temperature, unless its `target_loss` is above 2.9.
# - Tell the loss what you know. `train_groups()` may say which images are of one product, person, patient or video,
#   even if you know no classes.
# - If you have some labels, watch `batch_sampler/false_negative_rate` against `batch_sampler/hardness`, and choose
#   `pool_size` by them.
# - [Choosing settings](../docs/choosing.md) has the code for other kinds of data, and
#   [When harder batches help](../docs/when-it-helps.md) has the measurements.
