"""From rows of metrics.jsonl and flat scores to what is drawn and listed."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

# Training metrics by panel, the first pattern that matches; the rest are loss terms.
PANELS = (("Learning rate", r"lr|learning_rate|lr/.*"), ("Images per second", r".*images_per_s.*"),
          ("Waiting for data (share of time)", r".*data_wait"), ("Host memory (MB)", r".*resident_mb"),
          ("Skipped steps", r"bad_steps"), ("Gradient norm", r".*norm.*"),
          ("Codes in use (share)", r"usage"), ("Perplexity of the codes", r"perplexity"),
          ("Accuracy in the batch", r".*accuracy.*|.*_to_.*"), ("Similarity scale and bias", r".*scale|.*bias|temperature"),
          ("Other", r".*/.*"))
COUNTS = ("images", "captions", "classes", "truncated", "duplicates", "codes", "tokens")


@dataclasses.dataclass
class Score:
    """One score with what stands beside it; ``interval`` is (low, high) or None, ``baselines`` by name."""
    name: str
    value: float
    interval: tuple[float, float] | None
    baselines: dict[str, float]


def number(value: Any) -> float | None:
    """A float, from numbers and from the strings that stand for nan and infinity; None for anything else."""
    if isinstance(value, bool):
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def curves(rows: Iterable[Mapping[str, Any]]) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, np.ndarray]]:
    """(training metrics by panel and name, evaluation scores by name), each as [n,2] of step and value.

    A row with ``loss`` is a training row, any other an evaluation.
    """
    training: dict[str, list] = {}
    scores: dict[str, list] = {}
    for row in rows:
        found = training if "loss" in row else scores
        for name, value in row.items():
            if name != "step" and number(value) is not None:
                found.setdefault(name, []).append((row["step"], number(value)))
    panels: dict[str, dict[str, np.ndarray]] = {"Loss": {}}
    panels |= {title: {} for title, _ in PANELS}
    for name, points in training.items():
        title = next((t for t, pattern in PANELS if re.fullmatch(pattern, name)), "Loss")
        panels[title][name] = np.array(points, np.float64)
    return ({title: lines for title, lines in panels.items() if lines},
            {name: np.array(points, np.float64) for name, points in scores.items()})


def read_scores(scores: Mapping[str, Any]) -> dict[str, list[Score]]:
    """Scores by evaluation (the name's first part). ``a/b/c`` stands beside ``a/b`` where that is a score itself."""
    values = {k: number(v) for k, v in scores.items() if k != "step" and number(v) is not None}
    out: dict[str, list[Score]] = {}
    for name, value in values.items():
        if name.rpartition("/")[0] in values:
            continue
        beside = {k[len(name) + 1:]: v for k, v in values.items() if k.startswith(name + "/") and k.rpartition("/")[0] == name}
        low, high = beside.pop("ci_low", math.nan), beside.pop("ci_high", math.nan)
        interval = None if math.isnan(low) or math.isnan(high) else (low, high)
        out.setdefault(name.partition("/")[0], []).append(Score(name, value, interval, beside))
    return out


def score_panels(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """Panel title -> {score name: label}. Shares have a panel for each evaluation (and direction), ranks one for
    each evaluation, CIDEr-D one for all; counts are left out."""
    panels: dict[str, dict[str, str]] = {}
    names = list(names)
    order = list(dict.fromkeys(n.partition("/")[0] for n in names))
    for name in sorted(names, key=lambda n: (order.index(n.partition("/")[0]), n.endswith("_rank"))):
        head, _, tail = name.rpartition("/")
        if tail in COUNTS or not head:
            continue
        first, _, middle = head.partition("/")
        if tail.endswith("_rank"):
            title, label = f"{spell(first)}, ranks", f"{middle}_{tail.removesuffix('_rank')}"
        elif tail == "perplexity":
            title, label = f"{spell(first)}, perplexity", tail
        elif tail.startswith("CIDEr"):
            title, label = tail, head
        elif middle == "facts":
            title, label = spell(first), f"facts: {tail}"
        else:
            title, label = spell(head), tail
        panels.setdefault(title, {})[name] = spell(label)
    return panels


def spell(name: str) -> str:
    """``retrieval/text_to_image`` -> "retrieval, text → image"."""
    return name.replace("_to_", " \u2192 ").replace("_", " ").replace("/", ", ")


def short(value: float) -> str:
    """A number in about three figures."""
    if not math.isfinite(value):
        return "\u2013"
    if value == int(value) and 1 < abs(value) < 1e7:
        return f"{int(value):,}"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:,.1f}"
