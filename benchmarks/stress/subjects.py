"""The functions that ``pure`` calls: how to draw their arguments, and what they promise."""

import io
import math
import random
from collections.abc import Callable
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from bs_lightning import (
    ExactGraph,
    PlannedPool,
    Planning,
    PoolBatchSampler,
    Pools,
    RandomCandidateGraph,
    RWRComposer,
    WholeData,
    encode,
    rwr_batches,
)
from bs_lightning.baselines import B3Composer, ClusterComposer, GCBSComposer, knn_batches, uniform_batches
from bs_lightning.layout import BatchLayout
from bs_lightning.mask import mutual_nearest, pair_mask
from bs_lightning.metrics import (
    Alignment,
    InBatchFalseNegativeRate,
    InBatchHardness,
    Uniformity,
    alignment,
    in_batch_false_negative_rate,
    in_batch_hardness,
    uniformity,
)
from bs_lightning.plan import EpochPlan
from bs_lightning.schedules import LinearDecay, Staircase
from bs_lightning.state import SamplerState

Arguments = dict[str, Any]


class Case(NamedTuple):
    """A call to make, and how to check what it returns."""

    call: Callable[..., Any]
    arguments: Arguments
    valid: bool
    """Whether the call must not be refused."""
    check: Callable[..., None]
    """Called with the result and the arguments. Raises an exception if the result is not as promised."""


def expect(condition: object, words: str) -> None:
    """Raise an error if a promise is broken."""
    if not condition:
        raise AssertionError(words)


def _scalars() -> list[Any]:
    """Return numbers of all types, and what is no number."""
    return [
        None, True, False, -1, 0, 1, 2, 7, 2.5, -0.1, 1e-320, math.nan, math.inf, -math.inf, 1j, Fraction(1, 3),
        2**31, 2**63, 2**64, 10**30, -(10**30), "", "x", "3", b"3", [], [1], (), {}, object(), int, abs,
        np.int64(3), np.uint8(200), np.int8(-1), np.float32(0.1), np.float64("nan"), np.bool_(True), np.array(3),
        np.array([1, 2]), torch.tensor(3), torch.tensor(2.5), torch.zeros(0),
    ]  # fmt: skip


class Draw(random.Random):
    """Draws arguments."""

    def numpy(self) -> np.random.Generator:
        return np.random.default_rng(self.getrandbits(32))

    def seed_(self) -> Any:
        return self.choice([0, 1, self.getrandbits(31), 2**40, np.int64(5), np.uint8(200)])

    def spoiled(self, arguments: Arguments) -> tuple[Arguments, bool]:
        """Replace some arguments by wrong ones, in half of the cases. Return whether all are valid still."""
        if self.random() < 0.5:
            return arguments, True
        for name in self.sample(list(arguments), min(len(arguments), self.choice([1, 1, 2]))):
            value = arguments[name]
            if isinstance(value, np.ndarray | torch.Tensor) and self.random() < 0.9:
                arguments[name] = self.bent(value)
            elif isinstance(value, bool):
                arguments[name] = self.choice([None, 0, 1, "x", np.bool_(True)])  # a flag is what Python takes for true
            else:
                junk = self.choice(_scalars())
                # Memory for so many instances is not there, and nobody promises it.
                too_much = name == "n_instances" and isinstance(junk, int) and junk > 10**6
                arguments[name] = value if too_much else junk
        return arguments, False

    def bent(self, value: Any) -> Any:
        """Change the type, the shape or an entry of an array or tensor."""
        array: NDArray[Any] = value.detach().float().numpy() if isinstance(value, torch.Tensor) else value
        array = array.copy()
        kind = self.choice(["entry"] * 3 + ["dtype"] * 2 + ["shape"] * 2 + ["container"] * 2)
        if kind == "entry" and array.size:
            wrong: list[float] = [math.nan, math.inf, 1e38, 1e-40, 0.0]
            if array.dtype.kind in "iu":
                wrong = [0, len(array) % 100, 100, -1 if array.dtype.kind == "i" else 0]
            array.flat[self.randrange(array.size)] = self.choice(wrong)
        elif kind == "dtype":
            names = ["bool", "int8", "uint8", "int32", "int64", "uint64", "float16", "float32", "float64", "complex64"]
            array = array.astype(self.choice([*names, "object", "str", ">i4", ">f4"]))
        elif kind == "shape":
            shapes = [array.ravel(), array[None], array[:0], array[:1], array[..., :0], array[..., :1], array[::-1]]
            array = self.choice([*shapes, array.reshape(-1)[:1].reshape(())] if array.size else shapes)
        elif kind == "container":
            rows = array.tolist()
            masked: Any = np.ma.masked_array(array)
            return self.choice(
                [
                    rows,
                    [*rows, [1]],
                    [*rows[:-1], []],
                    tuple(rows),
                    masked,
                    _tensor(array.astype("float32")).to_sparse(),
                    {},
                ]
            )
        return self.choice([array, _tensor(array)])

    def embeddings(self, size: int, *, batches: int | None = None) -> Any:
        """Draw valid embeddings ``[size, d]``: of all sizes of numbers, with zero rows and equal rows."""
        shape = [size, self.randint(1, 12)] if batches is None else [batches, size, self.randint(1, 12)]
        x = torch.from_numpy(self.numpy().normal(size=shape)).float()
        if self.random() < 0.3:
            x[..., self.randrange(size), :] = 0
        if self.random() < 0.3:
            x[..., : self.randint(1, size), :] = x[..., :1, :]
        x = x * self.choice([1, 1, 1, 1e-20, 1e-38, 1e30, 0])
        form = self.choice(["float32"] * 4 + ["float64", "float16", "bfloat16", "numpy", "gradient", "view"])
        if form in ("float64", "float16", "bfloat16"):
            cast = x.to(getattr(torch, form))
            return cast if cast.isfinite().all() else x
        if form == "numpy":
            return x.numpy()
        if form == "gradient":
            return x.requires_grad_()
        return x.repeat_interleave(2, dim=-1)[..., ::2] if form == "view" else x

    def graph(self, size: int) -> NDArray[Any]:
        """Draw a neighbour graph; an entry may be its own row."""
        shape = (size, self.randint(1, 8))
        graph = self.numpy().integers(0, size, size=shape)
        if self.random() < 0.2:
            graph[:] = np.arange(size)[:, None]  # no edges
        return graph.astype(self.choice(["int32", "int64", "uint16"]))

    def size(self, batch_size: int) -> int:
        """Draw the size of a pool."""
        return max(2, batch_size * self.randint(1, 80 // batch_size))


def _tensor(array: NDArray[Any]) -> torch.Tensor:
    try:
        return torch.from_numpy(np.ascontiguousarray(array))
    except (TypeError, ValueError):  # not a dtype of torch
        return torch.zeros(array.shape, dtype=torch.complex64)


def _floats(values: Any) -> NDArray[np.float64]:
    """Return embeddings as the library sees them, in float32, with the precision of float64."""
    tensor = (
        values if isinstance(values, torch.Tensor) else torch.from_numpy(np.array(values, dtype=np.float32, order="C"))
    )
    return tensor.detach().float().double().numpy()


def _unit(values: Any) -> NDArray[np.float64]:
    """Return rows of length 1; zero rows stay zero."""
    x = _floats(values)
    x = x / np.maximum(np.abs(x).max(axis=-1, keepdims=True), 1e-300)
    unit: NDArray[np.float64] = x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-300)
    return unit


def _check_batches(batches: Any, size: int, batch_size: int, *, replacement: bool = False) -> None:
    """Check that batches use each position of a pool once."""
    expect(isinstance(batches, np.ndarray) and batches.dtype == np.int64, "batches must be int64")
    expect(batches.shape == (size // batch_size, batch_size), f"batches have shape {batches.shape}")
    expect(batches.min() >= 0 and batches.max() < size, "positions must lie in the pool")
    for row in batches if replacement else [batches.ravel()]:
        expect(len(np.unique(row)) == row.size, "a position comes twice")
    if not replacement and size % batch_size == 0:
        expect(batches.size == size, "a position is lost")


# Walks, masks and graphs


def draw_rwr_batches(draw: Draw) -> Case:
    size = draw.randint(1, 60)
    batch_size = draw.randint(1, size)
    arguments = {
        "neighbors": draw.graph(size),
        "batch_size": batch_size,
        "restart_probability": draw.choice([0.2, 1, 1e-6, draw.random() or 0.5]),
        "n_roots": draw.randint(1, batch_size),
        "seed": draw.seed_(),
        "replacement": draw.random() < 0.5,
    }

    def check(
        batches: Any, neighbors: Any, batch_size: Any, restart_probability: Any, replacement: Any, **_: Any
    ) -> None:
        expect(0 < restart_probability <= 1, "a restart probability out of range was accepted")
        _check_batches(batches, len(neighbors), int(batch_size), replacement=bool(replacement))

    return Case(rwr_batches, *draw.spoiled(arguments), check)


def draw_mutual_nearest(draw: Draw) -> Case:
    arguments = {"neighbors": draw.graph(draw.randint(1, 30)), "n_nearest": draw.randint(1, 9)}

    def check(pairs: Any, neighbors: Any, n_nearest: Any) -> None:
        near = [set(map(int, row[: int(n_nearest)])) for row in np.asarray(neighbors)]
        mutual = {(i, j) for i in range(len(near)) for j in near[i] if i != j and i in near[j]}
        expect(pairs.dtype == np.int64 and pairs.ndim == 2 and pairs.shape[1] == 2, "pairs must be int64 [m, 2]")
        expect(len(pairs) == len(mutual) and set(map(tuple, pairs.tolist())) == mutual, f"pairs must be {mutual}")

    return Case(mutual_nearest, *draw.spoiled(arguments), check)


def draw_pair_mask(draw: Draw) -> Case:
    n_instances = draw.randint(2, 40)
    batch = draw.numpy().permutation(n_instances)[: draw.randint(0, n_instances)]
    pairs = draw.numpy().integers(0, n_instances, size=(draw.randint(0, 40), 2))

    def check(mask: Any, pairs: Any, batch: Any) -> None:
        listed = {tuple(map(int, pair)) for pair in np.asarray(pairs).reshape(-1, 2)}
        members = [int(each) for each in np.asarray(batch)]
        expected = [[a != b and (a, b) in listed for b in members] for a in members]
        expect(mask.dtype == torch.bool and mask.shape == (len(members), len(members)), "the mask must be bool [B, B]")
        expect(mask.tolist() == expected, f"the mask must be {expected}")

    return Case(pair_mask, *draw.spoiled({"pairs": pairs, "batch": batch}), check)


def _check_graph(neighbors: Any, embeddings: Any, n_neighbors: int, *, exact: bool) -> None:
    x = _unit(embeddings)
    size, k = len(x), min(n_neighbors, len(x) - 1)
    expect(neighbors.dtype == np.int32 and neighbors.shape == (size, k), f"the graph has shape {neighbors.shape}")
    expect(neighbors.min() >= 0 and neighbors.max() < size, "neighbours must lie in the pool")
    expect((neighbors != np.arange(size)[:, None]).all(), "an instance is its own neighbour")
    real: NDArray[np.bool_] = (x != 0).any(axis=1)
    if not exact and not real.all():
        return  # what candidates an instance had is not known
    known = min(k, int(real.sum()) - 1) if exact else k
    head = neighbors[real][:, : max(0, known)]
    expect(real[head].all(), "an all-zero row is a neighbour before others")
    expect(all(len(set(row)) == len(row) for row in head.tolist()), "a neighbour comes twice")
    similarity = (x @ x.T)[real]
    found = np.take_along_axis(similarity, head.astype(np.int64), axis=1)
    expect((np.diff(found, axis=1) < 1e-5).all(), "the nearest must come first")
    if exact:
        similarity[np.arange(len(similarity)), np.flatnonzero(real)] = -np.inf
        best = -np.sort(-similarity[:, real], axis=1)[:, : head.shape[1]]
        expect(np.allclose(found, best, atol=1e-5), "these are not the nearest")


def draw_exact_graph(draw: Draw) -> Case:
    arguments = {
        "n_neighbors": draw.randint(1, 20),
        "embeddings": draw.embeddings(draw.randint(2, 60)),
        "seed": draw.seed_(),
    }

    def call(n_neighbors: Any, embeddings: Any, seed: Any) -> Any:
        return ExactGraph(n_neighbors)(embeddings, seed=seed)

    def check(neighbors: Any, n_neighbors: Any, embeddings: Any, **_: Any) -> None:
        _check_graph(neighbors, embeddings, int(n_neighbors), exact=True)

    return Case(call, *draw.spoiled(arguments), check)


def draw_random_candidate_graph(draw: Draw) -> Case:
    n_neighbors = draw.randint(1, 10)
    arguments = {
        "n_candidates": draw.randint(n_neighbors, 50),
        "n_neighbors": n_neighbors,
        "embeddings": draw.embeddings(draw.randint(2, 120)),
        "seed": draw.seed_(),
    }

    def call(n_candidates: Any, n_neighbors: Any, embeddings: Any, seed: Any) -> Any:
        return RandomCandidateGraph(n_candidates, n_neighbors)(embeddings, seed=seed)

    def check(neighbors: Any, n_candidates: Any, n_neighbors: Any, embeddings: Any, **_: Any) -> None:
        exact = int(n_candidates) >= len(embeddings) - 1
        _check_graph(neighbors, embeddings, int(n_neighbors), exact=exact)

    return Case(call, *draw.spoiled(arguments), check)


# Composers


def _composer_arguments(draw: Draw) -> Arguments:
    batch_size = draw.randint(1, 16)
    embeddings = draw.embeddings(draw.size(batch_size))
    batch_size = 1 if len(embeddings) % batch_size else batch_size
    return {"embeddings": embeddings, "batch_size": batch_size, "seed": draw.seed_(), "epoch": draw.randint(0, 100)}


def draw_rwr_composer(draw: Draw) -> Case:
    arguments = _composer_arguments(draw)
    schedules = [0.2, 1.0, lambda epoch: 0.5, LinearDecay(n_epochs=10), Staircase()]
    arguments |= {
        "graph": draw.choice([ExactGraph(draw.randint(1, 9)), RandomCandidateGraph(9, draw.randint(1, 9))]),
        "restart_probability": draw.choice(schedules),
        "replacement": draw.random() < 0.5,
        "n_roots": draw.randint(1, arguments["batch_size"]),
    }
    arguments, valid = draw.spoiled(arguments)
    if arguments["graph"] is None or arguments["graph"] is abs:
        arguments["graph"] = ExactGraph()  # `None` is pynndescent, which compiles for half a minute; `abs` is no graph

    def call(embeddings: Any, batch_size: Any, seed: Any, epoch: Any, **options: Any) -> Any:
        return RWRComposer(**options)(embeddings, batch_size, seed=seed, epoch=epoch)

    def check(batches: Any, embeddings: Any, batch_size: Any, replacement: Any, **_: Any) -> None:
        _check_batches(batches, len(embeddings), int(batch_size), replacement=bool(replacement))

    return Case(call, arguments, valid, check)


def _check_composed(batches: Any, embeddings: Any, batch_size: Any, **_: Any) -> None:
    _check_batches(batches, len(embeddings), int(batch_size))


def draw_uniform_batches(draw: Draw) -> Case:
    return Case(uniform_batches, *draw.spoiled(_composer_arguments(draw)), _check_composed)


def draw_knn_batches(draw: Draw) -> Case:
    return Case(knn_batches, *draw.spoiled(_composer_arguments(draw)), _check_composed)


def draw_gcbs(draw: Draw) -> Case:
    arguments = _composer_arguments(draw) | {"n_neighbors": draw.randint(1, 15)}
    fits = arguments["n_neighbors"] < len(arguments["embeddings"]) - 1
    arguments, valid = draw.spoiled(arguments)

    def call(n_neighbors: Any, **arguments: Any) -> Any:
        return GCBSComposer(n_neighbors)(**arguments)

    return Case(call, arguments, valid and fits, _check_composed)


def draw_b3(draw: Draw) -> Case:
    options = {
        "n_skipped": draw.randint(0, 10),
        "n_neighbors": draw.randint(1, 20),
        "community_size": draw.randint(1, 20),
    }
    arguments = _composer_arguments(draw) | options
    size = len(arguments["embeddings"])
    fits = options["n_skipped"] + options["n_neighbors"] < size - 1 and size // options["community_size"] > 1
    arguments, valid = draw.spoiled(arguments)

    def call(n_skipped: Any, n_neighbors: Any, community_size: Any, **arguments: Any) -> Any:
        return B3Composer(n_skipped, n_neighbors, community_size)(**arguments)

    return Case(call, arguments, valid and fits, _check_composed)


def draw_clusters(draw: Draw) -> Case:
    arguments = _composer_arguments(draw) | {"cluster_size": draw.randint(1, 20)}
    size, batch_size = len(arguments["embeddings"]), arguments["batch_size"]
    fits = size > arguments["cluster_size"] or size == batch_size
    packing: Any = draw.choice(["random", "greedy"])
    arguments, valid = draw.spoiled(arguments)

    def call(cluster_size: Any, **arguments: Any) -> Any:
        return ClusterComposer(cluster_size, packing)(**arguments)

    return Case(call, arguments, valid and fits, _check_composed)


# Plans, samplers and their state


def _planning(draw: Draw, layout: BatchLayout) -> Planning | None:
    """Draw a planner that shuffles its pool."""
    size = layout.global_batch_size
    kind = draw.choice(["none", "pools", "pools", "whole"])
    if kind == "none":
        return None

    def shuffle(indices: NDArray[np.int64], *, seed: int, epoch: int) -> PlannedPool:
        shuffled = np.random.default_rng([seed, epoch]).permutation(len(indices))
        batches = shuffled[: len(indices) // size * size].reshape(-1, size)  # `size` may not be the sampler's
        return PlannedPool(batches, batches[:, :2])

    if kind == "whole":
        return Planning(shuffle, WholeData(draw.randint(1, layout.n_full + 2)), replacement=True)
    return Planning(shuffle, Pools(draw.randint(size, layout.n_instances + size)))


def _layout(draw: Draw) -> Arguments:
    batch_size, world_size = draw.randint(2, 8), draw.randint(1, 3)
    n_instances = draw.randint(batch_size * world_size, 150)
    drop_last = 0 < n_instances % (batch_size * world_size) < 2 * world_size or draw.random() < 0.5
    return {"n_instances": n_instances, "batch_size": batch_size, "world_size": world_size, "drop_last": drop_last}


def _flat(batches: list[Any]) -> list[int]:
    return [int(index) for batch in batches for index in batch]


def draw_epoch_plan(draw: Draw) -> Case:
    layout = BatchLayout(**_layout(draw))
    start = draw.randint(0, layout.n_batches)
    stop = draw.choice([None, draw.randint(start, layout.n_batches + 3)])
    arguments = {"layout": layout, "planning": _planning(draw, layout), "start": start, "stop": stop}
    arguments |= {"seed": draw.seed_(), "epoch": draw.randint(0, 9)}

    def call(**arguments: Any) -> Any:
        return [batch.tolist() for pool in EpochPlan(**arguments) for batch in pool]

    def check(
        batches: Any, layout: BatchLayout, planning: Planning | None, start: int, stop: int | None, **_: Any
    ) -> None:
        end = layout.n_batches if stop is None else min(stop, layout.n_batches)
        sizes = ([layout.global_batch_size] * layout.n_full + [layout.n_last])[start:end]
        expect([len(batch) for batch in batches] == sizes, f"batches must have the sizes {sizes}")
        once = batches if planning is not None and planning.replacement else [_flat(batches)]
        expect(all(len(set(each)) == len(each) for each in once), "an instance comes twice")

    return Case(call, arguments, True, check)


def draw_pool_batch_sampler(draw: Draw) -> Case:
    arguments = _layout(draw)
    layout = BatchLayout(**arguments)
    arguments |= {"seed": draw.seed_(), "planning": _planning(draw, layout), "epoch": draw.choice([0, 1, np.int64(3)])}
    stopped_after = draw.randint(0, layout.n_batches)
    arguments, valid = draw.spoiled(arguments)

    def call(world_size: Any, epoch: Any, **options: Any) -> Any:
        """Serve an epoch on all ranks, and on the first one again with a stop and a resume."""
        ranks = []
        for rank in range(PoolBatchSampler(world_size=world_size, **options).layout.world_size):
            sampler = PoolBatchSampler(rank=rank, world_size=world_size, **options)
            sampler.set_epoch(epoch)
            ranks.append((len(sampler), list(sampler)))
        stopped = PoolBatchSampler(world_size=world_size, **options)
        stopped.set_epoch(epoch)
        batches = iter(stopped)
        first = [next(batches) for _ in range(min(stopped_after, len(stopped)))]
        resumed = PoolBatchSampler(world_size=world_size, **options)
        resumed.load_state_dict(_saved_and_loaded(stopped.state_dict()))
        return ranks, first + list(resumed)

    def check(
        served: Any, world_size: Any, drop_last: Any, planning: Any, n_instances: Any, batch_size: Any, **_: Any
    ) -> None:
        ranks, resumed = served
        layout = BatchLayout(int(n_instances), int(batch_size), int(world_size), bool(drop_last))
        expect(
            all(length == len(batches) == layout.n_batches for length, batches in ranks), "a wrong number of batches"
        )
        batches: list[Any] = [sum(parts, []) for parts in zip(*(batches for _, batches in ranks), strict=True)]
        sizes = [layout.global_batch_size] * layout.n_full + [layout.n_last] * (layout.n_last > 0)
        expect([len(batch) for batch in batches] == sizes, f"global batches must have the sizes {sizes}")
        once = batches if planning is not None and planning.replacement else [_flat(batches)]
        expect(all(len(set(each)) == len(each) for each in once), "an instance comes twice")
        expect(set(_flat(batches)) <= set(range(layout.n_instances)), "an index is out of range")
        expect(resumed == ranks[0][1], "a resumed epoch differs")

    return Case(call, arguments, valid, check)


def _saved_and_loaded(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def draw_planner(draw: Draw) -> Case:
    """What a user's planner returns, right and wrong."""
    layout = BatchLayout(draw.choice([16, 24, 27]), 4)
    positions = draw.numpy().permutation(8).reshape(2, 4)
    arguments = {"batches": positions, "pairs": positions[:, :2].copy()}
    arguments, valid = draw.spoiled(arguments)

    def call(batches: Any, pairs: Any) -> Any:
        def plan_pool(indices: Any, *, seed: int, epoch: int) -> PlannedPool:
            mine = np.arange(len(indices)).reshape(-1, 4)
            return PlannedPool(mine) if len(indices) != 8 else PlannedPool(batches, pairs)

        sampler = PoolBatchSampler(layout.n_instances, 4, planning=Planning(plan_pool, Pools(8)))
        served = []
        for batch in sampler:
            mask = sampler.likely_false_negatives()
            served.append((batch, None if mask is None else mask.tolist()))
            sampler.state_dict()
        return served

    def check(served: Any, **_: Any) -> None:
        batches = [batch for batch, _ in served]
        expect(len(batches) == layout.n_full, "a wrong number of batches")
        expect(len(set(_flat(batches))) == 4 * layout.n_full, "an instance comes twice")

    return Case(call, arguments, valid, check)


def draw_sampler_state(draw: Draw) -> Case:
    """A state with a single edit: refused in words, or it goes on with the batches of the uninterrupted epoch."""
    layout = BatchLayout(103, 4)

    def shuffle(indices: NDArray[np.int64], *, seed: int, epoch: int) -> PlannedPool:
        batches = np.random.default_rng([seed, epoch]).permutation(len(indices)).reshape(-1, 4)
        return PlannedPool(batches, batches[:, :2])

    def make() -> PoolBatchSampler:
        return PoolBatchSampler(layout.n_instances, 4, planning=Planning(shuffle, Pools(32)), seed=5)

    sampler = make()
    batches = iter(sampler)
    for _ in range(draw.randint(1, layout.n_batches - 1)):
        next(batches)
    state = sampler.state_dict()
    edited = state if draw.random() < 0.5 else state["pool"]
    name = draw.choice(list(edited))
    value = edited[name]
    valid = draw.random() < 0.1
    if not valid:
        kind = draw.random()
        if kind < 0.1:
            del edited[name]
        elif isinstance(value, torch.Tensor) and kind < 0.9:
            bent = draw.bent(value.numpy())
            # A different order of the same batches cannot be told from the true order.
            alike = isinstance(bent, torch.Tensor) and (bent.dtype, bent.shape) == (value.dtype, value.shape)
            reordered = alike and torch.equal(bent.flatten().sort().values, value.flatten().sort().values)
            edited[name] = value if reordered else bent
        elif type(value) is int and kind < 0.6:
            edited[name] = value + draw.choice([-8, -4, -1, 1, 4, 8, 100])
        else:
            edited[name] = draw.choice(_scalars())

    def call(state: Any) -> Any:
        sampler = make()
        sampler.load_state_dict(state)
        return list(sampler)

    def check(batches: Any, state: Any) -> None:
        # A different number of served batches of the same pool cannot be told from the true number.
        expect(batches == list(make())[state["served"] :], "it goes on with different batches")
        expect(SamplerState.from_dict(state).to_dict().keys() == state.keys(), "the state comes back changed")

    return Case(call, {"state": state}, valid, check)


# Encoding


def draw_encode(draw: Draw) -> Case:
    n_instances = draw.randint(1, 40)
    rows = torch.from_numpy(draw.numpy().normal(size=(101, draw.randint(1, 8)))).float()
    indices = draw.numpy().integers(0, n_instances, size=draw.randint(1, 40))
    arguments, valid = draw.spoiled({"indices": indices, "batch_size": draw.randint(1, 50)})
    arguments["rows"] = rows if draw.random() < 0.8 else draw.bent(rows)
    valid = valid and arguments["rows"] is rows

    def call(indices: Any, batch_size: Any, rows: Any) -> Any:
        whole = isinstance(rows, torch.Tensor) and rows.layout is torch.strided and rows.ndim > 1 and len(rows) == 101
        return encode(indices, iter, lambda chunk: rows[torch.tensor(chunk)] if whole else rows, batch_size=batch_size)

    def check(embeddings: Any, indices: Any, rows: Any, **_: Any) -> None:
        expect(embeddings.dtype == torch.float32 and len(embeddings) == len(indices), "one float32 row per instance")
        expect(np.allclose(embeddings.numpy(), _unit(rows)[np.array(indices)], atol=1e-5), "the rows are different")

    return Case(call, arguments, valid, check)


# Metrics


def _labels(draw: Draw, *shape: int) -> Any:
    labels = draw.numpy().integers(0, draw.choice([1, 2, 5, 100]), size=shape)
    labels = labels.astype(draw.choice(["int64", "int32", "uint8", "uint16", "int8"]))
    return labels if draw.random() < 0.3 else torch.from_numpy(labels)


def _as_batches(values: Any, n_dims: int) -> NDArray[Any]:
    array = values.detach().float().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)
    return array[None] if array.ndim == n_dims else array


def _check_mean(value: Any, values: list[float], lowest: float, highest: float) -> None:
    """Check a scalar that must be the mean of some values, or NaN if there are none."""
    expect(isinstance(value, torch.Tensor) and value.dtype == torch.float32 and value.ndim == 0, "a float32 scalar")
    expected = float(np.mean(values)) if values else math.nan
    close = math.isclose(float(value), expected, rel_tol=1e-4, abs_tol=2e-5)
    expect(close or (math.isnan(float(value)) and math.isnan(expected)), f"the mean must be {expected}")
    expect(math.isnan(expected) or lowest <= float(value) <= highest, "out of range")


def draw_false_negative_rate(draw: Draw) -> Case:
    shape = (draw.randint(2, 20),) if draw.random() < 0.5 else (draw.randint(1, 4), draw.randint(2, 9))
    accumulated = draw.random() < 0.3
    arguments, valid = draw.spoiled({"labels": _labels(draw, *shape)})

    def call(labels: Any) -> Any:
        return InBatchFalseNegativeRate()(labels) if accumulated else in_batch_false_negative_rate(labels)

    def check(value: Any, labels: Any) -> None:
        pairs = [float(a == b) for batch in _as_batches(labels, 1).tolist()
                 for i, a in enumerate(batch) for j, b in enumerate(batch) if i != j]  # fmt: skip
        _check_mean(value, pairs, 0, 1)

    return Case(call, arguments, valid, check)


def draw_hardness(draw: Draw) -> Case:
    size, batches = draw.randint(2, 12), draw.choice([None, draw.randint(1, 4)])
    labels = draw.choice([None, _labels(draw, *([size] if batches is None else [batches, size]))])
    accumulated = draw.random() < 0.3
    arguments, valid = draw.spoiled({"embeddings": draw.embeddings(size, batches=batches), "labels": labels})

    def call(embeddings: Any, labels: Any) -> Any:
        return InBatchHardness()(embeddings, labels) if accumulated else in_batch_hardness(embeddings, labels)

    def check(value: Any, embeddings: Any, labels: Any) -> None:
        x = _as_batches(_floats(embeddings), 2)
        y = np.arange(x.shape[0] * x.shape[1]).reshape(x.shape[:2]) if labels is None else _as_batches(labels, 1)
        finite = np.isfinite(x).all()
        unit = _unit(x) if finite else x
        pairs = [float(rows[i] @ rows[j]) if finite else math.nan for rows, own in zip(unit, y, strict=True)
                 for i in range(len(rows)) for j in range(len(rows)) if i != j and own[i] != own[j]]  # fmt: skip
        _check_mean(value, pairs, -1, 1)

    return Case(call, arguments, valid, check)


def draw_alignment(draw: Draw) -> Case:
    x = draw.embeddings(draw.randint(1, 12))
    y = torch.from_numpy(draw.numpy().normal(size=tuple(x.shape))).float()
    accumulated = draw.random() < 0.3
    arguments, valid = draw.spoiled({"x": x, "y": y, "alpha": draw.choice([2.0, 1, 0.5, np.float32(3)])})

    def call(x: Any, y: Any, alpha: Any) -> Any:
        return Alignment(alpha)(x, y) if accumulated else alignment(x, y, alpha)

    def check(value: Any, x: Any, y: Any, alpha: Any) -> None:
        if float(alpha) > 100:
            return  # a rounding error of the distance decides
        x, y = _floats(x), _floats(y)
        finite = np.isfinite(x).all() and np.isfinite(y).all()
        distances = np.linalg.norm(_unit(x) - _unit(y), axis=1) ** float(alpha) if finite else [math.nan]
        _check_mean(value.detach(), list(distances), 0, 2 ** float(alpha) * 1.0001)

    return Case(call, arguments, valid, check)


def draw_uniformity(draw: Draw) -> Case:
    accumulated = draw.random() < 0.3
    arguments, valid = draw.spoiled({"x": draw.embeddings(draw.randint(2, 12)), "t": draw.choice([2.0, 1, 0.5])})

    def call(x: Any, t: Any) -> Any:
        return Uniformity(t)(x) if accumulated else uniformity(x, t)

    def check(value: Any, x: Any, t: Any) -> None:
        unit = _unit(x) if np.isfinite(_floats(x)).all() else _floats(x) * math.nan
        squares = [float(((a - b) ** 2).sum()) for i, a in enumerate(unit) for b in unit[:i]]
        _check_mean(value.detach(), [math.log(np.mean(np.exp(-float(t) * np.array(squares))))], -4.001 * float(t), 1e-5)

    return Case(call, arguments, valid, check)


# Schedules


def draw_linear_decay(draw: Draw) -> Case:
    arguments = {"start": draw.random() or 1, "end": draw.choice([1e-9, 0.05, 1]), "n_epochs": draw.randint(1, 50)}
    arguments, valid = draw.spoiled(arguments | {"epoch": draw.randint(0, 99)})

    def call(epoch: Any, **options: Any) -> Any:
        schedule = LinearDecay(**options)
        return [schedule(0), schedule(epoch), schedule(options["n_epochs"])]

    def check(values: Any, start: Any, end: Any, **_: Any) -> None:
        expect(all(type(value) is float and 0 < value <= 1 for value in values), "floats in (0, 1]")
        expect(values[0] == float(start) and values[2] == float(end), "from start to end")
        expect(min(values[::2]) <= values[1] <= max(values[::2]), "between start and end")

    return Case(call, arguments, valid, check)


def draw_staircase(draw: Draw) -> Case:
    start = draw.uniform(0.1, 1)
    arguments = {"start": start, "step": draw.choice([0, 0.1, 5]), "every": draw.randint(1, 9), "floor": start / 2}
    arguments, valid = draw.spoiled(arguments | {"epoch": draw.randint(0, 99)})

    def call(epoch: Any, **options: Any) -> Any:
        schedule = Staircase(**options)
        return [schedule(0), schedule(epoch)]

    def check(values: Any, start: Any, floor: Any, **_: Any) -> None:
        expect(all(type(value) is float and 0 < value <= 1 for value in values), "floats in (0, 1]")
        expect(values[0] == float(start) and float(floor) <= values[1] <= float(start), "from start to floor")

    return Case(call, arguments, valid, check)


SUBJECTS: dict[str, Callable[[Draw], Case]] = {
    "rwr_batches": draw_rwr_batches,
    "mutual_nearest": draw_mutual_nearest,
    "pair_mask": draw_pair_mask,
    "ExactGraph": draw_exact_graph,
    "RandomCandidateGraph": draw_random_candidate_graph,
    "RWRComposer": draw_rwr_composer,
    "uniform_batches": draw_uniform_batches,
    "knn_batches": draw_knn_batches,
    "GCBSComposer": draw_gcbs,
    "B3Composer": draw_b3,
    "ClusterComposer": draw_clusters,
    "EpochPlan": draw_epoch_plan,
    "PoolBatchSampler": draw_pool_batch_sampler,
    "PlannedPool": draw_planner,
    "SamplerState": draw_sampler_state,
    "encode": draw_encode,
    "in_batch_false_negative_rate": draw_false_negative_rate,
    "in_batch_hardness": draw_hardness,
    "alignment": draw_alignment,
    "uniformity": draw_uniformity,
    "LinearDecay": draw_linear_decay,
    "Staircase": draw_staircase,
}
