"""Walking over evaluation batches: real rows, thumbnails, embeddings and features in fixed shapes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from vlm_jax.errors import ConfigError, nearest

THUMBNAIL = 96                                              # pixels, longest side
GALLERY = 2000                                              # images kept as thumbnails for pictures


def needs(predict: Mapping[str, Callable], name: str, kind: str) -> Callable:
    """The predict function, or a ConfigError that says which evaluation misses it."""
    if name not in predict:
        raise ConfigError(f"evaluation {kind!r} needs predict function {name!r}, which this system lacks"
                          f"{nearest(name, predict)}")
    return predict[name]


def real_rows(batch: Mapping[str, Any]) -> list[tuple[int, dict[str, Any]]]:
    """(row, meta) of every row that is not padding; ``meta`` has one record per row, whatever in padding."""
    mask = batch.get("mask", np.ones(len(batch["meta"]), bool))
    return [(row, meta) for row, (real, meta) in enumerate(zip(mask, batch["meta"], strict=True)) if real]


def thumbnail(image: np.ndarray, side: int = THUMBNAIL) -> np.ndarray:
    """[h,w,3] uint8, or float of any range (then stretched to its own) -> uint8 within side x side."""
    image = np.asarray(image)
    factor = -(-max(image.shape[:2]) // side)
    h, w = (n // factor * factor for n in image.shape[:2])
    small = image[:h, :w].astype(np.float32).reshape(h // factor, factor, w // factor, factor, -1).mean((1, 3))
    if image.dtype != np.uint8:
        low, high = small.min(), small.max()
        small = (small - low) / max(high - low, 1e-6) * 255
    return np.clip(np.rint(small), 0, 255).astype(np.uint8)


def one_image(batch: Mapping[str, Any]) -> np.ndarray:
    """The images of a batch [b,h,w,3]. Raises ConfigError where a row has several."""
    if "image" not in batch:
        raise ConfigError(f"this evaluation reads one image a row, the batches have {batch['images'].shape[1]} (data.images); nearest: kind='classify'")
    return batch["image"]


def asked(batch: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """What a question is, of a batch: its pictures, and the prompt (with the instruction) where text is laid out, else the text."""
    text = ("prompt", "prompt_mask", "instruction", "instruction_mask") if "prompt" in batch else ("text", "text_mask")
    return {name: batch[name] for name in ("image", "images", *text) if name in batch}


def side_by_side(batch: Mapping[str, Any], row: int) -> np.ndarray:
    """The image of a row [h,w,3], or its several images as one [h,n*w,3]; a black one of text alone."""
    if "images" not in batch and "image" not in batch:
        return np.zeros((THUMBNAIL, THUMBNAIL, 3), np.uint8)
    return np.concatenate(list(batch["images"][row]), axis=1) if "images" in batch else batch["image"][row]


@dataclasses.dataclass
class Images:
    """embeds float32 [n,e], or [n,k,e] where an image has several vectors, of which the nearest to a text counts (``rank.similarity``);
    meta: n records; thumbnails: the first GALLERY images; rows, length: batch shape;
    tokens [n,m,w]: image tokens, where they were asked for."""
    embeds: np.ndarray
    meta: list[dict[str, Any]]
    thumbnails: list[np.ndarray]
    rows: int
    length: int
    tokens: np.ndarray | None = None

    @property
    def means(self) -> np.ndarray:
        """float32 [n,e]: one vector an image."""
        return single(self.embeds)


def single(embeds: np.ndarray) -> np.ndarray:
    """[n,e] of [n,e] or [n,k,e]: the mean where an image has several vectors."""
    return embeds.mean(1) if embeds.ndim == 3 else embeds


def embed_images(embed: Callable, batches: Iterable[Mapping[str, Any]], features: Callable | None = None) -> Images:
    """Runs ``embed``, and ``features``, over the images of all batches; raises ConfigError when there are none."""
    embeds, tokens, meta, thumbnails, rows, length = [], [], [], [], 0, 0
    for batch in batches:
        keep = real_rows(batch)
        real, image = [row for row, _ in keep], one_image(batch)
        embeds.append(np.asarray(embed({"image": image})["image_embed"], np.float32)[real])
        if features:
            tokens.append(np.asarray(features({"image": image})["image"])[real])
        meta += [m for _, m in keep]
        thumbnails += [thumbnail(image[row]) for row, _ in keep[:max(0, GALLERY - len(thumbnails))]]
        rows = max(rows, len(image))
        length = length or (batch["text"].shape[1] if "text" in batch else 0)
    if not meta:
        raise ConfigError("the evaluation source has no samples; nearest: a source of length 1 or more")
    return Images(np.concatenate(embeds), meta, thumbnails, rows, length, np.concatenate(tokens) if features else None)


def text_batches(texts: Sequence[str], tokenizer: Callable, length: int, rows: int) -> Iterator[tuple[dict[str, np.ndarray], int, int]]:
    """(batch of exactly ``rows`` texts, how many of them are real, how many were cut to ``length`` ids)."""
    if length < 1:
        raise ConfigError("text_length=0: the batches carry no text to take the length from; nearest: the "
                          "length that the system was trained with")
    for start in range(0, len(texts), rows):
        part = list(texts[start:start + rows])
        ids, mask, cut = tokenizer(part, length)
        fill = ((0, rows - len(part)), (0, 0))
        # Filling with the last row keeps one compiled shape and never feeds an empty text.
        yield {"text": np.pad(ids, fill, mode="edge"), "text_mask": np.pad(mask, fill, mode="edge")}, len(part), int(cut)


def embed_texts(embed: Callable, texts: Sequence[str], tokenizer: Callable, length: int, rows: int
                ) -> tuple[np.ndarray, int]:
    """float32 [n,e] embeddings in batches of exactly ``rows``, and how many texts were cut to ``length`` ids."""
    embeds, cut = [], 0
    for batch, real, truncated in text_batches(texts, tokenizer, length, rows):
        embeds.append(np.asarray(embed(batch)["text_embed"], np.float32)[:real])
        cut += truncated
    return np.concatenate(embeds), cut
