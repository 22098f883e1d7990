"""What an evaluation returns, and how its per-item predictions are stored."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np


@dataclasses.dataclass
class Evaluation:
    """scores: name -> number. Beside a score ``a/b`` stand ``a/b/chance`` (blind guessing),
    ``a/b/ci_low`` and ``a/b/ci_high`` (95% bootstrap over images) and other baselines by name.

    items: one JSON-able record per prediction. pictures: arguments of ``report.write_report``
    (``similarity``, ``neighbours``, ``captions``, ``grounding``, ``codes``), those that the evaluation has.
    """
    scores: dict[str, float]
    items: list[dict[str, Any]]
    pictures: dict[str, Any] = dataclasses.field(default_factory=dict)


def in_turn(right: Sequence[int], wrong: Sequence[int], shown: int) -> list[int]:
    """The first right and the first wrong ones, half each where there are enough; ``shown`` of them at most."""
    right = list(right[:max(shown // 2, shown - len(wrong))])
    return right + list(wrong[:shown - len(right)])


def write_items(path: str | os.PathLike, items: Iterable[Mapping[str, Any]]) -> None:
    """Writes records as JSON lines, whole or not at all; numpy scalars and arrays become plain."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(path.name + ".tmp")
    with fresh.open("w", encoding="utf-8") as file:
        for item in items:
            file.write(json.dumps(item, ensure_ascii=False, default=_plain) + "\n")
    os.replace(fresh, path)


def _plain(value):
    if isinstance(value, (np.ndarray, np.generic)):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} in an item cannot be written as JSON")
