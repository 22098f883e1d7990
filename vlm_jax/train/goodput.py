"""Where the time of a run goes, over all its starts: ``goodput.jsonl`` in the work directory.

A row holds the seconds of a start so far, by kind, at a step of a stage; rows come with every logged step and save, so that a
kill costs the sum no more than what happened since. What a later start has to do again was lost.
"""

from __future__ import annotations

import contextlib
import json
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

KINDS = ("initialise", "compile", "restore", "data wait", "step", "save", "evaluate")
TRAINING = ("data wait", "step", "save", "evaluate")     # what is done again after a kill
LOST = "lost to restarts"


class Clock:
    """Counts the seconds of this start by kind: every moment belongs to the innermost ``spend``, and outside of one to "initialise".

    path: where rows go, None for nowhere. began: ``time.time()`` at the start of the process. notice: told of what happens now,
    and whether it is part of training (``now``), for whoever watches that something happens at all.
    """

    def __init__(self, path: pathlib.Path | None = None, began: float | None = None, notice: Callable[[str, bool], None] = lambda what, training: None):
        self.path, self.notice, self.stage = path, notice, ""
        self.began = time.time() if began is None else began
        self.seconds = dict.fromkeys(KINDS, 0.0)
        self.seconds["initialise"] = max(0.0, time.time() - self.began)
        self._kinds, self._since = ["initialise"], time.perf_counter()

    def _settle(self) -> None:
        now = time.perf_counter()
        self.seconds[self._kinds[-1]] += now - self._since
        self._since = now

    @contextlib.contextmanager
    def spend(self, kind: str) -> Iterator[None]:
        """What happens inside is of ``kind`` (of ``KINDS``)."""
        self._settle()
        self._kinds.append(kind)
        self.notice(kind, False)
        try:
            yield
        finally:
            self._settle()
            self._kinds.pop()

    def now(self, what: str) -> None:
        """Says what a training step is at."""
        self.notice(what, True)

    def move(self, seconds: float, kind: str, to: str) -> None:
        """Some seconds of ``kind`` were spent on something else."""
        self.seconds[kind] -= seconds
        self.seconds[to] += seconds

    def record(self, step: int, resumed: int | None = None) -> None:
        """Writes a row; ``resumed``: the step that this start goes on from."""
        self._settle()
        if self.path is None:
            return
        row = {"start": round(self.began, 3), "at": round(time.time(), 3), "stage": self.stage, "step": step,
               **({} if resumed is None else {"resumed": resumed}), "seconds": {k: round(v, 4) for k, v in self.seconds.items()}}
        with contextlib.suppress(OSError), self.path.open("a") as file:      # a full disk costs no training
            file.write(json.dumps(row) + "\n")


def read(path: pathlib.Path) -> list[dict[str, Any]]:
    """The rows of a file; a line that a kill cut short is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return rows


def total(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Seconds by kind over all starts, "lost to restarts" among them: what a later start did again is counted there alone.

    "away": seconds between the last sign of a start and the next start; "starts": how many.
    """
    starts: dict[float, list[Mapping[str, Any]]] = {}
    for row in rows:
        starts.setdefault(row["start"], []).append(row)
    out = {**dict.fromkeys((*KINDS, LOST), 0.0), "away": 0.0, "starts": float(len(starts))}
    order = sorted(starts)
    for number, start in enumerate(order):
        mine, later = starts[start], [row for other in order[number + 1:] for row in starts[other]]
        for kind, seconds in mine[-1]["seconds"].items():
            out[kind] += seconds
        last = mine[-1]
        again = next((row["resumed"] for row in later if "resumed" in row and row["stage"] == last["stage"]), None)
        if again is not None and again < last["step"]:
            kept = [row for row in mine if row["stage"] == last["stage"] and row["step"] <= again]
            for kind in TRAINING:
                lost = last["seconds"][kind] - (kept or mine)[-1 if kept else 0]["seconds"][kind]
                out[kind] -= lost
                out[LOST] += lost
        if number + 1 < len(order):
            out["away"] += max(0.0, order[number + 1] - last["at"])
    return out


def line(seconds: Mapping[str, float]) -> str:
    """The sum in one line: the share of steps that count, and what the rest went to."""
    whole = sum(seconds[kind] for kind in (*KINDS, LOST)) or 1.0
    parts = ", ".join(f"{kind} {seconds[kind]:.1f} s ({seconds[kind] / whole:.1%})" for kind in (*KINDS, LOST) if seconds[kind] >= 0.05)
    away = f"; {seconds['away']:.0f} s between them" if seconds["starts"] > 1 else ""
    return f"goodput {seconds['step'] / whole:.1%} of {whole:.1f} s in {seconds['starts']:.0f} start(s){away}: {parts}"
