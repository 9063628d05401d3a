import pytest
from lightning.pytorch import seed_everything


@pytest.fixture(autouse=True)
def _seed():
    seed_everything(0, verbose=False)
