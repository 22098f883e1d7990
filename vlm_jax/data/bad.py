"""Samples that cannot be used: how they are named, counted, written down, and when they stop a run."""

from __future__ import annotations

import collections
import json
import os
from typing import NamedTuple

from vlm_jax.errors import ConfigError


class BadSample(Exception):
    """One sample that cannot be used. ``reason`` is a short stable name that is counted ("truncated_image")."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


class BadDataError(ConfigError):
    """More bad samples than the budget allows, or none that can be read."""


class Offence(NamedTuple):
    """A bad sample as it stands in the quarantine file, one JSON object a line."""
    source: str
    key: str
    reason: str
    detail: str
    index: int


class Ledger:
    """Counts bad samples by reason against a budget.

    The run stops when more than ``max(floor, budget * seen)`` samples of those seen by this process
    were bad: ``budget`` is a fraction, ``floor`` an absolute number that a short run may always meet.
    Each (source, key, reason) is written to ``quarantine_path`` once, also across restarts.
    """

    def __init__(self, budget: float, floor: int = 16, quarantine_path: str | None = None):
        if not 0 <= budget <= 1:
            raise ValueError(f"bad_budget={budget} is not a fraction of samples (0 to 1)")
        self.budget, self.floor, self.path = budget, floor, quarantine_path
        self.seen = 0
        self.counts: collections.Counter[str] = collections.Counter()
        self.first: list[Offence] = []
        self._written: set[tuple[str, str, str]] = set()
        if quarantine_path and os.path.exists(quarantine_path):
            with open(quarantine_path, encoding="utf-8") as file:
                for line in file:
                    try:
                        row = json.loads(line)
                        self._written.add((row["source"], row["key"], row["reason"]))
                    except (ValueError, KeyError):  # a line cut by a crash
                        continue

    def add(self, seen: int, offences: list[Offence]) -> None:
        """Records a batch. Raises BadDataError when the budget is spent."""
        self.seen += seen
        if not offences:
            return
        self.counts.update(o.reason for o in offences)
        self.first += offences[:max(0, 5 - len(self.first))]
        self._write(offences)
        bad = self.counts.total()
        if bad > max(self.floor, self.budget * self.seen):
            raise BadDataError(self.report(f"{bad} bad samples of {self.seen} seen pass the budget "
                                           f"(bad_budget={self.budget:g}, at least {self.floor} allowed)"))

    def report(self, headline: str) -> str:
        """``headline`` with the counts by reason and the first offenders."""
        counts = ", ".join(f"{reason} {count}" for reason, count in self.counts.most_common())
        first = "; ".join(f"{o.source} {o.key} ({o.reason}{': ' + o.detail if o.detail else ''})" for o in self.first)
        return f"{headline}. By reason: {counts}. First: {first}"

    def _write(self, offences: list[Offence]) -> None:
        fresh = [o for o in dict.fromkeys(offences) if o[:3] not in self._written]
        if not self.path or not fresh:
            return
        self._written.update(o[:3] for o in fresh)
        os.makedirs(os.path.dirname(self.path) or ".", exist_ok=True)
        with open(self.path, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(o._asdict(), ensure_ascii=False) + "\n" for o in fresh)
