"""Percentile bootstrap intervals (Efron 1979), seeded: the same numbers give the same interval."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

SAMPLES, LEVEL = 1000, 0.95


def interval(parts: np.ndarray, combine: Callable[[np.ndarray], np.ndarray], samples: int = SAMPLES,
             level: float = LEVEL, seed: int = 0) -> tuple[float, float]:
    """Interval of a score that is a function of sums over independent units.

    Args:
        parts: float [n,d], what each unit (an image with all its captions, say) adds to d sums.
        combine: sums [samples,d] -> scores [samples].
        samples: resamples of n units with replacement.

    Returns:
        (low, high); (nan, nan) without units.
    """
    parts = np.asarray(parts, np.float64)
    count = len(parts)
    if not count:
        return float("nan"), float("nan")
    rng, sums = np.random.default_rng(seed), []
    step = max(1, 4_000_000 // count)                       # bounds the memory of the resampling weights
    for start in range(0, samples, step):
        rows = rng.integers(count, size=(min(step, samples - start), count))
        weights = np.stack([np.bincount(r, minlength=count) for r in rows])
        sums.append(weights @ parts)
    return _percentiles(combine(np.concatenate(sums)), level)


def mean_interval(values: np.ndarray, units: np.ndarray | None = None, **options) -> tuple[float, float]:
    """Interval of the mean of ``values`` [m]; values of one unit (int [m]) are resampled together."""
    values = np.asarray(values, np.float64)
    if units is None:
        parts = np.stack([values, np.ones_like(values)], axis=1)
    else:
        _, units = np.unique(units, return_inverse=True)
        parts = np.stack([np.bincount(units, values), np.bincount(units)], axis=1)
    return interval(parts, lambda sums: sums[:, 0] / sums[:, 1], **options)


def statistic_interval(statistic: Callable[[np.ndarray], float], count: int, samples: int = SAMPLES,
                       level: float = LEVEL, seed: int = 0) -> tuple[float, float]:
    """Interval of any ``statistic`` of resampled unit numbers (int [count], with repeats)."""
    if not count:
        return float("nan"), float("nan")
    rng = np.random.default_rng(seed)
    return _percentiles(np.array([statistic(rng.integers(count, size=count)) for _ in range(samples)]), level)


def _percentiles(scores: np.ndarray, level: float) -> tuple[float, float]:
    low, high = np.percentile(scores, [50 * (1 - level), 50 * (1 + level)])
    return float(low), float(high)
