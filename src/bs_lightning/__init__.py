"""Mini-batch sampling for contrastive learning, as a PyTorch Lightning plugin."""

import logging

# `import bs_lightning` alone makes these modules reachable, as `bs_lightning.losses` for example.
from bs_lightning import baselines as baselines
from bs_lightning import losses as losses
from bs_lightning import metrics as metrics
from bs_lightning import presets as presets
from bs_lightning import rules as rules
from bs_lightning import schedules as schedules
from bs_lightning.compose import Composer, RWRComposer
from bs_lightning.encoding import encode
from bs_lightning.graphs import ExactGraph, NNDescentGraph, RandomCandidateGraph
from bs_lightning.loader import BatchFetcher, PoolLoader
from bs_lightning.plan import PlannedPool, Planning
from bs_lightning.plugin.callback import BatchSamplerCallback
from bs_lightning.plugin.datamodule import BatchSamplerDataModule
from bs_lightning.pools import Pools, WholeData
from bs_lightning.reference import encode_dataset
from bs_lightning.sampler import PoolBatchSampler
from bs_lightning.stream import StreamLoader
from bs_lightning.walk import rwr_batches

__version__ = "0.2.0.dev0"

__all__ = [
    "BatchFetcher",
    "BatchSamplerCallback",
    "BatchSamplerDataModule",
    "Composer",
    "ExactGraph",
    "NNDescentGraph",
    "PlannedPool",
    "Planning",
    "PoolBatchSampler",
    "PoolLoader",
    "Pools",
    "RWRComposer",
    "RandomCandidateGraph",
    "StreamLoader",
    "WholeData",
    "encode",
    "encode_dataset",
    "rwr_batches",
]

# Show one-line messages even to a user who has not set up logging, as Lightning does.
_log = logging.getLogger(__name__)
_log.setLevel(logging.INFO)
if not logging.root.hasHandlers():
    _log.addHandler(logging.StreamHandler())
    _log.propagate = False
