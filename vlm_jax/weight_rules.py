"""One language for moving weights: between stages, from other layouts, and back into them.

A rule is ``(target, source, how)``: ``target`` a regex over whole target paths, ``source`` a
template that the match expands ("\\\\1"), ``how`` the transformation. The first matching rule
wins. In a template, "{layer}" stands for each layer of a stacked leaf (they are joined along its
first axis; "{layer+6}" counts from 6, "{layer*2+6}" by twos), a final "[1/3]" for the second of three equal parts of the source along its
first axis (torch keeps query, key and value in one matrix), and a final "[6..12]" for those rows of it: layers of a stack, parts of a table;
"[1..:2]" for every second row from the second on (by ``init`` alone, it has no way back).

``apply`` serves a stage's ``init``; ``import_leaves`` and ``export_leaves`` read one table of
rules forwards and backwards. Totals are checked: a rule that matches nothing, a target that nothing
fills and a source that nothing consumes are errors.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from vlm_jax.errors import ConfigError, nearest

Rule = tuple[str, str, str]
FRESH = "fresh"
LAYER = re.compile(r"\{layer(?:\*(\d+))?(?:\+(\d+))?\}")
ROWS = re.compile(r"(.*)\[(\d+)\.\.(\d*)(?::(\d+))?\]")


# ---- tables of positions -----------------------------------------------------------------------

def resize_grid(table: np.ndarray, length: int, kernel: str = "antialias") -> np.ndarray:
    """A square table of positions [n(+1), width] resized to ``length`` rows; a leading class row, and two dead rows before it, are kept.

    ``kernel`` "antialias": bicubic (a = -0.5) with antialias and renormalised weights, as open_clip does on
    load (open_clip ``pos_embed.py``); "border": bicubic (a = -0.75) without antialias, samples past the border
    clamped to it (transformers ``interpolate_pos_encoding``); "corners": the same with the corners of both grids on each other
    (LAVIS ``clip_vit.py``). Raises ValueError where a side is not a square.
    """
    extra, old = _grid_side(table.shape[0])
    extra_new, new = _grid_side(length)
    if extra != extra_new:
        raise ValueError(f"a table of {table.shape[0]} positions does not resize to {length}: only one has a class row, or dead rows before it")
    weights = _antialiased(old, new) if kernel == "antialias" else _clamped(old, new, kernel == "corners")
    grid = table[extra:].reshape(old, old, -1).astype(np.float64)
    grid = np.einsum("ai,bj,ijd->abd", weights, weights, grid).reshape(new * new, -1)
    return np.concatenate([table[:extra], grid.astype(table.dtype)])


def _grid_side(count: int) -> tuple[int, int]:
    """(rows before the grid, side) of a table of ``count`` positions: none, a class row, or two dead rows and a class row (fairseq's habit)."""
    for extra in (0, 1, 3):
        side = round(max(count - extra, 0) ** 0.5)
        if side and side * side == count - extra:
            return extra, side
    raise ValueError(f"{count} positions are no square grid, with or without a class row")


def _cubic(x: np.ndarray, a: float) -> np.ndarray:
    x = np.abs(x)
    return np.where(x < 1, (a + 2) * x**3 - (a + 3) * x**2 + 1, np.where(x < 2, a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a, 0.0))


def _antialiased(old: int, new: int) -> np.ndarray:
    scale = old / new
    centre = (np.arange(new) + 0.5) * scale - 0.5
    w = _cubic((centre[:, None] - np.arange(old)) / max(scale, 1.0), -0.5)
    return w / w.sum(1, keepdims=True)


def _clamped(old: int, new: int, corners: bool = False) -> np.ndarray:
    centre = np.arange(new) * ((old - 1) / max(new - 1, 1)) if corners else (np.arange(new) + 0.5) * (old / new) - 0.5
    taps = np.floor(centre)[:, None] + np.arange(-1, 3)
    out = np.zeros((new, old))
    np.add.at(out, (np.arange(new)[:, None], np.clip(taps, 0, old - 1).astype(int)), _cubic(centre[:, None] - taps, -0.75))
    return out


def resize_sequence(table: np.ndarray, length: int) -> np.ndarray:
    """Positions of a text [n, width] resized to ``length`` rows, linearly (open_clip ``resize_text_pos_embed``)."""
    centre = np.clip((np.arange(length) + 0.5) * (table.shape[0] / length) - 0.5, 0, None)
    low = np.floor(centre).astype(int)
    high, share = np.minimum(low + 1, table.shape[0] - 1), (centre - low)[:, None]
    return (table[low] * (1 - share) + table[high] * share).astype(table.dtype)


def resize_relative(table: np.ndarray, length: int) -> np.ndarray:
    """A table [..., (2w - 1)^2, heads] of biases by relative position on a grid of w x w, for one of ``length`` rows (BEiT, ``run_class_finetuning.py``).

    The old positions are thought to lie at distances that grow geometrically from the middle, so that the outermost are those of the new
    grid; a cubic spline goes through them. Raises ValueError where a number of rows is no odd square.
    """
    from scipy.interpolate import RectBivariateSpline

    old, new = (round(count ** 0.5) for count in (table.shape[-2], length))
    if old * old != table.shape[-2] or new * new != length or not old % 2 or not new % 2:
        raise ValueError(f"a table of {table.shape[-2]} relative positions does not resize to {length}: both must be odd squares")
    low, high = 1.01, 1.5
    while high - low > 1e-6:
        ratio = (low + high) / 2
        low, high = (low, ratio) if (1 - ratio ** (old // 2)) / (1 - ratio) > new // 2 else (ratio, high)
    steps = np.cumsum(ratio ** np.arange(old // 2))
    places, wanted = np.concatenate([-steps[::-1], [0], steps]), np.arange(new) - new // 2
    grids = np.moveaxis(table.reshape(*table.shape[:-2], old, old, table.shape[-1]), -1, -3).reshape(-1, old, old)
    found = np.stack([RectBivariateSpline(places, places, grid.astype(np.float32), s=0)(wanted, wanted) for grid in grids])
    found = np.moveaxis(found.reshape(*table.shape[:-2], table.shape[-1], length), -2, -1)
    return found.astype(table.dtype)


# ---- transformations ---------------------------------------------------------------------------

class How(NamedTuple):
    """``forward(source, target shape)`` and its inverse ``backward(target)``; both without the layers axis."""
    forward: Callable[[np.ndarray, Sequence[int]], np.ndarray]
    backward: Callable[[np.ndarray], np.ndarray]


def _same(x, *_):
    return x


def _if_needed(resize):
    return lambda x, shape: x if x.shape == tuple(shape) or x.ndim != 2 else resize(x, shape[0])


def _grow(x, shape):
    """A larger vocabulary table: new rows start at the mean of the old ones."""
    extra = shape[0] - x.shape[0]
    if extra < 0:
        raise ValueError(f"a table of {x.shape[0]} rows does not shrink to {shape[0]}")
    return np.concatenate([x, np.repeat(x.mean(0, keepdims=True), extra, 0)])


def _grow_columns(x, shape):
    """A larger vocabulary's head [width, vocab]: new columns are the mean of the old ones."""
    return _grow(x.T, shape[::-1]).T


def _grow_last(x, shape):
    """A larger table: new rows are copies of the last one."""
    extra = shape[0] - x.shape[0]
    if extra < 0:
        raise ValueError(f"a table of {x.shape[0]} rows does not shrink to {shape[0]}")
    return np.concatenate([x, np.repeat(x[-1:], extra, 0)])


def _relative(x, shape):
    """[rows, layers * heads], or [rows, heads] for all layers -> [layers, rows, heads]."""
    if x.ndim == 2 and len(shape) == 3:
        layers, _, heads = shape
        x = np.repeat(x[None], layers, 0) if x.shape[1] == heads else _reshape(x, (len(x), layers, heads)).transpose(1, 0, 2)
    return x


def _relative_resized(x, shape):
    x = _relative(x, shape)
    return x if x.shape[-2] == shape[-2] else resize_relative(x, shape[-2])


def _relative_back(x):
    return x.transpose(1, 0, 2).reshape(x.shape[1], -1)


def _patches_back(x):
    side = round((x.shape[0] / 3) ** 0.5)
    return x.reshape(side, side, 3, -1).transpose(3, 2, 0, 1)


def _reshape(x, shape):
    if x.size != np.prod(shape, dtype=int):
        raise ValueError(f"{x.shape} does not reshape to {tuple(shape)}")
    return x.reshape(shape)


HOW: Mapping[str, How] = {
    "copy": How(_same, _same),
    "scalar": How(_reshape, _same),                                                                # [] or [1] -> []
    "dense": How(lambda x, shape: x.T, lambda x: x.T),                                             # [out, in] -> [in, out]
    "to_heads": How(lambda x, shape: _reshape(x.T, shape), lambda x: x.reshape(x.shape[0], -1).T), # [h*d, in] -> [in, h, d]
    "from_heads": How(lambda x, shape: _reshape(x.T, shape), lambda x: x.reshape(-1, x.shape[-1]).T),  # [out, h*d] -> [h, d, out]
    "heads": How(_reshape, lambda x: x.reshape(-1)),                                               # [h*d] -> [h, d]
    "conv": How(lambda x, shape: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1)),      # OIHW -> HWIO
    "patches": How(lambda x, shape: _reshape(x.transpose(2, 3, 1, 0), shape), _patches_back),      # OIHW -> [h*w*i, o]
    "cells": How(lambda x, shape: x[:, :, 0, 0].T, lambda x: x.T[..., None, None]),                # a 1x1 convolution [out, in, 1, 1] -> [in, out]
    "resize_positions": How(_if_needed(resize_grid), _same),
    "one": How(_reshape, lambda x: x.reshape(1)),                                                  # [1] -> []
    "id_row": How(_reshape, lambda x: x[None]),                                                    # [1, n] -> [n]
    "class_row": How(_reshape, lambda x: x[None, None]),                                          # [1, 1, d] -> [d]
    "batched_resize_positions_border": How(lambda x, shape: _if_needed(lambda y, n: resize_grid(y, n, "border"))(x[0], shape), lambda x: x[None]),
    "resize_positions_border": How(_if_needed(lambda x, n: resize_grid(x, n, "border")), _same),
    "resize_positions_corners": How(_if_needed(lambda x, n: resize_grid(x, n, "corners")), _same),
    "resize_text_positions": How(_if_needed(resize_sequence), _same),
    "grow": How(_grow, _same),
    "grow_columns": How(_grow_columns, _same),
    "grow_last": How(_grow_last, _same),
    "first_rows": How(lambda x, shape: x[:shape[0]], _same),
    "relative_positions": How(_relative, _relative_back),
    "resize_relative_positions": How(_relative_resized, _relative_back),
}


def _how(name: str, where: str) -> How:
    if name not in HOW:
        raise ConfigError(f"{where}: {name!r} is not a transformation{nearest(name, HOW)}")
    return HOW[name]


def _part(template: str) -> tuple[str, int, int]:
    """"name[1/3]" -> ("name", 1, 3); without a part ("name", 0, 1)."""
    match = re.fullmatch(r"(.*)\[(\d+)/(\d+)\]", template)
    return (match[1], int(match[2]), int(match[3])) if match else (template, 0, 1)


def _names(template: str, shape: Sequence[int]) -> list[str]:
    """The source names of a template: one, or one for each layer of a stacked leaf of ``shape``."""
    name = ROWS.sub(r"\1", _part(template)[0])
    if not LAYER.search(name):
        return [name]
    return [LAYER.sub(lambda found, i=i: str(i * int(found[1] or 1) + int(found[2] or 0)), name) for i in range(shape[0])]


def first_match(rules: Sequence[Rule], path: str) -> tuple[int, str, str] | None:
    """(rule index, expanded source, how) of the first rule for ``path``."""
    for i, (target, source, how) in enumerate(rules):
        match = re.fullmatch(target, path)
        if match:
            return i, source if source == FRESH else match.expand(source) if source else path, how
    return None


def value(path: str, shape: Sequence[int], template: str, how: str, sources: Mapping[str, np.ndarray], where: str) -> np.ndarray:
    """The target's value. Raises ConfigError where a source is missing or does not fit."""
    rows = ROWS.fullmatch(template)
    template = rows[1] if rows else template
    forward, (_, part, parts) = _how(how, where).forward, _part(template)
    stacked = bool(LAYER.search(template))

    def one(name):
        if name not in sources:
            raise ConfigError(f"{where}: {path} wants {name!r}, which the source lacks{nearest(name, sources, 5)}")
        x = np.asarray(sources[name])
        if rows:
            x = x[int(rows[2]):int(rows[3]) if rows[3] else None:int(rows[4] or 1)]
        try:
            if parts > 1:
                if not x.ndim or x.shape[0] % parts:
                    raise ValueError(f"{name} of shape {x.shape} does not divide into {parts} parts")
                x = np.split(x, parts)[part]
            x = forward(x, tuple(shape[1:] if stacked else shape))
        except ValueError as error:
            raise ConfigError(f"{where}: {path}: {error}") from error
        if x.shape != tuple(shape[1:] if stacked else shape):
            raise ConfigError(f"{where}: {path} has shape {tuple(shape)}, but {name} gives {x.shape}")
        return x

    names = _names(template, shape)
    if not stacked:
        return one(names[0])
    out = None
    for i, name in enumerate(names):      # one layer beside the leaf, not all of them: language models are large
        layer = one(name)
        out = np.empty((len(names), *layer.shape), layer.dtype) if out is None else out
        out[i] = layer
    return out


# ---- tables of rules ---------------------------------------------------------------------------

def apply(rules: Sequence[Rule], targets: Mapping[str, Sequence[int]], sources: Mapping[str, np.ndarray],
          where: str = "init") -> dict[str, np.ndarray]:
    """Values for the ``targets`` (path -> shape) that the rules fill from ``sources`` (path -> array).

    Targets whose rule says ``fresh``, or that no rule matches, are left out of the result.
    Raises ConfigError for a rule that matches no target, a source that is not there, a shape
    that does not fit, or an unknown transformation.
    """
    out: dict[str, np.ndarray] = {}
    used: set[int] = set()
    for path, shape in targets.items():
        found = first_match(rules, path)
        if found:
            used.add(found[0])
            if found[1] != FRESH:
                out[path] = value(path, shape, found[1], found[2], sources, where)
    for i, (target, _, _) in enumerate(rules):
        if i not in used:
            raise ConfigError(f"{where}: rule {target!r} matches no parameter{nearest(target, targets, 5)}")
    return out


def import_leaves(rules: Sequence[Rule], ignored: Sequence[str], targets: Mapping[str, Sequence[int]],
                  sources: Mapping[str, np.ndarray], where: str) -> tuple[dict[str, np.ndarray], list[str]]:
    """Every target from a foreign layout -> (leaves, names of the sources that were ignored).

    The table may hold rules for parts that this model lacks; in return every target must be filled,
    and every source consumed or match a regex of ``ignored``. Raises ConfigError naming what is left.
    """
    matched = {path: first_match(rules, path) for path in targets}
    lacking = sorted(path for path, found in matched.items() if found is None)
    if lacking:
        raise ConfigError(f"{where}: no rule fills {len(lacking)} parameters of the model, the first: {', '.join(lacking[:3])}")
    consumed = {name for path, found in matched.items() for name in _names(found[1], targets[path])}
    left = [name for name in sources if name not in consumed]
    unknown = sorted(name for name in left if not any(re.fullmatch(p, name) for p in ignored))
    if unknown:
        raise ConfigError(f"{where}: {len(unknown)} tensors of the file have no place in the model, the first: {', '.join(unknown[:5])}")
    return {path: value(path, targets[path], found[1], found[2], sources, where) for path, found in matched.items()}, left


def export_leaves(rules: Sequence[Rule], leaves: Mapping[str, np.ndarray], where: str) -> dict[str, np.ndarray]:
    """The same table backwards: our leaves -> arrays by foreign name.

    Raises ConfigError for a leaf that the other layout has no place for.
    """
    parts: dict[str, dict[int, np.ndarray]] = {}
    counts: dict[str, int] = {}
    for path, leaf in leaves.items():
        found = first_match(rules, path)
        if found is None:
            raise ConfigError(f"{where}: that layout has no place for {path}")
        backward, (_, part, count), rows = _how(found[2], where).backward, _part(found[1]), ROWS.fullmatch(found[1])
        leaf = np.asarray(leaf)
        for name, x in zip(_names(found[1], leaf.shape), leaf if LAYER.search(found[1]) else [leaf]):
            parts.setdefault(name, {})[int(rows[2]) if rows else part] = backward(x)
            counts[name] = 0 if rows else count      # rows go together in their order, however many parts there are
    for name, found in parts.items():
        if counts[name] and len(found) != counts[name]:
            raise ConfigError(f"{where}: {name} needs {counts[name]} parts, the model fills {len(found)} of them")
    return {name: np.asarray(np.concatenate([found[i] for i in sorted(found)]) if len(found) > 1 else next(iter(found.values())), order="C")
            for name, found in parts.items()}
