"""Means over seeds, and how sure one may be of them."""

from collections.abc import Sequence

import numpy as np
from scipy.stats import t


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Mean, and half the width of its confidence interval (Student's t, n - 1 degrees of freedom); not a number for one value."""
    if len(values) < 2:
        return float(values[0]), float("nan")
    half = t.ppf((1 + confidence) / 2, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values))
    return float(np.mean(values)), float(half)
