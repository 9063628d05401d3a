"""How hard the batches of every composer are, what they cost, and whether the paper's graph is what the paper says.

    python benchmarks/composers.py table --embeddings embeddings.npz
    python benchmarks/composers.py paper --embeddings embeddings.npz
    python benchmarks/composers.py escape --embeddings embeddings.npz
    python benchmarks/composers.py scale
    python benchmarks/composers.py plot

The file holds `z`, floats [N, d], and perhaps `y`, integers [N]. Each prints markdown and appends to a CSV file under
`--out`, of which `plot` draws the newest rows; without `--out` it is that of docs/composers.md's figures, which git
tracks. Needs `bs-lightning[baselines]` and matplotlib. `table` says in the end which rows say nothing about so few
instances. Its columns:

- graph, s and batches, s: for an epoch, compiling left out. Composers that do not tell them apart have all in the
  second. Pools leave out what does not fill a pool; their seconds are scaled up to all instances.
- FN: in-batch false-negative rate. TN: mean cosine similarity of true negatives (without labels: of all pairs).
- FN mass: the false negatives' share of a softmax over similarity / `--temperature`: what an InfoNCE loss feels.
- root: mean similarity of a batch's first instance (where walks are, a root) to the others.
- seen: share of the data in some batch of an epoch, but for what pools leave out.
- peak, MB: growth of the process while it composes; each row has a process of its own, as a peak never falls.
"""

import argparse
import csv
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from scipy.sparse import csr_matrix

from bs_lightning import ExactGraph, NNDescentGraph, RandomCandidateGraph, RWRComposer, rwr_batches
from bs_lightning.baselines import B3Composer, GCBSComposer, knn_batches, uniform_batches
from bs_lightning.metrics import InBatchFalseNegativeRate, InBatchHardness

SIZES = [10_000, 20_000, 50_000, 100_000, 200_000, 500_000, 1_280_000]
RESULTS = Path(__file__).parent / "results" / "composers"
BASE_SIZE = 50_000  # `scale` relates time per instance to that at this size


class Pooled:
    """A composer over a random permutation of the data, cut into pools; the remainder is left out."""

    def __init__(self, composer, pool_size):
        self.composer = composer
        self.pool_size = pool_size

    def __call__(self, embeddings, batch_size, *, seed, epoch):
        order = np.random.default_rng(seed).permutation(len(embeddings))
        pools = order[: len(order) // self.pool_size * self.pool_size].reshape(-1, self.pool_size)
        self.seconds = {"graph": 0.0, "walk": 0.0}
        batches = []
        for number, pool in enumerate(pools):
            batches.append(pool[self.composer(embeddings[pool], batch_size, seed=number, epoch=epoch)])
            for step, seconds in self.composer.seconds.items():
                self.seconds[step] += seconds
        return np.concatenate(batches)


def pools(size, n_roots=1):
    return Pooled(RWRComposer(NNDescentGraph(15), n_roots=n_roots), size)


def paper(m=1000, k=100, alpha=0.2, replacement=True):
    return RWRComposer(RandomCandidateGraph(m, k), alpha, replacement)


def table(batch_size):
    """The composers of `table` by family and label; pools are of whole batches, ten by default in this library."""
    ten = 10 * batch_size
    return {
        ("uniform", ""): uniform_batches,
        ("kNN sampler", ""): knn_batches,
        **{("GCBS, pairs", str(k)): GCBSComposer(k) for k in (10, 100)},
        **{("B3, skipped", str(n)): B3Composer(n_skipped=n) for n in (30, 0)},
        ("B3, communities of a batch, skipped", "30"): B3Composer(community_size=batch_size),
        **{("pools, P", str(size)): pools(size) for size in (4 * batch_size, ten, 2 * ten, 10 * ten)},
        **{("pools of ten batches, roots", str(n)): pools(ten, n) for n in (4, 16)},
        ("kNN graph, K", "100"): RWRComposer(ExactGraph(100), replacement=True),
        ("paper's graph", ""): paper(),
        ("paper's graph, each once", ""): paper(replacement=False),
        **{("paper's graph, M", str(m)): paper(m=m) for m in (100, 300, 3000)},
        **{("paper's graph, K", str(k)): paper(k=k) for k in (15, 30)},
        **{("paper's graph, alpha", str(alpha)): paper(alpha=alpha) for alpha in (0.05, 0.1, 0.5, 0.8)},
    }


def scaled(batch_size):
    """The families and labels of `scale`."""
    whole = [("uniform", ""), ("kNN sampler", ""), ("GCBS, pairs", "100"), ("B3, skipped", "30")]
    return [*whole, ("pools, P", str(10 * batch_size)), ("paper's graph", ""), ("kNN graph, K", "100")]


FAMILIES = list(dict.fromkeys(family for family, _ in table(256)))
SCALED = [family for family, _ in scaled(256)]
MARKERS = dict(zip(FAMILIES, "oXsDdPv^*<op>", strict=True))
LOOK = {family: (f"C{number % 10}", MARKERS[family]) for number, family in enumerate(FAMILIES)}  # in plots
LOOK["paper's graph"] = ("black", "*")


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("table", "paper", "escape", "scale", "plot"):
        command = commands.add_parser(name)
        command.add_argument("--out", type=Path, default=RESULTS, help="folder of CSV files and plots")
        if name != "plot":
            command.add_argument("--batch-size", type=int, default=256)
        if name in ("table", "paper", "escape"):
            command.add_argument("--embeddings", required=True, help="an .npz file with z [N, d] and perhaps y [N]")
            command.add_argument("--instances", type=int, help="use only the first")
    commands.choices["table"].add_argument("--temperature", type=float, default=0.5)
    commands.choices["table"].add_argument("--only", nargs="+", default=[], help="families of rows, or rows by name")
    commands.choices["paper"].add_argument("--repeats", type=int, default=5)
    commands.choices["escape"].add_argument("--share", type=float, default=0.1, help="of all instances, in a set")
    commands.choices["scale"].add_argument("--only", nargs="+", choices=SCALED, default=SCALED)
    commands.choices["scale"].add_argument("--largest", type=int, default=SIZES[-1])
    commands.choices["scale"].add_argument("--seconds", type=float, default=60, help="a composer stops after as many")
    args = parser.parse_args()
    if args.command != "plot" and args.batch_size < 2:
        parser.error(f"--batch-size must be at least 2, got {args.batch_size}. The docs' is 256.")
    return args


def load(args):
    """Normalised embeddings, and labels or None."""
    data = np.load(args.embeddings)
    z = torch.from_numpy(data["z"][: args.instances].astype(np.float32))
    others = 0 if args.command == "table" else 1000  # the candidates of the graphs of the other two
    least = max(2 * args.batch_size, others + 2)
    if len(z) < least:
        source = f"--embeddings {args.embeddings}" + (f" --instances {args.instances}" if args.instances else "")
        raise SystemExit(
            f"{source} has {len(z)} rows, but `{args.command}` needs {least}: two batches of "
            f"--batch-size {args.batch_size}{f' and more than {others} others' if others else ''}. "
            "Give more rows, or smaller batches."
        )
    y = torch.from_numpy(data["y"][: args.instances].astype(np.int64)) if "y" in data else None
    return torch.nn.functional.normalize(z, dim=1), y


def mixture(size, d=128, n_components=1000):
    """Normalised rows from a mixture of Gaussians."""
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(n_components, d, generator=generator)
    z = torch.randn(size, d, generator=generator)
    for block in z.split(10_000):
        block += means[torch.randint(n_components, (len(block),), generator=generator)]
        block /= block.norm(dim=1, keepdim=True)
    return z


def alone(function, *arguments):
    """Call in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as executor:
        return executor.submit(function, *arguments).result()


def compose(composer, z, batch_size):
    """Batches, seconds, and the growth of memory in bytes. Kernels are compiled before, on a small slice."""
    z = z[: len(z) // batch_size * batch_size]
    inner = getattr(composer, "composer", composer)  # pools may be larger than the slice
    few = max(4, 1024 // batch_size) * batch_size
    inner(z[: min(few, getattr(composer, "pool_size", few))], batch_size, seed=0, epoch=0)
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    start = time.perf_counter()
    batches = composer(z, batch_size, seed=0, epoch=0)
    return batches, time.perf_counter() - start, memory("VmHWM") - before


def memory(field):
    """The process's, now (VmRSS) or at its peak (VmHWM), in bytes; Linux."""
    status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[field].removesuffix("kB")) * 1024


def hardness(batches, z, y, temperature=0.5):
    """The columns FN, TN, FN mass and root."""
    fn, tn, mass, root = InBatchFalseNegativeRate(), InBatchHardness(), [], []
    for batch in batches:
        tn.update(z[batch], None if y is None else y[batch])
        similarity = z[batch] @ z[batch].T
        root.append(similarity[0, 1:].mean().item())
        if y is not None:
            fn.update(y[batch])
            felt = (similarity / temperature).fill_diagonal_(-torch.inf).softmax(dim=1)
            mass.append((felt * (y[batch][:, None] == y[batch])).sum(dim=1).mean().item())
    false, felt = ("", "") if y is None else (fn.compute().item(), float(np.mean(mass)))
    return {"FN": false, "TN": tn.compute().item(), "FN mass": felt, "root": float(np.mean(root))}


def name_of(family, label, batch_size):
    return f"{family} {label}".strip().replace("ten batches", str(10 * batch_size))


def too_few(composer, size):
    """Why a composer says nothing about so few instances; empty where it does."""
    pool = getattr(composer, "pool_size", size)
    graph = getattr(getattr(composer, "composer", composer), "graph", None)
    if pool > size:
        return f"a pool is larger than the data's whole batches, {size}"
    if getattr(graph, "n_candidates", 0) >= size - 1:
        return f"its graph of {graph.n_candidates} candidates would be the exact one of {size} instances"
    if getattr(graph, "n_neighbors", 0) >= pool - 1:
        return f"its graph of {graph.n_neighbors} neighbours would join all of {pool} instances"
    return ""


def table_row(family, label, args):
    z, y = load(args)
    composer = table(args.batch_size)[family, label]
    batches, seconds, growth = compose(composer, z, args.batch_size)
    steps = getattr(composer, "seconds", {"walk": seconds})
    to_all = len(z) / batches.size
    return {
        "composer": name_of(family, label, args.batch_size),
        "graph, s": steps["graph"] * to_all if "graph" in steps else "",
        "batches, s": steps["walk"] * to_all,
        **hardness(batches, z, y, args.temperature),
        "seen": len(np.unique(batches)) / batches.size,
        "peak, MB": round(growth / 2**20),
    }


def run_table(args):
    size = len(load(args)[0])
    composers = table(args.batch_size)
    names = {key: name_of(*key, args.batch_size) for key in composers}
    if unknown := set(args.only) - {*FAMILIES, *names.values()}:
        raise SystemExit(f"--only {sorted(unknown)}: no such rows. Give a row's name as printed, or of {FAMILIES}.")
    shown, skipped = 0, []
    for (family, label), composer in composers.items():
        name = names[family, label]
        if args.only and not {family, name} & set(args.only):
            continue
        why = too_few(composer, size // args.batch_size * args.batch_size)
        if not why:
            try:
                row = alone(table_row, family, label, args)
            except ValueError as error:
                why = error
        if why:
            skipped.append(f"- {name}: {why}")
            continue
        show(row, with_header=not shown)
        keep(args.out / "table.csv", {**row, "N": size, "family": family, "label": label})
        shown += 1
    if skipped:
        print("\nSkipped:", *skipped, sep="\n")
    if not shown:
        raise SystemExit(f"No row for {size} embeddings and --batch-size {args.batch_size}, see above.")


def gathered_graph(z, *, seed, n_candidates=1000, n_neighbors=100, n_blocks=20):
    """Gathers candidates drawn for each instance, in 20 blocks of rows, as the paper's public code does."""
    generator = torch.Generator().manual_seed(seed)
    neighbors = torch.empty(len(z), n_neighbors, dtype=torch.int64)
    for own in torch.arange(len(z)).chunk(n_blocks):
        candidates = torch.randint(len(z) - 1, (len(own), n_candidates), generator=generator)
        candidates += candidates >= own[:, None]  # never itself
        similarity = torch.bmm(z[candidates], z[own][:, :, None]).squeeze(2)
        neighbors[own] = candidates.gather(1, similarity.topk(n_neighbors, dim=1).indices)
    return neighbors.int().numpy()


def graph_row(neighbors, z, y, batch_size, seed):
    """What a graph is like, and an epoch's walks on it. Reach: distinct nodes that two edges lead to."""
    batches = rwr_batches(neighbors, batch_size, seed=seed, replacement=True)
    found = hardness(batches, z, y)
    into = np.bincount(neighbors.ravel(), minlength=len(z))
    nodes = np.random.default_rng(0).permutation(len(z))[:2000]
    return {
        "FN": found["FN"],
        "TN": found["TN"],
        "seen": len(np.unique(batches)) / len(z),
        "least in-degree": int(into.min()),
        "greatest in-degree": int(into.max()),
        "standard deviation of in-degrees": float(into.std()),
        "instances without in-edge": int((into == 0).sum()),
        "two-step reach": float(np.mean([len(np.unique(neighbors[neighbors[node]])) for node in nodes])),
    }


def run_paper(args):
    z, y = load(args)
    ways = {
        "RandomCandidateGraph": RandomCandidateGraph(1000, 100),
        "gathered": gathered_graph,
        "gathered, small blocks": partial(gathered_graph, n_blocks=len(z) // 32),  # the fastest size here
    }
    rows = {way: [] for way in ways}
    for build in ways.values():
        rwr_batches(build(z[:2048], seed=0), args.batch_size)  # compiles
    for seed in range(args.repeats):
        for way, build in ways.items():
            start = time.perf_counter()
            neighbors = build(z, seed=seed)
            seconds = time.perf_counter() - start
            rows[way].append({"seconds": seconds, **graph_row(neighbors, z, y, args.batch_size, seed)})
            keep(args.out / "paper.csv", {"graph": way, "N": len(z), "seed": seed, **rows[way][-1]})
    for measure, first in rows["gathered"][0].items():
        if first != "":
            row = {f"mean ± deviation of {args.repeats}": measure}
            fast, *slow = ([row[measure] for row in of_way] for of_way in rows.values())
            row |= {way: spread(values) for way, values in zip(ways, (fast, *slow), strict=True)}
            row["ratios"] = ", ".join(spread(np.divide(values, fast)) for values in slow) if all(fast) else ""
            show(row, with_header=measure == "seconds")


def run_escape(args, n_sets=20, n_steps=500):
    """How much of a walk leaves the set it starts in, against the bound of Andersen, Chung and Lang (FOCS 2006).

    Sets: what is most similar to an instance, `--share` of all. A step of a walk from a uniformly random member is in
    expectation outside the set with at most the probability conductance * (1 - alpha) / alpha. The bound is for the
    steps of one walk on a graph of equal degrees, lazy walks have half of it; batches hold distinct instances, more of
    which are far away, and the graph's in-degrees differ.
    """
    z, _ = load(args)
    neighbors = RandomCandidateGraph(1000, 100)(z, seed=0)
    n, k = neighbors.shape
    step = csr_matrix((np.full(n * k, 1 / k), neighbors.ravel(), np.arange(0, n * k + 1, k)), (n, n)).T.tocsr()
    centres = np.random.default_rng(0).choice(n, n_sets, replace=False)
    inside = np.zeros((n, n_sets))
    for column, centre in enumerate(centres):
        inside[(z @ z[centre]).topk(round(args.share * n)).indices, column] = 1
    where, outside = inside / inside.sum(axis=0), []
    for _ in range(n_steps):
        outside.append((where * (1 - inside)).sum(axis=0).mean())
        where = step @ where
    for alpha in (0.05, 0.1, 0.2, 0.5, 0.8):
        weights = alpha * (1 - alpha) ** np.arange(n_steps)  # of the number of steps since the last restart
        batches = rwr_batches(neighbors, args.batch_size, restart_probability=alpha, seed=0, replacement=True)
        from_inside = inside[batches[:, 0]]  # [number of batches, n_sets]
        left = 1 - inside[batches].mean(axis=1)
        row = {
            "alpha": alpha,
            "conductance": outside[1],
            "bound": outside[1] * (1 - alpha) / alpha,
            "steps outside": float(weights @ outside),
            "instances of batches outside": float((left * from_inside).sum() / from_inside.sum()),
        }
        show(row, with_header=alpha == 0.05)
        keep(args.out / "escape.csv", {"N": n, "share": args.share, **row})


def spread(values):
    return f"{np.mean(values):.4g}" + (f" ± {np.std(values, ddof=1):.2g}" if len(values) > 1 else "")


def scale_row(family, label, size, args):
    _, seconds, growth = compose(table(args.batch_size)[family, label], mixture(size), args.batch_size)
    name = name_of(family, label, args.batch_size)
    return {"composer": name, "N": size, "seconds": seconds, "peak, bytes per instance": round(growth / size)}


def run_scale(args):
    sizes = [size for size in SIZES if 10 * args.batch_size <= size <= args.largest]
    if not sizes:
        raise SystemExit(
            f"No N of {SIZES} is between ten batches of --batch-size {args.batch_size} and --largest {args.largest}: "
            "lower the one or raise the other."
        )
    print(f"Stops at the first N that takes more than {args.seconds:g} s; relative to N {BASE_SIZE}.\n")
    chosen = [each for each in scaled(args.batch_size) if each[0] in args.only]
    for family, label in chosen:
        rows = []
        for size in sizes:
            if not rows or rows[-1]["seconds"] <= args.seconds:
                rows.append(alone(scale_row, family, label, size, args))
                keep(args.out / "scale.csv", rows[-1])
        base = next((row["seconds"] / BASE_SIZE for row in rows if row["N"] == BASE_SIZE), None)
        for row in rows:
            row["time per instance, relative"] = row["seconds"] / row["N"] / base if base else ""
            show(row, with_header=(family, label) == chosen[0] and row is rows[0])


def show(row, with_header):
    """Print as markdown."""
    if with_header:
        print(f"| {' | '.join(row)} |\n{'|---' * len(row)}|")
    print(f"| {' | '.join(f'{v:.3f}' if isinstance(v, float) else str(v) for v in row.values())} |", flush=True)


def keep(path, row):
    """Append to a CSV file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, row, lineterminator="\n")
        if file.tell() == 0:
            writer.writeheader()
        writer.writerow(row)


def kept(path):
    """A CSV file's rows in the order of writing; the last of those with the same composer and N."""
    with path.open(newline="") as file:
        newest = {}
        for row in csv.DictReader(file):
            newest.pop((row["composer"], row["N"]), None)
            newest[row["composer"], row["N"]] = row
    return list(newest.values())


def run_plot(args):
    from matplotlib import pyplot as plt

    plt.switch_backend("Agg")
    undrawn = []
    for name, plot in (("table", plot_table), ("scale", plot_scale)):
        path = args.out / f"{name}.csv"
        rows = kept(path) if path.exists() else []
        if name == "table":
            rows = [row for row in rows if row["N"] == rows[-1]["N"] and row["FN"]]
        if rows:
            plot(rows, plt).savefig(path.with_suffix(".png"))
            print(path.with_suffix(".png"))
        elif path.exists():
            undrawn.append(f"No plot of FN against TN: {path} has no labelled rows. Give `table` an .npz file with y.")
        else:
            undrawn.append(f"No {path} to draw. Run `{name}` first, or give its folder as --out.")
    if len(undrawn) == 2:
        raise SystemExit("\n".join(undrawn))
    print(*undrawn, sep="\n", end="\n" if undrawn else "")


def plot_table(rows, plt):
    """FN against TN: every composer on the left, the paper's letters on the right, if there are any."""
    varied = [f"paper's graph, {letter}" for letter in ("M", "K", "alpha")]
    families_of = {
        f"every composer, N {rows[0]['N']}": [family for family in FAMILIES if family not in varied],
        "the paper's graph: M 1000, K 100, alpha 0.2, one of them varied": ["paper's graph", *varied],
    }
    rows_of = {title: [row for row in rows if row["family"] in of] for title, of in families_of.items()}
    titles = [title for title in rows_of if rows_of[title]]
    how = {"sharex": True, "sharey": True, "squeeze": False, "layout": "constrained"}
    figure, ((*panels,),) = plt.subplots(1, len(titles), figsize=(7 * len(titles), 8), **how)
    for axes, title in zip(panels, titles, strict=True):
        for family in FAMILIES:
            points = [(float(row["TN"]), float(row["FN"])) for row in rows_of[title] if row["family"] == family]
            if points:
                colour, marker = LOOK[family]
                axes.scatter(*zip(*points, strict=True), s=60, c=colour, marker=marker, label=family, zorder=2)
        axes.set(title=title, xlabel="TN: mean similarity of true negatives", ylabel="FN: false-negative rate")
        axes.legend(loc="upper left", frameon=False)
        axes.grid(alpha=0.3)
    figure.draw_without_rendering()  # settles where the points are
    for axes, title in zip(panels, titles, strict=True):
        label_points(axes, rows_of[title])
    return figure


def plot_scale(rows, plt):
    figure, axes = plt.subplots(figsize=(10, 6), layout="constrained")
    for family in SCALED:
        for name in dict.fromkeys(row["composer"] for row in rows if row["composer"].startswith(family)):
            line = sorted((int(row["N"]), float(row["seconds"])) for row in rows if row["composer"] == name)
            axes.loglog(*zip(*line, strict=True), c=LOOK[family][0], marker=LOOK[family][1], label=name)
    axes.set(xlabel="N", ylabel="seconds to compose an epoch")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    axes.grid(alpha=0.3)
    return figure


def label_points(axes, rows):
    """Write each point's setting beside it, on a side that is free."""
    places = axes.transData.transform([(float(row["TN"]), float(row["FN"])) for row in rows])
    taken = [(x, y, 10) for x, y in places]  # with half the width, in pixels
    for row, (x, y) in zip(rows, places, strict=True):
        half = 5 * len(row["label"])
        around = [(a * (12 + half), b * 20) for a, b in ((1, 0), (0, 1), (-1, 0), (0, -1), (1, -1), (-1, 1))]
        inside = [(x + a, y + b) for a, b in around if axes.bbox.contains(x + a - half, y + b - 5)]
        free = [(a, b) for a, b in inside if all(abs(a - c) > half + w or abs(b - d) > 14 for c, d, w in taken)]
        place = [*free, *inside][0]
        taken.append((*place, half))
        axes.text(*place, row["label"], ha="center", va="center", color=LOOK[row["family"]][0], transform=None)


def main():
    args = arguments()
    commands = {"table": run_table, "paper": run_paper, "escape": run_escape, "scale": run_scale, "plot": run_plot}
    commands[args.command](args)


if __name__ == "__main__":
    main()
