"""The demo's data: what is held out was not trained on, and no two letters look the same."""

import importlib.util
from pathlib import Path

import pytest
import torch

from bs_lightning import graphs

SCRIPT = Path(__file__).parents[1] / "examples" / "glyphs.py"


@pytest.fixture(scope="module")
def glyphs():
    spec = importlib.util.spec_from_file_location("glyphs", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def letters(glyphs):
    return glyphs.read_letters()


def distinct(pictures):
    return {picture.numpy().tobytes() for picture in pictures}


def test_no_two_letters_look_the_same(letters):
    assert len(distinct(letters.pictures[0])) == len(letters.characters) > 2000


def test_the_demo_needs_no_pynndescent(letters):
    """Else a new user would wait for its kernels: the demo's graph holds all letters."""
    assert len(letters.characters) <= graphs._SMALL_POOL


@pytest.mark.parametrize("font", ["VALIDATION_FONT", "TEST_FONT"])
def test_held_out_pictures_are_new(glyphs, letters, font):
    font = getattr(glyphs, font)
    assert font not in glyphs.TRAIN_FONTS
    indices, pictures = glyphs.held_out(letters, font)
    assert len(distinct(pictures)) == len(pictures) > 1000
    assert not distinct(pictures) & distinct(letters.pictures.flatten(0, 1))
    characters = [letters.characters[index] for index in indices]
    assert torch.equal(pictures, glyphs.draw_letters(characters, font))
