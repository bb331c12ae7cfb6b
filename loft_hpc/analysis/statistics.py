"""Means over seeds, and how sure one may be of them."""

from collections.abc import Sequence

import numpy as np
from scipy.special import stdtrit

NEAR = 1.0
"""Percentage points that make no difference between two tickets, as `loft check` has it by default."""


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


def difference_interval(first: Sequence[float], second: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Difference of two means, and half the width of its confidence interval (Welch's t); not a number where either has one value."""
    difference = float(np.mean(first) - np.mean(second))
    if min(len(first), len(second)) < 2:
        return difference, float("nan")
    parts = [np.var(values, ddof=1) / len(values) for values in (first, second)]
    if not sum(parts):
        return difference, 0.0
    degrees = sum(parts) ** 2 / sum(part**2 / (len(values) - 1) for part, values in zip(parts, (first, second), strict=True))
    return difference, float(student(confidence, degrees) * np.sqrt(sum(parts)))
