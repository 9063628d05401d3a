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
# # Graphs: find functions of the same shape
#
# You have the source of some libraries, and one function in your hand. Which other functions do the same kind of work,
# whatever their variables are called? A syntax tree is a graph that has no variable names. GraphCL learns an embedding
# of graphs from graphs alone: a tree and a slightly damaged copy of it should be alike, and two different trees should
# not.
#
# The other trees of a batch are the negatives. Most random trees are easy to tell apart: this notebook composes
# batches of trees that look alike, shows them, and measures whether the search gets better. Here it does not, and the
# notebook shows how you could have known from the loss.

# %%
import ast
import csv
import importlib.util
import logging
import math
import tempfile
import warnings
from collections import Counter, deque
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from lightning import Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from scipy import stats
from torch_geometric.data import Data

from bs_lightning import BatchSamplerCallback, RWRComposer
from bs_lightning.metrics import in_batch_false_negative_rate, in_batch_hardness
from bs_lightning.recipes.graph_evaluation import represent
from bs_lightning.recipes.graphcl import GraphCL, GraphCLDataModule

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", module="lightning")
warnings.filterwarnings("ignore", message="BatchSamplerCallback composes no batch")  # as one run below intends
torch.set_num_threads(1)  # so small a model gains nothing by more
plt.rcParams.update({"figure.dpi": 90, "axes.spines.top": False, "axes.spines.right": False})

# %% [markdown]
# ## From source to graphs
#
# The data is the source of two installed packages, scikit-learn and PyTorch Geometric. Each function of 20 to 40 nodes
# is a graph. A node is a statement, an expression or an operator; its feature is which kind it is. Docstrings are left
# out, and so are constructors, which share a name whatever they do. Functions with exactly the same tree are kept
# once: as negatives they would be false for sure.


# %%
def functions(package):
    """Yield the functions of an installed package, as syntax trees."""
    folder = Path(importlib.util.find_spec(package).origin).parent
    for path in sorted(folder.rglob("*.py")):
        if "tests" not in path.parts:
            for node in ast.walk(ast.parse(path.read_text(encoding="utf8"))):
                if isinstance(node, ast.FunctionDef):
                    yield node


def kinds_and_parents(function):
    """Return each node's kind, and its parent's number. The function itself is node 0."""
    if ast.get_docstring(function):
        function.body = function.body[1:]
    kinds, parents, waiting = [], [], deque([(function, 0)])
    while waiting:
        node, parent = waiting.popleft()
        children = [child for child in ast.iter_child_nodes(node) if not isinstance(child, ast.expr_context)]
        waiting += [(child, len(kinds)) for child in children]
        kinds.append(type(node).__name__)
        parents.append(parent)
    return tuple(kinds), tuple(parents)


name_of = {}  # tree -> name of the first function that has it
for package in ("sklearn", "torch_geometric"):
    for function in functions(package):
        tree = kinds_and_parents(function)
        if function.name != "__init__" and 20 <= len(tree[0]) <= 40:
            name_of.setdefault(tree, function.name)

kinds = sorted({kind for tree_kinds, _ in name_of for kind in tree_kinds})


def as_graph(tree_kinds, parents):
    """Return a tree as a graph for PyTorch Geometric. Each edge has both directions."""
    features = F.one_hot(torch.tensor([kinds.index(kind) for kind in tree_kinds]), len(kinds))
    edges = torch.stack([torch.tensor(parents[1:]), torch.arange(1, len(parents))])
    return Data(x=features.float(), edge_index=torch.cat([edges, edges.flip(0)], dim=1))


trees = list(name_of)
graphs = [as_graph(*tree) for tree in trees]
names = list(name_of.values())
numbers = {name: number for number, name in enumerate(sorted(set(names)))}
labels = torch.tensor([numbers[name] for name in names])
print(f"{len(graphs)} functions, {len(numbers)} names, {len(kinds)} kinds of node")
print("most frequent names:", *(f"{name} ({n})" for name, n in Counter(names).most_common(6)))

# %% [markdown]
# The names are the labels, because functions of the same name mostly do the same kind of work: `fit`, `forward`,
# `__repr__`. They are not perfect. But training never sees them, and most functions have a name of their own. So there
# are many classes, and most negatives are true.
#
# ## DataModule
#
# The recipe's `GraphCLDataModule` serves pairs of a graph and a damaged copy of it. It embeds graphs as they are. The
# subclass adds the names, only to count false negatives.


# %%
class Functions(GraphCLDataModule):
    def train_labels(self):
        return labels


# %% [markdown]
# ## Fit
#
# Add the callback to the Trainer. Nothing else changes. By default it composes pools of ten batches, after one uniform
# epoch. The uniform run has the callback, too, but all its epochs are warm-up epochs. So the callback only logs how
# hard uniform batches are.

# %%
BATCH_SIZE, EPOCHS = 64, 4


def fit(seed, callback):
    """Return the trained model, and what was logged."""
    seed_everything(seed, verbose=False)
    trainer = Trainer(
        max_epochs=EPOCHS,
        callbacks=callback,
        logger=CSVLogger(tempfile.mkdtemp()),
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model = GraphCL(n_features=len(kinds))
    trainer.fit(model, datamodule=Functions(graphs, BATCH_SIZE))
    with open(f"{trainer.logger.log_dir}/metrics.csv") as file:
        return model, list(csv.DictReader(file))


uniform_model, uniform_log = fit(0, BatchSamplerCallback(warmup_epochs=EPOCHS))
walked_model, walked_log = fit(0, BatchSamplerCallback())

# %% [markdown]
# ## What is logged
#
# Look at the loss first. The dotted line is the loss of a model that has nothing left to learn from uniform batches:
# each copy equal to its graph, and all others at a right angle. Then look at how many negatives are false.

# %%
nothing_left = math.log(BATCH_SIZE - 1) - 1 / uniform_model.loss.temperature
panels = {
    "loss": "train/loss",
    "hardness": "batch_sampler/hardness",
    "false-negative rate": "batch_sampler/false_negative_rate",
}
figure, axes = plt.subplots(1, 3, figsize=(10, 3), layout="constrained")
for axis, (title, name) in zip(axes, panels.items(), strict=True):
    for arm, log, color in (("uniform", uniform_log, "tab:gray"), ("walked", walked_log, "tab:red")):
        axis.plot([float(row[name]) for row in log if row.get(name)], "o-", markersize=3, color=color, label=arm)
    axis.set_title(title)
    axis.set_xlabel("epoch")
    axis.set_xticks(range(EPOCHS))
axes[0].axhline(nothing_left, color="black", linestyle="dotted")
axes[0].legend(frameon=False)
axes[2].set_ylim(0)
plt.show()

# %% [markdown]
# Walked batches are harder from the second epoch on, and about two in a hundred of their negatives are false. But the
# loss of uniform batches is far above the dotted line. The model has much left to learn from easy batches.
#
# ## Batches, looked at
#
# What would a walked batch hold? The next cell composes one pool for the model that was trained on uniform batches. It
# takes the batch of median hardness, and a random batch to compare.

# %%
uniform_model.eval()
with torch.no_grad():
    embeddings = F.normalize(uniform_model.head(represent(uniform_model, graphs)), dim=1)

pool = torch.randperm(len(graphs), generator=torch.Generator().manual_seed(0))[: 10 * BATCH_SIZE]
walked = pool[RWRComposer()(embeddings[pool], BATCH_SIZE, seed=0, epoch=0)]
walked = sorted(walked, key=lambda batch: float(in_batch_hardness(embeddings[batch], labels[batch])))
shown = {"Uniform": pool[:BATCH_SIZE], "Walked": walked[len(walked) // 2]}


def draw(axis, parents):
    """Draw a tree: depth downwards, leaves side by side."""
    children = {node: [] for node in range(len(parents))}
    for node, parent in list(enumerate(parents))[1:]:
        children[parent].append(node)
    place, n_leaves = {}, 0

    def put(node, depth):
        nonlocal n_leaves
        for child in children[node]:
            put(child, depth + 1)
        x = np.mean([place[child][0] for child in children[node]]) if children[node] else n_leaves
        n_leaves += not children[node]
        place[node] = (x, -depth)

    put(0, 0)
    for node, parent in enumerate(parents):
        axis.plot(*zip(place[node], place[parent], strict=True), color="tab:gray", linewidth=0.8)
    axis.plot(*zip(*place.values(), strict=True), "o", markersize=2.5, color="tab:blue")
    axis.axis("off")


# %% [markdown]
# Six trees of each batch, in the order in which the walk found them. Look at their shapes, and at the names above
# them.

# %%
figure, axes = plt.subplots(2, 6, figsize=(10, 4), layout="constrained")
for row, (title, batch) in zip(axes, shown.items(), strict=True):
    for axis, index in zip(row, batch[:6].tolist(), strict=True):
        draw(axis, trees[index][1])
        axis.set_title(names[index][:18], fontsize=8)
    row[0].text(-0.15, 0.5, title, transform=row[0].transAxes, rotation=90, va="center", ha="right")
plt.show()

# %% [markdown]
# Both rows happen to begin with the same function. The trees of the walked batch are a little more alike, under
# different names. The likeness is loose: the model also compares kinds of nodes, which the drawing does not show.
#
# Now the similarities of all pairs in these two batches. Look at how far the true negatives move to the right, and
# whether you can see any orange.

# %%
figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), sharey=True, layout="constrained")
for axis, (title, batch) in zip(axes, shown.items(), strict=True):
    first, second = batch[torch.triu_indices(BATCH_SIZE, BATCH_SIZE, offset=1)]
    similarity = (embeddings[first] * embeddings[second]).sum(dim=1)
    same = labels[first] == labels[second]
    axis.hist([similarity[~same], similarity[same]], bins=np.linspace(-1, 1, 41), stacked=True)
    rate = in_batch_false_negative_rate(labels[batch])
    hardness = in_batch_hardness(embeddings[batch], labels[batch])
    axis.set_title(f"{title}: false negatives {rate:.0%}, hardness {hardness:z.2f}", fontsize=10)
    axis.set_xticks([-1, -0.5, 0, 0.5, 1])
    axis.set_xlabel("cosine similarity of a pair")
axes[0].set_ylabel("pairs")
legend = ["true negatives (different names)", "false negatives (same name)"]
figure.legend(legend, loc="outside lower center", ncols=2, frameon=False)
plt.show()

# %% [markdown]
# True negatives move to the right, and the orange part stays small. With so many names, hard negatives are mostly
# true. Compare this with the digits of the [vision notebook](vision.ipynb), where nearly half of them were false.
#
# ## Does the search get better?
#
# The metric is your search: which share of the functions has a nearest other function of the same name? It asks for
# the functions whose name at least ten of them have. The representations are sums over nodes, so each column is
# standardised first. Three seeds, and an untrained model to see what training is worth.

# %%
counts = labels.bincount()
queries = (counts[labels] >= 10).nonzero().flatten()


def search(model):
    """Return the share of the queries whose nearest other function has the same name, in percent."""
    found = represent(model, graphs)
    found = F.normalize((found - found.mean(dim=0)) / (found.std(dim=0) + 1e-6), dim=1)
    similarity = (found @ found.T).fill_diagonal_(-torch.inf)
    nearest = similarity[queries].argmax(dim=1)
    return 100 * float((labels[nearest] == labels[queries]).float().mean())


def untrained(seed):
    seed_everything(seed, verbose=False)
    return GraphCL(n_features=len(kinds))


SEEDS = range(3)
shares = {
    "untrained": [search(untrained(seed)) for seed in SEEDS],
    "uniform": [search(uniform_model), *(search(fit(seed, None)[0]) for seed in SEEDS[1:])],
    "walked": [search(walked_model), *(search(fit(seed, BatchSamplerCallback())[0]) for seed in SEEDS[1:])],
}

# %% [markdown]
# Each line is a seed: both of its runs begin with the same weights. Look at whether lines go up from "uniform" to
# "walked".

# %%
figure, axis = plt.subplots(figsize=(5, 3.2), layout="constrained")
axis.plot(list(shares), np.array(list(shares.values())), "o-")
axis.set_ylabel("nearest has the same name, %")
plt.show()

difference = np.subtract(shares["walked"], shares["uniform"])
reach = stats.t.ppf(0.975, len(difference) - 1) * stats.sem(difference)
print(f"{len(queries)} queries; " + ", ".join(f"{arm} {np.mean(values):.1f}%" for arm, values in shares.items()))
print(f"walked - uniform: {difference.mean():+.1f} ± {reach:.1f} points (95% interval)")

# %% [markdown]
# Training helps: both arms find more than the untrained model. Walked against uniform batches is a null result: the
# interval holds zero. The reason is not the false negatives, as with the digits. It is that uniform batches are not
# easy yet: their loss is far from where nothing is left to learn. A model that still learns from random trees has no
# use for harder ones.
#
# ## What to do with your graphs
#
# - Train with uniform batches first, and look at the loss late in training. GraphCL's public code trains for 20
#   epochs, and these few are not the last word.
# - `pool_size="auto"` decides by the loss when to compose. `GraphCLLoss` falls below 0, so give `GraphCL` the loss
#   `bs_lightning.losses.InfoNCELoss(temperature=0.2)`. For batches of 128 its least value is 0.6: give the callback a
#   `target_loss` a little above.
# - If your dataset may hold copies of a graph, drop them, or let `train_groups()` say which they are.
# - [Choosing settings](../docs/choosing.md) has the code for other kinds of data, and
#   [When harder batches help](../docs/when-it-helps.md) has the measurements.
