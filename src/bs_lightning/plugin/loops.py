"""Loops: all that the library asks of Lightning's loops, which are not a public interface.

``tests/test_loops.py`` names each attribute that is read here, and fails in words when Lightning moves one.
"""

from lightning.pytorch import Trainer


def next_batch(trainer: Trainer) -> int:
    """The number in its epoch of the batch to train next.

    It is right when the first batch of an iteration is asked for. A counter of our own would go wrong: other callbacks
    may save a checkpoint before it is raised.
    """
    ready: int = trainer.fit_loop.epoch_loop.batch_progress.current.ready
    return ready


def batch_in_training(trainer: Trainer) -> int | None:
    """The number in its epoch of the batch being trained, or ``None`` between two batches."""
    ready, completed = next_batch(trainer), trainer.fit_loop.epoch_loop.batch_progress.current.completed
    return None if ready == completed else ready - 1


def epochs_processed(trainer: Trainer) -> int:
    """Epochs whose batches have all been trained."""
    processed: int = trainer.fit_loop.epoch_progress.current.processed
    return processed


def count_epoch(trainer: Trainer) -> None:
    """Count an epoch that Lightning has begun without counting it.

    Resumed from a checkpoint that was written in ``on_train_batch_end`` of an epoch's last batch, Lightning trains the
    next epoch uncounted. To Lightning, a checkpoint taken in that epoch looks as if it were taken between two epochs. A
    run resumed from it would train the epoch's first batches again.
    """
    progress = trainer.fit_loop.epoch_progress
    if trainer.fit_loop.restarted_mid_epoch and progress.current.ready == progress.current.processed:
        progress.increment_ready()
        progress.increment_started()


def check_trainer(trainer: object) -> None:
    """Refuse a Trainer of the package ``pytorch_lightning``, whose classes differ from those of ``lightning``.

    Raises:
        TypeError: Saying what to import.
    """
    if trainer is not None and not isinstance(trainer, Trainer):
        raise TypeError(
            f"This Trainer is of {type(trainer).__module__}, but bs_lightning uses the package lightning: "
            "write `from lightning import Trainer, LightningModule`."
        )
