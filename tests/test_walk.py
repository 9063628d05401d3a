import re

import naive
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from bs_lightning import rwr_batches
from bs_lightning._walk_kernel import PATIENCE, walk_batches


@st.composite
def walks(draw):
    """Draw any graph (self-loops, repeated edges, no edges, disconnected) and arguments for a walk on it."""
    size, n_neighbors = draw(st.integers(1, 40)), draw(st.integers(1, 6))
    own = np.arange(size, dtype=np.int32)[:, None]
    edges = draw(arrays(np.int32, (size, n_neighbors), elements=st.integers(0, size - 1)))
    no_edge = draw(arrays(np.bool_, (size, n_neighbors)))
    arguments = {
        "restart_probability": draw(st.floats(0, 1, exclude_min=True)),
        "seed": draw(st.integers(0, 2**32 - 1)),
        "replacement": draw(st.booleans()),
    }
    batch_size = draw(st.integers(1, size))
    arguments["n_roots"] = draw(st.integers(1, batch_size))
    return np.where(no_edge, own, edges), batch_size, arguments


def random_graph(size, n_neighbors, seed=0):
    return np.random.default_rng(seed).integers(0, size, (size, n_neighbors))


@settings(max_examples=200, deadline=None)
@given(walks())
def test_equals_the_plain_python_walk(walk):
    graph, batch_size, arguments = walk
    batches = rwr_batches(graph, batch_size, **arguments)
    assert batches.tolist() == naive.rwr_batches(graph.tolist(), batch_size, **arguments)


@pytest.mark.parametrize("replacement", [False, True])
@pytest.mark.parametrize("alpha", [0.05, 0.2, 1.0])
def test_equals_the_plain_python_walk_on_a_large_graph(alpha, replacement):
    graph, arguments = random_graph(700, 15), {"restart_probability": alpha, "replacement": replacement, "seed": 3}
    assert rwr_batches(graph, 64, **arguments).tolist() == naive.rwr_batches(graph.tolist(), 64, **arguments)


@settings(max_examples=200, deadline=None)
@given(walks())
def test_nothing_lost_or_doubled(walk):
    graph, batch_size, arguments = walk
    size = len(graph)
    batches = rwr_batches(graph, batch_size, **arguments)
    assert batches.dtype == np.int64
    assert batches.shape == (size // batch_size, batch_size)
    assert batches.min() >= 0
    assert batches.max() < size
    assert all(len(set(batch)) == batch_size for batch in batches.tolist())
    if not arguments["replacement"]:
        assert len(np.unique(batches)) == batches.size  # covers all nodes if `batch_size` divides `size`
    assert np.array_equal(batches, rwr_batches(graph, batch_size, **arguments))


@settings(max_examples=100, deadline=None)
@given(walks())
def test_work_is_bounded(walk):
    graph, batch_size, arguments = walk
    bound = len(graph) * (PATIENCE + 1)
    rng = np.random.default_rng(arguments["seed"])
    walk_batches(graph, batch_size, *(arguments[k] for k in ("restart_probability", "n_roots", "replacement")), rng)
    # If the next number is among the first `bound + 1`, the kernel drew at most `bound` numbers.
    assert rng.random() in np.random.default_rng(arguments["seed"]).random(bound + 1)


@pytest.mark.parametrize("replacement", [False, True])
def test_seeds_differ(replacement):
    graph = random_graph(200, 5)
    one, other = (rwr_batches(graph, 20, seed=seed, replacement=replacement) for seed in (1, 2))
    assert not np.array_equal(one, other)


def test_replacement_repeats_instances_between_batches_only():
    batches = rwr_batches(random_graph(400, 10), 40, replacement=True)
    assert len(np.unique(batches)) < 400
    assert all(len(set(batch)) == 40 for batch in batches.tolist())


@pytest.mark.parametrize("replacement", [False, True])
def test_stays_in_the_clique_of_its_root(replacement):
    clique = np.random.default_rng(0).permutation(40) % 2
    graph = [[other for other in range(40) if other != node and clique[other] == clique[node]] for node in range(40)]
    for seed in range(20):
        batches = rwr_batches(graph, 10, seed=seed, replacement=replacement)
        assert all(len(set(clique[batch])) == 1 for batch in batches)


def test_a_higher_restart_probability_stays_closer_to_the_root():
    ring = np.arange(1000)[:, None] + [-1, 1]

    def spread(alpha):
        batches = rwr_batches(ring % 1000, 20, restart_probability=alpha, replacement=True)
        return np.median([np.ptp(batch) for batch in batches])

    assert spread(0.01) < 40  # a batch covers one stretch of the ring
    assert spread(1.0) > 500  # the walk never leaves its roots, so batches are uniform


def test_roots_share_a_batch_evenly():
    clique = np.random.default_rng(0).permutation(60) % 6
    graph = [[other for other in range(60) if other != node and clique[other] == clique[node]] for node in range(60)]
    for batch in rwr_batches(graph, 15, n_roots=3, seed=1):
        walks = clique[batch].reshape(3, 5)
        assert (walks == walks[:, :1]).all()
    assert len(set(clique[rwr_batches(graph, 12, n_roots=12, restart_probability=0.01)].ravel())) == 6
    assert np.array_equal(rwr_batches(graph, 15, n_roots=1, seed=1), rwr_batches(graph, 15, seed=1))


@pytest.mark.parametrize("n_roots", [0, 4])
def test_refuses_more_roots_than_instances(n_roots):
    with pytest.raises(ValueError, match=f"n_roots must be from 1 to batch_size 3, got {n_roots}"):
        rwr_batches(GRAPH, 3, n_roots=n_roots)


@pytest.mark.parametrize("container", [list, np.asarray, lambda graph: np.asfortranarray(graph, dtype=np.uint16)])
def test_accepts_any_integers(container):
    graph = random_graph(30, 4).tolist()
    assert np.array_equal(rwr_batches(container(graph), 5), rwr_batches(graph, 5))


GRAPH = [[1], [2], [0]]


@pytest.mark.parametrize(
    ("graph", "batch_size", "alpha", "error", "words"),
    [
        ([[1], [-1], [0]], 1, 0.2, ValueError, r"neighbors must lie in \[0, 3\), got -1. For 'no edge here' write"),
        ([[1], [3], [0]], 1, 0.2, ValueError, r"neighbors must lie in \[0, 3\), got 3"),
        ([[1.0], [0.0]], 1, 0.2, TypeError, "neighbors must hold integers, got dtype float64"),
        ([[True], [False]], 1, 0.2, TypeError, "neighbors must hold integers, got dtype bool"),
        ([1, 2, 0], 1, 0.2, ValueError, r"shape \[P, K\] with K >= 1, got shape \[3\]"),
        (np.empty((3, 0), int), 1, 0.2, ValueError, r"shape \[P, K\] with K >= 1, got shape \[3, 0\]"),
        (np.empty((0, 3), int), 1, 0.2, ValueError, "batch_size must be from 1 to the graph's 0 nodes, got 1"),
        (GRAPH, 0, 0.2, ValueError, "batch_size must be from 1 to the graph's 3 nodes, got 0"),
        (GRAPH, 4, 0.2, ValueError, "batch_size must be from 1 to the graph's 3 nodes, got 4"),
        (GRAPH, 1, 0, ValueError, r"restart_probability must lie in \(0, 1\], got 0"),
        (GRAPH, 1, -0.1, ValueError, r"restart_probability must lie in \(0, 1\], got -0.1"),
        (GRAPH, 1, 1.1, ValueError, r"restart_probability must lie in \(0, 1\], got 1.1"),
        (GRAPH, 1, float("nan"), ValueError, r"restart_probability must lie in \(0, 1\], got nan"),
    ],
)
def test_refuses_bad_arguments(graph, batch_size, alpha, error, words):
    with pytest.raises(error, match=words):
        rwr_batches(graph, batch_size, restart_probability=alpha)


@pytest.mark.parametrize("alpha", [True, "0.2", None, 0.2j])
def test_refuses_a_restart_probability_that_is_not_a_number(alpha):
    with pytest.raises(TypeError, match=f"restart_probability must be a number, got {alpha!r}"):
        rwr_batches(GRAPH, 1, restart_probability=alpha)


@pytest.mark.parametrize("seed", [np.uint8(3), np.int32(3), np.int64(3), np.array(3)])
def test_accepts_numpy_integers_as_seeds(seed):
    graph = random_graph(200, 5)
    assert np.array_equal(rwr_batches(graph, 20, seed=seed), rwr_batches(graph, 20, seed=3))


@pytest.mark.parametrize("seed", [None, 1.5, np.float32(1), "1", True, [1, 2]])
def test_refuses_seeds_that_are_not_integers(seed):
    with pytest.raises(TypeError, match=re.escape(f"seed must be an integer, got {seed!r}")):
        rwr_batches(GRAPH, 1, seed=seed)


def test_refuses_negative_seeds():
    with pytest.raises(ValueError, match="seed must be at least 0, got -1"):
        rwr_batches(GRAPH, 1, seed=np.int64(-1))
