"""Ratios that were measured pair by pair, in the columns of a table."""

import statistics

from scipy.stats import quantile_test

from ..csv_files import Row


def ratio_columns(ratios: list[float], name: str = "ratio") -> Row:
    """Return the median of six ratios or more, and its 95% interval in the columns "from" and "to"."""
    interval = quantile_test(ratios, p=0.5).confidence_interval(0.95)
    return {name: statistics.median(ratios), "from": float(interval.low), "to": float(interval.high)}
