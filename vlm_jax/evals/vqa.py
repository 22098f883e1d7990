"""Answering questions about images."""

from __future__ import annotations

import collections
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from vlm_jax.data.bad import BadSample
from vlm_jax.data.fingerprint import spread
from vlm_jax.data.sources import name_of, read_answers
from vlm_jax.errors import ConfigError, nearest
from vlm_jax.evals import bootstrap
from vlm_jax.evals.answers import Given, normalise, plain
from vlm_jax.evals.embed import asked, needs, real_rows, side_by_side, thumbnail
from vlm_jax.evals.evaluation import Evaluation, in_turn
from vlm_jax.evals.rank import with_baselines

METHODS = ("rank", "generate")
FREQUENT = "train:"


def evaluate(predict: Mapping[str, Callable], batches: Iterable[Mapping[str, Any]], *, tokenizer: Any, source: Any = None,
             train_source: Any = None, method: str = "rank", k: int = 128, candidates: str | Sequence[str] = "train:3128",
             candidates_from: int = 20_000, answer_length: int = 0, beams: int | None = None, max_length: int | None = None,
             min_length: int | None = None, shown: int = 12) -> Evaluation:
    """Answers every question, by ranking a list of answers or in the model's own words, and compares with what people answered.

    Args:
        predict: needs "answer". Called with ``image``, ``text``, ``text_mask`` (where text is laid out, ``prompt`` and ``instruction``), and to rank with
            ``candidates`` int32 [c,l] and ``candidates_mask`` bool [c,l] too, and with ``method``, and ``k`` or the options of generating. Returns
            ``answer`` int [b], the number of a candidate, or ``text`` int32 [b,m], ids as of captions; ``score`` [b].
        batches: host batches with ``image`` (or ``images``), ``text`` and ``meta`` (``answers`` as given, with repeats; ``key``, ``captions``).
        train_source: what the most frequent answers are counted in, without its images.
        method: "rank" or "generate". k: candidates that are scored in full, as the system chooses them.
        candidates: "train:3128" for that many of the most frequent answers, a file (one answer a line, or a JSON list), or the answers themselves.
        candidates_from: samples of ``train_source`` that are counted, spread evenly over it; 0 for all.
        answer_length: ids per candidate; 0 for as many as the longest has.
        beams, max_length, min_length: of generating; None leaves the system's default.
        shown: examples to picture, right and wrong ones in turn.

    Returns:
        scores ``vqa/accuracy`` (``answers.Given``: the official measure with ten answers, an exact match with one) with an interval (images
        resampled with their questions), ``chance`` (a candidate drawn blindly; without candidates, one of the answers of this set)
        and ``most_frequent`` (one answer to all: the most frequent of the training samples where they are counted, else of this set), the same as
        ``vqa/accuracy/<kind>`` for each kind of question; ``vqa/questions``; ``vqa/reachable``, the share of questions whose most given answer is
        among the candidates; ``vqa/truncated``, the share of candidates cut to ``answer_length``, or of generated answers without an end.
    """
    answer = needs(predict, "answer", "vqa")
    if method not in METHODS:
        raise ConfigError(f"vqa method={method!r} is not known{nearest(method, METHODS)}")
    if k < 1:
        raise ConfigError(f"vqa k={k} scores no candidate; nearest: 1")
    listed: list[str] = []
    extra: dict[str, np.ndarray] = {}
    cut = 0
    if method == "rank":
        listed = read_candidates(candidates, train_source, candidates_from)
        length = answer_length or max(len(tokenizer.encode(text)) for text in listed)
        extra["candidates"], extra["candidates_mask"], cut = tokenizer(listed, length)
        options: dict[str, Any] = {"method": method, "k": min(k, len(listed))}
    else:
        options = {"method": method, "beams": beams, "max_length": max_length, "min_length": min_length}
        options = {name: value for name, value in options.items() if value is not None}

    said, score, meta, pictures = [], [], [], []
    for batch in batches:
        out = {name: np.asarray(value) for name, value in answer({**asked(batch), **extra}, **options).items()}
        for row, m in real_rows(batch):
            if not m.get("answers"):
                raise ConfigError(f"vqa: sample {m.get('key')!r} has no answers; name their field with data.answer, nearest: 'json:answer'")
            if method == "rank":
                said.append(listed[int(out["answer"][row])])
            else:
                ids = out["text"][row].tolist()
                said.append(tokenizer.decode(ids).strip())
                cut += tokenizer.eos_id not in ids[ids[:1] == [tokenizer.bos_id]:]      # a begin may be the end too
            score.append(float(out["score"][row]))
            meta.append(m)
            pictures.append(thumbnail(side_by_side(batch, row)) if len(meta) <= 40 * shown else None)
    if not meta:
        raise ConfigError("the vqa evaluation source has no samples; nearest: a source of length 1 or more")

    given = [Given(m["answers"]) for m in meta]
    frequent = _most_frequent(m["answers"] for m in meta)
    if method == "rank" and isinstance(candidates, str) and candidates.startswith(FREQUENT):
        frequent = listed[0]
    drawn = listed or list(dict.fromkeys(g.most for g in given))
    forms = {form: collections.Counter(map(form, drawn)) for form in (normalise, plain)}
    each = {"accuracy": np.array([g.accuracy(text) for g, text in zip(given, said)]),
            "chance": np.array([sum(forms[g.form][form] * value for form, value in g.table.items()) / len(drawn) for g in given]),
            "most_frequent": np.array([g.accuracy(frequent) for g in given])}
    units = np.unique([str(m.get("key", i)) for i, m in enumerate(meta)], return_inverse=True)[1]
    kinds = np.array([str(m.get("kind", "")).replace("/", " or ") for m in meta])
    scores = {"vqa/questions": float(len(meta)), "vqa/truncated": cut / len(listed or meta)}
    if listed:
        scores["vqa/reachable"] = float(np.mean([forms[g.form][g.most] > 0 for g in given]))
    for kind in ("", *sorted(set(kinds.tolist()) - {""})):
        of = kinds == kind if kind else np.ones(len(meta), bool)
        scores |= with_baselines(f"vqa/accuracy/{kind}".rstrip("/"), each["accuracy"][of].mean(), each["chance"][of].mean(),
                                 bootstrap.mean_interval(each["accuracy"][of], units[of]), most_frequent=each["most_frequent"][of].mean())

    questions = [m.get("question") or (m.get("captions") or [""])[0] for m in meta]
    items = [{"key": str(m.get("key", i)), "question": questions[i], "answer": said[i], "score": score[i], "accuracy": float(each["accuracy"][i]),
              "answers": m["answers"], **{name: m[name] for name in ("kind", "question_id") if name in m}} for i, m in enumerate(meta)]
    near = [i for i, picture in enumerate(pictures) if picture is not None]
    right = each["accuracy"] >= 0.5
    chosen = in_turn([i for i in near if right[i]], [i for i in near if not right[i]], shown)
    return Evaluation(scores, items, {"captions": [
        {"image": pictures[i], "generated": f"{questions[i]} {said[i]}", "reference": given[i].most, "ok": bool(right[i])} for i in chosen]})


def read_candidates(candidates: str | Sequence[str], train_source: Any = None, samples: int = 0) -> list[str]:
    """The answers to choose from, each once: "train:N", a file, or the answers themselves. Raises ConfigError."""
    if not isinstance(candidates, str):
        found = [str(text) for text in candidates]
    elif candidates.startswith(FREQUENT):
        found = _frequent(candidates, train_source, samples)
    else:
        found = _from_file(candidates)
    found = list(dict.fromkeys(filter(None, map(str.strip, found))))
    if not found:
        raise ConfigError(f"vqa candidates={candidates!r} gives no answer; nearest: 'train:3128', a file with one answer a line, or the answers")
    return found


def _frequent(candidates: str, source: Any, samples: int) -> list[str]:
    number = candidates.removeprefix(FREQUENT)
    if not number.isdigit() or int(number) < 1:
        raise ConfigError(f"vqa candidates={candidates!r} has no number of answers; nearest: 'train:3128'")
    if source is None:
        raise ConfigError(f"vqa candidates={candidates!r} needs a training source to count answers in; nearest: a file with one answer a line")
    counts: collections.Counter[str] = collections.Counter()
    for i in spread(len(source), samples or len(source)):
        try:
            counts.update(read_answers(source, i))
        except BadSample:      # told of where it is trained on
            continue
    if not counts:
        raise ConfigError(f"vqa candidates={candidates!r}: {name_of(source)} has no answers; name their field with data.answer, nearest: 'json:answer'")
    return sorted(counts, key=lambda text: (-counts[text], text))[:int(number)]


def _from_file(path: str) -> list[str]:
    full = os.path.expanduser(path)
    if not os.path.isfile(full):
        folder = os.path.dirname(full) or "."
        beside = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
        hint = nearest(os.path.basename(full), beside) if beside else "; nearest: 'train:3128'"
        raise ConfigError(f"vqa candidates={path!r}: no such file{hint}")
    with open(full, encoding="utf-8-sig") as file:
        text = file.read()
    if not text.lstrip().startswith("["):
        return text.splitlines()
    try:
        return [str(value) for value in json.loads(text)]
    except ValueError as error:
        raise ConfigError(f"vqa candidates={path!r} is no JSON list ({error}); nearest: one answer a line") from error


def _most_frequent(answers: Iterable[Sequence[str]]) -> str:
    counts = collections.Counter(text for several in answers for text in several)
    return min(counts, key=lambda text: (-counts[text], text))
