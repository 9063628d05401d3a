"""Presets: callbacks with published settings."""

from bs_lightning.compose import RWRComposer
from bs_lightning.graphs import RandomCandidateGraph
from bs_lightning.plugin.callback import BatchSamplerCallback
from bs_lightning.schedules import Staircase


def public_code() -> BatchSamplerCallback:
    """Return a callback with the settings of the paper's public implementation.

    Every 100 steps it builds a graph over the whole dataset: each instance's 100 nearest among 1000 random candidates.
    The graph is built on the embeddings that training has computed. ``training_step`` returns them, as
    ``{"loss": ..., "embeddings": [b, d]}``. The public code takes both views' projections:
    ``torch.cat([z1, z2], dim=1)``. Walks may take instances that earlier batches took. The first epoch is uniform.

    The restart probability is ``0.2 - epoch / 5 * 0.1``, at least 0.05, with epochs counted from 1. It falls by 0.02
    every epoch. One may misread the public code as a fall by 0.1 every five epochs.

    The public code trains with batches of 256, temperature 0.5, and Adam with learning rate 1e-3 and weight decay 1e-6.

    An epoch here has ``N // B`` batches, in which walks with replacement see about 60% of the data. In the public code,
    an epoch goes on until all instances were seen, and draws its roots from the unseen instances. It has about six
    times as many batches. Counted in steps, its restart probability falls about six times more slowly, close to
    ``Staircase(0.18, 0.02, every=6)`` here. This library's defaults see all instances in ``N // B`` batches.

    Returns:
        A new callback, for the Trainer's ``callbacks``.

    Example:
        >>> from bs_lightning.presets import public_code
        >>> callback = public_code()
        >>> callback.refresh_every, callback.composer.graph.n_candidates
        (100, 1000)

    Source: the public implementation of arXiv 2306.03355.
    """
    composer = RWRComposer(
        RandomCandidateGraph(n_candidates=1000, n_neighbors=100),
        restart_probability=Staircase(start=0.18, step=0.02, every=1, floor=0.05),
        replacement=True,
    )
    return BatchSamplerCallback(composer=composer, warmup_epochs=1, refresh_every=100, recycle=True)
