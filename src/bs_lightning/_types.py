"""Names for the arrays that the library's functions take and return."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Embeddings = Tensor | NDArray[np.floating[Any]]
"""Floats of shape ``[P, d]``, one row for each instance."""

Indices = NDArray[np.int64]
"""Dataset indices, or positions in a pool; any shape."""

Order = NDArray[np.integer[Any]]
"""A permutation of the dataset indices, or a part of it: int32 where that suffices, else int64."""

Batches = NDArray[np.int64]
"""Positions in a pool, ``[P // batch_size, batch_size]``."""

Neighbors = NDArray[np.int32]
"""Each instance's neighbours, ``[P, K]``."""

Pairs = NDArray[np.int64]
"""Pairs of instances, ``[m, 2]``."""
