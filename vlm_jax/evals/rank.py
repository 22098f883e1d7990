"""Ranks of the right answers among all, without the full similarity matrix, and what chance would give."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

TIE = 1e-6                                                  # cosines closer than this are equal in float32
CELLS = 1 << 25                                             # similarities held at a time


def similarity(queries: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """float [q,t]: products of [q,e] and [t,e]. Where the items of one side have several vectors each, [q,k,e] or [t,k,e], the largest of theirs counts."""
    if queries.ndim == 3:
        return (queries.reshape(-1, queries.shape[-1]) @ targets.T).reshape(*queries.shape[:2], -1).max(axis=1)
    if targets.ndim == 3:
        return (queries @ targets.reshape(-1, targets.shape[-1]).T).reshape(len(queries), *targets.shape[:2]).max(axis=2)
    return queries @ targets.T


def similarity_of_pairs(images: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """float [n]: ``similarity`` of row i of [n,e] or [n,k,e] with row i of [n,e]."""
    products = np.einsum("...e,...e->...", images, texts[:, None] if images.ndim == 3 else texts)
    return products.max(axis=1) if images.ndim == 3 else products


def rank(queries: np.ndarray, targets: np.ndarray, right: Sequence[Sequence[int]], top: int = 5
         ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rank of each query's best right target: 1 + the wrong targets that score as high or higher.

    Ties count against the query, so a model that gives everything the same embedding ranks
    last, and not-a-number ranks last too. Other right targets never count.

    Args:
        queries: float [q,e]. targets: float [t,e]; those of one side may have several vectors (``similarity``). right: for each query its right
            targets, one or more.
        top: how many best targets to return.

    Returns:
        (ranks int [q] from 1; best targets int [q,top]; their similarities [q,top]).
    """
    count, total = len(queries), len(targets)
    top = min(top, total)
    ranks, best, similar = np.empty(count, np.int64), np.empty((count, top), np.int64), np.empty((count, top))
    several = max(x.shape[1] if x.ndim == 3 else 1 for x in (queries, targets))
    step = max(1, CELLS // (total * several))
    for start in range(0, count, step):
        part = slice(start, min(start + step, count))
        scores = similarity(queries[part], targets)
        order = np.argpartition(-scores, top - 1, axis=1)[:, :top]
        order = np.take_along_axis(order, np.argsort(-np.take_along_axis(scores, order, 1), axis=1, kind="stable"), 1)
        best[part], similar[part] = order, np.take_along_axis(scores, order, 1)
        sizes = np.array([len(r) for r in right[part]])
        rows, columns = np.repeat(np.arange(len(sizes)), sizes), np.concatenate([np.asarray(r) for r in right[part]])
        mine = np.maximum.reduceat(scores[rows, columns], np.cumsum(sizes) - sizes)
        scores[rows, columns] = -np.inf
        ahead = (~(scores < mine[:, None] - TIE)).sum(axis=1)
        ranks[part] = 1 + np.minimum(ahead, total - sizes)
    return ranks, best, similar


def rerank(ranks: np.ndarray, right: Sequence[Sequence[int]], total: int, candidates: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Ranks int [q] after each query's k best targets of ``total`` were put in another order, and all others left where they were.

    Args:
        ranks, candidates: what ``rank`` returned, with top=k. right: as there.
        scores: float [q,k], of the candidates. Ties and not-a-number count against the query, as there.
    """
    within = ranks <= candidates.shape[1]
    sizes = np.array([len(r) for r in right])
    rows, columns = np.repeat(np.arange(len(sizes)), sizes), np.concatenate([np.asarray(r) for r in right])
    mine = np.isin(np.arange(len(sizes))[:, None] * total + candidates, rows * total + columns)
    best = np.where(mine, scores, -np.inf).max(axis=1)
    ahead = (~mine & ~(scores < best[:, None] - TIE)).sum(axis=1)
    return np.where(within, 1 + np.where(np.isnan(best), total - sizes, ahead), ranks)


def chance_within(k: int, total: int, sizes: np.ndarray) -> float:
    """Probability that a random order puts one of a query's right targets among the first k; mean over
    queries with ``sizes`` [q] right targets of ``total``."""
    values, counts = np.unique(sizes, return_counts=True)
    # None of p right ones lies among the first k: the p places are drawn from the other total - k.
    missed = [math.prod(max(total - k - j, 0) / (total - j) for j in range(p)) for p in values.tolist()]
    return float(1 - np.average(missed, weights=counts))


def chance_mean(total: int, sizes: np.ndarray) -> float:
    """Expected rank of the best of a query's right targets in a random order."""
    return float(np.mean((total + 1) / (np.asarray(sizes) + 1)))


def chance_median(total: int, sizes: np.ndarray) -> float:
    """Median rank in a random order: the first k that half of the queries are within."""
    low, high = 1, total
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if chance_within(middle, total, sizes) >= 0.5 else (middle + 1, high)
    return float(low)


def with_baselines(name: str, value: float, chance: float, interval: tuple[float, float], **others: float
                   ) -> dict[str, float]:
    """A score with its chance level, 95% interval and other baselines, under the names of ``Evaluation``."""
    return {name: float(value), f"{name}/chance": float(chance), f"{name}/ci_low": interval[0],
            f"{name}/ci_high": interval[1], **{f"{name}/{k}": float(v) for k, v in others.items()}}
