"""BLEU-4, ROUGE-L and CIDEr-D from the papers' formulas, with the constants of the COCO caption evaluation.

Every metric takes ``candidates``: a token list per image, and ``references``: a list of token
lists per image (one or more), and returns the corpus score beside the score of each image.
Scales are the papers': BLEU and ROUGE-L in [0, 1], CIDEr-D in [0, 10].
"""

from __future__ import annotations

import collections
import math
import re
from collections.abc import Sequence

import numpy as np

Tokens = Sequence[str]

# Close to the Penn Treebank tokens that the COCO evaluation gets from Stanford's tokenizer:
# lower case, clitics split off, punctuation dropped, words with inner hyphens, dots or
# apostrophes kept whole. It knows no abbreviations ("u.s." loses its last dot).
_CLITIC = re.compile(r"(?<=\w)(n't|'(?:s|m|d|re|ve|ll))(?!\w)")
_TOKEN = re.compile(r"n't(?!\w)|'(?:s|m|d|re|ve|ll)(?!\w)|\w+(?:[-.,/']\w+)*|[^\w\s]")
_DROPPED = frozenset("'`.?!,:;-\"()[]{}")


def tokenise(caption: str) -> list[str]:
    """"A man's dog, running." -> ["a", "man", "'s", "dog", "running"]."""
    text = caption.lower().replace("\u2019", "'").replace("\u2018", "'")
    return [t for t in _TOKEN.findall(_CLITIC.sub(r" \1", text)) if t not in _DROPPED]


def ngrams(tokens: Tokens, n: int) -> collections.Counter:
    """Counts of the n-grams of one length."""
    return collections.Counter(zip(*(tokens[i:] for i in range(n))))


def bleu_parts(candidates: Sequence[Tokens], references: Sequence[Sequence[Tokens]], order: int = 4) -> np.ndarray:
    """Per image [n, 2 + 2*order]: candidate length, closest reference length, then for each n-gram
    length the clipped matches, then the candidate's n-grams. Their sums give corpus BLEU."""
    rows = []
    for candidate, refs in zip(candidates, references, strict=True):
        closest = min((abs(len(r) - len(candidate)), len(r)) for r in refs)[1]
        matches, counts = [], []
        for n in range(1, order + 1):
            most = collections.Counter()
            for r in refs:
                most |= ngrams(r, n)
            found = ngrams(candidate, n)
            matches.append(sum((found & most).values()))
            counts.append(sum(found.values()))
        rows.append([len(candidate), closest, *matches, *counts])
    return np.array(rows, np.float64).reshape(-1, 2 + 2 * order)


def bleu_from_sums(sums: np.ndarray) -> np.ndarray:
    """[..., 2 + 2*order] sums of ``bleu_parts`` -> BLEU [...]; 0 where some n-gram length has no match."""
    sums = np.asarray(sums, np.float64)
    order = (sums.shape[-1] - 2) // 2
    length, closest = sums[..., 0], sums[..., 1]
    matches, counts = sums[..., 2:2 + order], sums[..., 2 + order:]
    with np.errstate(divide="ignore", invalid="ignore"):
        precision = np.log(matches) - np.log(counts)
        brevity = np.minimum(0.0, 1.0 - closest / length)
        score = np.exp(brevity + precision.mean(-1))
    return np.where(matches.min(-1) > 0, score, 0.0)


def bleu(candidates: Sequence[Tokens], references: Sequence[Sequence[Tokens]], order: int = 4) -> float:
    """Corpus BLEU (Papineni et al. 2002): brevity penalty times the geometric mean of clipped precisions."""
    return float(bleu_from_sums(bleu_parts(candidates, references, order).sum(0)))


def rouge_l(candidates: Sequence[Tokens], references: Sequence[Sequence[Tokens]], beta: float = 1.2
            ) -> tuple[float, np.ndarray]:
    """ROUGE-L (Lin 2004): F measure of the longest common subsequence, the best precision and the best
    recall over the references. Returns (mean, per image [n])."""
    scores = []
    for candidate, refs in zip(candidates, references, strict=True):
        common = [_longest_common(candidate, r) for r in refs]
        precision = max(c / max(len(candidate), 1) for c in common)
        recall = max(c / max(len(r), 1) for c, r in zip(common, refs))
        scores.append((1 + beta ** 2) * precision * recall / (recall + beta ** 2 * precision) if precision else 0.0)
    return float(np.mean(scores)) if scores else float("nan"), np.array(scores)


def _longest_common(a: Tokens, b: Tokens) -> int:
    """Length of the longest common subsequence."""
    previous = [0] * (len(b) + 1)
    for x in a:
        current = [0]
        for j, y in enumerate(b):
            current.append(previous[j] + 1 if x == y else max(previous[j + 1], current[j]))
        previous = current
    return previous[-1]


def cider_d(candidates: Sequence[Tokens], references: Sequence[Sequence[Tokens]], order: int = 4, sigma: float = 6.0
            ) -> tuple[float, np.ndarray]:
    """CIDEr-D (Vedantam et al. 2015, section 5): clipped tf-idf cosine with a length penalty, times 10.

    Document frequencies come from ``references``: the number of images with the n-gram in some
    reference. With a single image every idf, and the score, is 0. Returns (mean, per image [n]).
    """
    frequency = collections.Counter()
    for refs in references:
        frequency.update({g for r in refs for n in range(1, order + 1) for g in ngrams(r, n)})
    log_images = math.log(max(len(references), 1))

    def weigh(tokens):
        """For each n-gram length its tf-idf vector and norm. Raw counts are the term frequencies."""
        vectors = [{g: c * (log_images - math.log(max(frequency[g], 1))) for g, c in ngrams(tokens, n).items()}
                   for n in range(1, order + 1)]
        return vectors, [math.sqrt(sum(w * w for w in v.values())) for v in vectors]

    def bigrams(tokens):
        return max(len(tokens) - 1, 0)                      # the length that the penalty compares

    scores = []
    for candidate, refs in zip(candidates, references, strict=True):
        vectors, norms = weigh(candidate)
        total = 0.0
        for r in refs:
            other, other_norms = weigh(r)
            closeness = math.exp(-(bigrams(candidate) - bigrams(r)) ** 2 / (2 * sigma ** 2))
            for v, w, nv, nw in zip(vectors, other, norms, other_norms):
                if nv and nw:
                    total += closeness * sum(min(x, w[g]) * w[g] for g, x in v.items() if g in w) / (nv * nw)
        scores.append(10.0 * total / (order * len(refs)))
    return float(np.mean(scores)) if scores else float("nan"), np.array(scores)
