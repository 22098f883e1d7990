"""The glossary of batch keys: names, shapes, types, meaning.

Axes: b rows, n images of a row, h w pixels, c = 3 colours, l tokens, a answers of a row, m tokens of an answer, p tokens of a prompt, q tokens
of an instruction.

Text lies in a batch as ``data.layout`` says (data/layouts.py):

plain    ``text`` is a caption or a question, begin and end included.
joined   For language models that go on writing. ``text``, of data.prompt_length + data.length ids, is begin, prompt, reply and its end in one row,
         several turns one after another; ``target_mask`` is True on the replies and their ends alone.
apart    For an encoder with a decoder. ``prompt``, of data.prompt_length ids, is what the encoder reads; ``text``, of data.length ids, the reply and
         its end, without a begin: what the decoder starts with is the family's.

In evaluation both have ``prompt`` too, all that stands before the reply: with "joined" padded on the left, so that what is written next follows
it. Prompts are cut on the left, behind their begin, and replies on the right; a joined row that was cut has no end, as nothing ended there.
``instruction`` is the same prompt by data.instruction_tokenizer. What "generate" and "answer" return is the continuation without the prompt, from its
first id on or from one begin before it.

What a source's sample says of them, before it is tokenised: ``prompt``, a text, and ``text``, the replies, one of which is drawn; instead of both
``turns``, a list of (prompt, reply). Without a prompt a sample with ``answers`` asks ``text`` and has an answer as its reply; else ``text`` is the
reply to nothing. ``task`` names a list of ``templates.TEMPLATES``, and ``slots`` what else fills them ({"a": ..., "ocr": [...], "history": ...}).
``choices`` are candidates, in order, the right one being ``label`` (and the reply, where there is no ``text``). ``frames`` are the frames of a video.
``kind`` is the kind of question, by which reports group.
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
    "images": Entry(("b", "n", "h", "w", "c"), ("uint8", "float32"), "several images a row, or frames of a video, instead of ``image``"),
    "image_states": Entry(("b", "n", "t", "d"), ("float32", "bfloat16"),
                          "instead of images: what a frozen tower made of each of a row's n images, t tokens of d channels"),
    "text": Entry(("b", "l"), ("int32",), "token ids, padded on the right with the tokenizer's pad id"),
    "text_mask": Entry(("b", "l"), ("bool",), "True where a token is real (begin and end included)"),
    "target_mask": Entry(("b", "l"), ("bool",), "True where a token of ``text`` is learned: of a reply, or its end"),
    "prompt": Entry(("b", "p"), ("int32",), "token ids of what a reply answers, padded on the left with layout \"joined\", on the right with \"apart\""),
    "prompt_mask": Entry(("b", "p"), ("bool",), "True where a token of ``prompt`` is real"),
    "instruction": Entry(("b", "q"), ("int32",), "the same prompt by the instruction tokenizer, padded on the right"),
    "instruction_mask": Entry(("b", "q"), ("bool",), "True where a token of ``instruction`` is real"),
    "caption_id": Entry(("b",), ("int32",), "31-bit hash of the normalised caption: equal captions, equal ids"),
    "image_id": Entry(("b",), ("int32",), "31-bit hash of the sample's image key"),
    "answer": Entry(("b", "a", "m"), ("int32",), "token ids of a question's answers, the likeliest first, or of a "
                    "row's candidates (without a begin, where text is laid out), padded on the right"),
    "answer_mask": Entry(("b", "a", "m"), ("bool",), "True where an answer's token is real; False all along where there is no answer"),
    "answer_weight": Entry(("b", "a"), ("float32",), "share of those asked who gave this answer; 0 where there is no answer"),
    "label": Entry(("b",), ("int32",), "number of the class, or of the right candidate; evaluation only: -1 where there is none"),
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
