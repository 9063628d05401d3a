"""The meter: what it measures of each pool size, what it advises, and its command line."""

import itertools
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

from bs_lightning import Composer, ExactGraph, RWRComposer
from bs_lightning.baselines import uniform_batches
from bs_lightning.meter import Reading, advise, main, measure
from bs_lightning.metrics import in_batch_accuracy, in_batch_hardness, negatives_above_positive

B = 32


def clusters(size=2048, spread=0.5, noise=0.5):
    """Return pairs [size, 2, 16] in 64 clusters. A query finds its document among random ones, hardly among its own."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(64, 16, generator=generator)
    middle = centres[torch.randint(64, (size,), generator=generator)]
    middle = middle + spread * torch.randn(size, 16, generator=generator)
    return middle[:, None] + noise * torch.randn(size, 2, 16, generator=generator)


class Recorder(Composer):
    """Composes uniform batches, and keeps what it was called with."""

    def __init__(self):
        self.calls = []

    def __call__(self, embeddings, batch_size, *, seed, epoch, indices, labels):
        assert (batch_size, epoch, labels) == (B, 0, None)
        assert len(indices) == len(embeddings)
        self.calls.append((indices.tolist(), seed))
        return np.arange(len(embeddings)).reshape(-1, batch_size)


def test_batches_become_harder_as_pools_grow():
    readings = measure(clusters(), B)
    assert [reading.pool_size for reading in readings] == [B * step for step in (1, 4, 10, 20, 40, 64)]
    for name, sign in (("hardness", 1), ("accuracy", -1), ("negatives_above", 1), ("loss", 1)):
        values = sign * np.array([getattr(reading, name) for reading in readings])
        assert (np.diff(values) > 0).all(), name
    assert readings[0].accuracy > 0.9 > 0.7 > readings[-1].accuracy
    assert readings[0].seconds == 0 < min(reading.seconds for reading in readings[1:])


def test_equals_a_plain_computation():
    """Each batch of the only pool is measured, so a plain loop over all batches gives the same means."""
    batches = []

    def in_order(embeddings, batch_size, *, seed, epoch):
        batches[:] = embeddings.split(batch_size)
        return np.arange(len(embeddings)).reshape(-1, batch_size)

    (reading,) = measure(clusters(4 * B), B, pool_sizes=[4 * B], temperature=0.2, composer=in_order)
    together = torch.stack(batches)
    assert reading.accuracy == pytest.approx(in_batch_accuracy(together).item())
    assert reading.negatives_above == pytest.approx(negatives_above_positive(together).item())
    assert reading.hardness == pytest.approx(in_batch_hardness(together).item(), abs=1e-6)
    losses = []
    for first, second in (batch.double().unbind(1) for batch in batches):
        for i, anchor in enumerate(first):
            logits = torch.stack([torch.cosine_similarity(anchor, other, dim=0) / 0.2 for other in second])
            losses.append(float(logits.logsumexp(dim=0) - logits[i]))
    assert reading.loss == pytest.approx(sum(losses) / len(losses), abs=1e-5)


def test_uniform_batches_are_parts_of_a_random_permutation():
    """With as many batches as are measured, all instances are measured once: the means are those of all anchors."""
    sides = clusters(3 * B)
    reading = measure(sides, B, pool_sizes=[B])[0]
    order = np.random.default_rng([0, 0]).permutation(3 * B).reshape(3, B)
    assert reading.accuracy == pytest.approx(in_batch_accuracy(sides[torch.from_numpy(order)]).item())


def test_one_side_has_no_positives():
    for reading in measure(clusters()[:, 0], B, pool_sizes=[B, 320]):
        assert (reading.accuracy, reading.negatives_above, reading.loss) == (None, None, None)
        assert -1 <= reading.hardness <= 1
    easy, hard = measure(clusters()[:, 0], B, pool_sizes=[B, 2048])
    assert easy.hardness < hard.hardness


def test_the_work_is_bounded():
    """Each pool size composes the pools that 40 batches need, or one pool. They do not overlap."""
    composer = Recorder()
    measured = []
    for n_batches in (4, 10, 15, 64):
        composer.calls.clear()
        measure(torch.randn(64 * B, 2, 4), B, pool_sizes=[n_batches * B], composer=composer)
        _, *pools = composer.calls  # the first call only compiles
        measured.append(len(pools))
        indices = sum((pool for pool, _ in pools), [])
        assert len(indices) == len(set(indices)) == len(pools) * n_batches * B
        assert len({seed for _, seed in pools}) == len(pools)
    assert measured == [10, 4, 3, 1]


def test_seconds_are_those_of_an_epoch(monkeypatch):
    """Each composed pool takes one second here. An epoch has 6.4 pools, and four of them are composed."""
    monkeypatch.setattr("time.perf_counter", itertools.count().__next__)
    uniform, pools = measure(torch.randn(64 * B, 4), B, pool_sizes=[B, 10 * B], composer=Recorder())
    assert (uniform.seconds, pools.seconds) == (0, pytest.approx(6.4))


def test_at_most_40_batches_are_measured(monkeypatch):
    counted = []
    monkeypatch.setattr("bs_lightning.meter._measure_batch", lambda rows, temperature: counted.append(1) or [0.0])
    for n_batches, expected in ((1, 40), (4, 40), (10, 40), (15, 39), (64, 40)):
        counted.clear()
        measure(torch.randn(64 * B, 4), B, pool_sizes=[n_batches * B])
        assert len(counted) == expected


def test_early_and_late_batches_of_a_pool_are_measured():
    """Of the 100 batches of a pool, the first 50 are as hard as can be, and the others not at all."""
    axes = torch.eye(3)[[0] * 100 + [1, 2] * 50]

    def along_the_axes(embeddings, batch_size, *, seed, epoch):
        own = embeddings.argmax(dim=1)
        alike, *others = ((own == axis).nonzero().flatten() for axis in range(3))
        return torch.cat([alike, torch.stack(others, dim=1).flatten()]).reshape(-1, batch_size).numpy()

    assert 0.2 < measure(axes, 2, pool_sizes=[200], composer=along_the_axes)[0].hardness < 0.8


def test_a_composer_whose_batches_share_instances_is_measured():
    composer = RWRComposer(ExactGraph(5), replacement=True)
    assert measure(torch.randn(100, 2, 4), 10, pool_sizes=[100], composer=composer)[0].pool_size == 100


def test_the_same_seed_gives_the_same_reading():
    def values(seed):
        return [reading._replace(seconds=0) for reading in measure(clusters(512), B, seed=seed)]

    assert values(3) == values(3) != values(4)


def test_accepts_arrays_functions_and_other_pool_sizes():
    sides = clusters(512)
    expected = measure(sides, B, pool_sizes=[100], composer=RWRComposer(ExactGraph()))[0]
    read = measure(sides.numpy(), B, pool_sizes=(np.int64(100),))[0]
    assert read._replace(seconds=0) == expected._replace(seconds=0)
    assert read.pool_size == 96
    (uniform,) = measure(sides, B, pool_sizes=[512], composer=uniform_batches)
    assert uniform.accuracy > 0.9


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (
            {"embeddings": [[1.0]]},
            TypeError,
            "embeddings must be a dense tensor or a NumPy array of floats, got a list",
        ),
        ({"embeddings": torch.zeros(64, 3, 4)}, ValueError, "for two sides, with P >= 2 and d >= 1, got [64, 3, 4]"),
        ({"embeddings": torch.tensor([[1.0], [torch.nan]])}, ValueError, "embeddings must be finite, but row 1 is not"),
        ({"batch_size": 1}, ValueError, "batch_size must be at least 2 and at most the 64 instances that have"),
        ({"batch_size": 65}, ValueError, "embeddings, got 65. Give the batch size that you train with, or embed more"),
        ({"batch_size": 8.0}, TypeError, "batch_size must be an integer, got 8.0"),
        ({"pool_sizes": [7]}, ValueError, "pool_sizes must lie between one batch, 8 instances, and all 64, got 7"),
        ({"pool_sizes": [8, 65]}, ValueError, "pool_sizes must lie between one batch, 8 instances, and all 64, got 65"),
        ({"pool_sizes": [8.5]}, TypeError, "pool_sizes must be an integer, got 8.5"),
        ({"pool_sizes": []}, ValueError, "pool_sizes must hold at least one number of instances, got none"),
        ({"temperature": 0}, ValueError, "temperature must be finite and above 0, got 0"),
        ({"temperature": torch.inf}, ValueError, "temperature must be finite and above 0, got inf"),
        ({"temperature": "1"}, TypeError, "temperature must be a number, got '1'"),
        ({"composer": RWRComposer}, TypeError, "composer must be an object, such as RWRComposer()"),
        ({"composer": RWRComposer(n_roots=9)}, ValueError, "n_roots must be at most the 8 instances of a batch, got 9"),
        ({"seed": -1}, ValueError, "seed must be at least 0, got -1"),
        ({"composer": lambda e, b, *, seed, epoch: e}, TypeError, "The composer must return integer positions"),
    ],
)
def test_refuses_bad_arguments(arguments, error, words):
    with pytest.raises(error, match=re.escape(words)):
        measure(**({"embeddings": torch.randn(64, 2, 4), "batch_size": 8} | arguments))


def readings_of(*accuracies):
    sizes = (32, 128, 320, 640)
    return [Reading(size, 0.1, value, 0.01, 0.1, 0.0) for size, value in zip(sizes, accuracies, strict=False)]


@pytest.mark.parametrize(
    ("accuracies", "advice"),
    [
        ((0.9, 0.8, 0.7, 0.6), "Pools of 320 instances keep in-batch accuracy at 0.700: at most BatchSamplerCal"),
        ((0.9, 0.8, 0.75, 0.71), "Pools of 640 instances keep"),
        ((0.9, 0.8, 0.6, 0.75), "Pools of 128 instances keep"),  # accuracy must stay above, not come back
        ((0.9, 0.6, 0.5), "Keep uniform batches: their in-batch accuracy is 0.900, and no larger pools"),
        (
            (0.6, 0.5, 0.4),
            "Keep uniform batches: in-batch accuracy is 0.600 in pools of 32 already, below the target 0.",
        ),
        ((None, None), "No advice: in-batch accuracy needs two sides. Save embeddings of shape [N, 2, d]."),
    ],
)
def test_advice(accuracies, advice):
    for readings in (readings_of(*accuracies), readings_of(*accuracies)[::-1]):
        assert advise(readings, 32, target_accuracy=0.7).startswith(advice)


def save(path, array):
    np.savez(path, embeddings=array)
    return str(path)


@pytest.mark.slow
def test_the_command_line(tmp_path):
    """Run as a user does, in a new process. The table has what `measure` returns."""
    sides = clusters(1024).numpy().astype(np.float16)
    command = [sys.executable, "-W", "error::RuntimeWarning:runpy", "-m", "bs_lightning.meter"]
    command += [save(tmp_path / "embeddings.npz", sides), "--batch-size", "32", "--temperature", "0.1"]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    about, titles, *rows, advice = run.stdout.splitlines()
    assert about == "1024 instances with two sides, in batches of 32. Pools of 32 are uniform batches."
    assert titles.split() == ["pool", "size", "hardness", "accuracy", "negatives", "above", "loss", "seconds"]
    expected = measure(sides, 32, temperature=0.1)
    assert len(rows) == len(expected)
    for row, reading in zip(rows, expected, strict=True):
        assert len(row) == len(titles)
        printed = [float(cell) for cell in row.split()][:-1]
        assert printed == pytest.approx(list(reading)[:-1], rel=0.006, abs=0.0006)
    assert advice == advise(expected, 32)
    assert advice.startswith("Pools of ")


def test_the_command_line_with_one_side(tmp_path, capsys):
    main([save(tmp_path / "embeddings.npz", clusters(256)[:, 0].numpy()), "--batch-size", "32"])
    about, why, _, *rows, advice = capsys.readouterr().out.splitlines()
    assert about.startswith("256 instances with one side, in batches of 32.")
    assert why == "With one side the positives are not known. The columns that need them stay empty."
    assert [len(row.split()) for row in rows] == [3, 3, 3]  # pool size, hardness and seconds
    assert advice.startswith("No advice: in-batch accuracy needs two sides")


def test_the_target_of_the_command_line(tmp_path, capsys):
    path = save(tmp_path / "embeddings.npz", clusters(256).numpy())
    for target, words in (("0", "Pools of 256 instances keep"), ("1", "Keep uniform batches: ")):
        main([path, "--batch-size", "32", "--target-accuracy", target])
        assert capsys.readouterr().out.splitlines()[-1].startswith(words)


@pytest.mark.parametrize("n_sides", [1, 2])
def test_the_plot(tmp_path, n_sides):
    sides = clusters(256)[:, :n_sides].squeeze(1).numpy()
    main([save(tmp_path / "embeddings.npz", sides), "--batch-size", "32", "--plot", str(tmp_path / "plot.png")])
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def refusal(capsys, arguments):
    with pytest.raises(SystemExit) as refused:
        main(arguments)
    assert refused.value.code == 2
    streams = capsys.readouterr()
    assert not streams.out  # refused before anything is measured
    return streams.err.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--batch-size", "1"], "batch_size must be at least 2 and at most the 64 instances"),
        ([], "batch_size must be at least 2 and at most the 64 instances that have embeddings, got 256"),
        (["--batch-size", "8", "--temperature", "0"], "temperature must be finite and above 0, got 0.0"),
        (["--batch-size", "8", "--target-accuracy", "70"], "--target-accuracy must lie in [0, 1], got 70.0"),
        (["--batch-size", "8", "--plot", "plot"], "--plot plot must end in one of .eps, "),
        (["--batch-size", "8", "--plot", "no/folder/plot.png"], "there is no folder no/folder. Make it first."),
    ],
)
def test_the_command_line_refuses_bad_arguments(tmp_path, capsys, arguments, words):
    path = save(tmp_path / "embeddings.npz", np.ones((64, 2, 4)))
    assert words in refusal(capsys, [path, *arguments])


def test_a_plot_without_matplotlib_is_refused(tmp_path, capsys, monkeypatch):
    for name in ("matplotlib", "matplotlib.backend_bases"):
        monkeypatch.setitem(sys.modules, name, None)
    path = save(tmp_path / "embeddings.npz", np.ones((64, 2, 4)))
    words = refusal(capsys, [path, "--batch-size", "8", "--plot", "plot.png"])
    assert "--plot needs matplotlib: pip install 'bs-lightning[demo]'" in words


def write_text(path):
    path.write_text("no zip")


def write_truncated(path):
    np.savez(path, embeddings=np.ones((64, 2, 4)))
    path.write_bytes(path.read_bytes()[:1000])


def write_damaged(path):
    np.savez_compressed(path, embeddings=np.random.default_rng(0).normal(size=(64, 2, 4)))
    data = bytearray(path.read_bytes())
    data[300:400] = bytes(100)
    path.write_bytes(data)


def write_single_array(path):
    with path.open("wb") as file:
        np.save(file, np.ones((64, 2, 4)))


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (lambda path: None, "is no .npz file of embeddings: [Errno 2] No such file"),
        (lambda path: path.mkdir(), "is no .npz file of embeddings: "),
        (lambda path: path.touch(), "is no .npz file of embeddings: "),
        (write_text, "is no .npz file of embeddings: "),
        (write_truncated, "is no .npz file of embeddings: "),
        (write_damaged, "is no .npz file of embeddings: "),
        (write_single_array, "it holds a single array without a name. Save it with numpy.savez"),
        (lambda path: np.savez(path, z=np.ones((64, 4))), "it has no array `embeddings`, only ['z']. Save it with"),
        (lambda path: save(path, np.array([{}])), "is no .npz file of embeddings: Object arrays cannot be loaded"),
        (lambda path: save(path, np.ones((64, 4), dtype=int)), "embeddings must be a dense tensor or a NumPy array of"),
        (lambda path: save(path, np.ones((64, 3, 4))), "or [P, 2, d] for two sides, with P >= 2 and d >= 1, got"),
        (lambda path: save(path, np.full((64, 4), np.nan)), "embeddings must be finite, but row 0 is not."),
    ],
)
def test_bad_files_are_refused(tmp_path, capsys, write, words):
    path = tmp_path / "embeddings.npz"
    write(path)
    assert words in refusal(capsys, [str(path), "--batch-size", "8"])
