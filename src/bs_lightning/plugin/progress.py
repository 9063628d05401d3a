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
        # One for all pools: rich keeps what it has drawn of each task, even after the task is removed.
        made = [task.id for task in shown.tasks if task.description == what]
        task = made[0] if made else shown.add_task(what, total=total)
        shown.reset(task, total=total, visible=True)
        try:
            yield lambda: shown.advance(task)
        finally:
            shown.update(task, visible=False)
    elif isinstance(bar, TQDMProgressBar):
        with bar.init_validation_tqdm() as tqdm:
            tqdm.set_description(what)
            tqdm.reset(total)
            yield lambda: tqdm.update() and None
    else:
        yield lambda: None
