"""The two sides of a source that comes in one piece: "SPEC#train" and "SPEC#val", or "SPEC#train:5" and "SPEC#val:5" for
5% held out instead of 10%.

Where a sample falls follows from its key alone: no order, machine, packing or new sample moves another one, and rows about one image
(equal keys) stay together. What 5% holds out, 10% holds out too; both sides of a run must say the same share.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from vlm_jax.data.record import RecordSource
from vlm_jax.errors import nearest

SIDES = ("train", "val")
HELD_OUT = 10.0     # percent


def parse_split(spec: str) -> tuple[str, str, float]:
    """"SPEC#val:10" -> ("SPEC", "val", 10.0); ("SPEC", "", 0.0) without a side. Raises ValueError on another word after "#"."""
    name, mark, tail = spec.rpartition("#")
    match = re.fullmatch(r"(\w+)(?::([^:/]*))?", tail) if mark else None
    if not match:
        return spec, "", 0.0
    side, percent = match.group(1), match.group(2)
    if side not in SIDES and os.path.exists(os.path.expanduser(spec.partition(":")[2])):      # a "#" of the path itself
        return spec, "", 0.0
    if side not in SIDES:
        raise ValueError(f"{spec!r}: {side!r} is not a side of a split{nearest(side, SIDES)}")
    try:
        held_out = HELD_OUT if percent is None else float(percent)
    except ValueError:
        held_out = 0.0
    if not 0 < held_out < 100:
        raise ValueError(f"{spec!r}: {percent!r} is not a share to hold out, in percent between 0 and 100; nearest: '{name}#{side}:{HELD_OUT:g}'")
    return name, side, held_out


def check_sides(train: Iterable[str], held_out: Iterable[str]) -> None:
    """Raises ValueError where one of the specs ``held_out`` has samples that one of ``train`` trains on, both being sides of one source."""
    shares = {name: share for name, side, share in map(parse_split, train) if side == "train"}
    for name, side, share in map(parse_split, held_out):
        if side == "val" and share > shares.get(name, share):
            raise ValueError(f"{name}#val:{share:g} has samples of {name}#train:{shares[name]:g}, which holds out less; nearest: "
                             f"'{name}#val:{shares[name]:g}'")


def place_of(key: str) -> float:
    """Where a key stands among all, in percent [0, 100): it is held out where that is below the share."""
    return int.from_bytes(hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=6).digest(), "big") / 2**48 * 100


class Split:
    """One side of a source: its samples by the numbers of their rows (8 bytes each), in its order.

    Raises ValueError where the side is empty, naming the smallest share that would do.
    """

    def __init__(self, source: RecordSource, side: str, held_out: float = HELD_OUT):
        share = "" if held_out == HELD_OUT else f":{held_out:g}"
        self.source, self.side, self.held_out, self.name = source, side, held_out, f"{source.name}#{side}{share}"
        places = np.fromiter(map(place_of, source.keys()), np.float64, len(source))
        self.rows = np.flatnonzero((places < held_out) == (side == "val"))
        if not len(self.rows):
            shares = [p for p in (1, 2, 5, 10, 15, 20, 25, 30, 40, 50, 60, 75, 90) if 0 < np.sum(places < p) < len(places)]
            near = min(shares, key=lambda p: abs(p - held_out), default=None)
            hint = (f"write #train:{near} and #val:{near}, which hold out {np.sum(places < near):,}" if near else
                    "they are too few, or of one image, to be split")
            raise ValueError(f"{self.name} is empty: with {held_out:g}% held out, all {len(source):,} samples fall on the other side; {hint}")

    def __len__(self) -> int:
        return len(self.rows)

    def _row(self, i: int) -> int:
        if not -len(self) <= i < len(self):
            raise IndexError(f"{self.name} has {len(self)} samples, not number {i}")
        return int(self.rows[i])

    def __getitem__(self, i: int) -> dict[str, Any]:
        return self.source[self._row(i)]

    def key(self, i: int) -> str:
        return self.source.key(self._row(i))

    def keys(self) -> Iterator[str]:
        return (self.key(i) for i in range(len(self)))

    def read_text(self, i: int) -> list[str]:
        return self.source.read_text(self._row(i))

    def read_answers(self, i: int) -> list[str]:
        return self.source.read_answers(self._row(i))

    @property
    def classes(self) -> list[str] | None:
        return self.source.classes

    @property
    def counts(self):
        """What opening the whole source left out, by reason; ``first`` as in ``RecordSource``."""
        return self.source.counts

    @property
    def first(self) -> dict[str, str]:
        return self.source.first
