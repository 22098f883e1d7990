"""Samples of a published data set."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from typing import Any

from vlm_jax.data.bad import BadSample
from vlm_jax.data.fingerprint import digest
from vlm_jax.data.frames import Frames
from vlm_jax.data.published.files import Folder, read_image
from vlm_jax.data.published.table import SETS
from vlm_jax.data.record import RecordSource
from vlm_jax.errors import nearest

_OTHERWISE = (KeyError, TypeError, IndexError, AttributeError, UnicodeError)      # what fields that are missing or of another type raise


class PublishedSource(RecordSource):
    """"SET:SPLIT:DIR", one split of a data set of ``table.SETS`` whose files lie in DIR.

    Samples are those of ``RecordSource`` with ``task`` and ``slots`` for the templates (data/templates.py), and ``prompt`` (a question), ``choices``
    with ``label``, ``turns`` or ``frames`` where the data set has them (data/batch.py says what they mean); ``text`` are the replies: captions, or
    answers by the shares of those who gave them; [] in test splits without answers. ``caption`` names another field to be the text, with neither
    prompt nor task: "json:question" for systems that read questions there. Key = the name of the image, or of the video's folder. Memory: 12 bytes
    a row, 28 a question in VQA's two files.

    Raises ValueError for an unknown set or split, or a file that cannot be read, FileNotFoundError where a file or the images are missing; all name
    what is there instead.
    """

    def __init__(self, path: str, caption: str | None = None, classes: Sequence[str] | None = None, answer: str | None = None):
        name, _, rest = path.partition(":")
        split, _, folder = rest.partition(":")
        if name not in SETS:
            raise ValueError(f"published:{path}: {name!r} is no published set{nearest(name, SETS)}")
        entry = SETS[name]
        if split not in entry.splits:
            raise ValueError(f"published:{path}: {entry.title} has no split {split!r}{nearest(split, entry.splits)}")
        if not folder:
            raise ValueError(f"published:{path} names no folder; write published:{name}:{split}:DIR")
        self.entry, self.set, self.split = entry, name, split
        self._own_text = caption is None
        super().__init__(f"published:{path}", caption or "json:text", None, classes, answer or "json:answers")
        place = Folder(entry.title, folder, entry.within)
        try:
            self._reader = entry.reader(entry, split, place)
            self._reader.refuse_empty()
            self._root = place.image_root(entry.images[split], len(self), self._reader.images)
        except _OTHERWISE as error:
            files = ", ".join(names.replace("|", " or ") for names in entry.splits[split])
            raise ValueError(f"published:{path}: {files} is not as {entry.title} is published: {type(error).__name__} {error}") from error
        self.counts, self.first = self._reader.counts, self._reader.first
        if entry.labels:      # their numbers are the files' own
            self._classes = [words[0] for words in entry.labels]

    def __len__(self) -> int:
        return len(self._reader)

    def key(self, i: int) -> str:
        try:
            return self._reader.image(i)
        except (BadSample, *_OTHERWISE):      # told of when it is read
            return f"row {i}"

    def fingerprint(self) -> str:
        """Of the tables' bytes; of a folder of problems, their names. Images are not read."""
        found = []
        for path in self._reader.files:
            if os.path.isdir(path):
                found.append(sorted(os.listdir(path)))
                continue
            with open(path, "rb") as file:
                found.append(hashlib.file_digest(file, "sha256").hexdigest())
        return digest(self.set, self.split, found)

    def record(self, i: int, kinds: tuple[str, ...] | None = None) -> dict[str, Any]:
        try:
            return {"json": dict(self._reader.row(i)), **(self._pictures(i) if kinds is None else {})}
        except (ValueError, *_OTHERWISE) as error:
            raise BadSample("bad_record", f"row {i} of {self._reader.files[0]}: {type(error).__name__} {error}") from None

    def _pictures(self, i: int) -> dict[str, Any]:
        names = self._reader.images(i)
        name = next((name for name in names if os.path.exists(os.path.join(self._root, name))), names[0])
        if not self.entry.video:
            return {"image": read_image(self._root, name)}
        return {"image": None, "frames": Frames(os.path.join(self._root, name))}

    def _read_captions(self, record: dict[str, Any]) -> tuple[list[str], list[float]]:
        row = record["json"]
        if self._own_text and "answers" in row:
            found = self._read_answers(record)
            return found.get("answers", []), found.get("answer_weights", [])
        if self._own_text and "text" not in row:
            return [], []
        return super()._read_captions(record)

    def __getitem__(self, i: int) -> dict[str, Any]:
        i = self._check(i)
        record = self.record(i)
        row = record["json"]
        texts, weights = self._read_captions(record)
        sample = {"key": self.key(i), "text": texts, "text_weight": weights, **self._read_answers(record),
                  **{name: value for name, value in record.items() if name != "json"},
                  **{name: row[name] for name in ("choices", "label", "turns", "kind", "question_id") if row.get(name) is not None}, "json": row}
        if not self._own_text:
            return sample
        told = {"prompt": row.get("question"), "task": row.get("task", self.entry.task), "slots": row.get("slots")}
        return sample | {name: value for name, value in told.items() if value}
