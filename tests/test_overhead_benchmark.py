"""The benchmark of costs prints its rows, and keeps them with the device and versions."""

import sys

import pytest
import torch

from benchmarks import csv_files
from benchmarks.overhead import __main__ as overhead
from benchmarks.overhead import epochs
from benchmarks.processes import measured


@pytest.mark.parametrize(
    ("command", "options", "value"),
    [
        ("encoding", "--instances 64 --rounds 6", "ratio"),
        ("profile", "--instances 64 --pool-size 32 --batch-size 8", "share"),
        # These start processes.
        pytest.param(
            "memory", "--instances 20_000 --pool-size 512 --pools 2", "peak growth, MB", marks=pytest.mark.slow
        ),
        pytest.param("epochs", "--instances 64 --batch-size 8 --rounds 6", "epoch ratio", marks=pytest.mark.slow),
    ],
)
def test_rows_are_printed_and_kept(tmp_path, monkeypatch, capsys, command, options, value):
    monkeypatch.setattr(epochs, "ARMS", {"default": {}})  # each starts a process
    arguments = [command, *options.split(), "--results", str(tmp_path), "--threads", str(torch.get_num_threads())]
    monkeypatch.setattr(sys, "argv", ["overhead", *arguments])
    overhead.main()
    rows = csv_files.read(tmp_path / f"{command}.csv")
    assert rows
    assert all(float(row[value]) >= 0 for row in rows)
    assert {row["torch"] for row in rows} == {torch.__version__}
    assert all(row["device"].startswith("CPU") for row in rows)
    assert len(capsys.readouterr().out.splitlines()) >= len(rows) + 2


def test_a_command_that_needs_embeddings_says_so(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["overhead", "growth"])
    with pytest.raises(SystemExit):
        overhead.main()
    assert "needs --embeddings" in capsys.readouterr().err


def test_an_earlier_peak_of_memory_does_not_count():
    bytearray(200 * 2**20)  # freed at once
    assert measured(lambda: None)[2] < 50 * 2**20
    assert measured(lambda: bytearray(100 * 2**20))[2] > 50 * 2**20
