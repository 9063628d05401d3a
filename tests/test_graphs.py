import logging
import re

import naive
import numba
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from parts import assert_equal, rng_states
from torch.utils._python_dispatch import TorchDispatchMode

from bs_lightning import ExactGraph, NNDescentGraph, RandomCandidateGraph, _embeddings, _nndescent, graphs
from bs_lightning._cells import cell
from bs_lightning._nndescent import shared_cores

# pynndescent compiles once per process, so no other test module may build a large NNDescentGraph.


@pytest.fixture(autouse=True)
def small_pools_go_to_pynndescent(monkeypatch):
    monkeypatch.setattr(graphs, "_SMALL_POOL", 0)


def gaussian(size, dim=8, seed=0):
    return torch.randn(size, dim, generator=torch.Generator().manual_seed(seed))


def clusters(size, n_clusters=20, dim=32):
    centers = gaussian(n_clusters, dim)
    return centers[torch.arange(size) % n_clusters] + 0.5 * gaussian(size, dim, seed=1)


def naive_nearest(embeddings, k):
    x = embeddings.double().numpy()
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    similarity = x @ x.T
    np.fill_diagonal(similarity, -np.inf)
    return np.argsort(-similarity, axis=1)[:, :k]


def assert_real(neighbors, size, k):
    assert neighbors.dtype == np.int32
    assert neighbors.shape == (size, k)
    assert neighbors.flags.c_contiguous
    assert neighbors.min() >= 0
    assert neighbors.max() < size
    assert (neighbors != np.arange(size)[:, None]).all()


def among_40(n_neighbors=15):
    return RandomCandidateGraph(40, n_neighbors)


every = pytest.mark.parametrize("graph", [ExactGraph, NNDescentGraph, among_40])


def two_sides(size, dim=16, gap=3.0):
    """Pairs of sides that lie in different places of the sphere, as the sides of image and text do."""
    common = clusters(size, dim=dim)
    means = gap * gaussian(2, dim, seed=2)
    noise = 0.3 * torch.stack([gaussian(size, dim, seed=3), gaussian(size, dim, seed=4)])
    return (common + noise + means[:, None]).movedim(0, 1)


def naive_two_sides(sides, k):
    first, second = torch.nn.functional.normalize(sides.double(), dim=2).unbind(1)
    similarity = (first @ second.T + second @ first.T).fill_diagonal_(-torch.inf)
    return similarity.topk(k, dim=1).indices.numpy()


def recall(neighbors, exact):
    return np.mean([len(set(row) & set(true)) / len(true) for row, true in zip(neighbors, exact, strict=True)])


# Every graph


@every
@pytest.mark.parametrize(("size", "k", "expected"), [(2, 15, 1), (5, 15, 4), (16, 15, 15), (17, 15, 15), (200, 1, 1)])
def test_shape_and_real_neighbors_in_any_pool(graph, size, k, expected):
    assert_real(graph(k)(gaussian(size)), size, expected)


@every
def test_all_equal_embeddings(graph):
    assert_real(graph(15)(torch.ones(200, 8)), 200, 15)
    assert_real(graph(15)(torch.zeros(200, 8)), 200, 15)


@every
def test_zero_rows_have_random_neighbors_and_are_nobodys(graph):
    embeddings = clusters(300)
    embeddings[[0, 100, 299]] = 0
    neighbors = graph(10)(embeddings)
    assert_real(neighbors, 300, 10)
    assert not np.isin(np.delete(neighbors, [0, 100, 299], axis=0), [0, 100, 299]).any()
    assert len(np.unique(neighbors[[0, 100, 299]])) > 20
    assert not np.array_equal(neighbors[100], graph(10)(embeddings, seed=1)[100])


@every
def test_zero_rows_are_neighbors_where_there_is_nobody_else(graph):
    embeddings = torch.zeros(30, 8)
    embeddings[:3] = gaussian(3)
    neighbors = graph(5)(embeddings)
    assert_real(neighbors, 30, 5)
    assert all(set(neighbors[row, :2]) == {0, 1, 2} - {row} for row in range(3))


def test_exact_takes_even_the_opposite_before_a_zero_row():
    embeddings = torch.zeros(30, 2)
    embeddings[:3] = torch.tensor([[1.0, 0.0], [-1.0, 0.1], [-1.0, -0.1]])
    neighbors = ExactGraph(2)(embeddings)
    assert all(set(neighbors[row]) == {0, 1, 2} - {row} for row in range(3))


@every
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_any_float_embeddings_with_gradients(graph, dtype):
    embeddings = clusters(200).to(dtype)
    assert np.array_equal(graph(5)(embeddings.requires_grad_()), graph(5)(embeddings.detach().float()))


@every
def test_length_does_not_count_and_embeddings_stay_as_they_are(graph):
    embeddings = clusters(200)
    before = embeddings.clone()
    scaled = embeddings * torch.logspace(-30, 30, 200)[:, None]
    assert (graph(5)(embeddings) == graph(5)(scaled)).mean() > 0.99
    assert torch.equal(embeddings, before)


@every
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_refuses_what_is_not_finite(graph, bad):
    embeddings = gaussian(10)
    embeddings[7, 3] = bad
    with pytest.raises(ValueError, match=r"embeddings must be finite, but row 7 is not"):
        graph()(embeddings)


@every
@pytest.mark.parametrize("shape", [(), (10,), (1, 8), (0, 8), (4, 0), (50, 0), (4, 3, 2), (1, 2, 8), (4, 2, 0)])
def test_refuses_other_shapes(graph, shape):
    with pytest.raises(ValueError, match=rf"embeddings must have shape .*, got {re.escape(str(list(shape)))}"):
        graph()(torch.ones(shape))


@every
def test_takes_arrays_of_every_float_and_layout(graph):
    embeddings = clusters(200).double().numpy()
    read_only = embeddings.copy()
    read_only.flags.writeable = False
    expected = graph(5)(torch.from_numpy(embeddings))
    for array in (
        embeddings,
        read_only,
        embeddings[::-1].copy()[::-1],
        embeddings.astype(">f4"),
        embeddings.T.copy().T,
    ):
        assert np.array_equal(graph(5)(array), expected)


@every
@pytest.mark.parametrize(
    ("embeddings", "kind"),
    [
        ([[1.0, 0.0], [0.0, 1.0]], "a list"),
        (None, "a NoneType"),
        (np.ones((4, 2), dtype=int), "an array of dtype int64"),
        (np.ones((4, 2), dtype=complex), "an array of dtype complex128"),
        (torch.ones(4, 2, dtype=torch.int64), "a tensor of dtype torch.int64"),
        (torch.ones(4, 2, dtype=torch.bool), "a tensor of dtype torch.bool"),
        (torch.ones(4, 2, dtype=torch.complex64), "a tensor of dtype torch.complex64"),
        (torch.eye(4).to_sparse(), "a tensor of dtype torch.float32 and layout torch.sparse_coo"),
    ],
)
def test_refuses_what_is_not_dense_floats(graph, embeddings, kind):
    with pytest.raises(TypeError, match=f"embeddings must be a dense tensor or a NumPy array of floats, got {kind}"):
        graph(1)(embeddings)


@every
def test_takes_integers_of_numpy_as_seeds(graph):
    embeddings = clusters(200)
    embeddings[::2] = 0  # all-zero rows have random neighbours in every graph
    for seed in (np.uint8(3), np.int32(3), np.uint64(3)):
        assert np.array_equal(graph(5)(embeddings, seed=seed), graph(5)(embeddings, seed=3))


@every
@pytest.mark.parametrize(("seed", "error"), [(None, TypeError), (1.0, TypeError), ("1", TypeError), (-1, ValueError)])
def test_refuses_other_seeds(graph, seed, error):
    with pytest.raises(error, match=f"seed must .*got {seed!r}"):
        graph(5)(gaussian(100), seed=seed)


@pytest.mark.filterwarnings("error")
def test_refuses_arrays_that_overflow_float32():
    array = np.ones((10, 2))
    array[3, 1] = 1e300
    with pytest.raises(ValueError, match="embeddings must be finite, but row 3 is not"):
        ExactGraph(2)(array)


@every
@pytest.mark.parametrize("n_neighbors", [0, -1])
def test_refuses_less_than_one_neighbor(graph, n_neighbors):
    with pytest.raises(ValueError, match=f"n_neighbors must be at least 1, got {n_neighbors}"):
        graph(n_neighbors)


# The exact graph


@pytest.mark.parametrize("rows_per_block", [1, 7, 60, 1000])
def test_exact_equals_naive_across_blocks(monkeypatch, rows_per_block):
    monkeypatch.setattr(_embeddings, "_BLOCK_ENTRIES_ON_CPU", rows_per_block * 60 + 3)
    embeddings = gaussian(60)
    assert np.array_equal(ExactGraph(7)(embeddings), naive_nearest(embeddings, 7))


def test_exact_never_holds_all_pairs(monkeypatch):
    class Largest(TorchDispatchMode):
        entries = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, tuple) else [result]:
                self.entries = max(self.entries, tensor.numel() if isinstance(tensor, torch.Tensor) else 0)
            return result

    monkeypatch.setattr(_embeddings, "_BLOCK_ENTRIES_ON_CPU", 5000)
    with Largest() as largest:
        ExactGraph(3)(gaussian(500))
    assert 0 < largest.entries <= 5000


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.integers(1, 6), st.integers(0, 127), st.integers(0, 2**32 - 1))
def test_the_choice_by_groups_of_columns_equals_the_choice_among_all(k, more_groups, rest, seed):
    """It is a GPU's. The largest may lie in one group, or behind the last."""
    n_columns = (k + more_groups) * graphs._COLUMN_GROUP + rest
    similarity = torch.randn(20, n_columns, generator=torch.Generator().manual_seed(seed))
    similarity[::2, -3:] += 9
    chosen = graphs._most_similar_of_groups(similarity, k)
    assert chosen.dtype == torch.int32
    assert torch.equal(chosen.long(), similarity.topk(k, dim=1).indices)


# The graph among random candidates


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(3, 300), st.integers(0, 2**32 - 1))
def test_each_draws_as_many_distinct_others_as_it_is_drawn(data, size, seed):
    n_candidates = data.draw(st.integers(1, size - 1))
    candidates = RandomCandidateGraph(n_candidates, n_candidates)(gaussian(size), seed=seed)
    assert_real(candidates, size, n_candidates)
    assert (np.bincount(candidates.ravel(), minlength=size) == n_candidates).all()
    assert all(len(set(row)) == n_candidates for row in candidates.tolist())


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(3, 300), st.integers(0, 2**32 - 1))
def test_keeps_the_nearest_of_its_candidates(data, size, seed):
    n_candidates = data.draw(st.integers(1, size - 1))
    k = data.draw(st.integers(1, n_candidates))
    embeddings = gaussian(size, seed=seed)
    candidates = RandomCandidateGraph(n_candidates, n_candidates)(embeddings, seed=seed)
    neighbors = RandomCandidateGraph(n_candidates, k)(embeddings, seed=seed)
    nearest = naive.nearest_of(embeddings, candidates, k)
    assert all(set(row) <= set(own) for row, own in zip(neighbors.tolist(), candidates.tolist(), strict=True))

    def similarity(found):  # of two candidates that are equally similar in float32, either may be kept
        unit = torch.nn.functional.normalize(embeddings.double(), dim=1)
        return torch.einsum("pd,pkd->pk", unit, unit[torch.from_numpy(found)])

    torch.testing.assert_close(similarity(neighbors), similarity(nearest), rtol=0, atol=1e-6)


@pytest.mark.parametrize("chunk_entries", [1, 100_000])
def test_chunks_do_not_matter(monkeypatch, chunk_entries):
    embeddings = gaussian(1003)
    expected = RandomCandidateGraph(50, 10)(embeddings)
    monkeypatch.setattr(graphs, "_CHUNK_ENTRIES", chunk_entries)
    assert np.array_equal(RandomCandidateGraph(50, 10)(embeddings), expected)


def test_candidates_are_uniform_and_independent_of_the_embeddings():
    """Candidates are drawn with the expected probabilities, over 2000 seeds.

    Each of the 31 x 30 ordered pairs is drawn with probability 7 / 30. Two candidates of one instance are drawn
    together with probability 7 x 6 / (30 x 29). The bound is 6 standard deviations: a false alarm has a probability
    below 1e-5 for all pairs together.
    """
    size, n_candidates, n_seeds = 31, 7, 2000
    pairs, together = np.zeros((size, size)), np.zeros((size, size))
    for seed in range(n_seeds):
        for row, candidates in enumerate(RandomCandidateGraph(n_candidates, n_candidates)(gaussian(size), seed=seed)):
            pairs[row, candidates] += 1
            if row == 0:
                together[np.ix_(candidates, candidates)] += 1
    for counts, p in ((pairs, 7 / 30), (together[1:, 1:], 7 * 6 / (30 * 29))):
        off_diagonal = counts[~np.eye(len(counts), dtype=bool)]
        assert np.abs(off_diagonal - n_seeds * p).max() < 6 * np.sqrt(n_seeds * p * (1 - p))


def test_as_many_candidates_as_there_are_others_is_exact():
    embeddings = clusters(200)
    for n_candidates in (199, 1000):
        assert np.array_equal(RandomCandidateGraph(n_candidates, 5)(embeddings), ExactGraph(5)(embeddings))
    assert not np.array_equal(RandomCandidateGraph(198, 5)(embeddings), ExactGraph(5)(embeddings))


def test_reaches_in_two_steps_as_far_as_with_candidates_drawn_for_each():
    """Walks reach as many nodes in two steps. One run of distances would halve this reach."""
    embeddings, k = gaussian(20_000, dim=32), 20
    rng = np.random.default_rng(0)
    drawn = [rng.choice(20_000, 200, replace=False) for _ in range(20_000)]
    literal = naive.nearest_of(embeddings, drawn, k)

    def reach(neighbors):
        return np.mean([len(np.unique(neighbors[neighbors[node]])) for node in range(2000)])

    assert reach(RandomCandidateGraph(200, k)(embeddings)) == pytest.approx(reach(literal), rel=0.05)


def test_refuses_fewer_candidates_than_neighbors():
    with pytest.raises(ValueError, match="n_candidates must be at least n_neighbors, 100, got 99"):
        RandomCandidateGraph(99)


# Two sides


def test_exact_compares_the_first_sides_with_the_second_sides():
    sides = two_sides(300)
    assert np.array_equal(ExactGraph(10)(sides), naive_two_sides(sides, 10))
    of_one_side = naive_nearest(sides.sum(dim=1), 10)
    assert (np.sort(ExactGraph(10)(sides)) != np.sort(of_one_side)).mean() > 0.1


@pytest.mark.parametrize("gap", [0.0, 3.0])
@pytest.mark.parametrize("graph", [NNDescentGraph, lambda k: RandomCandidateGraph(1999, k)])
def test_large_pools_of_two_sides_find_the_nearest_across_a_gap(graph, gap):
    sides = two_sides(2000, gap=gap)
    assert recall(graph(10)(sides), naive_two_sides(sides, 10)) > 0.95


def test_random_candidates_of_two_sides_are_ranked_by_their_similarity():
    sides = two_sides(2000)
    sides /= sides.norm(dim=2, keepdim=True)
    candidates = RandomCandidateGraph(200, 200)(sides, seed=1)
    similarity = torch.einsum(
        "id,ikd->ik", sides.flatten(1), sides.flip(1).flatten(1)[torch.from_numpy(candidates).long()]
    )
    assert (similarity.diff(dim=1) <= 1e-5).all()
    nearest = RandomCandidateGraph(200, 5)(sides, seed=1)
    assert np.array_equal(nearest, candidates[:, :5])


@every
def test_equal_sides_give_the_graph_of_one_side(graph):
    embeddings = clusters(400)
    twice = torch.stack([embeddings, embeddings], dim=1)
    assert recall(graph(5)(twice), graph(5)(embeddings)) > 0.95


@every
def test_an_instance_with_one_zero_side_is_nobodys_neighbor(graph):
    sides = two_sides(300)
    sides[7, 1] = 0
    neighbors = graph(10)(sides)
    assert_real(neighbors, 300, 10)
    assert not (np.delete(neighbors, 7, axis=0) == 7).any()


# Shared work


@pytest.mark.parametrize("graph", [ExactGraph, NNDescentGraph, among_40, lambda k: RandomCandidateGraph(1000, k)])
@pytest.mark.parametrize("embeddings", [clusters(301), two_sides(301)], ids=["one side", "two sides"])
@pytest.mark.parametrize("n_parts", [2, 7, 400])
def test_the_parts_of_a_graph_make_the_graph(graph, embeddings, n_parts, monkeypatch):
    monkeypatch.setattr(graphs, "_SMALL_POOL", 301)
    embeddings = embeddings.clone()
    embeddings[[5, 200]] = 0  # which have random neighbours
    whole = graph(7)(embeddings, seed=3)
    parts = [graph(7).part(embeddings, part, n_parts, seed=3) for part in range(n_parts)]
    assert max(map(len, parts)) <= -(-301 // n_parts)
    assert np.array_equal(graph(7).join(parts, embeddings, seed=3), whole)


@pytest.mark.parametrize("rows", [None, range(3, 50), range(5, 5)])
def test_blocks_of_similarities_share_their_memory(rows, monkeypatch):
    """Else what is kept of each block would lie between blocks, and a pool of 50,000 would take gigabytes."""
    monkeypatch.setattr(_embeddings, "_BLOCK_ENTRIES_ON_CPU", 60 * 8)
    unit = _embeddings.unit_rows(gaussian(60))
    kept, parts = [], []
    for start, block in _embeddings.similarity_blocks(unit, rows):
        kept.append(block)
        parts.append((start, block.clone()))
    expected = unit @ unit.T
    for start, part in parts:
        torch.testing.assert_close(part, expected[start : start + len(part)])
    assert sum(len(part) for _, part in parts) == len(range(60) if rows is None else rows)
    assert len({block.data_ptr() for block in kept}) <= 1


@pytest.mark.parametrize("graph", [ExactGraph(10), RandomCandidateGraph(200, 10)], ids=repr)
@pytest.mark.parametrize("n_sides", [1, 2])
def test_a_graph_is_the_same_under_autocast(graph, n_sides):
    embeddings = gaussian(500 * n_sides, 64) + 5  # cosines that bfloat16 cannot tell apart
    embeddings = embeddings if n_sides == 1 else embeddings.view(500, 2, 64)
    expected = graph(embeddings)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert np.array_equal(graph(embeddings), expected)


def test_which_graphs_are_shared(monkeypatch):
    class Centred(ExactGraph):
        def __call__(self, embeddings, *, seed=0):
            return super().__call__(embeddings - embeddings.mean(dim=0), seed=seed)

    assert graphs.can_share(ExactGraph(5))
    assert graphs.can_share(RandomCandidateGraph(40, 5))
    assert graphs.can_share(NNDescentGraph(5))
    assert not graphs.can_share(Centred(5))
    assert not graphs.can_share(None)


def share(embeddings, k, n_parts, monkeypatch, small_pool=1):
    """Return the graph that parts make, and how many rows each part searched."""
    searched = []

    def exact_descent(data, n_found, seed, n_shares=1):
        searched.append(len(data))
        unit = torch.from_numpy(data)
        left, right = (unit, unit) if unit.ndim == 2 else (unit.flatten(1), unit.flip(1).flatten(1))
        return (left @ right.T).topk(n_found, dim=1).indices.int().numpy()  # each row as its own neighbour, too

    monkeypatch.setattr(graphs, "_SMALL_POOL", small_pool)
    monkeypatch.setattr(graphs, "compile_ahead", lambda n_sides: None)
    monkeypatch.setattr(graphs, "descend", exact_descent)
    parts = [NNDescentGraph(k).part(embeddings, part, n_parts) for part in range(n_parts)]
    return NNDescentGraph(k).join(parts, embeddings), searched


@pytest.mark.parametrize(("n_parts", "exact"), [(2, False), (3, True)])
def test_processes_share_a_product_in_larger_pools_than_one_would_take(n_parts, exact, monkeypatch):
    embeddings = gaussian(100)
    neighbors, searched = share(embeddings, 2, n_parts, monkeypatch, small_pool=40)
    assert bool(searched) is not exact
    assert np.array_equal(neighbors, ExactGraph(2)(embeddings)) is exact


@pytest.mark.parametrize(("n_parts", "most"), [(2, 0.63), (3, 0.51), (4, 0.40), (7, 0.40)])
@pytest.mark.parametrize(
    ("embeddings", "least"), [(clusters(2000), 0.9), (two_sides(2000), 0.75)], ids=["one side", "two sides"]
)
def test_parts_of_a_descent_search_cells_and_find_most_neighbors(embeddings, least, n_parts, most, monkeypatch):
    neighbors, searched = share(embeddings, 15, n_parts, monkeypatch)
    assert_real(neighbors, 2000, 15)
    assert max(searched) <= most * 2000
    assert len(searched) == min(n_parts, 4)
    assert recall(neighbors, ExactGraph(15)(embeddings)) > least


def test_cells_overlap_and_each_row_is_the_own_row_of_one_part():
    unit = torch.nn.functional.normalize(gaussian(500), dim=1)
    for n_parts in (1, 2, 3, 5, 8, 500):
        cells = [cell(unit, part, n_parts) for part in range(n_parts)]
        assert np.array_equal(np.sort(np.concatenate([rows[own] for rows, own in cells])), np.arange(500))
        assert all(np.array_equal(rows, np.unique(rows)) for rows, _ in cells)
        assert n_parts in (1, 500) or sum(len(rows) for rows, _ in cells) > 1.2 * 500


@pytest.mark.parametrize("embeddings", [torch.ones(300, 8), torch.zeros(300, 8)], ids=["equal", "zero"])
def test_parts_of_a_descent_where_all_rows_are_equal(embeddings, monkeypatch):
    neighbors, searched = share(embeddings, 5, 4, monkeypatch)
    assert_real(neighbors, 300, 5)
    assert max(searched, default=0) <= 0.4 * 300


def test_zero_rows_do_not_fill_the_overlap_of_cells(monkeypatch):
    embeddings = clusters(2000)
    embeddings[::2] = 0
    neighbors, searched = share(embeddings, 15, 2, monkeypatch)
    assert max(searched) <= 0.63 * 1000
    assert recall(neighbors[1::2], ExactGraph(15)(embeddings)[1::2]) > 0.9


def test_parts_of_a_descent_fill_up_what_a_cell_does_not_hold(monkeypatch):
    neighbors, searched = share(gaussian(60), 50, 4, monkeypatch)
    assert max(searched) < 50
    assert_real(neighbors, 60, 50)


# The approximate graph


def test_nndescent_takes_the_exact_graph_in_small_pools(monkeypatch):
    monkeypatch.setattr(graphs, "_SMALL_POOL", 100)
    monkeypatch.setattr(graphs, "descend", lambda *_: pytest.fail("descended"))
    embeddings = clusters(100)
    assert np.array_equal(NNDescentGraph(10)(embeddings), ExactGraph(10)(embeddings))
    monkeypatch.setattr(graphs, "descend", lambda data, k, *_: np.zeros((len(data), k), dtype=np.int32))
    assert not np.array_equal(NNDescentGraph(10)(clusters(101)), ExactGraph(10)(clusters(101)))


@pytest.mark.parametrize("size", [64, 2560])
def test_nndescent_finds_most_of_the_nearest(size):
    embeddings = clusters(size)
    assert recall(NNDescentGraph(15)(embeddings), ExactGraph(15)(embeddings)) > 0.95


def test_nndescent_fills_up_what_was_not_found(monkeypatch):
    found = np.int32([[0, 1, -1], [-1, -1, -1], [2, 0, 1], [1, 3, -1]])
    monkeypatch.setattr(graphs, "descend", lambda *_: found)
    neighbors = NNDescentGraph(2)(gaussian(4))
    assert_real(neighbors, 4, 2)
    assert (neighbors[0, 0], neighbors[3, 0], *neighbors[2]) == (1, 1, 0, 1)


def test_nndescent_is_determined_by_the_seed():
    embeddings = gaussian(1500, dim=64)
    one, same, *others = (NNDescentGraph(15)(embeddings, seed=seed) for seed in (1, 1, 3, 2**40))
    assert np.array_equal(one, same)
    assert not any(np.array_equal(one, other) for other in others)


def test_nndescent_prepares_for_one_side_or_for_two(monkeypatch):
    prepared = []
    monkeypatch.setattr(graphs, "compile_ahead", lambda n_sides: prepared.append(n_sides))
    for example in (gaussian(2), two_sides(2)):
        NNDescentGraph().prepare(100, example)
    assert prepared == [1, 2]


def test_nndescent_uses_no_more_threads_than_it_may(monkeypatch):
    embeddings = gaussian(1500, dim=64)
    NNDescentGraph(15)(embeddings)
    seen, most = [], numba.get_num_threads()
    nndescent = _nndescent._import_nndescent()
    monkeypatch.setattr(
        _nndescent,
        "_import_nndescent",
        lambda: lambda *args, **more: seen.append(more["n_jobs"]) or nndescent(*args, **more),
    )
    for n_cores in (None, 1, 10_000):
        with shared_cores(n_cores):
            NNDescentGraph(15)(embeddings)
    with shared_cores(1):
        NNDescentGraph(15).part(embeddings, 0, 8)  # one of four processes that search
    assert seen == [None, 1, most, min(2, most)]
    assert numba.get_num_threads() == most


def test_nndescent_leaves_random_states_and_threads_alone():
    NNDescentGraph()(gaussian(100))  # starts numba's threads
    numba.set_num_threads(1)
    before = rng_states()
    NNDescentGraph()(gaussian(100))
    assert numba.get_num_threads() == 1
    numba.set_num_threads(numba.config.NUMBA_NUM_THREADS)
    NNDescentGraph()(gaussian(100))
    assert numba.get_num_threads() == numba.config.NUMBA_NUM_THREADS
    assert_equal(rng_states(), before)


def test_nndescent_announces_its_compile_once(monkeypatch, caplog):
    monkeypatch.setattr(_nndescent, "_compiled", False)
    monkeypatch.setattr(logging.getLogger("bs_lightning"), "propagate", True)  # so that caplog receives the message
    NNDescentGraph()(gaussian(50))
    NNDescentGraph()(gaussian(50))
    assert [record.message for record in caplog.records] == [
        "NNDescentGraph: pynndescent loads its kernels, or compiles them for one to two minutes."
    ]
