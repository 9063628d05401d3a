"""Progress: a bar for what a Trainer waits for while a pool is planned."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar


@contextmanager
def progress(trainer: Trainer, what: str, total: int) -> Iterator[Callable[[], None]]:
    """Show a bar below the Trainer's progress bar, if the Trainer has one.

    Args:
        trainer: The Trainer.
        what: The bar's label.
        total: How many steps there are.

    Yields:
        A function to call after each step.
    """
    bar = trainer.progress_bar_callback
    if isinstance(bar, RichProgressBar) and bar.progress is not None:
        shown = bar.progress
        task = shown.add_task(what, total=total)
        try:
            yield lambda: shown.advance(task)
        finally:
            shown.remove_task(task)
    elif isinstance(bar, TQDMProgressBar):
        with bar.init_validation_tqdm() as tqdm:
            tqdm.set_description(what)
            tqdm.reset(total)
            yield lambda: tqdm.update() and None
    else:
        yield lambda: None
