"""One language for moving weights: between stages, and from other layouts.

A rule is ``(target, source, how)``: ``target`` a regex over whole target paths, ``source`` a
template that the match expands ("\\\\1"), ``how`` the transformation. The first matching rule
wins. Totals are checked: a rule that matches nothing and a target that nothing fills are errors.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from vlm_jax.errors import ConfigError, nearest

Rule = tuple[str, str, str]
FRESH = "fresh"


def resize_grid(table: np.ndarray, length: int) -> np.ndarray:
    """A square table of positions [n(+1), width] resized to ``length`` rows; a leading class row is kept.

    Bicubic (a = -0.5) with antialias and renormalised weights, as open_clip does on load
    (open_clip/pos_embed.py). Raises ValueError where a side is not a square.
    """
    def split(n):
        side = int(round(n ** 0.5))
        if side * side == n:
            return 0, side
        side = int(round((n - 1) ** 0.5))
        if side * side == n - 1:
            return 1, side
        raise ValueError(f"{n} positions are no square grid, with or without a class row")

    extra, old = split(table.shape[0])
    extra_new, new = split(length)
    if extra != extra_new:
        raise ValueError(f"a table of {table.shape[0]} positions does not resize to {length}: only one has a class row")
    weights = _cubic_weights(old, new)
    grid = table[extra:].reshape(old, old, -1).astype(np.float64)
    grid = np.einsum("ai,bj,ijd->abd", weights, weights, grid).reshape(new * new, -1)
    return np.concatenate([table[:extra], grid.astype(table.dtype)])


def _cubic_weights(old: int, new: int, a: float = -0.5) -> np.ndarray:
    scale = old / new
    support = max(scale, 1.0)
    centre = (np.arange(new) + 0.5) * scale - 0.5
    x = np.abs(centre[:, None] - np.arange(old)[None]) / support
    w = np.where(x < 1, (a + 2) * x**3 - (a + 3) * x**2 + 1,
                 np.where(x < 2, a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a, 0.0))
    return w / w.sum(1, keepdims=True)


def _copy(x: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    return x


def _resize_positions(x: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    return x if x.shape == tuple(shape) else resize_grid(x, shape[0])


def _grow(x: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """A larger vocabulary table: new rows start at the mean of the old ones."""
    extra = shape[0] - x.shape[0]
    if extra < 0:
        raise ValueError(f"a table of {x.shape[0]} rows does not shrink to {shape[0]}")
    return np.concatenate([x, np.repeat(x.mean(0, keepdims=True), extra, 0)])


HOW: Mapping[str, Callable[[np.ndarray, Sequence[int]], np.ndarray]] = {
    "copy": _copy, "resize_positions": _resize_positions, "grow": _grow}


def apply(rules: Sequence[Rule], targets: Mapping[str, Sequence[int]], sources: Mapping[str, np.ndarray],
          where: str = "init") -> dict[str, np.ndarray]:
    """Values for the ``targets`` (path -> shape) that the rules fill from ``sources`` (path -> array).

    Targets whose rule says ``fresh``, or that no rule matches, are left out of the result.
    Raises ConfigError for a rule that matches no target, a source that is not there, a shape
    that does not fit, or an unknown transformation.
    """
    out: dict[str, np.ndarray] = {}
    used = [False] * len(rules)
    for path, shape in targets.items():
        for i, (target, source, how) in enumerate(rules):
            match = re.fullmatch(target, path)
            if not match:
                continue
            used[i] = True
            if source == FRESH:
                break
            name = match.expand(source) if source else path
            if how not in HOW:
                raise ConfigError(f"{where}: {how!r} is not a transformation{nearest(how, HOW)}")
            if name not in sources:
                raise ConfigError(f"{where}: rule {target!r} wants {name!r}, which the source lacks{nearest(name, sources, 5)}")
            try:
                value = HOW[how](np.asarray(sources[name]), shape)
            except ValueError as error:
                raise ConfigError(f"{where}: {path}: {error}") from error
            if value.shape != tuple(shape):
                raise ConfigError(f"{where}: {path} has shape {tuple(shape)}, but {name} gives {value.shape}")
            out[path] = value
            break
    for i, (target, source, how) in enumerate(rules):
        if not used[i]:
            raise ConfigError(f"{where}: rule {target!r} matches no parameter{nearest(target, targets, 5)}")
    return out
