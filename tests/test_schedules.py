import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bs_lightning import ExactGraph, RWRComposer
from bs_lightning.presets import public_code
from bs_lightning.schedules import LinearDecay, Staircase


def literal_staircase(epoch):
    """0.2, lowered by 0.1 every 5 epochs, not below 0.05."""
    alpha = 0.2
    for past in range(1, epoch + 1):
        if past % 5 == 0:
            alpha = max(alpha - 0.1, 0.05)
    return alpha


@given(st.integers(0, 200))
def test_staircase(epoch):
    assert Staircase()(epoch) == pytest.approx(literal_staircase(epoch))


@given(st.integers(0, 200))
def test_the_presets_schedule_is_the_public_codes(epoch):
    """Which counts epochs from 1."""
    literal = max(0.2 - ((epoch + 1) / 5) * 0.1, 0.05)
    assert public_code().composer.restart_probability(epoch) == pytest.approx(literal)


@given(st.integers(0, 300), st.floats(0.01, 1), st.floats(0.01, 1), st.integers(1, 200))
def test_linear_decay(epoch, start, end, n_epochs):
    schedule = LinearDecay(start, end, n_epochs)
    assert schedule(0) == start
    assert schedule(n_epochs + epoch) == pytest.approx(end)
    assert min(start, end) - 1e-12 <= schedule(epoch) <= max(start, end) + 1e-12


def test_the_composer_follows_a_schedule_and_survives_pickling():
    composer = pickle.loads(pickle.dumps(RWRComposer(ExactGraph(5), Staircase())))
    assert [composer.restart_probability(epoch) for epoch in (0, 5)] == [0.2, 0.1]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: LinearDecay(start=0), r"restart_probability must lie in \(0, 1\], got 0"),
        (lambda: LinearDecay(end=1.5), r"restart_probability must lie in \(0, 1\], got 1.5"),
        (lambda: LinearDecay(n_epochs=0), "n_epochs must be at least 1 epoch, got 0"),
        (lambda: Staircase(every=0), "every must be at least 1 epoch, got 0"),
        (lambda: Staircase(step=-0.1), "step must not be negative, got -0.1"),
        (lambda: Staircase(step=float("nan")), "step must not be negative, got nan"),
        (lambda: Staircase(floor=0.3), "floor must not be above start 0.2, got 0.3"),
    ],
)
def test_refuses_bad_arguments(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize("make", [lambda: LinearDecay(n_epochs=2.5), lambda: Staircase(every=2.5)])
def test_refuses_parts_of_epochs(make):
    with pytest.raises(TypeError, match=r"must be an integer, got 2\.5"):
        make()
