"""The benchmark of composers, started as users start it, and its messages if it has nothing to show."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import csv_files, pools
from benchmarks.composers import __main__ as composers
from benchmarks.composers import catalog, plot, scale, table
from bs_lightning import _walk_kernel

ROOT = Path(__file__).parents[1]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Return a function that runs a command in this process, on `n` clustered embeddings."""

    def run(command, *options, n=None, labels=True):
        if n is not None:
            options = ("--embeddings", str(clustered(tmp_path, n, labels)), *options)
        if command == "plot":
            options = ("--out", tmp_path)
        monkeypatch.setattr(sys, "argv", ["composers", command, "--results", str(tmp_path), *map(str, options)])
        composers.main()

    for module in (table, scale):
        monkeypatch.setattr(module, "in_new_process", lambda function, *arguments: function(*arguments))
    return run


def clustered(folder, n, labels=True):
    rng = np.random.default_rng(0)
    y = rng.integers(10, size=n)
    z = rng.normal(size=(10, 16))[y] + 0.7 * rng.normal(size=(n, 16))
    np.savez(folder / "embeddings.npz", z=z, **({"y": y} if labels else {}))
    return folder / "embeddings.npz"


def rows(folder):
    return {row["composer"]: row for row in csv_files.read(folder / "table.csv")}


@pytest.mark.slow
def test_table_and_plot_of_a_few_hundred(tmp_path):
    def start(command, *options):
        script = [sys.executable, "-m", "benchmarks.composers", command, "--results", tmp_path, *options]
        return subprocess.run(script, check=True, capture_output=True, text=True, timeout=240, cwd=ROOT).stdout

    few = ("--batch-size", "50", "--only", "uniform", "pools, P 500", "pools, P 5000", "paper's graph")
    printed = start("table", "--embeddings", clustered(tmp_path, 640), *few)
    assert "- pools, P 5000: a pool is larger than the data's whole batches, 600" in printed
    assert "- paper's graph: its graph of 1000 candidates would be the exact one of 600 instances" in printed
    found = rows(tmp_path)
    assert list(found) == ["uniform", "pools, P 500"]
    for name, row in found.items():
        assert f"\n| {name} |" in printed
        assert 0 < float(row["false_negative_rate"]) < 1
        assert float(row["seen"]) == 1
        assert (row["instances"], row["batch_size"], row["temperature"]) == ("640", "50", "0.5")
    for column in ("hardness", "false_negative_rate", "false_negative_mass", "root_similarity"):
        assert float(found["pools, P 500"][column]) > float(found["uniform"][column]) + 0.01
    assert str(tmp_path / "composers.png") in start("plot", "--out", tmp_path)
    assert (tmp_path / "composers.png").stat().st_size > 0


def test_rows_that_say_nothing_are_left_out_and_listed(run, tmp_path, capsys):
    run("table", "--batch-size", 50, n=100)
    shown, skipped = capsys.readouterr().out.split("\nSkipped:\n")
    clusters = [
        f"clusters{size}, packing {order}" for size in ("", " of a quarter batch") for order in ("random", "greedy")
    ]
    assert list(rows(tmp_path)) == ["uniform", "kNN sampler", "GCBS, pairs 10", *clusters]
    assert shown.count("\n") == 2 + 3 + len(clusters)
    lines = dict(line.removeprefix("- ").split(": ", 1) for line in skipped.splitlines())
    names = {catalog.name_of(key, 50) for key in catalog.composers(50)}
    assert set(lines) == names - set(rows(tmp_path))
    assert lines["GCBS, pairs 100"].startswith("n_neighbors=100 keeps all pairs of 100")
    assert lines["B3, skipped 30"].startswith("n_skipped=30 and n_neighbors=100 take all neighbours")
    assert lines["pools of 500, roots 4"].startswith("a pool is larger")
    assert lines["kNN graph, K 100"] == "its graph of 100 neighbours would join all of 100 instances"


def test_pools_are_of_whole_batches():
    names = {size: {catalog.name_of(key, size) for key in catalog.composers(size)} for size in (50, 256)}
    assert {"pools, P 1024", "pools, P 2560", "pools of 2560, roots 4"} < names[256]
    assert {"pools, P 200", "pools, P 500", "pools of 500, roots 4"} < names[50]


@pytest.mark.parametrize(
    ("command", "options", "words"),
    [
        ("table", [], r"\.npz has 200 rows, but `table` needs 512: two batches of --batch-size 256\. Give more rows"),
        ("table", ["--instances", 90, "--batch-size", 50], "--instances 90 has 90 rows, but `table` needs 100"),
        ("paper", ["--batch-size", 50], "200 rows, but `paper` needs 1002: .* and more than 1000 candidates"),
        ("escape", ["--batch-size", 50], "200 rows, but `escape` needs 1002"),
        ("table", ["--batch-size", 50, "--only", "paper's graph"], "No row for 200 embeddings and --batch-size 50"),
    ],
)
def test_too_few_embeddings_are_refused(run, command, options, words):
    with pytest.raises(SystemExit, match=words):
        run(command, *options, n=200)


def test_wrong_options_are_refused(run, capsys):
    with pytest.raises(SystemExit, match=r"--only \['pools'\]: no such composers\. Give .* or families: .*'pools, P'"):
        run("table", "--batch-size", 50, "--only", "uniform", "pools", n=100)
    with pytest.raises(SystemExit, match="ten batches of --batch-size 256 and --largest 5000"):
        run("scale", "--largest", 5000)
    with pytest.raises(SystemExit):
        run("scale", "--batch-size", 0)
    assert "--batch-size must be at least 2, got 0" in capsys.readouterr().err


def test_plot_says_what_it_cannot_draw(run, tmp_path, capsys):
    with pytest.raises(SystemExit, match=r"(?s)No .*table.csv to draw. Run `table` first.*No .*scale.csv to draw"):
        run("plot")
    run("table", "--batch-size", 50, "--only", "uniform", "kNN sampler", n=200)
    run("table", "--batch-size", 50, "--only", "uniform", "kNN sampler", n=200, labels=False)
    with pytest.raises(
        SystemExit,
        match=r"No plot of the false-negative rate: the newest rows of .*table.csv have no labels\. Give .* y",
    ):
        run("plot")
    run("scale", "--largest", 10_000, "--only", "uniform")
    capsys.readouterr()
    run("plot")
    printed = capsys.readouterr().out
    assert str(tmp_path / "composers_scale.png") in printed
    assert "No plot of the false-negative rate" in printed
    assert not (tmp_path / "composers.png").exists()


def test_plot_draws_the_newest_rows_of_one_batch_size(tmp_path):
    path = tmp_path / "scale.csv"
    for batch_size, size, seconds in ((256, 10, 1.0), (50, 20, 2.0), (256, 30, 3.0), (256, 30, 4.0)):
        row = {"composer": "uniform", "instances": size, "seconds": seconds, "batch_size": batch_size}
        csv_files.append(path, row)
    assert [(row["instances"], row["seconds"]) for row in plot.newest(path, "batch_size")] == [("10", "1"), ("30", "4")]


def test_a_results_file_gains_columns_and_keeps_its_rows(tmp_path):
    path = tmp_path / "new folder" / "results.csv"
    assert csv_files.read(path) == []
    csv_files.append(path, {"arm": "a, b", "seed": 0})
    csv_files.append(path, {"seed": 1, "loss": 1 / 3})
    assert path.read_bytes() == b'arm,seed,loss\n"a, b",0,\n,1,0.333333\n'
    assert csv_files.read(path)[1] == {"arm": "", "seed": "1", "loss": "0.333333"}
    assert list(path.parent.iterdir()) == [path]


def test_pools_of_fewer_embeddings_than_an_epoch(tmp_path, monkeypatch, capsys):
    for name in ("PATIENCE", "walk_batches"):  # the script sets them
        monkeypatch.setattr(_walk_kernel, name, getattr(_walk_kernel, name))
    given = ("--embeddings", clustered(tmp_path, 330), "--batch-size", 32, "--pool-sizes", 128, 512, "--repeats", 1)
    monkeypatch.setattr(sys, "argv", ["pools", *map(str, given)])
    pools.main()
    found = [line.split(" | ")[:2] for line in capsys.readouterr().out.splitlines()[2:]]
    assert found == [["| uniform batches", ""], ["| NNDescentGraph", "128"], ["| ExactGraph", "128"]]
