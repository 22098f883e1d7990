"""Text as published models read it: lower case, signs deleted, the first so many words.

Models that were pre-trained on such text expect it. The rules are those of the ALBEF and BLIP releases (``pre_caption``,
``pre_question``), which cut after 30 words, BLIP's questions after 50, and ALBEF's after 50 where the model is evaluated.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

from vlm_jax.errors import nearest

_ALBEF = re.compile(r"""[,.'!?"()*#:;~]""")
_BLIP = re.compile(r"""[.!"()*#:;~]""")
_SPACES = re.compile(r"\s{2,}")
_DASHES = str.maketrans("-/", "  ")


def _albef(text: str) -> str:
    text = _ALBEF.sub("", text.lower()).translate(_DASHES).replace("<person>", "person")
    return _SPACES.sub(" ", text).rstrip("\n").strip(" ")


def _albef_question(text: str) -> str:
    return _ALBEF.sub("", text.lower()).translate(_DASHES).rstrip(" ")


def _blip(text: str) -> str:
    return _SPACES.sub(" ", _BLIP.sub(" ", text.lower())).rstrip("\n").strip(" ")


def _blip_question(text: str) -> str:
    return _BLIP.sub("", text.lower()).rstrip(" ")


class _Rule(NamedTuple):
    """clean, and how many words are kept in training and in evaluation."""
    clean: Callable[[str], str]
    training: int
    evaluation: int


RULES: Mapping[str, _Rule] = {"albef": _Rule(_albef, 30, 30), "blip": _Rule(_blip, 30, 30),
                              "albef_question": _Rule(_albef_question, 30, 50), "blip_question": _Rule(_blip_question, 50, 50)}


class Clean:
    """A rule by name, "" for none; "blip(40)" keeps 40 words instead of the rule's own number. Raises ValueError on another name."""

    def __init__(self, name: str, training: bool = False):
        match = re.fullmatch(r"(\w+)\s*(?:\(\s*(\d+)\s*\))?", name)
        if name and not (match and match.group(1) in RULES):
            raise ValueError(f"text_clean={name!r} is not a way to clean text{nearest(name.partition('(')[0], RULES)}")
        self.rule = RULES[match.group(1)] if name else None
        own = match.group(2) if name else None
        self.words = int(own) if own else (self.rule.training if training else self.rule.evaluation) if name else 0
        if name and self.words < 1:
            raise ValueError(f"text_clean={name!r} keeps no word; nearest: '{match.group(1)}({self.rule.training})'")

    def __call__(self, text: str) -> str:
        """The cleaned text; "" where nothing is left of it."""
        if self.rule is None:
            return text
        return " ".join(self.rule.clean(text).split(" ")[:self.words])
