"""Classifying an image, or several, together with a text: entailment, statements about pairs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from vlm_jax.errors import ConfigError
from vlm_jax.evals import bootstrap
from vlm_jax.evals.embed import needs, real_rows, side_by_side, thumbnail
from vlm_jax.evals.evaluation import Evaluation, in_turn
from vlm_jax.evals.rank import with_baselines


def evaluate(predict: Mapping[str, Callable], batches: Iterable[Mapping[str, Any]], *, tokenizer: Any = None, source: Any = None,
             classes: Sequence[str] = (), shown: int = 12) -> Evaluation:
    """The class with the highest logit against the label. A logit that is no number is wrong.

    Args:
        predict: needs "classify". Called with ``image`` or ``images``, ``text``, ``text_mask``; returns ``logits`` [b,c].
        batches: host batches with these and ``meta`` (``label``, an index into the classes; ``key``, ``captions``).
        classes: names; empty takes ``source.classes``.
        shown: examples to picture, right and wrong ones in turn.

    Returns:
        scores ``classify/accuracy`` with chance (a class drawn blindly), interval (images resampled with their texts) and ``majority`` (always
        the most frequent label of this set), and ``classify/recall/<class>`` for each class that this set has; ``classify/samples``.
    """
    classify = needs(predict, "classify", "classify")
    names = list(classes) or list(getattr(source, "classes", None) or ())
    if len(names) < 2:
        raise ConfigError(f"classify classes={names}: neither the option nor the source names two classes or more; nearest: data.classes")
    logits, meta, pictures = [], [], []
    for batch in batches:
        inputs = {name: batch[name] for name in ("image", "images", "text", "text_mask") if name in batch}
        out = np.asarray(classify(inputs)["logits"], np.float64)
        if out.shape[1] != len(names):
            raise ConfigError(f"classify classes={names}: the model tells {out.shape[1]} classes apart, not {len(names)}; nearest: "
                              f"{out.shape[1]} names, in the order of training")
        for row, m in real_rows(batch):
            label = m.get("label")
            if label is None or not 0 <= label < len(names):
                raise ConfigError(f"classify: sample {m.get('key')!r} has label={label}, not one of the {len(names)} classes; nearest: "
                                  f"{0 if label is None or label < 0 else len(names) - 1}")
            logits.append(out[row])
            meta.append(m)
            pictures.append(thumbnail(side_by_side(batch, row)) if len(meta) <= 40 * shown else None)
    if not meta:
        raise ConfigError("the classify evaluation source has no samples; nearest: a source of length 1 or more")
    found, labels = np.array(logits), np.array([m["label"] for m in meta])
    best = np.where(np.isnan(found), -np.inf, found).argmax(axis=1)
    right = (best == labels) & ~np.isnan(found).any(axis=1)
    units = np.unique([str(m.get("key", i)) for i, m in enumerate(meta)], return_inverse=True)[1]
    counts = np.bincount(labels, minlength=len(names))
    scores = {"classify/samples": float(len(meta)), **with_baselines(
        "classify/accuracy", right.mean(), 1 / len(names), bootstrap.mean_interval(right, units), majority=counts.max() / len(meta))}
    for c, name in enumerate(names):
        of = labels == c
        if of.any():
            scores |= with_baselines(f"classify/recall/{name}", right[of].mean(), 1 / len(names), bootstrap.mean_interval(right[of], units[of]))

    texts = [(m.get("captions") or [""])[0] for m in meta]
    items = [{"key": str(m.get("key", i)), "text": texts[i], "label": names[labels[i]], "predicted": names[best[i]], "right": bool(right[i]),
              "logits": found[i].tolist()} for i, m in enumerate(meta)]
    near = [i for i, picture in enumerate(pictures) if picture is not None]
    chosen = in_turn([i for i in near if right[i]], [i for i in near if not right[i]], shown)
    return Evaluation(scores, items, {"captions": [
        {"image": pictures[i], "generated": f"{texts[i]}: {names[best[i]]}", "reference": names[labels[i]], "ok": bool(right[i])} for i in chosen]})
