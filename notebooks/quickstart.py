# %% [markdown]
# # Quickstart: harder batches in two minutes
#
# You train two towers on pairs, as CLIP does: a picture and its name. The other names of the mini-batch are the
# negatives. After a while most of them are too easy: the model tells an Arabic letter from a Greek one at a glance, and
# what it confuses, É and È, is seldom in one batch. `bs-lightning` puts letters into one batch that the model confuses
# *at this moment*.
#
# The data: letters of DejaVu Sans, a font that comes with matplotlib, and their Unicode names. The model must then name
# letters of DejaVu Sans Mono, a font that it has never seen.

# %%
import logging
import unicodedata
import warnings
from functools import cache
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from lightning import LightningModule, Trainer, seed_everything
from matplotlib import get_data_path
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from torch.utils.data import TensorDataset

from bs_lightning import BatchSamplerCallback, BatchSamplerDataModule, RWRComposer
from bs_lightning.losses import info_nce
from bs_lightning.metrics import in_batch_accuracy, in_batch_hardness

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", module="lightning")
torch.set_num_threads(1)  # so small a model gains nothing by more

# %% [markdown]
# ## Data
#
# Letters that look the same, such as the Latin A and the Greek Alpha, would be false negatives. Only the first of them
# is kept.


# %%
def font_path(font):
    return Path(get_data_path(), "fonts/ttf", f"{font}.ttf")


@cache
def load_font(font, size):
    return ImageFont.truetype(font_path(font), size, layout_engine=ImageFont.Layout.BASIC)


def draw(letter, font, pixels=24):
    drawn = load_font(font, int(0.69 * pixels))
    picture = Image.new("L", (pixels, pixels))
    ImageDraw.Draw(picture).text((pixels // 2, 3 * pixels // 4), letter, fill=255, font=drawn, anchor="ms")
    return np.array(picture, dtype=np.float32) / 255


codes = [set(FT2Font(str(font_path(font))).get_charmap()) for font in ("DejaVuSans", "DejaVuSans-Oblique")]
letters = [chr(code) for code in sorted(codes[0] & codes[1]) if unicodedata.category(chr(code)).startswith("L")]
unique = {}
for letter in letters:
    unique.setdefault(draw(letter, "DejaVuSans").tobytes(), letter)
letters = list(unique.values())
upright, oblique = (
    torch.tensor(np.stack([draw(letter, font) for letter in letters])) for font in ("DejaVuSans", "DejaVuSans-Oblique")
)

names = [unicodedata.name(letter).replace("-", " ").split() for letter in letters]
numbers = {word: number for number, word in enumerate(sorted({word for name in names for word in name}), start=1)}
words = [torch.tensor([numbers[word] for word in name]) for name in names]
words = nn.utils.rnn.pad_sequence(words, batch_first=True)
print(f"{len(letters)} letters, such as {letters[300]}: {' '.join(names[300])}")

# %% [markdown]
# ## Model
#
# An ordinary Lightning module. The one thing to add is `embed`: it returns what the loss compares, here both sides.


# %%
class CLIP(LightningModule):
    def __init__(self):
        super().__init__()
        self.picture_tower = nn.Sequential(nn.Flatten(), nn.Linear(24 * 24, 512), nn.ReLU(), nn.Linear(512, 128))
        self.words = nn.EmbeddingBag(len(numbers) + 1, 128, padding_idx=0)
        self.losses = []

    def embed(self, batch):
        pictures, words = batch
        return self.picture_tower(pictures), self.words(words)

    def training_step(self, batch, batch_idx):
        upright, oblique, words = batch
        leaning = torch.rand(len(words), 1, 1) < 0.5
        loss = info_nce(*self.embed((torch.where(leaning, oblique, upright), words)), temperature=0.1)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=8e-3)


# %% [markdown]
# ## Two additions
#
# Subclass the DataModule, and add the callback. `train_dataset` is what you train on, `pool_dataset` is what the
# callback embeds.


# %%
class Data(BatchSamplerDataModule):
    def train_dataset(self):
        return TensorDataset(upright, oblique, words)

    def pool_dataset(self):
        return TensorDataset(upright, words)


def train(*callbacks):
    seed_everything(0, verbose=False)
    model = CLIP()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(max_epochs=12, callbacks=list(callbacks), accelerator="cpu", enable_model_summary=False, **quiet)
    trainer.fit(model, datamodule=Data(batch_size=64))
    return model.eval()


uniform = train()
walked = train(BatchSamplerCallback(pool_size="all"))

# %% [markdown]
# ## What changed: the batches
#
# A uniform batch and a walked batch, both as the uniform model would get them now. Letters are sorted by code point.

# %%
with torch.no_grad():
    embeddings = F.normalize(torch.stack(uniform.embed((upright, words)), dim=1), dim=2)
pool = torch.randperm(len(letters), generator=torch.Generator().manual_seed(0))[: len(letters) // 64 * 64]
plan = pool[torch.from_numpy(RWRComposer()(embeddings[pool], 64, seed=0, epoch=0))]
batches = {"uniform": pool[:64], "walked": plan[len(plan) // 2]}

figure, axes = plt.subplots(1, 2, figsize=(9, 4.6), layout="constrained")
for axis, (name, batch) in zip(axes, batches.items(), strict=True):
    tiles = torch.tensor(np.stack([draw(letters[index], "DejaVuSans", 80) for index in batch.sort().values]))
    axis.imshow(tiles.unflatten(0, (8, 8)).transpose(1, 2).flatten(0, 1).flatten(1, 2), cmap="gray_r")
    accuracy, hardness = in_batch_accuracy(embeddings[batch]), in_batch_hardness(embeddings[batch][None])
    axis.set_title(f"{name}: hardness {hardness:.2f}, in-batch accuracy {accuracy:.0%}")
    axis.set(xticks=[], yticks=[])

# %% [markdown]
# Hardness is the mean similarity of a picture and another letter's name. In-batch accuracy is the share of pictures
# whose own name is the most similar.

# %%
figure, axes = plt.subplots(1, 2, figsize=(9, 2.8), sharey=True, layout="constrained")
for axis, (name, batch) in zip(axes, batches.items(), strict=True):
    similarity = embeddings[batch, 0] @ embeddings[batch, 1].T
    for kind, own in (("negatives", False), ("positives", True)):
        values = similarity[torch.eye(64, dtype=torch.bool) == own]
        axis.hist(
            values, np.linspace(-1, 1, 41), weights=torch.full_like(values, 1 / len(values)), alpha=0.6, label=kind
        )
    axis.set(title=name, xlabel="cosine similarity")
axes[0].set_ylabel("share")
_ = axes[1].legend(frameon=False)
# %% [markdown]
# ## What changed: the model
#
# The share of letters of DejaVu Sans Mono whose own name comes first among the names of all letters.

# %%
mono = set(FT2Font(str(font_path("DejaVuSansMono"))).get_charmap())
unseen = torch.tensor([index for index, letter in enumerate(letters) if ord(letter) in mono])
pictures = torch.tensor(np.stack([draw(letters[index], "DejaVuSansMono") for index in unseen]))
for name, model in (("uniform", uniform), ("walked", walked)):
    with torch.no_grad():
        found, every_name = (F.normalize(side, dim=1) for side in (model.picture_tower(pictures), model.words(words)))
    recall = ((found @ every_name.T).argmax(dim=1) == unseen).float().mean()
    last = np.mean(model.losses[-(len(letters) // 64) :])
    print(f"{name}: recall at 1 {recall:.1%}, loss in the last epoch {last:.2f}")

# %% [markdown]
# The loss of walked batches is higher, because their negatives are harder. The recall is what counts. One run says
# little: `make demo` compares five seeds on a font that no setting was chosen on.
#
# ## Next
#
# Harder batches pay where hard negatives are true ones, as here. Where they are often false, as in ten digits, they
# cost. `encode_every=4` embeds the data once in four epochs, which saves most of what composing costs.
# [When harder batches help](../docs/when-it-helps.md) says what was measured, and
# [Choosing settings](../docs/choosing.md) says what to write.
