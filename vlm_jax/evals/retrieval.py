"""Image-text retrieval: recall at k and ranks in both directions."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from vlm_jax.errors import ConfigError, nearest
from vlm_jax.evals import bootstrap
from vlm_jax.evals.embed import Images, embed_images, embed_texts, needs
from vlm_jax.evals.evaluation import Evaluation
from vlm_jax.evals.rank import (
    chance_mean,
    chance_median,
    chance_within,
    rank,
    with_baselines,
)

KS = (1, 5, 10)
DUPLICATES = ("wrong", "right")
CAPTIONS = ("all", "first")


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
    if duplicates not in DUPLICATES:
        raise ConfigError(f"retrieval duplicates={duplicates!r} is not known{nearest(duplicates, DUPLICATES)}")
    if captions not in CAPTIONS:
        raise ConfigError(f"retrieval captions={captions!r} is not known{nearest(captions, CAPTIONS)}")
    images = embed_images(embed, batches)
    own = [list(m.get("captions") or ())[:1 if captions == "first" else None] for m in images.meta]
    captions = [c for mine in own for c in mine]
    owner = np.array([i for i, mine in enumerate(own) for _ in mine], np.int64)
    missing = np.setdiff1d(np.arange(len(images.meta)), owner)
    if len(missing):
        raise ConfigError(f"retrieval needs captions; sample {images.meta[missing[0]].get('key')!r} has none "
                          f"({len(missing)} of {len(images.meta)} such samples)")
    texts = list(dict.fromkeys(captions))
    number = {t: i for i, t in enumerate(texts)}
    text = np.array([number[c] for c in captions])
    found, cut = embed_texts(embed, [prompt.replace("{}", t) for t in texts], tokenizer,
                             text_length or images.length, images.rows)
    text_embeds = found[text]

    have_text, says = collections.defaultdict(set), [set() for _ in images.meta]   # text -> images, image -> texts
    for t, i in zip(text.tolist(), owner.tolist()):
        have_text[t].add(i)
        says[i].add(t)
    shared = np.array([len(have_text[t]) > 1 for t in text.tolist()])
    if duplicates == "right":
        entries = collections.defaultdict(list)             # text -> captions that say it
        for c, t in enumerate(text.tolist()):
            entries[t].append(c)
        right_images = [sorted(have_text[t]) for t in text.tolist()]
        right_captions = [sorted(c for t in mine for c in entries[t]) for mine in says]
    else:
        right_images = owner[:, None]
        starts = np.searchsorted(owner, np.arange(len(images.meta) + 1))
        right_captions = [range(a, b) for a, b in zip(starts[:-1], starts[1:])]

    to_image, near_images, near_scores = rank(text_embeds, images.embeds, right_images)
    to_text, near_texts, _ = rank(images.embeds, text_embeds, right_captions)
    scores = {"retrieval/images": float(len(images.meta)), "retrieval/captions": float(len(captions)),
              "retrieval/duplicates": float(shared.mean()), "retrieval/truncated": cut / len(texts)}
    scores |= _direction("retrieval/text_to_image", to_image, len(images.meta), [len(r) for r in right_images], owner)
    scores |= _direction("retrieval/image_to_text", to_text, len(captions), [len(r) for r in right_captions],
                         np.arange(len(images.meta)))

    keys = [str(m.get("key", i)) for i, m in enumerate(images.meta)]
    items = [{"query": "text", "key": keys[owner[c]], "caption": captions[c], "rank": int(to_image[c]),
              "top": [keys[i] for i in near_images[c]]} for c in range(len(captions))]
    items += [{"query": "image", "key": keys[i], "rank": int(to_text[i]),
               "top": [captions[c] for c in near_texts[i]]} for i in range(len(images.meta))]
    return Evaluation(scores, items, _pictures(images, captions, owner, text_embeds, right_images, queries, shown))


def _direction(name: str, ranks: np.ndarray, total: int, sizes: list[int], units: np.ndarray) -> dict[str, float]:
    """Scores of one direction: ranks [q] among ``total`` targets, ``sizes`` right ones, images ``units``."""
    scores = {}
    for k in KS:
        hits = ranks <= k
        scores |= with_baselines(f"{name}/R@{k}", hits.mean(), chance_within(k, total, np.array(sizes)),
                                 bootstrap.mean_interval(hits, units))
    scores |= with_baselines(f"{name}/mean_rank", ranks.mean(), chance_mean(total, np.array(sizes)),
                             bootstrap.mean_interval(ranks, units))
    return scores | with_baselines(f"{name}/median_rank", np.median(ranks), chance_median(total, np.array(sizes)),
                                   bootstrap.statistic_interval(lambda rows: np.median(ranks[rows]), len(ranks)))


def _pictures(images: Images, captions, owner, text_embeds, right_images, queries: int, shown: int) -> dict[str, Any]:
    """The matrix of the first images with their first captions, and what a few texts find in the gallery."""
    gallery = len(images.thumbnails)
    shown = min(shown, gallery)
    first = [int(np.argmax(owner == i)) for i in range(shown)]
    matrix = images.embeds[:shown] @ text_embeds[first].T
    similarity = {"matrix": matrix, "images": images.thumbnails[:shown], "captions": [captions[c] for c in first]}
    neighbours, asked = [], set()
    for c in range(len(captions)):
        if len(neighbours) == queries or owner[c] >= gallery:
            break
        if captions[c] in asked or any(owner[c] == n["owner"] for n in neighbours):
            continue
        asked.add(captions[c])
        scores = images.embeds[:gallery] @ text_embeds[c]
        best = np.argsort(-scores, kind="stable")[:5]
        neighbours.append({"query": captions[c], "owner": owner[c], "images": [images.thumbnails[i] for i in best],
                           "scores": scores[best].tolist(), "right": [bool(i in right_images[c]) for i in best]})
    for n in neighbours:
        del n["owner"]
    return {"similarity": similarity, "neighbours": neighbours}
