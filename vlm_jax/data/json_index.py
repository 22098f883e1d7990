"""Where the values of large JSON files stand, so that a value is read alone and the file is never held in memory.

    found = scan("questions.json", {"questions": take})      # take(key, value) -> keep it?
    found["questions"][5]                                    # the sixth value that was kept, parsed

A file is read once, in windows of 4 MiB. A place costs 12 bytes in memory.
"""

from __future__ import annotations

import array
import json
import mmap
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from vlm_jax.data.bad import BadSample
from vlm_jax.errors import nearest

Take = Callable[[Any, Any], bool]      # (key in an object, or number in a list; value) -> whether it is kept

WINDOW = 1 << 22
LARGEST = 1 << 27      # bytes of one value
_SPACE = re.compile(r"[ \t\r\n]*")
_BEHIND = frozenset(" \t\r\n,:]}")
_BETWEEN = re.compile(r"[ \t\r\n,]*")


class Slices:
    """Values of a JSON file by number. Threads may share it; processes may fork or pickle it.

    start: int64 [n], offsets; size: int32 [n], bytes; keyed: they stand in an object, and each place begins with its key.
    """

    def __init__(self, path: str, start: np.ndarray, size: np.ndarray, keyed: bool = False):
        self.path, self.start, self.size, self.keyed = path, start, size, keyed

    def __len__(self) -> int:
        return len(self.start)

    def __getstate__(self):
        return {name: value for name, value in self.__dict__.items() if name != "_map"}

    @property
    def nbytes(self) -> int:
        """Of the places in memory."""
        return self.start.nbytes + self.size.nbytes

    def __getitem__(self, i: int) -> Any:
        return self.item(i)[1]

    def item(self, i: int) -> tuple[Any, Any]:
        """(key, value); the key is None in a list. Raises BadSample where the file is no longer what was scanned."""
        content = self.__dict__.get("_map")
        if content is None:
            with open(self.path, "rb") as file:
                content = self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        start = int(self.start[i])
        raw = content[start:start + int(self.size[i])]
        try:
            if not self.keyed:
                return None, json.loads(raw)
            return next(iter(json.loads(b"{" + raw + b"}").items()))
        except ValueError as error:
            raise BadSample("bad_json", f"{self.path} at byte {start}: {error}") from None

    def select(self, rows: Sequence[int] | np.ndarray) -> Slices:
        return Slices(self.path, self.start[rows], self.size[rows], self.keyed)


class _Window:
    """A file's text from ``base`` on, a character a byte: JSON's own signs are never part of another character of UTF-8."""

    def __init__(self, path: str, file: Any):
        self.path, self.file, self.total = path, file, os.fstat(file.fileno()).st_size
        self.base, self.text, self.decode = 0, "", json.JSONDecoder().raw_decode

    def fill(self, at: int, size: int) -> None:
        self.file.seek(at)
        self.base, self.text = at, self.file.read(size).decode("latin-1")

    @property
    def whole(self) -> bool:
        """Nothing of the file comes behind the window."""
        return self.base + len(self.text) >= self.total

    def skip(self, at: int, pattern: re.Pattern = _SPACE) -> int:
        """The place behind ``pattern``; the window holds it unless the file ends there."""
        while True:
            if self.base <= at < self.base + len(self.text):
                at = self.base + pattern.match(self.text, at - self.base).end()
                if at < self.base + len(self.text):
                    return at
            if at >= self.total:
                return at
            self.fill(at, WINDOW)

    def colon(self, at: int) -> int:
        """The place behind a key's colon."""
        at = self.skip(at)
        if self.look(at) != ":":
            raise ValueError(f"{self.path} cannot be read as JSON from byte {at} of {self.total} on")
        return self.skip(at + 1)

    def look(self, at: int) -> str:
        return self.text[at - self.base:at - self.base + 1]

    def value(self, at: int) -> tuple[Any, int]:
        """(the value at a place, the place behind it). Raises ValueError where there is none."""
        while True:
            try:
                value, end = self.decode(self.text, at - self.base)
                if self.whole or self.text[end:end + 1] in _BEHIND:      # a number may go on behind the window
                    return value, self.base + end
            except (ValueError, RecursionError):
                if self.whole or len(self.text) >= LARGEST:
                    raise ValueError(f"{self.path} cannot be read as JSON from byte {at} of {self.total} on") from None
            self.fill(at, WINDOW if at > self.base else 2 * max(WINDOW, len(self.text)))


def scan(path: str, wanted: Mapping[str, Take]) -> dict[str, Slices]:
    """The places of the values that ``wanted`` keeps. Its names are the lists and objects that hold them: "questions", "data/dialogs", "" for the
    whole file, which may also be one value a line. Strings that ``take`` is given have a character a byte.

    Raises ValueError where the file breaks off or holds no such list or object, naming its keys.
    """
    found: dict[str, tuple[array.array, array.array, bool]] = {}
    seen: list[str] = []
    with open(path, "rb") as file:
        window = _Window(path, file)
        start = window.skip(3 if file.read(3) == b"\xef\xbb\xbf" else 0)
        first = window.look(start)
        if not first:
            raise ValueError(f"{path} is empty")
        if "" in wanted and path.endswith(".jsonl"):
            _values(window, start, wanted[""], found.setdefault("", (array.array("q"), array.array("i"), False)), "")
        elif first in "[{":
            _walk(window, start, "", wanted, found, seen)
        missing = [name for name in wanted if name not in found]
        if missing:
            raise ValueError(f"{path} holds no {missing[0]!r}{nearest(missing[0], seen) if seen else ''}")
    return {name: Slices(path, np.frombuffer(start, np.int64), np.frombuffer(size, np.int32), keyed) for name, (start, size, keyed) in found.items()}


def _walk(window: _Window, at: int, path: str, wanted: Mapping[str, Take], found: dict, seen: list[str]) -> int:
    """Goes through the list or object at a place; returns the place behind it."""
    keyed = window.look(at) == "{"
    if path in wanted:
        places = found.setdefault(path, (array.array("q"), array.array("i"), keyed))
        return _values(window, at + 1, wanted[path], places, "}" if keyed else "]")
    if not keyed:
        return _values(window, at + 1, lambda key, value: False, (array.array("q"), array.array("i"), False), "]")
    at = window.skip(at + 1, _BETWEEN)
    while window.look(at) != "}":
        key, at = window.value(at)
        at, inner = window.colon(at), f"{path}/{key}" if path else str(key)
        seen.append(inner)
        at = _walk(window, at, inner, wanted, found, seen) if window.look(at) in ("[", "{") else window.value(at)[1]
        at = window.skip(at, _BETWEEN)
    return at + 1


def _values(window: _Window, at: int, take: Take, places: tuple[array.array, array.array, bool], end: str) -> int:
    """Goes through the values of a list or object from behind its bracket on; returns the place behind it. ``end`` "" is the end of the file."""
    starts, sizes, keyed = places
    at, number = window.skip(at, _BETWEEN), 0
    while window.look(at) != end:
        start = at
        if keyed:
            key, at = window.value(at)
            at = window.colon(at)
        else:
            key, number = number, number + 1
        value, at = window.value(at)
        if take(key, value):
            starts.append(start)
            sizes.append(at - start)
        at = window.skip(at, _BETWEEN)
    return at + 1
