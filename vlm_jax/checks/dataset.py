"""A data set before it is trained on: what cannot be read, what is left out, sizes, captions, near-duplicates, speed."""

from __future__ import annotations

import collections
import concurrent.futures
import hashlib
import os
import time
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from vlm_jax.checks import ERROR, OK, WARNING, Finding
from vlm_jax.data import ops
from vlm_jax.data.bad import BadSample
from vlm_jax.data.batch import normalise_caption
from vlm_jax.data.fingerprint import spread
from vlm_jax.data.sources import key_of, left_out

AREA = "data"
BITS, NEAR, BANDS = 128, 6, 8       # of a hash; at most so many differ between near-duplicates; equal parts that are compared: more than NEAR
CROWD = 256                         # hashes that share a part: more than this are flat pictures, which are only compared whole
SHOWN = 3
QUARTILES = (0, 5, 50, 95, 100)
MARKUP = ("<|endoftext|>", "<|startoftext|>", "<image>", "<s>", "</s>", "[CLS]", "[SEP]", "[MASK]", "[PAD]", "<pad>", "<unk>")


class Read(NamedTuple):
    """What is kept of a sample: "" or what is wrong with it; bytes, width and height of its picture, its hashes, its captions."""
    index: int
    reason: str
    detail: str = ""
    size: int = 0
    width: int = 0
    height: int = 0
    content: bytes = b""
    hash: int = 0
    texts: tuple[str, ...] = ()


def read(source: Any, index: int) -> Read:
    """A sample as training would read it, up to the decoded picture."""
    try:
        sample = source[index]
        if not sample["text"]:
            raise BadSample("missing_caption")
        picture = sample["image"]
        if picture is None:
            raise BadSample("missing_image")
        image = ops.to_image(picture)
        content = picture if isinstance(picture, bytes) else np.ascontiguousarray(picture).tobytes()
    except BadSample as error:
        return Read(index, error.reason, error.detail)
    return Read(index, "", "", len(content), image.width, image.height, hashlib.blake2b(content, digest_size=16).digest(), difference_hash(image),
                tuple(sample["text"]))


def difference_hash(image: Image.Image) -> int:
    """128 bits: whether grey grows from each of 8 x 8 cells to the next, to the right and downwards. Near pictures differ in few."""
    grey = np.asarray(image.convert("L").resize((9, 9), Image.Resampling.BOX), np.int16)
    bits = np.concatenate([(grey[:8, 1:] > grey[:8, :-1]).ravel(), (grey[1:, :8] > grey[:-1, :8]).ravel()])
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def near_groups(hashes: Sequence[int]) -> list[list[int]]:
    """Numbers of hashes that lie within ``NEAR`` bits of another of their group, the largest group first; those alone are left out."""
    distinct: dict[int, list[int]] = {}
    for i, value in enumerate(hashes):
        distinct.setdefault(value, []).append(i)
    values = list(distinct)
    parent = list(range(len(values)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    width = BITS // BANDS
    for band in range(BANDS):       # of hashes that differ in fewer bits than there are bands, one band is equal
        crowds: dict[int, list[int]] = collections.defaultdict(list)
        for i, value in enumerate(values):
            crowds[value >> (band * width) & ((1 << width) - 1)].append(i)
        for crowd in crowds.values():
            if 1 < len(crowd) <= CROWD:
                for at, a in enumerate(crowd):
                    for b in crowd[at + 1:]:
                        if (values[a] ^ values[b]).bit_count() <= NEAR:
                            parent[root(a)] = root(b)
    groups: dict[int, list[int]] = collections.defaultdict(list)
    for i, value in enumerate(values):
        groups[root(i)] += distinct[value]
    return sorted((sorted(g) for g in groups.values() if len(g) > 1), key=len, reverse=True)


def script_of(text: str) -> str:
    """The script that most letters of a text belong to ("latin", "han", "cyrillic" ...); "none" where there are no letters."""
    counts = collections.Counter(_script(c) for c in text if c.isalpha())
    return counts.most_common(1)[0][0] if counts else "none"


def _script(letter: str) -> str:
    name = unicodedata.name(letter, "UNKNOWN").lower()
    first = name.split(" ")[0].split("-")[0]
    return {"cjk": "han", "hiragana": "japanese", "katakana": "japanese", "fullwidth": "latin", "halfwidth": "japanese"}.get(first, first)


def lost_letters(text: str, back: str) -> set[str]:
    """The letters and digits of a text that its tokens no longer say, whatever their case or width."""
    def bare(s: str) -> str:
        return "".join(c for c in unicodedata.normalize("NFKD", s).casefold() if c.isalnum())

    return set(bare(text)) - set(bare(back))


def quantiles(values: Iterable[float]) -> dict[str, float]:
    found = np.asarray(list(values))
    return {f"p{q}": float(v) for q, v in zip(QUARTILES, np.percentile(found, QUARTILES))} if found.size else {}


def examine(source: Any, tokenizer: Any = None, *, length: int = 0, samples: int = 10_000, bad_budget: float = 0.01,
            threads: int = 0) -> tuple[dict[str, Any], list[Finding]]:
    """(numbers, findings) of up to ``samples`` samples spread over a source, 0 for all.

    tokenizer, length: of the model that will be trained; None says nothing of tokens. bad_budget: the share of unreadable samples that training
    allows. threads: that read and decode, 0 for one a processor. Errors of the machine (OSError) pass.
    """
    threads = threads or os.cpu_count() or 1
    chosen = list(range(len(source))) if not samples or samples >= len(source) else spread(len(source), samples)
    began = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        found = list(pool.map(lambda i: read(source, i), chosen, chunksize=16))
    seconds = time.perf_counter() - began
    good = [r for r in found if not r.reason]
    numbers: dict[str, Any] = {
        "samples": len(source), "read": len(found), "seconds": seconds, "threads": threads, "samples_per_second": len(found) / seconds,
        "bytes_per_second": sum(r.size for r in good) / seconds, "left_out": left_out_counts(source),
        "unreadable": unreadable(source, found)}
    findings: list[Finding] = []

    def tell(name: str, text: str, status: str = OK) -> None:
        findings.append(Finding(AREA, name, status, text))

    tell("samples", f"{len(source):,}, of which {len(found):,} were read: {len(found) / seconds:,.0f} samples/s, "
         f"{numbers['bytes_per_second'] / 1e6:,.1f} MB/s with {threads} threads, picture and caption, nothing resized")
    if left_out(source):
        tell("left out", left_out(source), WARNING)
    share = 1 - len(good) / max(1, len(found))
    bad = "; ".join(f"{reason} {entry['count']:,} (first: {entry['first']})" for reason, entry in numbers["unreadable"].items())
    tell("unreadable", f"{share:.2%}: {bad}" if bad else "none", ERROR if share > bad_budget or not good else WARNING if bad else OK)
    if good:
        numbers |= {"pictures": pictures(good), "captions": captions(good), "duplicates": duplicates(source, good)}
        if tokenizer is not None:
            numbers["tokens"] = tokens(good, tokenizer, length)
        findings += judge(numbers)
    return numbers, findings


def left_out_counts(source: Any) -> dict[str, int]:
    """What opening the source left out, by reason: duplicate members, orphans ("missing_image", "missing_caption"), cut tars ..."""
    out: collections.Counter[str] = collections.Counter()
    for part in getattr(source, "parts", [source]):
        out.update(getattr(part, "counts", {}))
    return dict(out)


def unreadable(source: Any, found: Sequence[Read]) -> dict[str, dict[str, Any]]:
    out: dict[str, dict[str, Any]] = {}
    for r in found:
        if r.reason:
            entry = out.setdefault(r.reason, {"count": 0, "first": f"{key_of(source, r.index)}{': ' + r.detail if r.detail else ''}"})
            entry["count"] += 1
    return out


def pictures(good: Sequence[Read]) -> dict[str, Any]:
    return {"width": quantiles(r.width for r in good), "height": quantiles(r.height for r in good), "bytes": quantiles(r.size for r in good),
            "short_side": quantiles(min(r.width, r.height) for r in good),
            "longer_than_3_to_1": float(np.mean([max(r.width, r.height) > 3 * min(r.width, r.height) for r in good]))}


def captions(good: Sequence[Read]) -> dict[str, Any]:
    texts = [text for r in good for text in r.texts]
    scripts = collections.Counter(map(script_of, texts))
    first = collections.Counter(normalise_caption(r.texts[0]) for r in good)
    common, count = first.most_common(1)[0]
    marked = {mark: n for mark in MARKUP if (n := sum(mark in text for text in texts))}
    return {"captions": len(texts), "per_sample": len(texts) / len(good), "characters": quantiles(map(len, texts)),
            "words": quantiles(len(text.split()) for text in texts), "scripts": {name: n / len(texts) for name, n in scripts.most_common()},
            "repeated": 1 - len(first) / len(good), "most_common": {"text": common, "count": count}, "markup": marked}


def tokens(good: Sequence[Read], tokenizer: Any, length: int) -> dict[str, Any]:
    """How long captions are in tokens, and the letters that the vocabulary has no way to say."""
    texts, counts, hurt = [text for r in good for text in r.texts], [], 0
    lost: collections.Counter[str] = collections.Counter()
    for text in texts:
        ids = tokenizer.encode(text)
        counts.append(len(ids))
        gone = lost_letters(text, tokenizer.decode(ids))
        lost.update(gone)
        hurt += bool(gone)
    return {"length": quantiles(counts), "cut": float(np.mean(np.array(counts) > length)) if length else None, "cut_at": length or None,
            "losing": hurt / len(texts), "lost": dict(lost.most_common(20))}


def duplicates(source: Any, good: Sequence[Read]) -> dict[str, Any]:
    """Pictures that are the same by their bytes, and those that look nearly so; rows of one key show one picture and count once."""
    first: dict[str, Read] = {}
    for r in good:
        first.setdefault(key_of(source, r.index), r)
    kept, keys = list(first.values()), list(first)
    exact = len(kept) - len({r.content for r in kept})
    groups = near_groups([r.hash for r in kept])
    return {"pictures": len(kept), "exact": exact, "near": sum(len(g) - 1 for g in groups), "groups": len(groups),
            "largest": [[keys[i] for i in group[:SHOWN]] for group in groups[:SHOWN]], "largest_size": len(groups[0]) if groups else 0}


def judge(numbers: dict[str, Any]) -> list[Finding]:
    """What the numbers mean. None of this stops training; what it is worth is another matter."""
    out = []

    def tell(name: str, text: str, doubtful: bool = False) -> None:
        out.append(Finding(AREA, name, WARNING if doubtful else OK, text))

    def middle(q: dict[str, float]) -> str:
        return f"{q['p50']:,.0f} in the middle, 90% within {q['p5']:,.0f} .. {q['p95']:,.0f}, at most {q['p100']:,.0f}"

    p, c, d = numbers["pictures"], numbers["captions"], numbers["duplicates"]
    tell("pictures", f"shorter side {middle(p['short_side'])} pixels; {p['bytes']['p50'] / 1e3:,.1f} kB; longer than 3:1: {p['longer_than_3_to_1']:.1%}",
         p["longer_than_3_to_1"] > 0.05)
    tell("captions", f"{c['per_sample']:.3g} a sample; words {middle(c['words'])}")
    tell("scripts", ", ".join(f"{name} {share:.1%}" for name, share in c["scripts"].items()), False)
    most = c["most_common"]
    tell("repeated captions", f"{c['repeated']:.1%} of the samples have a caption of another; {most['text'][:60]!r} {most['count']:,} times",
         c["repeated"] > 0.5)
    if c["markup"]:
        tell("control words", "captions hold " + ", ".join(f"{mark} {n:,}" for mark, n in c["markup"].items()) + " as text", True)
    if "tokens" in numbers:
        t = numbers["tokens"]
        cut = f"; longer than {t['cut_at']}: {t['cut']:.1%}" if t["cut_at"] else ""
        tell("tokens", middle(t["length"]) + cut, bool(t["cut"] and t["cut"] > 0.1))
        lost = ", ".join(f"{letter!r} {n:,}" for letter, n in list(t["lost"].items())[:8])
        tell("lost to the tokenizer", f"{t['losing']:.1%} of the captions lose letters: {lost}" if t["losing"] else "nothing", t["losing"] > 0.01)
    near = d["near"] / d["pictures"]
    tell("duplicates", f"{d['exact']:,} pictures are another's bytes, {d['near']:,} ({near:.1%}) look nearly like another, in {d['groups']:,} groups" +
         (f"; the largest, of {d['largest_size']:,}: {', '.join(d['largest'][0])}" if d["groups"] else ""), near > 0.05)
    return out
