"""Several processes, started as users start them."""

import itertools
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from subprocess import TimeoutExpired

import pytest
import torch
from parts import same_cluster_share
from processes import SCRIPT, Hung, batches_by_step, finish, run, run_all, seen

SETTINGS = {
    "slow rank 1": {"slow_rank": 1},
    "slow rank 0": {"slow_rank": 0, "loader": {"num_workers": 2, "prefetch_factor": 8}},
    "workers": {"loader": {"num_workers": 1, "persistent_workers": True}, "warmup_epochs": 1},
    "unused parameters": {"strategy": "ddp_find_unused_parameters_true"},
    "no distributed sampler": {"use_distributed_sampler": False},
    "odd sizes": {"pool_size": 45, "n": 211},
    "rank 0 looks alone": {"looks_alone": True},
}
RUNS = SETTINGS | {
    "default": {"num_sanity_val_steps": 0, "mask_nearest": 3},
    "rest": {"drop_last": False, "n": 205},
    "per rank": {"per_rank": True, "pool_size": 240, "n": 1003, "mask_nearest": 3},
    "sides": {"two_sides": True, "groups": True},
    "sides, per rank": {"two_sides": True, "groups": True, "per_rank": True},
    "low loss": {"pool_size": "auto", "target_loss": 100.0},
    "high loss": {"pool_size": "auto", "target_loss": 1e-9},
    "recycled": {"recycle": True, "warmup_epochs": 1, "pool_size": 80, "save_every": 5},
    "recycled, ahead": {
        "recycle": True,
        "warmup_epochs": 1,
        "pool_size": 80,
        "loader": {"num_workers": 2, "prefetch_factor": 8},
    },
    "kept": {"encode_every": 2, "pool_size": "all", "n": 200, "max_epochs": 3, "looks_alone": True},
    "kept, reloaded": {
        "encode_every": 9,
        "pool_size": "all",
        "n": 200,
        "max_epochs": 3,
        "looks_alone": True,
        "reload_dataloaders_every_n_epochs": 2,
    },
    "kept, per rank": {"encode_every": 2, "per_rank": True, "pool_size": 240, "n": 1003, "max_epochs": 3},
    "encoded": {"composer": "pool order", "warmup_epochs": 1, "max_epochs": 3},
    "plain": {"composer": "none", "warmup_epochs": 1, "max_epochs": 3},
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """All of these runs, in two processes that are started once; return what each rank of each run recorded."""
    folder = tmp_path_factory.mktemp("runs")
    return folder, run_all(folder, RUNS)


def global_batches(ranks, epoch):
    return [sum(parts, []) for parts in zip(*(rank["epochs"][str(epoch)] for rank in ranks), strict=True)]


def assert_covered(ranks, epochs=2, n=203, batch_size=4):
    size = batch_size * len(ranks)
    for epoch in range(epochs):
        batches = global_batches(ranks, epoch)
        indices = sum(batches, [])
        assert len(batches) == n // size
        assert len(set(indices)) == len(indices) == n // size * size


def test_ddp_with_default_flags(trained):
    ranks = trained[1]["default"]
    assert_covered(ranks)
    assert ranks[0]["masks"] == ranks[1]["masks"]
    assert any(max(pair) >= 4 for mask in ranks[0]["masks"] for pair in mask)  # of the global batch
    assert ranks[0]["encoded"] == ranks[1]["encoded"]  # equal parts, the same number of calls
    assert sum(ranks[0]["encoded"]) * 2 == 200 * 2  # 25 global batches of 8 in each of two epochs
    assert ranks[0]["weights"] == ranks[1]["weights"]
    assert ranks[0]["shared"] == [True] * 10  # graphs, by both processes; the script compares them with ExactGraph's
    assert ranks[1]["shared"] == []
    for epoch in (0, 1):
        walked = global_batches(ranks, epoch)
        assert same_cluster_share(walked) > 0.25
        # One walk made the global batch: a rank's part is as close to the other's part as to itself.
        across = [a % 10 == b % 10 for batch in walked for a in batch[:4] for b in batch[4:]]
        assert sum(across) / len(across) > 0.2
    logged = [rank["logged"] for rank in ranks]
    assert logged[0]["batch_sampler/false_negative_rate"] == logged[1]["batch_sampler/false_negative_rate"]
    share = same_cluster_share(global_batches(ranks, 1))
    assert logged[0]["batch_sampler/false_negative_rate"] == pytest.approx(share, abs=1e-5)


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="asks for the cores that a process may use")
@pytest.mark.parametrize("name", ["default", "per rank"])
def test_graphs_leave_other_processes_their_cores(trained, name):
    for rank in trained[1][name]:
        assert set(rank["cores"]) == {max(len(os.sched_getaffinity(0)) // 2, 1)}


def assert_trained_alike(ranks, n=203):
    assert_covered(ranks, n=n)
    assert ranks[0]["weights"] == ranks[1]["weights"]
    assert same_cluster_share(global_batches(ranks, 1)) > 0.2


@pytest.mark.parametrize("name", SETTINGS)
def test_speeds_loaders_and_flags(trained, name):
    assert_trained_alike(trained[1][name], SETTINGS[name].get("n", 203))


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"strategy": "ddp_spawn"}, {"sharded": True}], ids=str)
def test_other_strategies(settings, tmp_path):
    assert_trained_alike(run(tmp_path, **settings))


def test_a_last_batch_is_shared_out(trained):
    ranks = trained[1]["rest"]
    for epoch in (0, 1):
        batches = global_batches(ranks, epoch)
        assert sorted(sum(batches, [])) == list(range(205))
    assert [len(rank["epochs"]["0"][-1]) for rank in ranks] == [3, 2]


@pytest.mark.slow
def test_two_nodes_of_two_processes_under_torchrun(tmp_path):
    """Two launchers on one machine, as on two."""
    settings = json.dumps({"strategy": "ddp", "devices": 2, "num_nodes": 2, "batch_size": 2, "pool_size": 44})
    nodes = []
    for node in (0, 1):
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=2"]
        command += [f"--node-rank={node}", "--master-addr=localhost", "--master-port=29517"]
        nodes.append([*command, SCRIPT, tmp_path, settings])
    with ThreadPoolExecutor() as launchers:
        for done in launchers.map(finish, nodes):
            assert done.returncode == 0, done.error[-4000:]
    ranks = seen(tmp_path, 4)
    assert_covered(ranks, batch_size=2)
    assert len({rank["weights"] for rank in ranks}) == 1
    assert same_cluster_share(global_batches(ranks, 1)) > 0.25


def test_walks_of_each_rank(trained):
    ranks = trained[1]["per rank"]
    assert_covered(ranks, n=1003)
    assert set(ranks[0]["shared"] + ranks[1]["shared"]) == {False}  # each process builds graphs of its own
    shares = [same_cluster_share(rank["epochs"]["1"]) for rank in ranks]
    assert min(shares) > 0.3
    logged = [rank["logged"]["batch_sampler/false_negative_rate"] for rank in ranks]
    assert logged == pytest.approx([sum(shares) / 2] * 2, abs=1e-4)
    assert abs(shares[0] - shares[1]) > 1e-3  # a rank's own would not do
    assert ranks[0]["masks"] == ranks[1]["masks"]  # of the global batch, each rank's pairs in its own part
    pairs = [pair for mask in ranks[0]["masks"] for pair in mask]
    assert {(a // 4, b // 4) for a, b in pairs} == {(0, 0), (1, 1)}
    across = [a % 10 == b % 10 for batch in global_batches(ranks, 1) for a in batch[:4] for b in batch[4:]]
    assert sum(across) / len(across) < 0.16


@pytest.mark.parametrize("name", ["sides", "sides, per rank"])
def test_two_sides_groups_and_rules(trained, name):
    ranks = trained[1][name]
    assert_covered(ranks)
    assert ranks[0]["weights"] == ranks[1]["weights"]
    for batch in global_batches(ranks, 0) + global_batches(ranks, 1):
        assert len({index // 3 for index in batch}) == 8  # groups are kept apart across the processes
    assert ranks[0]["masks"] == ranks[1]["masks"]
    masks = [{tuple(pair) for pair in mask} for mask in ranks[0]["masks"]]
    assert any((b, a) not in mask for mask in masks for a, b in mask)  # the own rule has a direction


@pytest.mark.parametrize("name", ["low loss", "high loss"])
def test_pools_that_follow_the_loss_are_the_same_in_all_processes(trained, name):
    ranks = trained[1][name]
    assert_covered(ranks)
    assert ranks[0]["weights"] == ranks[1]["weights"]
    assert ranks[0]["logged"]["batch_sampler/pool_size"] == ranks[1]["logged"]["batch_sampler/pool_size"]
    composed = same_cluster_share(global_batches(ranks, 1)) > 0.2
    assert composed == (name == "low loss")


def test_recycled_embeddings_are_those_of_all_ranks(trained):
    ranks = trained[1]["recycled"]
    assert_covered(ranks)
    assert ranks[0]["encoded"] == ranks[1]["encoded"] == []
    assert set(ranks[0]["shared"]) == {False}  # only rank 0 keeps embeddings
    assert ranks[0]["weights"] == ranks[1]["weights"]
    across = [a % 10 == b % 10 for batch in global_batches(ranks, 1) for a in batch[:4] for b in batch[4:]]
    assert sum(across) / len(across) > 0.14
    bank = torch.load(trained[0] / "recycled" / "last.ckpt", weights_only=True)["callbacks"]["BatchSamplerCallback"][
        "rows"
    ]
    assert bank.dtype == torch.float16
    trained = sum(global_batches(ranks, 0) + global_batches(ranks, 1), [])
    assert set(bank.any(dim=1).nonzero().flatten().tolist()) == set(trained)


def test_pools_that_are_planned_ahead_are_the_same(trained):
    ahead, recycled = (trained[1][name] for name in ("recycled, ahead", "recycled"))
    assert [global_batches(ahead, epoch) for epoch in (0, 1)] == [global_batches(recycled, epoch) for epoch in (0, 1)]


def embedded(ranks):
    return [sum(rank["encoded"]) for rank in ranks]


def test_kept_embeddings_and_their_graph_are_made_by_all_ranks(trained):
    ranks = trained[1]["kept"]
    assert_covered(ranks, epochs=3, n=200)
    assert embedded(ranks) == [200, 200]  # half of the data, in the first and the third epoch
    assert ranks[0]["shared"] == [True] * 3  # the script compares the kept graph with ExactGraph's
    assert ranks[0]["weights"] == ranks[1]["weights"]
    assert same_cluster_share(global_batches(ranks, 1)) > 0.25


def test_ranks_embed_together_where_one_looks_into_the_data(trained):
    ranks = trained[1]["kept, reloaded"]
    assert_covered(ranks, epochs=3, n=200)
    # Rank 0 alone has asked for the data again after each epoch. As they may be different, all ranks embed them anew.
    assert embedded(ranks) == [300, 300]
    assert ranks[0]["weights"] == ranks[1]["weights"]


def test_kept_embeddings_of_walks_of_each_rank(trained):
    ranks = trained[1]["kept, per rank"]
    assert_covered(ranks, epochs=3, n=1003)
    assert embedded(ranks) == [2 * 502] * 2  # one instance comes twice, so that the parts are equal
    assert min(same_cluster_share(rank["epochs"]["1"]) for rank in ranks) > 0.3
    assert ranks[0]["weights"] == ranks[1]["weights"]


KEPT_IN_CHECKPOINTS = [
    {"recycle": True, "refresh_every": 5, "pool_size": None},
    {"recycle": True, "per_rank": True, "drop_last": False},
    {"recycle": True, "loader": {"num_workers": 2, "prefetch_factor": 8}},
    {"encode_every": 2, "warmup_epochs": 0},
    {"encode_every": 2, "per_rank": True, "drop_last": False},
]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KEPT_IN_CHECKPOINTS, ids=str)
def test_kept_embeddings_killed_and_resumed(kind, tmp_path):
    settings = {"warmup_epochs": 1, "max_epochs": 3, "save_every": 3, "n": 205} | kind
    for kill_at in (8, 31, 40):
        run(tmp_path / "killed", kill_at=kill_at, fails=True, **settings)
    killed, whole = run_all(tmp_path, {"killed": settings, "whole": settings}).values()
    assert batches_by_step(tmp_path / "killed", 2) == batches_by_step(tmp_path / "whole", 2)
    assert [rank["weights"] for rank in killed] == [rank["weights"] for rank in whole]


@pytest.mark.parametrize(
    ("fail", "how"),
    [
        ("encode", {}),
        ("eval mode", {}),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in itertools.product(("encode", "graph"), ({"sharded": True}, {"per_rank": True}))
        ),
        pytest.param("graph", {}, marks=pytest.mark.slow),
        pytest.param("kept graph", {"encode_every": 2, "pool_size": "all"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_all_ranks_stop_where_one_fails(fail, how, tmp_path):
    stderr = run(tmp_path, fail=fail, fails=True, **how)
    why = {
        "encode": "no embedding on rank 1",
        "eval mode": "no eval mode on rank 1",
        "graph": "no graph",
        "kept graph": "The graph must return a row",
    }[fail]
    assert why in stderr
    if how != {"sharded": True}:
        rank = 0 if fail == "kept graph" or (fail == "graph" and not how) else 1
        words = (tmp_path / f"rank{1 - rank}.error").read_text()
        assert words.startswith(f"RuntimeError: The process of rank {rank} failed to plan a pool. ValueError: {why}")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("loader", "save_every", "kills"),
    [
        ({"num_workers": 0}, 3, (8, 15, 33)),
        ({"num_workers": 2, "prefetch_factor": 8}, 5, (14, 24, 25)),
        ({"num_workers": 2, "prefetch_factor": 8, "persistent_workers": True}, 5, (15, 24, 40)),
    ],
    ids=str,
)
def test_killed_and_resumed(loader, save_every, kills, tmp_path):
    """Pools of 5 batches of 25 an epoch; killed in mid-pool, at a pool's first and last batch, and at an epoch's."""
    settings = {"loader": loader, "save_every": save_every, "warmup_epochs": 0}
    for kill_at in kills:
        run(tmp_path / "killed", kill_at=kill_at, fails=True, **settings)
    killed, whole = run_all(tmp_path, {"killed": settings, "whole": settings}).values()
    assert batches_by_step(tmp_path / "killed", 2) == batches_by_step(tmp_path / "whole", 2)
    assert [rank["weights"] for rank in killed] == [rank["weights"] for rank in whole]


@pytest.mark.slow
def test_processes_share_a_descent(tmp_path):
    """The script compares its graphs with ExactGraph's."""
    ranks = run(tmp_path, composer="descent", pool_size=1000, n=1003, warmup_epochs=1)
    assert_covered(ranks, n=1003)
    assert ranks[0]["shared"] == [True]
    assert ranks[1]["shared"] == []
    assert same_cluster_share(global_batches(ranks, 1)) > 0.25
    assert ranks[0]["weights"] == ranks[1]["weights"]


@pytest.mark.slow
def test_resumed_on_another_number_of_processes(tmp_path):
    """With an equal global batch: the pool in progress goes on, and no instance comes twice in an epoch."""
    settings = {"save_every": 3, "warmup_epochs": 0}
    whole = run(tmp_path / "whole", **settings)
    run(tmp_path / "killed", kill_at=33, fails=True, **settings)
    one = run(tmp_path / "killed", devices=1, batch_size=8, **settings)
    before = global_batches(whole, 1)
    rest = one[0]["epochs"]["1"]
    assert len(rest) == 50 - 33
    assert rest[:2] == before[8:10]  # of the pool of steps 30 to 34
    indices = sum(before[:8] + rest, [])
    assert len(set(indices)) == len(indices) == 200


def test_no_trace_on_two_processes(trained):
    """Weights, buffers, optimizer and random states of every rank, bit for bit."""
    encoded, plain = trained[1]["encoded"], trained[1]["plain"]
    assert [rank["digest"] for rank in encoded] == [rank["digest"] for rank in plain]
    assert encoded[0]["encoded"]
    assert not plain[0]["encoded"]


@pytest.mark.slow
@pytest.mark.parametrize("form", ["pure --cases 60 --seconds 60", "fits --cycles 3 --seconds 30"])
def test_the_stress_script_in_short(form):
    root = Path(__file__).parents[1]
    done = finish([sys.executable, "-m", "benchmarks.stress", *form.split()], cwd=root)
    assert done.returncode == 0, done.error


def test_a_run_without_progress_is_killed_and_says_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr("processes.PATIENCE", 5)
    script = "import faulthandler, signal, time; faulthandler.register(signal.SIGUSR1); time.sleep(100)"
    with pytest.raises(Hung, match=r"File .<string>., line 1 in <module>"):
        finish([sys.executable, "-c", script], watched=tmp_path)
    with pytest.raises(TimeoutExpired) as late:
        finish([sys.executable, "-c", script], timeout=5)
    assert "line 1 in <module>" in late.value.__notes__[0]
