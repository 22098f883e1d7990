"""Evaluations: consumers of predict functions, never of models.

``run("retrieval", predict, batches, tokenizer=..., source=...)`` returns scores with chance and
intervals beside them, the prediction for every item, and pictures for the report. ``predict``
maps names to functions of a host batch, already bound to variables; what a kind needs of them
and its options stand in the docstring of its ``evaluate``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from vlm_jax.errors import ConfigError, nearest
from vlm_jax.evals import caption, choice, classify, codebook, grounding, matching, probe, rerank, retrieval, vqa, zeroshot
from vlm_jax.evals.evaluation import Evaluation, write_items

KINDS: Mapping[str, Callable[..., Evaluation]] = {
    "caption": caption.evaluate, "choice": choice.evaluate, "classify": classify.evaluate, "codebook": codebook.evaluate, "grounding": grounding.evaluate,
    "matching": matching.evaluate,
    "probe": probe.evaluate, "rerank": rerank.evaluate, "retrieval": retrieval.evaluate, "vqa": vqa.evaluate, "zeroshot": zeroshot.evaluate}
WITHOUT_TEXTS = ("codebook",)      # what looks at images alone: its batches need no texts, nor a tokenizer


def run(kind: str, predict: Mapping[str, Callable], batches: Iterable[Mapping[str, Any]], *, tokenizer: Any,
        source: Any = None, **options: Any) -> Evaluation:
    """Runs one evaluation of ``KINDS``; raises ConfigError for an unknown kind."""
    if kind not in KINDS:
        raise ConfigError(f"evaluation {kind!r} is not known{nearest(kind, KINDS)}")
    return KINDS[kind](predict, batches, tokenizer=tokenizer, source=source, **options)


__all__ = ["Evaluation", "KINDS", "WITHOUT_TEXTS", "run", "write_items"]
