"""The Trainer of the benchmarks."""

from typing import Any

from lightning import Callback, Trainer


def make_trainer(epochs: int | None, callbacks: list[Callback], device: str = "cpu", **options: Any) -> Trainer:
    """Return a Trainer that writes and shows nothing, unless an option says so."""
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(max_epochs=epochs, callbacks=callbacks, accelerator=device, devices=1, **quiet | options)
