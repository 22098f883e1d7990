"""Telling a true caption from a false one of the same words, put together differently."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from vlm_jax.errors import ConfigError
from vlm_jax.evals import bootstrap
from vlm_jax.evals.embed import embed_images, embed_texts, needs
from vlm_jax.evals.evaluation import Evaluation
from vlm_jax.evals.pairs import match_scores, read_texts
from vlm_jax.evals.rank import TIE, similarity_of_pairs, with_baselines


def evaluate(predict: Mapping[str, Callable], batches: Iterable[Mapping[str, Any]], *, tokenizer: Any, source: Any = None,
             text_length: int = 0) -> Evaluation:
    """Which of two captions of an image scores higher? A bag of words cannot tell them apart. A tie counts against the model.

    Args:
        predict: needs "embed"; with "match" and "features" (as in ``rerank``) the matching head is asked too.
        batches: host batches with ``image`` and ``meta`` (``key``, ``index``).
        source: its ``swaps(index) -> {kind: (true caption, false caption)}`` tells the captions (data/scenes.py has it).
        text_length: ids per text; 0 takes the batches'.

    Returns:
        scores ``matching/{match,cosine}`` over all pairs, and ``matching/{match,cosine}/<kind>`` for each kind of swap, with chance (one
        half) and interval (images resampled with their pairs); ``matching/{images,pairs,truncated}``.
    """
    embed, match = needs(predict, "embed", "matching"), predict.get("match")
    features = needs(predict, "features", "matching") if match else None
    if not hasattr(source, "swaps"):
        raise ConfigError(f"matching: source {getattr(source, 'name', source)!r} tells no false captions; nearest: 'scenes:test'")
    images = embed_images(embed, batches, features)
    asked = [(i, kind, *pair) for i, m in enumerate(images.meta) for kind, pair in source.swaps(m["index"]).items()]
    if not asked:
        raise ConfigError(f"matching: none of the {len(images.meta)} images has two things to swap")
    owner, kinds = np.array([i for i, *_ in asked]), np.array([kind for _, kind, *_ in asked])
    texts = list(dict.fromkeys(t for *_, true, false in asked for t in (true, false)))
    number = {t: n for n, t in enumerate(texts)}
    sides = {side: np.array([number[a[at]] for a in asked]) for side, at in (("true", 2), ("false", 3))}
    length = text_length or images.length

    margins = {}
    if match:
        read = read_texts(embed, features, texts, tokenizer, length, images.rows)
        embeds, cut = read.embeds, read.cut
        logits, _ = match_scores(match, images, read, np.stack([np.tile(owner, 2), np.concatenate(list(sides.values()))], axis=1))
        margins["match"] = logits[:len(asked)] - logits[len(asked):]
    else:
        embeds, cut = embed_texts(embed, texts, tokenizer, length, images.rows)
    close = {side: similarity_of_pairs(images.embeds[owner], embeds[texts]) for side, texts in sides.items()}
    margins["cosine"] = close["true"] - close["false"]

    scores = {"matching/images": float(len(np.unique(owner))), "matching/pairs": float(len(asked)), "matching/truncated": cut / len(texts)}
    for name, margin in margins.items():
        hits = margin > TIE
        scores |= with_baselines(f"matching/{name}", hits.mean(), 0.5, bootstrap.mean_interval(hits, owner))
        for kind in dict.fromkeys(kinds.tolist()):
            of = kinds == kind
            scores |= with_baselines(f"matching/{name}/{kind}", hits[of].mean(), 0.5, bootstrap.mean_interval(hits[of], owner[of]))
    keys = [str(m.get("key", i)) for i, m in enumerate(images.meta)]
    items = [{"key": keys[i], "swap": kind, "true": true, "false": false, **{f"{name}_margin": float(margin[n]) for name, margin in margins.items()}}
             for n, (i, kind, true, false) in enumerate(asked)]
    return Evaluation(scores, items)
