"""Answers of people as they are compared: the rules of the VQA evaluation (visualqa.org/evaluation.html), written from their description.

Lower case; a period goes unless a digit follows; other signs, but for the apostrophe and the colon, become a space, or go where a space stands
beside one of them or a comma stands between digits; "none" and "zero" to "ten" become digits; a, an and the go; contractions get back their
apostrophe: of a verb and not, and of a pronoun or question word with would, is, will, are or have, where the bare letters are no word of
their own ("shed", "well"). Double contractions ("couldntve") and plays on them are left alone.
"""

from __future__ import annotations

import collections
import re
from collections.abc import Sequence

SIGNS = ";/[]\"{}()=+\\_-><@`,?!"
NUMBERS = {"none": "0"} | {word: str(n) for n, word in enumerate("zero one two three four five six seven eight nine ten".split())}
ARTICLES = ("a", "an", "the")
_PERIOD, _COMMA = re.compile(r"\.(?!\d)"), re.compile(r"\d,\d")
_CONTRACTED = {
    "n't": "ai are ca could did does do had has have is might must need ought sha should was were wo would",
    "'d": "he how it someone something there they where who you",
    "'s": "he how somebody someone that there what when where who why",
    "'ll": "how it somebody someone something they what who why you",
    "'re": "there they what why you",
    "'ve": "could might must not should they we what where who would you"}
CONTRACTIONS = {stem + end.replace("'", ""): stem + end for end, stems in _CONTRACTED.items() for stem in stems.split()} | {
    "maam": "ma'am", "oclock": "o'clock", "twas": "'twas", "yall": "y'all"}


def plain(answer: str) -> str:
    """White space around an answer goes, and each line break and tab in it is a space."""
    return answer.replace("\n", " ").replace("\t", " ").strip()


def normalise(answer: str) -> str:
    """The form in which two answers count as the same."""
    given = text = plain(answer)
    for sign in SIGNS:
        alone = f"{sign} " in given or f" {sign}" in given or _COMMA.search(given)
        text = text.replace(sign, "" if alone else " ")
    words = (NUMBERS.get(word, word) for word in _PERIOD.sub("", text).lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


class Given:
    """What people answered to one question. ``table``: the accuracy of each answer that one of them gave, in its form."""

    def __init__(self, answers: Sequence[str]):
        # where all agree, the official evaluation compares the answers as they are
        self.form = normalise if len(answers) == 1 or len(set(map(plain, answers))) > 1 else plain
        counts, n = collections.Counter(map(self.form, answers)), len(answers)
        self.table = {form: _accuracy(count, n) for form, count in counts.items()}
        self.most = counts.most_common(1)[0][0]

    def accuracy(self, answer: str) -> float:
        """From 0 to 1: min(1, matches / 3), leaving each person out in turn, on average; with fewer than four, a match with any."""
        return self.table.get(self.form(answer), 0.0)


def _accuracy(count: int, n: int) -> float:
    if n < 4:
        return 1.0
    return (count * min(1.0, (count - 1) / 3) + (n - count) * min(1.0, count / 3)) / n
