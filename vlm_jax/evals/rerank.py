"""Image-text retrieval in two passes: a dual encoder's nearest, ranked again by the matching head."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from vlm_jax.errors import ConfigError, nearest
from vlm_jax.evals.embed import embed_images, needs
from vlm_jax.evals.evaluation import Evaluation
from vlm_jax.evals.pairs import match_scores, pair_up, read_texts
from vlm_jax.evals.rank import rank, rerank
from vlm_jax.evals.retrieval import recalls

SCORES = ("match", "match+cosine")
SHOWN = 5      # best candidates kept for each query


def evaluate(predict: Mapping[str, Callable], batches: Iterable[Mapping[str, Any]], *, tokenizer: Any, source: Any = None, k: int = 128,
             score: str = "match", captions: str = "all", duplicates: str = "wrong", text_length: int = 0) -> Evaluation:
    """Retrieval as published for models with a fusion encoder (arXiv 2107.07651, section 5; 2201.12086): images and texts are encoded once, each
    query keeps its ``k`` nearest by cosine, and these are ranked by the matching head. All others rank after them, by cosine.

    Args:
        predict: needs "embed"; "features" of an image (``image`` [b,m,w]) and of a text (``text`` [b,l,w], where the system reads texts
            alone); "match" of such features beside ``text`` and ``text_mask`` (``match`` [b,2], class 1 = match).
        batches: host batches with ``image`` and ``meta`` (``captions``, ``key``).
        k: candidates of a query (the papers: 256 on COCO, 128 on Flickr30k).
        score: "match", the logit of class 1, or "match+cosine", the cosine added to it.
        captions, duplicates, text_length: as in ``retrieval``.

    Image tokens and text states of the whole set are held in memory.

    Returns:
        scores ``rerank/{text_to_image,image_to_text}/R@{1,5,10}`` with chance, interval and ``dual_encoder``, the same queries ranked by
        cosine alone; ``.../reachable``, the share of queries with an answer among their k, which
        re-ranking cannot exceed; ``.../seconds_per_1000_queries``, of scoring
        pairs, beside the ``dual_encoder``'s of comparing embeddings (encoding is the same for both); ``rerank/pairs``, how many
        distinct pairs were scored; ``rerank/{images,captions,duplicates,truncated}``.
    """
    embed, features, match = (needs(predict, name, "rerank") for name in ("embed", "features", "match"))
    if score not in SCORES:
        raise ConfigError(f"rerank score={score!r} is not known{nearest(score, SCORES)}")
    if k < 1:
        raise ConfigError(f"rerank k={k} leaves no candidate; nearest: 1")
    images = embed_images(embed, batches, features)
    known = pair_up(images.meta, captions, duplicates, "rerank")
    texts = read_texts(embed, features, known.texts, tokenizer, text_length or images.length, images.rows)
    text_embeds = texts.embeds[known.text]

    asked = {"text_to_image": (text_embeds, images.embeds, known.right_images), "image_to_text": (images.embeds, text_embeds, known.right_captions)}
    by_cosine, near, similar, compared = {}, {}, {}, {}
    for name, (queries, targets, right) in asked.items():
        began = time.perf_counter()
        by_cosine[name], near[name], similar[name] = rank(queries, targets, right, top=k)
        compared[name] = (time.perf_counter() - began) / len(queries)

    # A pair that both directions ask for, or two equal captions, is scored once.
    codes = {"text_to_image": near["text_to_image"] * len(known.texts) + known.text[:, None],
             "image_to_text": np.arange(len(images.meta))[:, None] * len(known.texts) + known.text[near["image_to_text"]]}
    distinct, where = np.unique(np.concatenate([c.ravel() for c in codes.values()]), return_inverse=True)
    logits, seconds = match_scores(match, images, texts, np.stack(np.divmod(distinct, len(known.texts)), axis=1))
    where = dict(zip(codes, np.split(where.ravel(), [codes["text_to_image"].size])))

    scores = {"rerank/images": float(len(images.meta)), "rerank/captions": float(len(known.captions)), "rerank/pairs": float(len(distinct)),
              "rerank/duplicates": float(known.shared.mean()), "rerank/truncated": texts.cut / len(known.texts)}
    units = {"text_to_image": known.owner, "image_to_text": np.arange(len(images.meta))}
    ranks, best = {}, {}
    for name, (_, targets, right) in asked.items():
        given = logits[where[name]].reshape(codes[name].shape)
        given = given + similar[name] if score == "match+cosine" else given
        ranks[name] = rerank(by_cosine[name], right, len(targets), near[name], given)
        best[name] = np.take_along_axis(near[name], np.argsort(-given, axis=1, kind="stable")[:, :SHOWN], axis=1)
        head, kept = f"rerank/{name}", near[name].shape[1]
        scores |= recalls(head, ranks[name], len(targets), [len(r) for r in right], units[name], dual_encoder=by_cosine[name])
        scores[f"{head}/reachable"] = float((by_cosine[name] <= kept).mean())
        scores[f"{head}/seconds_per_1000_queries"] = 1000 * kept * seconds / len(distinct)
        scores[f"{head}/seconds_per_1000_queries/dual_encoder"] = 1000 * compared[name]

    keys = [str(m.get("key", i)) for i, m in enumerate(images.meta)]
    items = [{"query": "text", "key": keys[known.owner[c]], "caption": known.captions[c], "rank": int(ranks["text_to_image"][c]),
              "dual_encoder": int(by_cosine["text_to_image"][c]), "top": [keys[i] for i in best["text_to_image"][c]]} for c in range(len(known.captions))]
    items += [{"query": "image", "key": keys[i], "rank": int(ranks["image_to_text"][i]), "dual_encoder": int(by_cosine["image_to_text"][i]),
               "top": [known.captions[c] for c in best["image_to_text"][i]]} for i in range(len(images.meta))]
    return Evaluation(scores, items)
