"""Weak grounding: is the place that a text's heat map points at where the thing is? No box was seen in training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from vlm_jax.errors import ConfigError
from vlm_jax.evals import bootstrap
from vlm_jax.evals.embed import needs, real_rows, text_batches, thumbnail
from vlm_jax.evals.evaluation import Evaluation
from vlm_jax.evals.rank import with_baselines


def evaluate(predict: Mapping[str, Callable], batches: Iterable[Mapping[str, Any]], *, tokenizer: Any, source: Any = None, layer: int | None = None,
             text_length: int = 0, shown: int = 12) -> Evaluation:
    """The heat map of a phrase that names one thing of the image, against that thing's box.

    Args:
        predict: needs "ground" (``image``, ``text``, ``text_mask`` -> ``heat`` [b, rows, columns], 0 or more).
        batches: host batches with ``image`` and ``meta`` (``key``, ``index``).
        source: its ``phrase(index)`` -> (phrase, box) or None tells what to look for; the box is x0, y0, x1, y1 in shares of the
            image's sides, y downwards (data/scenes.py has it). Images may be resized, not cropped.
        layer: handed to "ground"; None leaves the system's default.
        text_length: ids per phrase; 0 takes the batches'. shown: maps to picture.

    Returns:
        scores ``grounding/pointing``, the share of maps whose hottest cell has its centre in the box (a map without heat points at nothing), and
        ``grounding/heat_inside``, the mean share of a map's heat in the box, both with the mean share of the area that boxes have as
        chance; ``grounding/{images,truncated}``.
    """
    ground = needs(predict, "ground", "grounding")
    if not hasattr(source, "phrase"):
        raise ConfigError(f"grounding: source {getattr(source, 'name', source)!r} tells no phrases with boxes; nearest: 'scenes:test'")
    items, found, cut = [], [], 0
    options = {} if layer is None else {"layer": layer}
    for batch in batches:
        asked = [(row, meta, *named) for row, meta in real_rows(batch) if (named := source.phrase(meta["index"]))]
        if not asked:
            continue
        length = text_length or batch["text"].shape[1]
        rows = np.zeros(len(batch["image"]), int)
        rows[:len(asked)] = [row for row, *_ in asked]
        words, _, truncated = next(text_batches([phrase for _, _, phrase, _ in asked], tokenizer, length, len(rows)))
        maps = np.asarray(ground({"image": batch["image"][rows], **words}, **options)["heat"], np.float64)
        cut += truncated
        for heat, (row, meta, phrase, box) in zip(maps, asked, strict=False):      # rows behind them are padding
            inside = overlap(box, heat.shape)
            y, x = (np.array(np.unravel_index(heat.argmax(), heat.shape)) + 0.5) / heat.shape
            hit = bool(heat.max() > 0 and box[0] <= x <= box[2] and box[1] <= y <= box[3])
            share = float((heat * inside).sum() / heat.sum()) if heat.max() > 0 else 0.0
            items.append({"key": str(meta.get("key", len(items))), "phrase": phrase, "box": [float(v) for v in box], "peak": [float(x), float(y)],
                          "hit": hit, "heat_inside": share})
            if len(found) < shown:
                found.append({"image": thumbnail(batch["image"][row]), "heat": heat, "box": box, "phrase": phrase, "ok": hit})
    if not items:
        raise ConfigError("grounding: no image of the source has a thing to look for")
    hits, shares = np.array([i["hit"] for i in items], float), np.array([i["heat_inside"] for i in items])
    chance = np.mean([(b[2] - b[0]) * (b[3] - b[1]) for b in (i["box"] for i in items)])
    scores = {"grounding/images": float(len(items)), "grounding/truncated": cut / len(items),
              **with_baselines("grounding/pointing", hits.mean(), chance, bootstrap.mean_interval(hits)),
              **with_baselines("grounding/heat_inside", shares.mean(), chance, bootstrap.mean_interval(shares))}
    return Evaluation(scores, items, {"grounding": found})


def overlap(box: Any, shape: tuple[int, int]) -> np.ndarray:
    """[rows, columns]: the share of each cell that the box covers."""
    def along(low, high, count):
        edges = np.arange(count + 1) / count
        return np.clip(np.minimum(edges[1:], high) - np.maximum(edges[:-1], low), 0, None) * count

    return np.outer(along(box[1], box[3], shape[0]), along(box[0], box[2], shape[1]))
