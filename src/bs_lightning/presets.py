"""Presets: callbacks with published settings."""

from bs_lightning.compose import RWRComposer
from bs_lightning.graphs import RandomCandidateGraph
from bs_lightning.plugin.callback import BatchSamplerCallback
from bs_lightning.schedules import Staircase


def public_code() -> BatchSamplerCallback:
    """The settings of the paper's public implementation.

    Every 100 steps a graph over the whole data set: each instance's 100 nearest among 1000 random candidates, in the
    embeddings that training has computed (``training_step`` returns ``{"loss": ..., "embeddings": [b, d]}``; the public
    code takes both views' projections: ``torch.cat([z1, z2], dim=1)``). Walks may take what earlier batches took. One
    uniform epoch first. The restart probability is ``0.2 - epoch / 5 * 0.1`` with epochs from 1, at least 0.05: it
    falls by 0.02 every epoch, and not by 0.1 every five, as one may read it.

    Trained there with batches of 256, temperature 0.5, and Adam with learning rate 1e-3 and weight decay 1e-6. An epoch
    here has ``N // B`` batches, in which walks with replacement see about 60% of the data. There it goes on until all
    were seen, roots being drawn from those that were not: some six times as many batches, so the restart probability
    falls so much slower by steps. ``Staircase(0.18, 0.02, every=6)`` comes near to that. This library's defaults see
    all in ``N // B`` batches.

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
