import functools
import pickle
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from parts import clusters

from bs_lightning import ExactGraph, NNDescentGraph, RWRComposer, rwr_batches
from bs_lightning.compose import as_composer, call_composer
from bs_lightning.metrics import in_batch_hardness
from bs_lightning.plan import check_batches


def test_composes_harder_batches_than_uniform_ones():
    embeddings = clusters(n_clusters=10)
    uniform = in_batch_hardness(embeddings.view(-1, 32, 16))
    for seed in range(3):
        batches = RWRComposer(ExactGraph(10))(embeddings, 32, seed=seed, epoch=0)
        assert in_batch_hardness(embeddings[batches]) > uniform + 0.4


def test_what_a_partial_function_has_bound_stays_bound():
    def compose(embeddings, batch_size, *, seed, epoch, labels, indices):
        got.append((labels, indices))
        return [[0, 1], [2, 3]]

    got = []
    composer = as_composer(functools.partial(compose, labels="bound"))
    call_composer(composer, torch.zeros(4, 2), 2, seed=0, epoch=0, labels="offered", indices="offered")
    assert got == [("bound", "offered")]


@pytest.mark.parametrize("replacement", [False, True])
@pytest.mark.parametrize(("size", "batch_size"), [(64, 16), (16, 16), (2, 2), (64, 2)])
def test_composes_a_pool_of_any_size(size, batch_size, replacement):
    composer = RWRComposer(ExactGraph(5), replacement=replacement)
    batches = composer(clusters(size), batch_size, seed=0, epoch=0)
    assert batches.shape == (size // batch_size, batch_size)
    assert batches is check_batches(batches, size, batch_size, replacement=replacement)
    assert composer.seconds.keys() == {"graph", "walk"}
    assert min(composer.seconds.values()) > 0


def test_seed_reaches_graph_and_walk():
    seeds = []

    def graph(embeddings, *, seed=0):
        seeds.append(seed)
        return ExactGraph(5)(embeddings, seed=seed)

    one, same, other = (RWRComposer(graph)(clusters(), 32, seed=seed, epoch=0) for seed in (1, 1, 2))
    assert seeds == [1, 1, 2]
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)


def test_restart_probability_follows_the_epoch():
    embeddings, epochs = clusters(), []

    def falling(epoch):
        epochs.append(epoch)
        return 0.5 / (epoch + 1)

    composer = RWRComposer(ExactGraph(5), falling)
    for epoch in (0, 4):
        expected = RWRComposer(ExactGraph(5), 0.5 / (epoch + 1))(embeddings, 32, seed=0, epoch=7)
        assert np.array_equal(composer(embeddings, 32, seed=0, epoch=epoch), expected)
    assert epochs == [0, 4]
    with pytest.raises(ValueError, match=r"restart_probability must lie in \(0, 1\], got -0.5"):
        composer(embeddings, 32, seed=0, epoch=-2)


def test_walks_the_graph_with_replacement_as_told():
    embeddings = clusters()
    for replacement, n_roots in ((False, 1), (True, 1), (False, 4)):
        composer = RWRComposer(ExactGraph(5), 0.3, replacement, n_roots)
        batches = composer(embeddings, 32, seed=4, epoch=0)
        arguments = {"restart_probability": 0.3, "seed": 4, "replacement": replacement, "n_roots": n_roots}
        assert np.array_equal(batches, rwr_batches(ExactGraph(5)(embeddings), 32, **arguments))


def test_defaults_are_those_of_the_docs_and_survive_pickling():
    composer = pickle.loads(pickle.dumps(RWRComposer()))
    assert isinstance(composer.graph, NNDescentGraph)
    assert (composer.graph.n_neighbors, composer.restart_probability, composer.replacement) == (15, 0.2, False)


def test_refuses_a_graph_that_takes_no_seed():
    with pytest.raises(TypeError, match=r"graph must take \(embeddings, \*, seed=0\), got .*lambda.*'seed'"):
        RWRComposer(lambda embeddings: 0)


def test_takes_a_composer_whose_decorator_gives_an_argument():
    def from_two(function):
        @functools.wraps(function)
        def decorated(*args, **kwargs):
            return function(*args, first=2, **kwargs)

        return decorated

    @from_two
    def compose(embeddings, batch_size, *, first, seed, epoch):
        return [[first, 3], [0, 1]]

    batches = call_composer(as_composer(compose), torch.zeros(4, 2), 2, seed=0, epoch=0)
    assert batches.tolist() == [[2, 3], [0, 1]]


@pytest.mark.parametrize("replacement", [False, True])
def test_a_call_checks_the_batches(replacement):
    composer = as_composer(lambda embeddings, batch_size, *, seed, epoch: [[0, 1], [1, 2]])
    composer.replacement = replacement
    with nullcontext() if replacement else pytest.raises(ValueError, match="returned position 1 twice"):
        call_composer(composer, torch.zeros(4, 2), 2, seed=0, epoch=0)


def test_prepares_the_graph_that_compiles(monkeypatch):
    prepared = []
    monkeypatch.setattr(NNDescentGraph, "prepare", lambda graph, *given: prepared.append(given))
    example = torch.zeros(2, 8)
    for composer in (RWRComposer(), RWRComposer(ExactGraph())):
        composer.prepare(5000, example)
    assert prepared == [(5000, example)]


@pytest.mark.parametrize("alpha", [0, -1, 1.5, float("nan")])
def test_refuses_a_restart_probability_out_of_range(alpha):
    with pytest.raises(ValueError, match=rf"restart_probability must lie in \(0, 1\], got {alpha}"):
        RWRComposer(restart_probability=alpha)


def test_refuses_less_than_one_root():
    with pytest.raises(ValueError, match="n_roots must be at least 1, got 0"):
        RWRComposer(n_roots=0)


@pytest.mark.parametrize("batches", [[[3, 1], [0, 2]], torch.tensor([[3, 1], [0, 2]]), np.uint8([[3, 1], [0, 2]])])
def test_check_takes_any_integers(batches):
    checked = check_batches(batches, 4, 2)
    assert checked.dtype == np.int64
    assert checked.tolist() == [[3, 1], [0, 2]]


def test_check_lets_batches_share_with_replacement():
    assert check_batches([[0, 1], [1, 0]], 4, 2, replacement=True).tolist() == [[0, 1], [1, 0]]


@pytest.mark.parametrize(
    ("batches", "replacement", "error", "words"),
    [
        (None, False, TypeError, "must return integer positions in the pool, got dtype object"),
        ([[0, 1], [2]], False, ValueError, "must return an array of positions in the pool: .*inhomogeneous"),
        (torch.eye(2).to_sparse(), False, ValueError, "must return an array of positions in the pool: .*[Ss]parse"),
        ([[0.0, 1.0], [2.0, 3.0]], False, TypeError, "must return integer positions in the pool, got dtype float64"),
        ([0, 1, 2, 3], False, ValueError, r"shape \[2, 2\] for a pool of 4 and batches of 2, got \[4\]"),
        ([[0, 1, 2, 3]], False, ValueError, r"shape \[2, 2\] for a pool of 4 and batches of 2, got \[1, 4\]"),
        ([[0, 1]], True, ValueError, r"shape \[2, 2\] for a pool of 4 and batches of 2, got \[1, 2\]"),
        ([[0, 1], [2, 4]], False, ValueError, r"positions in \[0, 4\), got 4"),
        ([[0, 1], [2, -1]], True, ValueError, r"positions in \[0, 4\), got -1"),
        ([[0, 1], [1, 2]], False, ValueError, "position 1 twice. If batches may share instances, subclass bs_l"),
        ([[0, 1], [2, 2]], False, ValueError, "position 2 twice"),
        ([[0, 1], [2, 2]], True, ValueError, "position 2 twice within one batch"),
    ],
)
def test_check_refuses(batches, replacement, error, words):
    with pytest.raises(error, match=words):
        check_batches(batches, 4, 2, replacement=replacement)
