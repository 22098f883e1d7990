"""The queries of CLIP's data collection: how a list of them is built, and which of them a text holds.

A list comes from a text corpus, as MetaCLIP rebuilt CLIP's (arXiv 2309.16671, section 3.1): words seen often enough, pairs
of neighbouring words with a high pointwise mutual information, and lists of one's own (titles, WordNet's synsets).

A text holds a query where the query's words stand in it in a row: a sub-string match, case and all, after , . ; : ? ! ` have
been set apart and white space has become single spaces, with a space before and after the query. Queries are read in the
same way, so that "St. Louis" can be found; MetaCLIP's code leaves such a query without a match.
"""

from __future__ import annotations

import collections
import math
import os
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from vlm_jax.errors import ConfigError

APART = ",.;:?!`"
CHUNK = 2**20   # tokens that are counted at a time


class Query(NamedTuple):
    """A line of the list. ``count``: times in the corpus, None where it was not counted; ``origin``: "word", "bigram", "list"."""
    text: str
    count: int | None
    origin: tuple[str, ...]


class Built(NamedTuple):
    """A list, and the number of words of the corpus that it was built from."""
    queries: list[Query]
    words: int


def split(text: str) -> list[str]:
    """The words and marks that a text is matched by."""
    for mark in APART:
        if mark in text:
            text = text.replace(mark, f" {mark} ")
    return text.split()


# ---- which queries a text holds ----------------------------------------------------------------

class Matcher:
    """Finds the queries that a text holds, all in one pass.

    Queries end at spaces, so a table of their beginnings is enough: from each word of a text on, words are added as long as
    what they make begins a query. With 500,000 queries this is as fast as the Aho-Corasick libraries for Python, and smaller.
    """

    def __init__(self, queries: Iterable[str]):
        self._table: dict[str, int] = {}   # 2 (number + 1), 0 for what is no query; and 1 where a longer query begins so
        for number, query in enumerate(queries):
            words = split(query)
            for end in range(1, len(words)):
                beginning = " ".join(words[:end])
                self._table[beginning] = self._table.get(beginning, 0) | 1
            text = " ".join(words)
            self._table[text] = 2 * (number + 1) | self._table.get(text, 0) & 1

    def __call__(self, texts: Iterable[str]) -> list[int]:
        """Numbers of the queries that any of ``texts`` holds, each once, in order."""
        found, get = set(), self._table.get
        for text in texts:
            words = split(text)
            for at, beginning in enumerate(words, 1):
                entry = get(beginning, 0)
                while entry:
                    if entry > 1:
                        found.add(entry // 2 - 1)
                    if not entry & 1 or at == len(words):
                        break
                    beginning = f"{beginning} {words[at]}"
                    at += 1
                    entry = get(beginning, 0)
        return sorted(found)


# ---- building the list -------------------------------------------------------------------------

def build(texts: Callable[[], Iterable[str]] | None, lists: Mapping[str, Iterable[str]], *, word_count: int, pmi: float,
          bigram_count: int) -> Built:
    """The list: words by falling count, bigrams by falling count, then ``lists`` as they are, without repetitions.

    texts: gives the corpus anew each time it is called (it is read twice), None for no corpus; lists: {name: lines};
    word_count, bigram_count: times that a word, a bigram must occur; pmi: log2 of count(x y) N / (count(x) count(y)) that a
    bigram must reach, N being the corpus's words. A word begins and ends in a letter or digit; a bigram's words stand side by
    side in one text. Raises ConfigError where nothing is found.
    """
    for name, value in (("word_count", word_count), ("bigram_count", bigram_count)):
        if value < 1:
            raise ConfigError(f"--{name}={value} must be at least 1")
    if not abs(pmi) <= 64:
        raise ConfigError(f"--pmi={pmi} must lie between -64 and 64")
    words = count_words(texts()) if texts else collections.Counter()
    found: dict[str, tuple[int | None, tuple[str, ...]]] = {}
    for word in _by_count({w: n for w, n in words.items() if n >= word_count}):
        found[word] = words[word], ("word",)
    bigrams = count_bigrams(texts(), words, pmi, bigram_count) if texts else {}
    for text in _by_count(bigrams):
        found[text] = bigrams[text], ("bigram",)
    for lines in lists.values():
        for line in lines:
            text = " ".join(split(line))
            if text:
                count, origin = found.get(text, (words.get(text), ()))
                found[text] = count, origin if "list" in origin else (*origin, "list")
    if not found:
        top = _by_count(words)[:1]
        raise ConfigError(f"no word of the corpus is seen --word_count={word_count} times"
                          + (f"; the most frequent, {top[0]!r}, {words[top[0]]} times" if top else ": it holds none"))
    return Built([Query(text, count, origin) for text, (count, origin) in found.items()], words.total())


def _by_count(counts: Mapping[str, int]) -> list[str]:
    return sorted(counts, key=lambda text: (-counts[text], text))


def _is_word(token: str) -> bool:
    """Begins and ends in a letter, a digit or a mark that belongs to one (as vowels of many scripts do)."""
    return bool(token) and unicodedata.category(token[0])[0] in "LN" and unicodedata.category(token[-1])[0] in "LMN"


def _chunks(texts: Iterable[str]) -> Iterator[list[str]]:
    """The corpus as long lists of tokens, with an empty one after every text."""
    tokens: list[str] = []
    for text in texts:
        tokens += split(text)
        tokens.append("")
        if len(tokens) >= CHUNK:
            yield tokens
            tokens = []
    yield tokens


def count_words(texts: Iterable[str]) -> collections.Counter[str]:
    """How often each word occurs."""
    counts: collections.Counter[str] = collections.Counter()
    for tokens in _chunks(texts):
        counts.update(tokens)
    for token in [token for token in counts if not _is_word(token)]:
        del counts[token]
    return counts


def count_bigrams(texts: Iterable[str], words: Mapping[str, int], pmi: float, least: int) -> dict[str, int]:
    """{bigram: count} of those that occur ``least`` times and reach ``pmi``.

    A bigram is no more frequent than either word, so its PMI is at most log2(N / count) of the more frequent one: words
    beyond that bound are passed over, and what is held grows with the bigrams of the others alone (16 bytes for each).
    """
    total = sum(words.values())
    most = total * 2.0**-pmi * (1 + 1e-9)
    names = sorted(word for word, n in words.items() if least <= n <= most)
    number = {word: i for i, word in enumerate(names)}
    keys, counts = np.zeros(0, np.int64), np.zeros(0, np.int64)
    waiting: list[np.ndarray] = []
    for tokens in _chunks(texts) if names else ():
        ids = np.fromiter((number.get(token, -1) for token in tokens), np.int64, len(tokens))
        first, second = ids[:-1], ids[1:]
        both = (first >= 0) & (second >= 0)
        waiting.append(first[both] << 32 | second[both])
        if sum(map(len, waiting)) > max(CHUNK, len(keys)):
            keys, counts = _added(keys, counts, waiting)
    keys, counts = _added(keys, counts, waiting)
    keys, counts = keys[counts >= least], counts[counts >= least]
    size = np.array([words[name] for name in names], np.float64)
    reached = np.log2(counts * float(total) / (size[keys >> 32] * size[keys & 0xFFFFFFFF])) >= pmi
    return {f"{names[key >> 32]} {names[key & 0xFFFFFFFF]}": n for key, n in zip(keys[reached].tolist(), counts[reached].tolist(), strict=True)}


def _added(keys: np.ndarray, counts: np.ndarray, waiting: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Sorted keys and their counts with those that wait, which are let go of."""
    more, n = np.unique(np.concatenate([*waiting, keys[:0]]), return_counts=True)
    waiting.clear()
    keys, back = np.unique(np.concatenate([keys, more]), return_inverse=True)
    return keys, np.bincount(back, np.concatenate([counts, n]), len(keys)).astype(np.int64)


def highest_pmi(words: int, least: int) -> float:
    """What a bigram that occurs ``least`` times can reach at most in a corpus of so many words."""
    return math.log2(words / least) if words else -math.inf


# ---- the file ----------------------------------------------------------------------------------

def to_lines(queries: Iterable[Query]) -> Iterator[str]:
    """"TEXT<tab>COUNT<tab>ORIGIN", the count empty where there is none, origins joined by a comma."""
    for query in queries:
        yield f"{query.text}\t{'' if query.count is None else query.count}\t{','.join(query.origin)}\n"


def read(path: str | os.PathLike) -> list[str]:
    """The texts of a list, in order. Raises ConfigError."""
    return [line.partition("\t")[0] for line in read_lines(path)]


def read_lines(path: str | os.PathLike) -> Sequence[str]:
    """The lines of a UTF-8 file that hold something. Raises ConfigError naming the file."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            return [line.rstrip("\n") for line in file if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
