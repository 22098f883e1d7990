"""From a stored record to a raw sample: which fields are caption, label and image, and what is wrong with them."""

from __future__ import annotations

import collections
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from vlm_jax.data.bad import BadSample

IMAGE_KINDS = ("jpg", "jpeg", "png", "webp", "gif", "bmp")      # extensions of the formats that are decoded, in lower case
IMAGE_NAMES = ("image", "img", "jpg", "png", "webp", "file_name", "filename", "filepath", "image_path", "path", "images")
CAPTION_NAMES = ("text", "caption", "captions", "sentence", "sentences", "question")
ANSWER_NAMES = ("answer", "answers")
LABEL_NAMES = ("label", "gold_label")
KIND_NAMES = ("kind", "answer_type", "question_type")      # of a question
TEMPLATE = "a photo of a {}"      # the caption of what has a class alone
_TEMPLATE_KIND = "{}"


class Field(NamedTuple):
    """Where a value stands in a record: member ``kind`` ("txt", "json"), ``path`` inside its JSON ("a/b"). A template
    has the kind "{}", and its text as path."""
    kind: str
    path: str

    def __str__(self) -> str:
        if self.kind == _TEMPLATE_KIND:
            return self.path
        return f"{self.kind}:{self.path}" if self.path else self.kind


def parse_field(text: str) -> Field:
    """"txt" or "json:FIELD" ("json:a/b" for a nested one). Raises ValueError on anything else."""
    kind, _, path = text.strip().partition(":")
    if not re.fullmatch(r"[\w.-]+", kind) or (kind.endswith("json") and not path) or (path and not kind.endswith("json")):
        raise ValueError(f"{text!r} is not a field; write the extension of a text member (\"txt\") or \"json:FIELD\"")
    return Field(kind.lower(), path)


def _parse_caption(text: str) -> Field:
    if "{" not in text:
        return parse_field(text)
    if text.count("{}") != 1 or text.count("{") != 1:
        raise ValueError(f"caption template {text!r} has not exactly one {{}}, for the name of the class; nearest: {TEMPLATE!r}")
    return Field(_TEMPLATE_KIND, text.strip())


def parse_captions(text: str) -> tuple[tuple[Field, float], ...]:
    """"txt", a template for the name of the class ("a photo of a {}"), or several, with weights, "txt@1;json:title@2"
    -> ((field, weight), ...)."""
    out = []
    for part in filter(None, (p.strip() for p in text.split(";"))):
        name, at, weight = part.rpartition("@")
        try:
            value = float(weight) if at else 1.0
        except ValueError:
            value = 0.0
        if not value > 0:
            raise ValueError(f"caption={text!r}: the weight in {part!r} is not a positive number")
        out.append((_parse_caption(name if at else part), value))
    if not out:
        raise ValueError(f"caption={text!r} names no field; write \"txt\", \"json:FIELD\" or \"txt@1;json:title@2\"")
    return tuple(out)


def parse_answer(text: str) -> tuple[Field, float]:
    """"json:answer" or "json:answer@0.5" -> (field, weight of an answer that stands alone). Raises ValueError on anything else."""
    found = parse_captions(text)
    if len(found) > 1 or found[0][0].kind == _TEMPLATE_KIND:
        raise ValueError(f"answer={text!r} is not one field; nearest: 'json:answer' or 'json:answer@0.5'")
    return found[0]


def listed(value: Any) -> Any:
    """A list that a table's cell holds as text, '["a", "b"]', as a list; anything else as it is."""
    if isinstance(value, str) and value[:1] == "[" and value[-1:] == "]":
        try:
            return json.loads(value)
        except ValueError:
            pass
    return value


def and_more(count: int) -> str:
    """The tail of a message that names the first of ``count``."""
    return f", and {count - 1:,} more" if count > 1 else ""


def usual(names: Iterable[str], columns: Iterable[str]) -> str | None:
    """The first of ``names`` that is a column, upper case or lower; None where there is none."""
    found = {column.lower(): column for column in columns}
    return next((found[name] for name in names if name in found), None)


def field_value(record: dict[str, Any], field: Field) -> Any:
    """The value of a field, or None. Text is decoded strictly; raises BadSample on bad UTF-8 or JSON."""
    value = record.get(field.kind)
    if isinstance(value, bytes):
        try:
            value = value.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise BadSample("caption_not_utf8" if not field.path else "json_not_utf8", str(error)) from None
        if field.path:
            try:
                value = record[field.kind] = json.loads(value)  # kept parsed for the next field of it
            except ValueError as error:
                raise BadSample("bad_json", str(error)) from None
    for name in filter(None, field.path.split("/")):
        if isinstance(value, Mapping):
            value = value.get(name)
        elif isinstance(value, Sequence) and not isinstance(value, str):  # a list of records: the field of each
            value = [v[name] for v in value if isinstance(v, Mapping) and name in v]
        else:
            return None
    return value


def _texts(value: Any) -> list[str]:
    """The captions in a field that holds one or a list; empty ones are left out, white space is made single spaces."""
    texts = []
    for text in value if isinstance(value, (list, tuple, np.ndarray)) else [value]:
        try:
            text = text.decode("utf-8") if isinstance(text, bytes) else text
            if isinstance(text, str) and text.strip():
                text.encode("utf-8")  # JSON may hold half a surrogate pair
                texts.append(" ".join(text.split()))
        except UnicodeError as error:
            raise BadSample("caption_not_utf8", str(error)) from None
    return texts


class RecordSource:
    """A source whose samples are stored records; subclasses say how many there are and read one.

    Raw sample: {"key": str, "image": bytes or uint8 [h,w,3] or None, "text": list of captions,
    "text_weight": list of their drawing weights, "label": int (with ``label``), "json": dict (where a field
    came from one)}. Where a record has several images, "images" lists them all, and "image" is the first; "frames" are those of a video. Where it
    has answers (with ``answer``): "all_answers" as they were given, "answers" each once, "answer_weights" its share of all, the likeliest
    first; "kind" and "question_id" of the question where the record says them.
    Reading a sample that cannot be used raises BadSample.
    """

    def __init__(self, name: str, caption: str, label: str | None = None, classes: Sequence[str] | None = None, answer: str | None = None):
        self.name = name
        self.captions = parse_captions(caption)
        self.label = parse_field(label) if label else None
        if self.label is None and any(field.kind == _TEMPLATE_KIND for field, _ in self.captions):
            raise ValueError(f"caption={caption!r} is filled with the name of the class, but {name} has no label; give label=json:FIELD")
        self.answer = parse_answer(answer) if answer else None
        self.counts: collections.Counter[str] = collections.Counter()  # left out when the source was opened, by reason
        self.first: dict[str, str] = {}      # of a reason in counts: what was left out first, where that is known
        self._classes = list(classes) if classes is not None else None

    def __len__(self) -> int:
        raise NotImplementedError

    def key(self, i: int) -> str:
        """The sample's name; names its image too (equal keys, equal images)."""
        raise NotImplementedError

    def keys(self) -> Iterator[str]:
        """The keys of all samples, in order."""
        return (self.key(i) for i in range(len(self)))

    def record(self, i: int, kinds: tuple[str, ...] | None = None) -> dict[str, Any]:
        """{"image": ..., member kind: bytes or parsed value}; only ``kinds`` where given."""
        raise NotImplementedError

    def _check(self, i: int) -> int:
        if not -len(self) <= i < len(self):
            raise IndexError(f"{self.name} has {len(self)} samples, not number {i}")
        return int(i) % len(self)

    def __getitem__(self, i: int) -> dict[str, Any]:
        i = self._check(i)
        record = self.record(i)
        texts, weights = self._read_captions(record)
        sample = {"key": self.key(i), "image": record.get("image"), "text": texts, "text_weight": weights}
        sample |= {key: record[key] for key in ("images", "frames") if key in record}
        if self.label:
            sample["label"] = self._label_id(field_value(record, self.label))
        if self.answer:
            sample |= self._read_answers(record)
        if isinstance(record.get("json"), Mapping):
            sample["json"] = record["json"]
        return sample

    def read_text(self, i: int) -> list[str]:
        """The captions of a sample, without reading its image."""
        return self._read_captions(self.record(self._check(i), self._caption_kinds()))[0]

    def read_answers(self, i: int) -> list[str]:
        """The answers of a sample as they were given, without reading its image; [] where there are none."""
        if not self.answer:
            return []
        return self._read_answers(self.record(self._check(i), (self.answer[0].kind,))).get("all_answers", [])

    @property
    def classes(self) -> list[str] | None:
        """Class names, by label id: as given, or the sorted distinct strings of the label field
        (read once from every sample); None where labels are numbers or there are none."""
        if self._classes is None and self.label and len(self):
            first = (self._raw_label(i) for i in range(min(64, len(self))))
            if isinstance(next((v for v in first if v is not None), None), str):
                values = {self._raw_label(i) for i in range(len(self))}
                self._classes = sorted(v for v in values if isinstance(v, str))
        return self._classes

    def _caption_kinds(self) -> tuple[str, ...]:
        """The members that captions are read from; a template's is that of the label."""
        return tuple(self.label.kind if field.kind == _TEMPLATE_KIND else field.kind for field, _ in self.captions)

    def fields(self) -> list[Field]:
        """The fields that are read from a record."""
        return ([field for field, _ in self.captions if field.kind != _TEMPLATE_KIND] + ([self.label] if self.label else [])
                + ([self.answer[0]] if self.answer else []))

    def _raw_label(self, i: int) -> Any:
        try:
            return field_value(self.record(i, (self.label.kind,)), self.label)
        except BadSample:
            return None

    def _label_id(self, value: Any) -> int:
        """A number is an id; a word is looked up among the classes, true and false too, which else are 1 and 0."""
        truth = isinstance(value, (bool, np.bool_))
        if truth or (isinstance(value, str) and not value.strip().lstrip("-").isdigit()):
            names, word = (self._classes if truth else self.classes) or [], str(value)
            if word in names:
                return names.index(word)
            lower = [name.lower() for name in names]
            if lower.count(word.lower()) == 1:
                return lower.index(word.lower())
            if word.lower() in ("true", "false"):
                return int(word.lower() == "true")
            raise BadSample("unknown_label", f"{self.label}={value!r}")
        if value is None:
            raise BadSample("missing_label", str(self.label))
        return int(value)

    def _fill(self, template: str, record: dict[str, Any]) -> str | None:
        """A template with the name of the record's class in it."""
        value = field_value(record, self.label)
        if value is None:
            return None
        label, names = self._label_id(value), self.classes
        if not names or not 0 <= label < len(names):
            raise BadSample("unknown_label", f"{self.label}={value!r} has no name among the {len(names or ())} classes")
        return template.replace("{}", names[label].replace("_", " "))

    def _read_captions(self, record: dict[str, Any]) -> tuple[list[str], list[float]]:
        texts, weights, present = [], [], False
        for field, weight in self.captions:
            value = self._fill(field.path, record) if field.kind == _TEMPLATE_KIND else field_value(record, field)
            present |= value is not None
            found = _texts(value)
            texts += found
            weights += [weight / len(found) for _ in found]
        if not texts:
            fields = "; ".join(str(field) for field, _ in self.captions)
            raise BadSample("empty_caption" if present else "missing_caption", fields)
        return texts, weights

    def _read_answers(self, record: dict[str, Any]) -> dict[str, Any]:
        """What a sample says of its answers; {} where the field is absent or empty."""
        field, alone = self.answer
        value = listed(field_value(record, field))
        several = isinstance(value, (list, tuple, np.ndarray))
        value = [v.get("answer") if isinstance(v, Mapping) else v for v in (value if several else [value])]
        given = _texts([str(v) if isinstance(v, (int, float)) and not isinstance(v, bool) else v for v in value])
        if not given:
            return {}
        counts = collections.Counter(given).most_common()      # the first of equal counts first
        found: dict[str, Any] = {"all_answers": given, "answers": [text for text, _ in counts],
                                 "answer_weights": [count / len(given) for _, count in counts] if several else [alone]}
        row = record.get(field.kind)
        if isinstance(row, Mapping):
            kind = usual(KIND_NAMES, row)
            found |= {"kind": str(row[kind])} if kind and row[kind] is not None else {}
            found |= {"question_id": row["question_id"]} if "question_id" in row else {}
        return found
