import logging
import os

import pytest
import torch
from lightning.pytorch import seed_everything

# The tests' tensors are tiny. Threads would only wait for each other where several processes share the cores.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    seed_everything(0, verbose=False)


@pytest.fixture(autouse=True)
def _nothing_warned_of():
    from bs_lightning.encoding import _warn_once  # not earlier: pytest's handlers must be there, as a user's would be

    _warn_once.cache_clear()


@pytest.fixture(autouse=True)
def _log_levels():
    """Let no benchmark that a test runs silence the tests after it."""
    levels = {logger: logger.level for logger in map(logging.getLogger, ("lightning.pytorch", "bs_lightning"))}
    yield
    for logger, level in levels.items():
        logger.setLevel(level)
