"""Caption quality: facts, exact matches and n-gram metrics, beside captions that looked at no image."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from vlm_jax.errors import ConfigError
from vlm_jax.evals import bootstrap, text_metrics
from vlm_jax.evals.embed import asked, embed_images, needs, one_image, real_rows, side_by_side, single, thumbnail
from vlm_jax.evals.evaluation import Evaluation, in_turn


def evaluate(predict: Mapping[str, Callable], batches: Iterable[Mapping[str, Any]], *, tokenizer: Any,
             source: Any = None, train_batches: Iterable[Mapping[str, Any]] | None = None, method: str = "greedy",
             beams: int | None = None, max_length: int | None = None, min_length: int | None = None,
             temperature: float | None = None, top_k: int | None = None, top_p: float | None = None,
             length_penalty: float | None = None, repetition_penalty: float | None = None, seed: int = 0,
             shown: int = 12) -> Evaluation:
    """Captions every image and compares with its references.

    Args:
        predict: needs "generate", called with ``image``, and, where text is laid out, ``prompt`` and ``instruction``; "embed" too for the
            nearest-neighbour baseline.
        batches: host batches with ``image`` and ``meta`` (``captions``, ``key``, ``index``).
        source: its ``judge(index, caption) -> {fact: bool}``, where it has one, checks the facts.
        train_batches: training samples in the same form, for the baselines.
        method ... repetition_penalty: handed to "generate"; None leaves the system's default.
        seed: of the key that ``method="sample"`` draws from, and of the chance baseline.
        shown: examples to picture, right and wrong ones in turn.

    Returns:
        scores ``caption/exact`` (equal to a reference but for case and spaces), ``caption/facts/<fact>``,
        ``caption/BLEU-4``, ``caption/CIDEr-D``, ``caption/ROUGE-L``, each with an interval and the baselines
        ``chance`` (the caption of another image, drawn blindly), ``most_frequent`` (one caption for all: the
        most frequent of the training samples, or of this set without them) and, with training samples,
        ``nearest`` (the caption of the training image with the closest embedding); ``caption/distinct``,
        the share of distinct captions, beside ``caption/distinct/reference``.
    """
    generate = needs(predict, "generate", "caption")
    options = dict(method=method, beams=beams, max_length=max_length, min_length=min_length, temperature=temperature,
                   top_k=top_k, top_p=top_p, length_penalty=length_penalty, repetition_penalty=repetition_penalty)
    options = {k: v for k, v in options.items() if v is not None}
    captions, scores, meta, thumbnails, embeds = [], [], [], [], []
    embed = predict.get("embed") if train_batches is not None else None
    for number, batch in enumerate(batches):
        inputs = asked(batch) if "prompt" in batch else {"image": one_image(batch)}
        if method == "sample":
            options["key"] = _key(seed, number)
        out = generate(inputs, **options)
        text, score = np.asarray(out["text"]), np.asarray(out["score"])
        rows = real_rows(batch)
        if embed:
            embeds.append(single(np.asarray(embed(inputs)["image_embed"], np.float32)[[row for row, _ in rows]]))
        for row, m in rows:
            captions.append(tokenizer.decode(text[row].tolist()).strip())
            scores.append(float(score[row]))
            meta.append(m)
            thumbnails.append(thumbnail(side_by_side(batch, row)) if len(meta) <= 40 * shown else None)
    if not meta:
        raise ConfigError("the caption evaluation source has no samples; nearest: a source of length 1 or more")
    references = [list(m.get("captions") or ()) for m in meta]
    for m, r in zip(meta, references):
        if not r:
            raise ConfigError(f"caption needs references; sample {m.get('key')!r} has no captions")

    judge = getattr(source, "judge", None)
    ours = _Measured(captions, references, meta, judge)
    baselines = {"chance": _of_others(references, seed), "most_frequent": [_most_frequent(references)] * len(meta)}
    if train_batches is not None:
        train = embed_images(embed, train_batches) if embed else None
        seen = train.meta if train else [m for b in train_batches for _, m in real_rows(b)]
        seen = [(row, list(m["captions"])) for row, m in enumerate(seen) if m.get("captions")]
        if not seen:
            raise ConfigError("caption: the training samples given for the baselines have no captions")
        baselines["most_frequent"] = [_most_frequent([c for _, c in seen])] * len(meta)
        if train:
            close = _nearest(np.concatenate(embeds), train.means[[row for row, _ in seen]])
            baselines["nearest"] = [seen[i][1][0] for i in close]
    out = {"caption/images": float(len(meta))}
    measured = {name: _Measured(texts, references, meta, judge) for name, texts in baselines.items()}
    for name in ours.values:
        out[f"caption/{name}"] = ours.values[name]
        out[f"caption/{name}/ci_low"], out[f"caption/{name}/ci_high"] = ours.interval(name)
        out |= {f"caption/{name}/{b}": m.values[name] for b, m in measured.items() if name in m.values}
    out["caption/distinct"] = len(set(captions)) / len(captions)
    out["caption/distinct/reference"] = len({r[0] for r in references}) / len(references)

    items = [{"key": str(m.get("key", i)), "generated": captions[i], "references": references[i], "score": scores[i],
              "exact": bool(ours.each["exact"][i]), "CIDEr-D": float(ours.each["CIDEr-D"][i]), "facts": ours.facts[i]}
             for i, m in enumerate(meta)]
    return Evaluation(out, items, {"captions": _examples(ours, thumbnails, captions, references, shown)})


class _Measured:
    """values: name -> score; each: name -> per image [n], NaN where it does not apply; facts: per image."""

    def __init__(self, captions: Sequence[str], references: Sequence[Sequence[str]], meta, judge: Callable | None):
        tokens = [text_metrics.tokenise(c) for c in captions]
        tokenised = [[text_metrics.tokenise(r) for r in refs] for refs in references]
        self.each = {"exact": np.array([_plain(c) in {_plain(r) for r in refs}
                                        for c, refs in zip(captions, references)], np.float64)}
        self.facts = [{k: bool(v) for k, v in judge(m.get("index", i), c).items()} if judge else {}
                      for i, (m, c) in enumerate(zip(meta, captions))]
        for fact in dict.fromkeys(k for f in self.facts for k in f):
            self.each[f"facts/{fact}"] = np.array([f.get(fact, np.nan) for f in self.facts], np.float64)
        self.bleu = text_metrics.bleu_parts(tokens, tokenised)
        self.each["CIDEr-D"] = text_metrics.cider_d(tokens, tokenised)[1]
        self.each["ROUGE-L"] = text_metrics.rouge_l(tokens, tokenised)[1]
        self.values = {k: float(np.nanmean(v)) for k, v in self.each.items()}
        self.values["BLEU-4"] = float(text_metrics.bleu_from_sums(self.bleu.sum(0)))

    def interval(self, name: str) -> tuple[float, float]:
        if name == "BLEU-4":
            return bootstrap.interval(self.bleu, text_metrics.bleu_from_sums)
        values = self.each[name]
        return bootstrap.mean_interval(values[~np.isnan(values)])


def _plain(caption: str) -> str:
    return " ".join(caption.lower().split())


def _most_frequent(captions: Sequence[Sequence[str]]) -> str:
    counts = collections.Counter(c for several in captions for c in several)
    return min(counts, key=lambda c: (-counts[c], c))


def _of_others(references: Sequence[Sequence[str]], seed: int) -> list[str]:
    """For each image the first caption of another one: a random cycle through all."""
    order = np.random.default_rng(seed).permutation(len(references))
    out = [""] * len(references)
    for i, j in zip(order, np.roll(order, 1)):
        out[i] = references[j][0]
    return out


def _nearest(queries: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """int [q]: the target with the highest cosine for each of the embeddings [q,e]; targets [t,e]."""
    return np.concatenate([np.argmax(queries[i:i + 256] @ targets.T, axis=1) for i in range(0, len(queries), 256)])


def _key(seed: int, number: int):
    import jax
    return jax.random.fold_in(jax.random.key(seed), number)


def _examples(ours: _Measured, thumbnails, captions, references, shown: int) -> list[dict[str, Any]]:
    """Right and wrong captions in turn, in the order of the set; CIDEr-D ranks where all are one or the other."""
    verdict = ours.each.get("facts/exact", ours.each["exact"]) == 1
    near = [i for i, t in enumerate(thumbnails) if t is not None]
    good, bad = [i for i in near if verdict[i]], [i for i in near if not verdict[i]]
    if not good:
        bad.sort(key=lambda i: -ours.each["CIDEr-D"][i])
        bad = bad[:-(-shown // 2)] + bad[-(-shown // 2):][-(shown // 2):]
    return [{"image": thumbnails[i], "generated": captions[i], "reference": references[i][0], "ok": bool(verdict[i])}
            for i in in_turn(good, bad, shown)]
