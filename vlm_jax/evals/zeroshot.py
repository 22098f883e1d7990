"""Zero-shot classification by prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from vlm_jax.errors import ConfigError, nearest
from vlm_jax.evals import bootstrap
from vlm_jax.evals.embed import embed_images, embed_texts, needs
from vlm_jax.evals.evaluation import Evaluation
from vlm_jax.evals.prompts import templates as read_templates
from vlm_jax.evals.rank import rank, similarity, with_baselines


def evaluate(predict: Mapping[str, Callable], batches: Iterable[Mapping[str, Any]], *, tokenizer: Any,
             source: Any = None, templates: str | Sequence[str] = "photo", classes: Sequence[str] = (),
             groups: Mapping[str, Sequence[str]] | None = None, text_length: int = 0, queries: int = 6) -> Evaluation:
    """Classifies by the nearest class prompt (CLIP, section 3.1.4): the normalised embeddings of a class's
    prompts are averaged and normalised again.

    Args:
        predict: needs "embed".
        batches: host batches with ``image`` and ``meta`` (``label``, an index into the classes).
        templates: a name of ``prompts.TEMPLATES`` or the templates themselves.
        classes: names; empty takes ``source.classes``.
        groups: names of classes by the name of a group, scored apart: which of their images are right, among all classes.
        text_length: ids per prompt; 0 takes the batches'.
        queries: how many classes to picture with the images nearest to them.

    Returns:
        scores ``zeroshot/top1``, ``zeroshot/top5`` (above five classes) and ``zeroshot/mean_per_class``,
        with chance (a class drawn blindly), interval, and ``majority``: always guessing the most
        frequent labels of this set; ``zeroshot/top1/<group>``. Ties count against the model.
    """
    embed = needs(predict, "embed", "zeroshot")
    names = list(classes) or list(getattr(source, "classes", None) or ())
    if len(names) < 2:
        raise ConfigError(f"zeroshot classes={names}: neither the option nor the source names two classes or more")
    images = embed_images(embed, batches)
    labels = [m.get("label") for m in images.meta]
    for label, meta in zip(labels, images.meta):
        if label is None or not 0 <= label < len(names):
            raise ConfigError(f"zeroshot: sample {meta.get('key')!r} has label={label}, not one of the "
                              f"{len(names)} classes; nearest: {0 if label is None or label < 0 else len(names) - 1}")
    labels = np.array(labels)
    cut = 0

    def embed_prompts(prompts):
        nonlocal cut
        found, cut = embed_texts(embed, prompts, tokenizer, text_length or images.length, images.rows)
        return found

    weights, prompts = class_embeddings(embed_prompts, names, templates)

    ranks, best, similar = rank(images.embeds, weights, labels[:, None])
    counts = np.bincount(labels, minlength=len(names))
    frequent = np.sort(counts)[::-1] / len(labels)
    scores = {"zeroshot/images": float(len(labels)), "zeroshot/classes": float(len(names)),
              "zeroshot/truncated": cut / prompts}
    for k in (1, 5) if len(names) > 5 else (1,):
        scores |= with_baselines(f"zeroshot/top{k}", (ranks <= k).mean(), k / len(names),
                                 bootstrap.mean_interval(ranks <= k), majority=frequent[:k].sum())
    hits = (ranks == 1).astype(np.float64)
    for group, members in (groups or {}).items():
        for name in members:
            if name not in names:
                raise ConfigError(f"zeroshot groups.{group}: {name!r} is no class{nearest(name, names)}")
        rows = np.isin(labels, [names.index(name) for name in members])
        if not rows.any():
            raise ConfigError(f"zeroshot groups.{group}: no image is of its classes")
        scores |= with_baselines(f"zeroshot/top1/{group}", hits[rows].mean(), 1 / len(names), bootstrap.mean_interval(hits[rows]))

    def mean_per_class(rows):
        """Mean over the classes that these rows have."""
        seen = np.bincount(labels[rows], minlength=len(names))
        right = np.bincount(labels[rows], hits[rows], minlength=len(names))
        return (right[seen > 0] / seen[seen > 0]).mean()

    scores |= with_baselines("zeroshot/mean_per_class", mean_per_class(np.arange(len(labels))), 1 / len(names),
                             bootstrap.statistic_interval(mean_per_class, len(labels)),
                             majority=1 / (counts > 0).sum())

    items = [{"key": str(m.get("key", i)), "label": names[labels[i]], "predicted": names[best[i, 0]],
              "rank": int(ranks[i]), "top": [names[c] for c in best[i]], "similarity": similar[i].tolist()}
             for i, m in enumerate(images.meta)]
    gallery = len(images.thumbnails)
    neighbours = []
    for c in np.argsort(-counts, kind="stable")[:queries]:
        close = similarity(images.embeds[:gallery], weights[c:c + 1])[:, 0]
        order = np.argsort(-close, kind="stable")[:5]
        neighbours.append({"query": names[c], "images": [images.thumbnails[i] for i in order],
                           "scores": close[order].tolist(), "right": [bool(labels[i] == c) for i in order]})
    return Evaluation(scores, items, {"neighbours": neighbours})


def class_embeddings(embed_text: Callable[[list[str]], np.ndarray], names: Sequence[str], templates: str | Sequence[str]
                     ) -> tuple[np.ndarray, int]:
    """(unit vectors [classes, e], number of prompts): per class, its prompts' unit embeddings averaged and normalised."""
    patterns = read_templates(templates if isinstance(templates, str) else tuple(templates))
    prompts = [t.replace("{}", name) for name in names for t in patterns]
    found = normalise(embed_text(prompts)).reshape(len(names), len(patterns), -1)
    return normalise(found.mean(axis=1)), len(prompts)


def normalise(x: np.ndarray) -> np.ndarray:
    """Unit length along the last axis; zero stays zero."""
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
