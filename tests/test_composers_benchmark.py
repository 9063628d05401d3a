"""The benchmark of composers: started as users start it, and what it says where it has nothing to show."""

import csv
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import composers


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs a command in this process, on `n` clustered embeddings."""

    def run(command, *options, n=None, labels=True):
        if n is not None:
            options = ("--embeddings", str(clustered(tmp_path, n, labels)), *options)
        monkeypatch.setattr(sys, "argv", ["composers.py", command, "--out", str(tmp_path), *map(str, options)])
        composers.main()

    monkeypatch.setattr(composers, "alone", lambda function, *arguments: function(*arguments))
    return run


def clustered(folder, n, labels=True):
    rng = np.random.default_rng(0)
    y = rng.integers(10, size=n)
    z = rng.normal(size=(10, 16))[y] + 0.7 * rng.normal(size=(n, 16))
    np.savez(folder / "embeddings.npz", z=z, **({"y": y} if labels else {}))
    return folder / "embeddings.npz"


def rows(folder):
    with (folder / "table.csv").open(newline="") as file:
        return {row["composer"]: row for row in csv.DictReader(file)}


@pytest.mark.slow
def test_table_and_plot_of_a_few_hundred(tmp_path):
    def start(command, *options):
        script = [sys.executable, composers.__file__, command, "--out", tmp_path, *options]
        return subprocess.run(script, check=True, capture_output=True, text=True, timeout=240).stdout

    few = ("--batch-size", "50", "--only", "uniform", "pools, P 500", "pools, P 5000", "paper's graph")
    printed = start("table", "--embeddings", clustered(tmp_path, 640), *few)
    assert "- pools, P 5000: a pool is larger than the data's whole batches, 600" in printed
    assert "- paper's graph: its graph of 1000 candidates would be the exact one of 600 instances" in printed
    found = rows(tmp_path)
    assert list(found) == ["uniform", "pools, P 500"]
    for name, row in found.items():
        assert f"\n| {name} |" in printed
        assert 0 < float(row["FN"]) < 1
        assert float(row["seen"]) == 1
    for measure in ("FN", "TN", "FN mass", "root"):
        assert float(found["pools, P 500"][measure]) > float(found["uniform"][measure]) + 0.01
    assert str(tmp_path / "table.png") in start("plot")
    assert (tmp_path / "table.png").stat().st_size > 0


def test_rows_that_say_nothing_are_left_out_and_listed(run, tmp_path, capsys):
    run("table", "--batch-size", 50, n=100)
    shown, skipped = capsys.readouterr().out.split("\nSkipped:\n")
    assert list(rows(tmp_path)) == ["uniform", "kNN sampler", "GCBS, pairs 10"]
    assert shown.count("\n") == 2 + 3
    lines = dict(line.removeprefix("- ").split(": ", 1) for line in skipped.splitlines())
    names = {composers.name_of(*key, 50) for key in composers.table(50)}
    assert set(lines) == names - set(rows(tmp_path))
    assert lines["GCBS, pairs 100"].startswith("n_neighbors=100 keeps all pairs of 100")
    assert lines["B3, skipped 30"].startswith("n_skipped=30 and n_neighbors=100 take all neighbours")
    assert lines["pools of 500, roots 4"].startswith("a pool is larger")
    assert lines["kNN graph, K 100"] == "its graph of 100 neighbours would join all of 100 instances"


def test_pools_are_of_whole_batches():
    names = {size: {composers.name_of(*key, size) for key in composers.table(size)} for size in (50, 256)}
    assert {"pools, P 1024", "pools, P 2560", "pools of 2560, roots 4"} < names[256]
    assert {"pools, P 200", "pools, P 500", "pools of 500, roots 4"} < names[50]


@pytest.mark.parametrize(
    ("command", "options", "words"),
    [
        ("table", [], r"\.npz has 200 rows, but `table` needs 512: two batches of --batch-size 256\. Give more rows"),
        ("table", ["--instances", 90, "--batch-size", 50], "--instances 90 has 90 rows, but `table` needs 100"),
        ("paper", ["--batch-size", 50], "200 rows, but `paper` needs 1002: .* and more than 1000 others"),
        ("escape", ["--batch-size", 50], "200 rows, but `escape` needs 1002"),
        ("table", ["--batch-size", 50, "--only", "paper's graph"], "No row for 200 embeddings and --batch-size 50"),
    ],
)
def test_too_few_embeddings_are_refused(run, command, options, words):
    with pytest.raises(SystemExit, match=words):
        run(command, *options, n=200)


def test_wrong_options_are_refused(run, capsys):
    with pytest.raises(SystemExit, match=r"--only \['pools'\]: no such rows\. Give .* or of .*'pools, P'"):
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
    with pytest.raises(SystemExit, match=r"No plot of FN against TN: .*table.csv has no labelled rows\. Give .* y"):
        run("plot")
    run("scale", "--largest", 10_000, "--only", "uniform")
    capsys.readouterr()
    run("plot")
    printed = capsys.readouterr().out
    assert str(tmp_path / "scale.png") in printed
    assert "No plot of FN against TN" in printed
    assert not (tmp_path / "table.png").exists()
