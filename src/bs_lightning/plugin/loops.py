"""Loops: every use of Lightning's loops, which are not a public interface.

``tests/test_architecture.py`` names each attribute used here. If Lightning moves an attribute, that test says so.
"""

from lightning.pytorch import Trainer


def next_batch(trainer: Trainer) -> int:
    """Return the number of the next batch to train in its epoch.

    Read it when the first batch of an iteration is asked for: then it is right. A counter of our own would go wrong,
    because other callbacks may save a checkpoint before we raise it.

    Args:
        trainer: The Trainer.

    Returns:
        The number of the batch in its epoch, from 0.
    """
    ready: int = trainer.fit_loop.epoch_loop.batch_progress.current.ready
    return ready


def batch_in_training(trainer: Trainer | None, n_epochs_processed: int | None) -> int | None:
    """Return the number of the batch being trained in its epoch.

    Args:
        trainer: The Trainer, if there is one.
        n_epochs_processed: What :func:`epochs_processed` returned at the epoch's start; ``None`` before an epoch.

    Returns:
        The number of the batch in its epoch, from 0; ``None`` between two batches, and where none is trained.
    """
    if trainer is None or not trainer.training:
        return None
    ready, completed = next_batch(trainer), trainer.fit_loop.epoch_loop.batch_progress.current.completed
    # The batch with which `on_train_batch_start` ends an epoch, by returning -1, is never counted as completed.
    epoch_ended = epochs_processed(trainer) != n_epochs_processed
    return None if epoch_ended or ready == completed else ready - 1


def position(trainer: Trainer) -> tuple[int, int]:
    """Return the epoch that is trained next, and how many of its batches have been trained, of a resumed run.

    Unlike :func:`next_batch`, it is right while Lightning fetches a batch ahead, as it does from a loader of unknown
    length. After a resume it does so before it has counted the epoch whose last batch had been trained.

    Args:
        trainer: The Trainer.

    Returns:
        The number of the epoch, and the number of its batches.
    """
    progress = trainer.fit_loop.epoch_progress.current
    batches = trainer.fit_loop.epoch_loop.batch_progress
    return (progress.ready, 0) if batches.is_last_batch else (progress.processed, batches.current.processed)


def first_position(trainer: Trainer) -> tuple[int, int]:
    """Return the epoch and the batch with which a run begins, before it has served any.

    Args:
        trainer: The Trainer.

    Returns:
        The number of the epoch, and the number of its first batch that is still to be trained.
    """
    return position(trainer) if trainer.fit_loop.restarted_mid_epoch else (epochs_processed(trainer), 0)


def batches_processed(trainer: Trainer) -> int:
    """Return the number of batches that have been trained, of all epochs.

    Args:
        trainer: The Trainer.

    Returns:
        The number of batches.
    """
    processed: int = trainer.fit_loop.epoch_loop.batch_progress.total.processed
    return processed


def step_is_done(trainer: Trainer) -> bool:
    """Return whether the batch that was begun last has been trained, as in ``on_train_batch_end``.

    Args:
        trainer: The Trainer.

    Returns:
        ``True`` if so, and also between two batches.
    """
    progress = trainer.fit_loop.epoch_loop.batch_progress.current
    return bool(progress.processed == progress.ready)


def epoch_is_trained(trainer: Trainer) -> bool:
    """Return whether the last batch of an epoch has been trained, and no batch of the next epoch has been begun.

    Args:
        trainer: The Trainer.

    Returns:
        ``True`` if so. ``False`` if the epoch was left before its last batch, as ``max_steps`` may do.
    """
    return bool(trainer.fit_loop.epoch_loop.batch_progress.is_last_batch and step_is_done(trainer))


def restarting(trainer: Trainer) -> bool:
    """Return whether the Trainer goes on from a checkpoint, and has not trained a batch since.

    Args:
        trainer: The Trainer.

    Returns:
        ``True`` if so.
    """
    return bool(trainer.fit_loop.restarting)


def fetch_anew(trainer: Trainer) -> None:
    """Let Lightning ask the training loader for a new iterator, and drop the batches that it has fetched.

    Args:
        trainer: The Trainer.
    """
    fetcher = trainer.fit_loop._data_fetcher
    assert fetcher is not None
    iter(fetcher)


def epochs_processed(trainer: Trainer) -> int:
    """Return the number of epochs whose batches have all been trained.

    Args:
        trainer: The Trainer.

    Returns:
        The number of epochs.
    """
    processed: int = trainer.fit_loop.epoch_progress.current.processed
    return processed


def in_epoch(trainer: Trainer) -> bool:
    """Return whether the batches of an epoch are being trained, or are to be trained next.

    In ``on_train_epoch_start``, ``on_train_epoch_end`` and ``on_train_end`` they are not, and :func:`next_batch` still
    counts those of the epoch before. In ``on_train_start`` of a resumed run it is ``True`` too early.

    Args:
        trainer: The Trainer, after :func:`mend_counters`.

    Returns:
        ``True`` in an epoch.
    """
    progress = trainer.fit_loop.epoch_progress.current
    return bool(progress.started > progress.processed)


def mend_counters(trainer: Trainer) -> None:
    """Set Lightning's counters right, where they are wrong after resuming. Call it before each epoch, once or more.

    - A batch that was begun but not trained, as in a checkpoint that was written within a step, stays counted as begun.
      To Lightning, later checkpoints then look as if they were taken at a different place, and a run resumed from one
      of them would train a batch again.
    - After a checkpoint that was written in ``on_train_epoch_start``, or after a fit that ``max_steps`` had ended, the
      batches of the epoch before are still counted. Lightning would take them for batches of the epoch that begins.
    - After a checkpoint that was written in ``on_train_epoch_start``, the epoch that begins is not counted.
    - With ``max_steps``, after a checkpoint that was written in ``on_train_epoch_end``, Lightning would go on with the
      epoch that has ended, and train one batch more in it.
    - After a checkpoint that was written in ``on_train_batch_end`` of an epoch's last batch, Lightning does not count
      the epoch that it trains next. To Lightning, a checkpoint from that epoch looks as if it were taken between two
      epochs. A run resumed from it would train the epoch's first batches again.

    Args:
        trainer: The Trainer.
    """
    fit_loop, epoch_loop = trainer.fit_loop, trainer.fit_loop.epoch_loop
    total = epoch_loop.batch_progress.total
    total.ready = total.started = total.processed
    # Lightning is about to count the batch in whose `on_train_batch_end` the checkpoint was written.
    total.completed = total.processed - epoch_loop.restarted_on_train_batch_end
    if not epoch_loop.restarting:
        return  # a batch has been trained since
    progress = fit_loop.epoch_progress
    if fit_loop.restarted_on_epoch_end:
        progress.increment_completed()
        fit_loop.reset_restart_stage()
        # With `max_steps`, the setter of `fit_loop.restarting` sets True whatever it is given.
        fit_loop._restarting = epoch_loop.restarting = False
    if fit_loop.restarted_on_epoch_start:
        progress.current.ready = progress.current.processed + 1
    if not fit_loop.restarted_mid_epoch:
        epoch_loop.batch_progress.reset_on_run()
    if fit_loop.restarted_mid_epoch and progress.current.ready == progress.current.processed:
        progress.increment_ready()
        progress.increment_started()
