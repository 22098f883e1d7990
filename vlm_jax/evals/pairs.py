"""Which captions belong to which images, and scores of pairs by a matching head from features computed once."""

from __future__ import annotations

import collections
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from vlm_jax.errors import ConfigError, nearest
from vlm_jax.evals.embed import Images, text_batches

DUPLICATES = ("wrong", "right")
CAPTIONS = ("all", "first")


@dataclasses.dataclass
class Pairs:
    """Images and their captions, by number.

    captions: of all images in their order; owner int [c]: the image of each; texts: the distinct ones; text int [c]: which of them
    a caption is. right_images, right_captions: for each caption the images, and for each image the captions, that answer it.
    shared bool [c]: captions that another image has word for word.
    """
    captions: list[str]
    owner: np.ndarray
    texts: list[str]
    text: np.ndarray
    right_images: Sequence[Sequence[int]]
    right_captions: Sequence[Sequence[int]]
    shared: np.ndarray


def pair_up(meta: Sequence[Mapping[str, Any]], captions: str, duplicates: str, kind: str) -> Pairs:
    """Reads the records' captions: "all" of them or the "first" of each image. duplicates: a caption that another image has
    word for word is "wrong" for it, or "right". Raises ConfigError, naming the evaluation ``kind``."""
    if duplicates not in DUPLICATES:
        raise ConfigError(f"{kind} duplicates={duplicates!r} is not known{nearest(duplicates, DUPLICATES)}")
    if captions not in CAPTIONS:
        raise ConfigError(f"{kind} captions={captions!r} is not known{nearest(captions, CAPTIONS)}")
    own = [list(m.get("captions") or ())[:1 if captions == "first" else None] for m in meta]
    listed = [c for mine in own for c in mine]
    owner = np.array([i for i, mine in enumerate(own) for _ in mine], np.int64)
    missing = np.setdiff1d(np.arange(len(meta)), owner)
    if len(missing):
        raise ConfigError(f"{kind} needs captions; sample {meta[missing[0]].get('key')!r} has none "
                          f"({len(missing)} of {len(meta)} such samples)")
    texts = list(dict.fromkeys(listed))
    number = {t: i for i, t in enumerate(texts)}
    text = np.array([number[c] for c in listed])

    have_text, says = collections.defaultdict(set), [set() for _ in meta]   # text -> images, image -> texts
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
        starts = np.searchsorted(owner, np.arange(len(meta) + 1))
        right_captions = [range(a, b) for a, b in zip(starts[:-1], starts[1:])]
    return Pairs(listed, owner, texts, text, right_images, right_captions, shared)


@dataclasses.dataclass
class Texts:
    """embeds float32 [t,e]; ids, mask [t,l]; states [t,l,w], None where the system has none without an image; cut: to l ids."""
    embeds: np.ndarray
    ids: np.ndarray
    mask: np.ndarray
    states: np.ndarray | None
    cut: int


def read_texts(embed: Callable, features: Callable, texts: Sequence[str], tokenizer: Callable, length: int, rows: int) -> Texts:
    """Runs ``embed`` and ``features`` over texts, in batches of exactly ``rows``."""
    embeds, ids, mask, states, cut = [], [], [], [], 0
    for batch, real, truncated in text_batches(texts, tokenizer, length, rows):
        embeds.append(np.asarray(embed(batch)["text_embed"], np.float32)[:real])
        found = features(batch).get("text")
        if found is not None:
            states.append(np.asarray(found)[:real])
        ids.append(batch["text"][:real])
        mask.append(batch["text_mask"][:real])
        cut += truncated
    return Texts(*map(np.concatenate, (embeds, ids, mask)), np.concatenate(states) if states else None, cut)


def match_scores(match: Callable, images: Images, texts: Texts, pairs: np.ndarray) -> tuple[np.ndarray, float]:
    """(logits of class 1 = match, float32 [n]; seconds that they took) of pairs int [n,2], (image, text).

    ``match`` gets ``image_features``, ``text_features`` where there are some, ``text`` and ``text_mask``, in batches of ``images.rows``;
    the last is filled with its last pair. The first batch runs once before the clock starts: compiling is no cost of a query.
    """
    def score(part):
        image, text = np.pad(part, ((0, images.rows - len(part)), (0, 0)), mode="edge").T
        batch = {"image_features": images.tokens[image], "text": texts.ids[text], "text_mask": texts.mask[text]}
        if texts.states is not None:
            batch["text_features"] = texts.states[text]
        return np.asarray(match(batch)["match"], np.float32)[:len(part), 1]

    parts = [pairs[start:start + images.rows] for start in range(0, len(pairs), images.rows)]
    if not parts:
        return np.zeros(0, np.float32), 0.0
    score(parts[0])
    began = time.perf_counter()
    found = np.concatenate([score(part) for part in parts])
    return found, time.perf_counter() - began
