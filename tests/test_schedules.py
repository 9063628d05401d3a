import pickle
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bs_lightning import ExactGraph, RWRComposer
from bs_lightning.presets import public_code
from bs_lightning.schedules import LinearDecay, Staircase


def literal_staircase(epoch):
    """Return 0.2, lowered by 0.1 every 5 epochs, but at least 0.05."""
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
    """The public code counts epochs from 1."""
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
        (lambda: LinearDecay(start=0), r"start must lie in \(0, 1\], got 0"),
        (lambda: LinearDecay(end=1.5), r"end must lie in \(0, 1\], got 1.5"),
        (lambda: LinearDecay(n_epochs=0), "n_epochs must be at least 1, got 0"),
        (lambda: Staircase(every=0), "every must be at least 1, got 0"),
        (lambda: Staircase(step=-0.1), "step must be finite and not negative, got -0.1"),
        (lambda: Staircase(step=float("nan")), "step must be finite and not negative, got nan"),
        (lambda: Staircase(step=float("inf")), "step must be finite and not negative, got inf"),
        (lambda: Staircase(floor=0), r"floor must lie in \(0, 1\], got 0"),
        (lambda: Staircase(floor=0.3), "floor must not be above start 0.2, got 0.3"),
        (lambda: LinearDecay(start=float("nan")), r"start must lie in \(0, 1\], got nan"),
        (lambda: Staircase(floor=float("nan")), r"floor must lie in \(0, 1\], got nan"),
        (lambda: LinearDecay()(-1), "epoch must be at least 0, got -1"),
        (lambda: Staircase()(-1), "epoch must be at least 0, got -1"),
    ],
)
def test_refuses_bad_arguments(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize("value", [2.5, 3.0, float("nan"), True, None, "3"])
@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda value: LinearDecay(n_epochs=value), "n_epochs"),
        (lambda value: Staircase(every=value), "every"),
        (LinearDecay(), "epoch"),
        (Staircase(), "epoch"),
    ],
)
def test_refuses_parts_of_epochs(make, name, value):
    with pytest.raises(TypeError, match=f"^{name} must be an integer, got {value!r}"):
        make(value)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: LinearDecay(start="0.2"), "start must be a number, got '0.2'"),
        (lambda: LinearDecay(end=True), "end must be a number, got True"),
        (lambda: Staircase(step=None), "step must be a number, got None"),
    ],
)
def test_refuses_what_is_not_a_number(make, words):
    with pytest.raises(TypeError, match=words):
        make()


@pytest.mark.parametrize("schedule", [LinearDecay(0.2, 0.05, 10), Staircase()])
def test_a_schedule_cannot_be_changed_past_the_checks(schedule):
    with pytest.raises(FrozenInstanceError):
        schedule.start = 2


def test_numpy_numbers_are_used_as_python_numbers():
    """In float32 the last value would be 0.049999997, and 300 does not fit into uint8."""
    decay = LinearDecay(np.float32(0.2), np.float32(0.05), np.uint8(10))
    assert [decay(epoch) for epoch in (0, 10, 300)] == [float(np.float32(each)) for each in (0.2, 0.05, 0.05)]
    staircase = Staircase(np.float32(0.2), np.float32(0.1), np.uint8(5), np.float32(0.05))
    assert staircase(300) == float(np.float32(0.05))
    values = [*vars(decay).values(), *vars(staircase).values(), decay(np.int32(5)), staircase(np.int32(5))]
    assert {type(value) for value in values} == {int, float}


def test_linear_decay_ends_exactly_at_a_tiny_end():
    """``1 + (1e-20 - 1)`` is 0, which is not a restart probability."""
    assert LinearDecay(1, 1e-20, 7)(7) == 1e-20
