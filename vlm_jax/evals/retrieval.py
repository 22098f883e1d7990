"""Image-text retrieval: recall at k and ranks in both directions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from vlm_jax.evals import bootstrap
from vlm_jax.evals.embed import Images, embed_images, embed_texts, needs
from vlm_jax.evals.evaluation import Evaluation
from vlm_jax.evals.pairs import pair_up
from vlm_jax.evals.rank import (
    chance_mean,
    chance_median,
    chance_within,
    rank,
    similarity,
    with_baselines,
)

KS = (1, 5, 10)


def evaluate(predict: Mapping[str, Callable], batches: Iterable[Mapping[str, Any]], *, tokenizer: Any,
             source: Any = None, prompt: str = "{}", captions: str = "all", duplicates: str = "wrong", text_length: int = 0,
             queries: int = 6, shown: int = 12) -> Evaluation:
    """Ranks by cosine, features computed once; the protocol of COCO and Flickr30k (CLIP, section 3.1).

    Text to image: every caption of every image is a query, its image the answer. Image to text:
    every image is a query among all captions, answered by the best ranked of its own. Ties count
    against the model (see ``rank.rank``); equal captions are embedded once and so tie exactly.

    Args:
        predict: needs "embed".
        batches: host batches with ``image`` and ``meta`` (``captions``, ``key``, ``index``).
        prompt: wraps each caption; "{}" leaves it as it is.
        captions: of an image that has several, "all" count, or the "first" alone.
        duplicates: a caption that another image has word for word is "wrong" for it (the standard
            protocol, whose ceiling the score ``retrieval/duplicates``, their share, explains), or "right".
        text_length: ids per text; 0 takes the batches'.
        queries, shown: how many texts to picture with their neighbours, and images in the matrix.

    Returns:
        scores ``retrieval/{text_to_image,image_to_text}/{R@1,R@5,R@10,mean_rank,median_rank}``, each
        with chance and interval (images resampled with their captions; for the median, queries), and
        ``retrieval/{images,captions,duplicates,truncated}``.
    """
    embed = needs(predict, "embed", "retrieval")
    images = embed_images(embed, batches)
    pairs = pair_up(images.meta, captions, duplicates, "retrieval")
    captions, owner = pairs.captions, pairs.owner
    found, cut = embed_texts(embed, [prompt.replace("{}", t) for t in pairs.texts], tokenizer,
                             text_length or images.length, images.rows)
    text_embeds = found[pairs.text]

    to_image, near_images, _ = rank(text_embeds, images.embeds, pairs.right_images)
    to_text, near_texts, _ = rank(images.embeds, text_embeds, pairs.right_captions)
    scores = {"retrieval/images": float(len(images.meta)), "retrieval/captions": float(len(captions)),
              "retrieval/duplicates": float(pairs.shared.mean()), "retrieval/truncated": cut / len(pairs.texts)}
    scores |= _direction("retrieval/text_to_image", to_image, len(images.meta), [len(r) for r in pairs.right_images], owner)
    scores |= _direction("retrieval/image_to_text", to_text, len(captions), [len(r) for r in pairs.right_captions],
                         np.arange(len(images.meta)))

    keys = [str(m.get("key", i)) for i, m in enumerate(images.meta)]
    items = [{"query": "text", "key": keys[owner[c]], "caption": captions[c], "rank": int(to_image[c]),
              "top": [keys[i] for i in near_images[c]]} for c in range(len(captions))]
    items += [{"query": "image", "key": keys[i], "rank": int(to_text[i]),
               "top": [captions[c] for c in near_texts[i]]} for i in range(len(images.meta))]
    return Evaluation(scores, items, _pictures(images, captions, owner, text_embeds, pairs.right_images, queries, shown))


def recalls(name: str, ranks: np.ndarray, total: int, sizes: list[int], units: np.ndarray, **others: np.ndarray) -> dict[str, float]:
    """R@1, R@5 and R@10 of one direction. others: the same queries' ranks by another ranking, a baseline by name."""
    scores = {}
    for k in KS:
        scores |= with_baselines(f"{name}/R@{k}", (ranks <= k).mean(), chance_within(k, total, np.array(sizes)),
                                 bootstrap.mean_interval(ranks <= k, units), **{other: (theirs <= k).mean() for other, theirs in others.items()})
    return scores


def _direction(name: str, ranks: np.ndarray, total: int, sizes: list[int], units: np.ndarray) -> dict[str, float]:
    """Scores of one direction: ranks [q] among ``total`` targets, ``sizes`` right ones, images ``units``."""
    scores = recalls(name, ranks, total, sizes, units)
    scores |= with_baselines(f"{name}/mean_rank", ranks.mean(), chance_mean(total, np.array(sizes)),
                             bootstrap.mean_interval(ranks, units))
    return scores | with_baselines(f"{name}/median_rank", np.median(ranks), chance_median(total, np.array(sizes)),
                                   bootstrap.statistic_interval(lambda rows: np.median(ranks[rows]), len(ranks)))


def _pictures(images: Images, captions, owner, text_embeds, right_images, queries: int, shown: int) -> dict[str, Any]:
    """The matrix of the first images with their first captions, and what a few texts find in the gallery."""
    gallery = len(images.thumbnails)
    shown = min(shown, gallery)
    first = [int(np.argmax(owner == i)) for i in range(shown)]
    matrix = similarity(images.embeds[:shown], text_embeds[first])
    shown_pairs = {"matrix": matrix, "images": images.thumbnails[:shown], "captions": [captions[c] for c in first]}
    neighbours, asked = [], set()
    for c in range(len(captions)):
        if len(neighbours) == queries or owner[c] >= gallery:
            break
        if captions[c] in asked or any(owner[c] == n["owner"] for n in neighbours):
            continue
        asked.add(captions[c])
        scores = similarity(images.embeds[:gallery], text_embeds[c:c + 1])[:, 0]
        best = np.argsort(-scores, kind="stable")[:5]
        neighbours.append({"query": captions[c], "owner": owner[c], "images": [images.thumbnails[i] for i in best],
                           "scores": scores[best].tolist(), "right": [bool(i in right_images[c]) for i in best]})
    for n in neighbours:
        del n["owner"]
    return {"similarity": shown_pairs, "neighbours": neighbours}
