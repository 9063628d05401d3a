"""Ratios that were measured pair by pair, in the columns of a table."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.stats import quantile_test

from ..csv_files import Row


def ratio_columns(ratios: Sequence[float] | NDArray[np.float64]) -> Row:
    """Return the median of six ratios or more, and its 95% interval in the columns "from" and "to"."""
    interval = quantile_test(ratios, p=0.5).confidence_interval(0.95)
    return {"ratio": float(np.median(np.asarray(ratios))), "from": float(interval.low), "to": float(interval.high)}
