"""The glossary of batch keys: names, shapes, types, meaning.

Axes: b rows, n images of a row, h w pixels, c = 3 colours, l tokens, a answers of a row, m tokens of an answer.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from vlm_jax.errors import nearest


class Entry(NamedTuple):
    axes: tuple[str, ...]
    dtypes: tuple[str, ...]
    meaning: str


GLOSSARY: Mapping[str, Entry] = {
    "image": Entry(("b", "h", "w", "c"), ("uint8", "float32"),
                   "RGB, 0..255, normalised on the device; float32 means normalised already"),
    "images": Entry(("b", "n", "h", "w", "c"), ("uint8", "float32"), "several images a row, instead of ``image``"),
    "text": Entry(("b", "l"), ("int32",), "token ids, padded on the right with the tokenizer's pad id"),
    "text_mask": Entry(("b", "l"), ("bool",), "True where a token is real (begin and end included)"),
    "caption_id": Entry(("b",), ("int32",), "31-bit hash of the normalised caption: equal captions, equal ids"),
    "image_id": Entry(("b",), ("int32",), "31-bit hash of the sample's image key"),
    "answer": Entry(("b", "a", "m"), ("int32",), "token ids of a question's answers, the likeliest first, padded like ``text``"),
    "answer_mask": Entry(("b", "a", "m"), ("bool",), "True where an answer's token is real; False all along where there is no answer"),
    "answer_weight": Entry(("b", "a"), ("float32",), "share of those asked who gave this answer; 0 where there is no answer"),
    "label": Entry(("b",), ("int32",), "number of the class; evaluation only: -1 where there is none"),
    "mask": Entry(("b",), ("bool",), "evaluation only: True for real rows, False for padding and bad samples"),
}


def validate(batch: Mapping[str, np.ndarray]) -> None:
    """Checks a batch against the glossary. Raises ValueError naming key, value and what is expected."""
    lengths: dict[str, tuple[int, str]] = {"c": (3, "RGB")}
    for name, array in batch.items():
        if name not in GLOSSARY:
            raise ValueError(f"batch key {name!r} is not in the glossary{nearest(name, GLOSSARY)}")
        entry = GLOSSARY[name]
        if str(array.dtype) not in entry.dtypes:
            raise ValueError(f"batch[{name!r}] is {array.dtype}, expected {' or '.join(entry.dtypes)}: {entry.meaning}")
        if array.ndim != len(entry.axes):
            raise ValueError(f"batch[{name!r}] has shape {tuple(array.shape)}, expected axes {entry.axes}")
        for axis, length in zip(entry.axes, array.shape):
            expected, said_by = lengths.setdefault(axis, (length, name))
            if length != expected:
                raise ValueError(f"batch[{name!r}] has shape {tuple(array.shape)}: axis {axis!r} is {length}, "
                                 f"but {said_by} has {expected}")


def hash31(text: str) -> int:
    """A stable non-negative 31-bit hash (BLAKE2s) of a string: fits int32, equal on every machine."""
    return int.from_bytes(hashlib.blake2s(text.encode("utf-8", "surrogatepass"), digest_size=4).digest(), "big") >> 1


def normalise_caption(text: str) -> str:
    """The form in which two captions count as the same: NFKC, lower case, single spaces."""
    return " ".join(unicodedata.normalize("NFKC", text).lower().split())
