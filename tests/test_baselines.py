from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pymetis
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from parts import Data, Model, clusters, fit, same_cluster_share, walker

from bs_lightning import ExactGraph, RWRComposer, baselines
from bs_lightning.baselines import (
    B3Composer,
    ClusterComposer,
    GCBSComposer,
    UniformComposer,
    knn_batches,
    uniform_batches,
)
from bs_lightning.metrics import in_batch_hardness
from bs_lightning.plan import check_batches

COMPOSERS = {
    "uniform": uniform_batches,
    "uniform with a graph": UniformComposer(),
    "knn": knn_batches,
    "gcbs": GCBSComposer(n_neighbors=10),
    "b3": B3Composer(n_skipped=2, n_neighbors=10, community_size=16),
    "clusters": ClusterComposer(),
    "clusters, greedy": ClusterComposer(cluster_size=8, packing="greedy"),
    "rwr": RWRComposer(ExactGraph(5)),
    "rwr, 4 roots": RWRComposer(ExactGraph(5), n_roots=4),
}
SMALL = COMPOSERS | {
    "gcbs": GCBSComposer(2),
    "b3": B3Composer(n_skipped=1, n_neighbors=1, community_size=2),
    "clusters, greedy": ClusterComposer(cluster_size=2, packing="greedy"),
}
every = pytest.mark.parametrize("name", COMPOSERS)
hard = pytest.mark.parametrize("name", [name for name in COMPOSERS if not name.startswith("uniform")])


@every
@settings(max_examples=25, deadline=None)
@given(n_batches=st.integers(1, 12), batch_size=st.integers(4, 24), seed=st.integers(0, 2**32 - 1), kind=st.booleans())
def test_takes_each_instance_once(name, n_batches, batch_size, seed, kind):
    size = n_batches * batch_size
    embeddings = torch.randn(size, 6) if kind else torch.ones(size, 6)  # equal embeddings, as a collapsed model gives
    composer = SMALL[name]
    batches = composer(embeddings, batch_size, seed=seed, epoch=0)
    assert batches is check_batches(batches, size, batch_size)
    assert np.array_equal(batches, composer(embeddings, batch_size, seed=seed, epoch=0))


@every
def test_takes_arrays(name):
    embeddings = clusters()
    expected = COMPOSERS[name](embeddings, 32, seed=0, epoch=0)
    assert np.array_equal(COMPOSERS[name](embeddings.numpy(), 32, seed=0, epoch=0), expected)


@pytest.mark.parametrize("name", ["knn", "gcbs", "clusters", "clusters, greedy"])  # others get neighbours from a graph
def test_two_sides_are_compared_with_each_other(name):
    common, own = clusters(), clusters()[torch.randperm(640, generator=torch.Generator().manual_seed(1))]
    nothing = torch.zeros_like(own)  # the sides share one part of their width only
    sides = torch.stack([torch.cat([common, own, nothing], dim=1), torch.cat([common, nothing, own], dim=1)], dim=1)
    similar = torch.nn.functional.normalize(sides, dim=2)
    cosine = similar[:, 0] @ similar[:, 1].T
    batches = torch.from_numpy(COMPOSERS[name](sides, 32, seed=0, epoch=0))
    of_batches = torch.stack([cosine[batch][:, batch] for batch in batches])
    off_diagonal = ~torch.eye(32, dtype=torch.bool)
    assert of_batches[:, off_diagonal].mean() > cosine.mean() + 0.15


@hard
def test_refuses_what_is_not_embeddings(name):
    with pytest.raises(TypeError, match="embeddings must be a dense tensor or a NumPy array of floats, got a list"):
        COMPOSERS[name](clusters().tolist(), 32, seed=0, epoch=0)
    with pytest.raises(ValueError, match=r"embeddings must have shape \[P, d\], .*, got \[64, 0\]"):
        COMPOSERS[name](torch.ones(64, 0), 32, seed=0, epoch=0)


@every
def test_takes_integers_of_numpy_as_seeds(name):
    embeddings = clusters(128)
    batches = SMALL[name](embeddings, 32, seed=np.uint8(3), epoch=0)
    assert np.array_equal(batches, SMALL[name](embeddings, 32, seed=3, epoch=0))


@pytest.mark.parametrize("name", [name for name in COMPOSERS if "rwr" not in name])
@pytest.mark.parametrize(("seed", "error"), [(None, TypeError), (1.0, TypeError), ("1", TypeError), (-1, ValueError)])
def test_refuses_other_seeds(name, seed, error):
    with pytest.raises(error, match=f"seed must .*got {seed!r}"):
        SMALL[name](clusters(128), 32, seed=seed, epoch=0)


@hard
def test_is_harder_than_uniform_batches(name):
    embeddings = clusters()
    uniform, harder = (compose(embeddings, 32, seed=0, epoch=0) for compose in (uniform_batches, COMPOSERS[name]))
    assert in_batch_hardness(embeddings[harder]) > in_batch_hardness(embeddings[uniform]) + 0.15


@every
def test_leaves_embeddings_and_random_states_alone(name):
    embeddings = clusters()
    before, states = embeddings.clone(), (torch.get_rng_state(), np.random.get_state()[1].tolist())
    COMPOSERS[name](embeddings, 32, seed=0, epoch=0)
    assert torch.equal(embeddings, before)
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == np.random.get_state()[1].tolist()


@every
def test_trains_under_the_callback(name):
    model = Model()
    fit(model, Data(8, 203), walker(80, composer=COMPOSERS[name]))
    for batches in model.epochs.values():
        assert len(set(sum(batches, []))) == 200
        assert (same_cluster_share(batches) > 0.13) == (not name.startswith("uniform"))


def test_knn_batches_are_the_nearest_that_are_left():
    embeddings = clusters(200)
    unit = torch.nn.functional.normalize(embeddings, dim=1)
    left = set(range(200))
    for batch in knn_batches(embeddings, 20, seed=3, epoch=0).tolist():
        root, *nearest = batch
        similarity = unit @ unit[root]
        expected = sorted(left - {root}, key=lambda other: -similarity[other])[:19]
        assert sorted(nearest) == sorted(expected)
        left -= set(batch)


def test_knn_batches_take_all_zero_embeddings_last():
    embeddings = clusters(200)
    zero = torch.arange(0, 200, 10)
    embeddings[zero] = 0
    batches = knn_batches(embeddings, 20, seed=3, epoch=0)
    assert not np.isin(batches[:8, 1:], zero).any()  # the first instance is a root: it may be zero


def test_gcbs_brings_neighbors_together_whatever_the_order():
    """Reverse Cuthill-McKee finds the order along a shuffled ring, from both sides at a time."""
    angle = torch.arange(400) / 400 * 2 * torch.pi
    ring = torch.stack([angle.cos(), angle.sin()], dim=1)
    order = torch.randperm(400, generator=torch.Generator().manual_seed(0))
    batches = order.numpy()[GCBSComposer(n_neighbors=4)(ring[order], 40, seed=0, epoch=0)]
    for batch in batches:
        gaps = np.diff(np.sort(batch), append=batch.min() + 400)
        assert np.sum(gaps > 3) <= 2  # each batch covers one or two stretches of the ring


@pytest.mark.parametrize("n_neighbors", [1, 10, 100])
def test_gcbs_keeps_as_many_pairs_as_told(n_neighbors):
    unit = torch.nn.functional.normalize(torch.randn(2000, 16, generator=torch.Generator().manual_seed(0)), dim=1)
    kept = (unit @ unit.T > GCBSComposer(n_neighbors)._threshold(unit, seed=0)).sum().item() / 2000 - 1
    assert kept == pytest.approx(n_neighbors, rel=0.1)


def test_b3_joins_the_ranks_after_the_nearest():
    embeddings, joined = clusters(200), []

    class Watched(B3Composer):
        def _communities(self, neighbors, seed):
            joined.append(neighbors)
            return super()._communities(neighbors, seed)

    for graph in (None, ExactGraph(60)):
        Watched(n_skipped=30, n_neighbors=10, graph=graph)(embeddings, 20, seed=0, epoch=0)
        assert np.array_equal(joined[-1], ExactGraph(40)(embeddings)[:, 30:])


def test_b3_joins_in_both_directions_only(monkeypatch):
    embeddings, given = clusters(200), []
    cut = pymetis.part_graph

    def watch(n_parts, adjacency, **kwargs):
        given.append(adjacency)
        return cut(n_parts, adjacency, **kwargs)

    monkeypatch.setattr(pymetis, "part_graph", watch)
    B3Composer(n_skipped=5, n_neighbors=10, community_size=10)(embeddings, 20, seed=0, epoch=0)
    ranked = [set(row) for row in ExactGraph(15)(embeddings)[:, 5:].tolist()]
    starts, ends = given[0].adj_starts, given[0].adjacent
    for node in range(200):
        joined = {other for other in ranked[node] if node in ranked[other]}
        assert set(ends[starts[node] : starts[node + 1]].tolist()) == joined


def test_b3_fills_batches_with_communities():
    embeddings = clusters(640, n_clusters=20)
    nearest = B3Composer(n_skipped=0, n_neighbors=20, community_size=8)(embeddings, 32, seed=0, epoch=0)
    unit = torch.nn.functional.normalize(embeddings, dim=1)[torch.from_numpy(nearest)]
    alike = (unit @ unit.transpose(1, 2) > 0.8).sum(dim=2).float() - 1
    assert 4 < alike.mean() < 14  # neighbours come from a community of 8, not from a batch of 32


@pytest.mark.parametrize(("size", "batch_size"), [(640, 32), (60, 20)])  # 60 leaves 4 instances over
def test_b3_batches_are_whole_communities_of_equal_size(size, batch_size):
    n_communities = size // 8
    uneven = np.random.default_rng(0).integers(n_communities, size=size)
    counts = np.bincount(uneven)
    assert 0 < counts.min() < 8 < counts.max()

    class Uneven(B3Composer):
        def _communities(self, neighbors, seed):
            return uneven

    compose = Uneven(n_skipped=0, n_neighbors=20, community_size=8)
    orders = [compose(clusters(size), batch_size, seed=seed, epoch=0).ravel() for seed in (0, 1)]
    even = [uneven[order[: 8 * n_communities].reshape(-1, 8)] for order in orders]
    for rows in even:
        assert sorted(rows[:, 0]) == list(range(n_communities))  # a community's own members stand first
        assert np.sum(rows == rows[:, :1]) == np.minimum(counts, 8).sum()  # others take the places that are free
    assert not np.array_equal(even[0][:, 0], even[1][:, 0])


def test_the_nearest_cluster_comes_next_however_far_from_the_centre_it_lies():
    centers = np.array([[4.0], [2.5], [3.5], [9.0]], dtype=np.float32)
    assert baselines._nearest_next(centers, 0).tolist() == [0, 2, 1, 3]


@pytest.mark.parametrize("packing", ["random", "greedy"])
def test_cluster_batches_are_cut_from_a_sequence_of_clusters(packing, monkeypatch):
    k_means, found = baselines._k_means, []

    def watch(*arguments):
        found.append(k_means(*arguments))
        return found[-1]

    monkeypatch.setattr(baselines, "_k_means", watch)
    compose = ClusterComposer(cluster_size=12, packing=packing)
    batches = [compose(clusters(), 20, seed=seed, epoch=0) for seed in (0, 1)]
    assert not np.array_equal(*batches)
    for (cluster, centers), batch in zip(found, batches, strict=True):
        sizes = np.bincount(cluster)
        assert len(centers) == len(sizes)
        assert sizes.min() > 0
        assert sizes.mean() == pytest.approx(12, rel=0.2)
        assert sizes.max() > 20  # a large cluster fills several batches
        pieces = sum(len(set(row)) for row in cluster[batch])
        assert pieces <= len(sizes) + len(batch) - 1  # only the ends of batches cut clusters


@pytest.mark.parametrize("gap", [0.0, 3.0])
def test_clusters_are_of_both_sides(gap):
    """Instances that share one side only are apart."""
    first, second = torch.eye(16)[:8].repeat(80, 1), torch.eye(16)[8:].repeat_interleave(80, dim=0)
    place = torch.zeros(2, 16)
    place[0, 0] = place[1, 8] = gap  # the sides lie in different places
    order = torch.randperm(640, generator=torch.Generator().manual_seed(0))
    sides = (torch.stack([first, second], dim=1) + place)[order]
    kinds = (torch.arange(640) % 8 * 8 + torch.arange(640) // 80)[order].numpy()  # 64 kinds, 10 instances of each
    batches = kinds[ClusterComposer(cluster_size=5)(sides, 10, seed=0, epoch=0)]
    same = np.mean([(batch[:, None] == batch).mean() for batch in batches])
    assert same > 0.5


def test_k_means_restores_the_number_of_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        ClusterComposer()(clusters(), 32, seed=0, epoch=0)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_greedy_packing_puts_neighbouring_clusters_into_a_batch():
    angle = torch.arange(400) / 400 * 2 * torch.pi
    order = torch.randperm(400, generator=torch.Generator().manual_seed(0))
    ring = torch.stack([angle.cos(), angle.sin()], dim=1)[order]
    middle = {}
    for packing in ("random", "greedy"):
        batches = ClusterComposer(cluster_size=5, packing=packing)(ring, 40, seed=0, epoch=0)
        middle[packing] = torch.stack([ring[batch].mean(dim=0) for batch in torch.from_numpy(batches)])
    assert middle["greedy"].norm(dim=1).median() > 0.95  # an arc of a tenth of the ring has 0.98
    assert middle["random"].norm(dim=1).median() < 0.6
    following = (middle["greedy"][1:] * middle["greedy"][:-1]).sum(dim=1)
    assert following.mean() < 0.4  # batches come in random order: along the ring it would be 0.8


def compose(composer, size=40, batch_size=4):
    return composer(torch.randn(size, 4), batch_size, seed=0, epoch=0)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: GCBSComposer(0), "n_neighbors must be at least 1, got 0"),
        (lambda: B3Composer(n_skipped=-1), "n_skipped must be at least 0, got -1"),
        (lambda: B3Composer(n_neighbors=0), "n_neighbors must be at least 1, got 0"),
        (lambda: B3Composer(community_size=0), "community_size must be at least 1, got 0"),
        (lambda: ClusterComposer(cluster_size=0), "cluster_size must be at least 1, got 0"),
        (lambda: ClusterComposer(packing="tsp"), "packing must be 'random' or 'greedy', got 'tsp'"),
        # Without these errors, the batches would silently be almost uniform.
        (lambda: compose(GCBSComposer(39)), "n_neighbors=39 keeps all pairs of 40 embeddings"),
        (lambda: compose(B3Composer(9, 30)), "n_skipped=9 and n_neighbors=30 take all neighbours of each of 40"),
        (lambda: compose(B3Composer(2, 10, 32)), "community_size=32 makes one community of 40 embeddings"),
        (lambda: compose(ClusterComposer(40)), "cluster_size=40 makes one cluster of 40 embeddings"),
        (lambda: compose(B3Composer(9, 10, 8, graph=ExactGraph(9))), "leaves nothing of the graph's 9 neighbours"),
    ],
)
def test_refuses_bad_arguments(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize(
    "make",
    [
        lambda: GCBSComposer(2.5),
        lambda: B3Composer(2.5),
        lambda: B3Composer(graph=3),
        lambda: ClusterComposer(2.5),
        lambda: compose(knn_batches, batch_size=4.0),
    ],
)
def test_refuses_other_types(make):
    with pytest.raises(TypeError, match="must be"):
        make()


@pytest.mark.parametrize("name", [name for name in COMPOSERS if "rwr" not in name])
@pytest.mark.parametrize(("size", "batch_size"), [(40, 16), (40, 100), (40, 0)])
def test_refuses_what_does_not_fill_batches(name, size, batch_size):
    with pytest.raises(ValueError, match=f"batch_size must divide the number of embeddings, {size}, got {batch_size}"):
        compose(COMPOSERS[name], size, batch_size)


@pytest.mark.parametrize("make", [UniformComposer, lambda graph: B3Composer(2, 10, 8, graph=graph)])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda neighbors: np.where(neighbors == 3, -1, neighbors), r"neighbors must lie in \[0, 40\), got -1"),
        (lambda neighbors: neighbors + 20, r"neighbors must lie in \[0, 40\), got 59"),  # METIS would crash
        (lambda neighbors: neighbors[:9], "a row of neighbours for each of 40 embeddings, got 9 rows"),
    ],
)
def test_refuses_what_is_no_graph(make, change, words):
    with pytest.raises(ValueError, match=words):
        compose(make(lambda embeddings, *, seed=0: change(ExactGraph(20)(embeddings))))


def test_b3_takes_a_rows_own_number_for_no_edge(monkeypatch):
    adjacencies = []

    def part_graph(n_parts, adjacency, **_):
        adjacencies.append(adjacency)
        return SimpleNamespace(vertex_part=np.arange(40) % n_parts)

    monkeypatch.setattr(pymetis, "part_graph", part_graph)
    own = np.arange(40)[:, None]
    neighbors = np.concatenate([(own + 1) % 40, (own - 1) % 40, own, own], axis=1).astype(np.int32)
    compose(B3Composer(0, 4, 8, graph=lambda embeddings, *, seed=0: neighbors))
    starts, ends = np.asarray(adjacencies[0].adj_starts), np.asarray(adjacencies[0].adjacent)
    assert [sorted(ends[first:last]) for first, last in pairwise(starts)] == [
        sorted(((number + 1) % 40, (number - 1) % 40)) for number in range(40)
    ]


@pytest.mark.parametrize("name", [name for name in COMPOSERS if "rwr" not in name])
@pytest.mark.parametrize("kind", [np.uint8, np.int8, np.uint64, torch.tensor])
def test_takes_integers_of_other_kinds_as_batch_sizes(name, kind):
    z = torch.randn(320, 8)
    expected = COMPOSERS[name](z, 16, seed=0, epoch=0)
    assert np.array_equal(COMPOSERS[name](z, kind(16), seed=0, epoch=0), expected)
