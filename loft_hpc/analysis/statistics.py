"""Means over seeds, and how sure one may be of them."""

from collections.abc import Sequence

import numpy as np
from scipy.special import stdtrit


def student(confidence: float, degrees: float | np.ndarray) -> float | np.ndarray:
    """Standard errors from the middle of Student's t to the end of its interval of that confidence.

    scipy.stats says the same, but takes longer to import than a short training takes.
    """
    return stdtrit(degrees, (1 + confidence) / 2)


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Mean, and half the width of its confidence interval (Student's t, n - 1 degrees of freedom); not a number for one value."""
    if len(values) < 2:
        return float(values[0]), float("nan")
    half = student(confidence, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values))
    return float(np.mean(values)), float(half)
