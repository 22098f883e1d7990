"""Choosing among the candidates of each row: multiple choice, visual dialogue, yes or no."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from vlm_jax.errors import ConfigError
from vlm_jax.evals import bootstrap
from vlm_jax.evals.embed import asked, needs, real_rows, side_by_side, thumbnail
from vlm_jax.evals.evaluation import Evaluation, in_turn
from vlm_jax.evals.rank import with_baselines


def evaluate(predict: Mapping[str, Callable], batches: Iterable[Mapping[str, Any]], *, tokenizer: Any, source: Any = None, rule: str | None = None,
             verbalisers: Sequence[Sequence[str]] = (), shown: int = 12) -> Evaluation:
    """Ranks each row's candidates, or the words that stand for classes, and looks where the right one is.

    Args:
        predict: needs "rank". Called with what is asked (``image`` or ``images``, ``prompt``, ``instruction`` and their masks), ``answer`` int32
            [b,a,m] and ``answer_mask``, and with ``rule`` where it is given: how a candidate's tokens are summed, by a name of the system's. Returns
            ``score`` [b,a], higher for what is likelier.
        batches: host batches with these (candidates are made of ``meta`` where data.answers is 0) and ``meta`` (``choices``, ``label``, ``key``,
            ``question``, ``kind``).
        verbalisers: for each class the words that stand for it, such as (("no", "false"), ("yes", "true")): all of them are ranked for every row, and
            a class has the sum of their probabilities, taking scores as logarithms. The label of a row is then its class, or, where it has none, the
            class of its reply.
        shown: examples to picture, right and wrong ones in turn.

    Returns:
        scores ``choice/accuracy``, ``choice/MRR`` (the mean of 1 / rank of the right candidate; without verbalisers) and, where every row chooses
        between the same two, ``choice/AUC`` of the second; each with an interval (images resampled with their questions) and its chance;
        accuracy and MRR for each kind of question too, by ``/<kind>``; ``choice/questions``. Ties, and scores that are no number, are wrong.
    """
    rank = needs(predict, "rank", "choice")
    classes = [list(words) for words in verbalisers]
    words = [word for listed in classes for word in listed]
    if classes and (len(classes) < 2 or not all(classes) or len(set(words)) < len(words)):
        raise ConfigError(f"choice verbalisers={tuple(map(tuple, classes))} is not for two classes or more, each with words of its own; nearest: "
                          "(('no', 'false'), ('yes', 'true'))")
    given: dict[str, np.ndarray] = {}
    if words:
        given["answer"], given["answer_mask"], _ = tokenizer(words, max(len(tokenizer.encode(word)) for word in words))
    options = {} if rule is None else {"rule": rule}
    found, labels, named, meta, pictures = [], [], [], [], []
    for batch in batches:
        if words:
            candidates = {k: np.broadcast_to(v, (len(batch["meta"]), *v.shape)) for k, v in given.items()}
        else:
            candidates = {k: batch[k] for k in ("answer", "answer_mask")} if "answer" in batch else _candidates(batch["meta"], tokenizer)
        score = np.asarray(rank({**asked(batch), **candidates}, **options)["score"], np.float64)
        for row, m in real_rows(batch):
            choices = [listed[0] for listed in classes] or list(m.get("choices") or ())
            label = _class_of(m, classes) if classes else m.get("label")
            if label is None or not 0 <= label < len(choices):
                raise ConfigError(f"choice: sample {m.get('key')!r} has label={label} of the candidates {choices[:8]}; nearest: a source with choices and "
                                  "label, or verbalisers with the replies among them")
            own = score[row, :len(words or choices)]
            found.append(_summed(own, classes) if classes else own)
            labels.append(int(label))
            named.append(choices)
            meta.append(m)
            pictures.append(thumbnail(side_by_side(batch, row)) if len(meta) <= 40 * shown else None)
    if not meta:
        raise ConfigError("the choice evaluation source has no samples; nearest: a source of length 1 or more")

    ranks = np.array([_rank(own, label) for own, label in zip(found, labels, strict=True)])
    sizes = np.array([len(own) for own in found])
    units = np.unique([str(m.get("key", i)) for i, m in enumerate(meta)], return_inverse=True)[1]
    kinds = np.array([str(m.get("kind", "")).replace("/", " or ") for m in meta])
    scores = {"choice/questions": float(len(meta))}
    measured = {"accuracy": (ranks == 1, 1 / sizes)}
    if not classes:
        measured["MRR"] = 1 / ranks, np.array([np.mean(1 / np.arange(1, n + 1)) for n in sizes])
    for kind in ("", *sorted(set(kinds.tolist()) - {""})):
        of = kinds == kind if kind else np.ones(len(meta), bool)
        for name, (value, chance) in measured.items():
            scores |= with_baselines(f"choice/{name}/{kind}".rstrip("/"), np.mean(value[of]), chance[of].mean(), bootstrap.mean_interval(value[of], units[of]))
    if sizes.max() == sizes.min() == 2 and all(choices == named[0] for choices in named):
        margin, positive = np.array([own[1] - own[0] for own in found]), np.array(labels) == 1
        rows_of = [np.flatnonzero(units == unit) for unit in range(units.max() + 1)]

        def of_units(drawn: np.ndarray) -> float:
            rows = np.concatenate([rows_of[unit] for unit in drawn])
            return area(margin[rows], positive[rows])

        scores |= with_baselines("choice/AUC", area(margin, positive), 0.5, bootstrap.statistic_interval(of_units, len(rows_of)))

    best = [int(np.nanargmax(own)) if not np.isnan(own).all() else 0 for own in found]
    items = [{"key": str(m.get("key", i)), "question": m.get("question", ""), "choices": named[i], "label": labels[i], "chosen": best[i],
              "rank": int(ranks[i]), "score": found[i].tolist(), **{name: m[name] for name in ("kind", "question_id") if name in m}}
             for i, m in enumerate(meta)]
    near = [i for i, picture in enumerate(pictures) if picture is not None]
    chosen = in_turn([i for i in near if ranks[i] == 1], [i for i in near if ranks[i] > 1], shown)
    return Evaluation(scores, items, {"captions": [
        {"image": pictures[i], "generated": f"{meta[i].get('question', '')} {named[i][best[i]]}", "reference": named[i][labels[i]], "ok": bool(ranks[i] == 1)}
        for i in chosen]})


def _candidates(meta: Sequence[Mapping[str, Any]], tokenizer: Any) -> dict[str, np.ndarray]:
    """``answer`` and its mask of rows' ``choices``, in a few sizes: a power of two of candidates, a multiple of four ids."""
    rows = [list(m.get("choices") or ()) for m in meta]
    texts = [text for row in rows for text in row]
    most = 1 << max(0, max(map(len, rows)) - 1).bit_length()
    length = -(-max((len(tokenizer.encode(text)) for text in texts), default=1) // 4) * 4
    ids, mask = np.full((len(rows), most, length), tokenizer.pad_id, np.int32), np.zeros((len(rows), most, length), bool)
    if texts:
        at = np.arange(most) < np.array([len(row) for row in rows])[:, None]
        ids[at], mask[at], _ = tokenizer(texts, length)
    return {"answer": ids, "answer_mask": mask}


def _class_of(m: Mapping[str, Any], classes: Sequence[Sequence[str]]) -> int | None:
    if m.get("label") is not None:
        return m["label"]
    reply = str((m.get("answers") or [""])[0]).strip().lower()
    return next((c for c, words in enumerate(classes) if reply in words), None)


def _summed(score: np.ndarray, classes: Sequence[Sequence[str]]) -> np.ndarray:
    """The logarithm of each class's probability, from those of its words [a] in their order."""
    ends = np.cumsum([len(words) for words in classes])
    return np.array([np.logaddexp.reduce(part) for part in np.split(score, ends[:-1])])


def _rank(score: np.ndarray, label: int) -> int:
    """1 + the others that score as high or higher; last where the score is no number."""
    if np.isnan(score[label]):
        return len(score)
    return 1 + int(np.sum(~(np.delete(score, label) < score[label])))


def area(score: np.ndarray, positive: np.ndarray) -> float:
    """The area under the ROC curve: the share of pairs in which the positive one scores higher, ties counting half; nan without both."""
    count = int(positive.sum())
    if not 0 < count < len(positive):
        return float("nan")
    _, place, sizes = np.unique(score, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(sizes) - (sizes - 1) / 2)[place]      # mean rank of equal ones, from 1
    return float((ranks[positive].sum() - count * (count + 1) / 2) / (count * (len(positive) - count)))
