"""An image tokenizer: how much of its codebook is used, what its codes say of a teacher's features, and what they stand for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from vlm_jax.errors import ConfigError
from vlm_jax.evals import bootstrap
from vlm_jax.evals.embed import needs, one_image, real_rows, thumbnail
from vlm_jax.evals.evaluation import Evaluation

GALLERY = 256      # images whose patches are pictured
PATCH = 96         # pixels of a pictured patch, about, with its surroundings
SURROUNDINGS = 0.45      # their brightness


def evaluate(predict: Mapping[str, Callable], batches: Iterable[Mapping[str, Any]], *, tokenizer: Any, source: Any = None, shown: int = 8,
             nearest: int = 6) -> Evaluation:
    """Codes of all patches of all images.

    Args:
        predict: needs "tokens" (``image`` -> ``ids`` int [b, n] in raster order, ``similarity`` [b, n] of a patch to its code, ``codes``, how many there
            are), or "reconstruct", which also tells ``cosine`` [b, n] of what is decoded to the teacher's features ``target`` [b, n, features].
        batches: host batches with ``image`` and ``meta`` (``key``).
        shown: codes to picture, from the most to the least frequent, each with the patches ``nearest`` to it, one of an image.

    Returns:
        scores ``codebook/usage``, the share of codes that any patch has (beside it what as many patches drawn uniformly would use), ``codebook/perplexity``,
        exp of the codes' entropy (beside it the number of codes, its bound), ``codebook/cosine`` where there is a teacher (beside it the best that one
        constant feature could reach), and ``codebook/{images,codes,tokens}``. Intervals resample images.
    """
    say = predict["reconstruct"] if "reconstruct" in predict else needs(predict, "tokens", "codebook")
    ids, similarity, cosines, items, gallery, total = [], [], [], [], [], 0.0
    for batch in batches:
        image, rows = one_image(batch), real_rows(batch)
        out = {k: np.asarray(v) for k, v in say({"image": image}).items() if k != "decoded"}
        real = [row for row, _ in rows]
        ids.append(out["ids"][real])
        similarity.append(out["similarity"][real])
        gallery += [thumbnail(image[row], 512) for row in real[:max(0, GALLERY - len(gallery))]]
        items += [{"key": str(meta.get("key", len(items) + i)), "ids": out["ids"][row]} for i, (row, meta) in enumerate(rows)]
        if "cosine" in out:
            cosines.append(out["cosine"][real].mean(1))
            target = out["target"][real].astype(np.float64)
            total = total + (target / np.maximum(np.linalg.norm(target, axis=-1, keepdims=True), 1e-12)).sum((0, 1))
    if not items:
        raise ConfigError("the evaluation source has no samples; nearest: a source of length 1 or more")
    ids, similarity, codes = np.concatenate(ids), np.concatenate(similarity), int(out["codes"])
    count = np.bincount(ids.ravel(), minlength=codes)
    scores = {"codebook/images": float(len(ids)), "codebook/codes": float(codes), "codebook/tokens": float(ids.size),
              "codebook/usage": float((count > 0).mean()), "codebook/usage/uniform": float(1 - (1 - 1 / codes) ** ids.size),
              "codebook/perplexity": perplexity(count), "codebook/perplexity/codes": float(codes)}
    if cosines:
        cosines = np.concatenate(cosines).astype(np.float64)
        low, high = bootstrap.mean_interval(cosines)
        scores |= {"codebook/cosine": float(cosines.mean()), "codebook/cosine/ci_low": low, "codebook/cosine/ci_high": high,
                   "codebook/cosine/constant": float(np.linalg.norm(total) / ids.size)}
        for item, cosine in zip(items, cosines, strict=True):
            item["cosine"] = float(cosine)
    return Evaluation(scores, items, {"codes": pictures(gallery, ids[:len(gallery)], similarity[:len(gallery)], count, shown, nearest)})


def perplexity(count: np.ndarray) -> float:
    """exp of the entropy of counts: as many equally frequent codes would say as much."""
    share = count[count > 0] / count.sum()
    return float(np.exp(-(share * np.log(share)).sum()))


def pictures(gallery: list[np.ndarray], ids: np.ndarray, similarity: np.ndarray, count: np.ndarray, shown: int, nearest: int) -> list[dict[str, Any]]:
    """Codes evenly spaced by frequency among those that the gallery has, with the patches nearest to each."""
    seen = np.unique(ids)
    by_frequency = seen[np.argsort(-count[seen], kind="stable")]
    chosen = by_frequency[np.unique(np.linspace(0, len(seen) - 1, min(shown, len(seen))).astype(int))] if len(seen) else []
    found = []
    for code in chosen:
        own = np.where(ids == code, similarity, -np.inf)
        best = own.max(1)
        images = [i for i in np.argsort(-best, kind="stable")[:nearest] if np.isfinite(best[i])]
        found.append({"query": f"code {code}: {count[code] / count.sum():.2%} of all patches", "scores": [float(best[i]) for i in images],
                      "images": [patch(gallery[i], int(own[i].argmax()), ids.shape[1]) for i in images]})
    return found


def patch(image: np.ndarray, place: int, tokens: int) -> np.ndarray:
    """uint8 [side, side, 3]: patch ``place`` of a square grid of ``tokens``, in the middle of its darkened surroundings."""
    side = round(tokens ** 0.5)
    h, w = image.shape[0] // side, image.shape[1] // side
    y, x = place // side * h, place % side * w
    padded = np.pad((image * SURROUNDINGS).astype(np.uint8), ((h, h), (w, w), (0, 0)))
    cut = padded[y:y + 3 * h, x:x + 3 * w].copy()
    cut[h:2 * h, w:2 * w] = image[y:y + h, x:x + w]
    times = max(1, -(-PATCH // max(cut.shape[:2])))
    return cut.repeat(times, 0).repeat(times, 1)
