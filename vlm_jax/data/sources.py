"""Opening a dataset by its name. A source is a sequence of raw samples (see ``record.RecordSource``)."""

from __future__ import annotations

import csv
import hashlib
import inspect
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vlm_jax.data.bad import BadSample
from vlm_jax.data.fingerprint import digest, fingerprint
from vlm_jax.data.record import RecordSource
from vlm_jax.data.tars import TarSource
from vlm_jax.errors import nearest

SCHEMES = ("scenes", "tars", "tfds", "jsonl", "csv")


class TableSource(RecordSource):
    """Rows that name an image file relative to their own file. Key = that path, so rows about one image share it."""

    def __init__(self, scheme: str, path: str, image: str, caption: str, label, classes):
        super().__init__(f"{scheme}:{path}", caption, label, classes)
        if not os.path.isfile(path):
            folder = os.path.dirname(path) or "."
            beside = sorted(os.listdir(folder))[:20] if os.path.isdir(folder) else []
            raise FileNotFoundError(f"no file {path}{nearest(os.path.basename(path), beside) if beside else ''}")
        self.path, self.image = path, image

    def row(self, i: int) -> Mapping[str, Any]:
        raise NotImplementedError

    def fingerprint(self) -> str:
        """Of the table's bytes; the images that it names are not read."""
        with open(self.path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def key(self, i: int) -> str:
        return str(self.row(i).get(self.image, f"row {i}"))

    def record(self, i: int, kinds: tuple[str, ...] | None = None) -> dict[str, Any]:
        row = self.row(i)
        record: dict[str, Any] = {"json": row}
        if kinds is None:
            name = row.get(self.image)
            if not name:
                raise BadSample("missing_image", f"no field {self.image!r}")
            try:
                with open(os.path.join(os.path.dirname(self.path), name), "rb") as file:
                    record["image"] = file.read()
            except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
                raise BadSample("missing_image", str(name)) from None
        return record


class JsonlSource(TableSource):
    """One JSON object a line: ``image`` (path) and the caption field ("text" unless said otherwise).

    Only the lines' offsets are kept in memory (8 bytes each).
    """

    def __init__(self, path: str, image: str = "image", caption: str = "json:text", label: str | None = None,
                 classes: Sequence[str] | None = None):
        super().__init__("jsonl", path, image, caption, label, classes)
        starts, at = [], 0
        with open(path, "rb") as file:
            for line in file:
                if line.strip():
                    starts.append(at)
                at += len(line)
        self._start = np.array([*starts, at], np.int64)

    def __len__(self) -> int:
        return len(self._start) - 1

    def row(self, i: int) -> Mapping[str, Any]:
        start, end = int(self._start[i]), int(self._start[i + 1])
        with open(self.path, "rb") as file:
            file.seek(start)
            line = file.read(end - start)
        try:
            row = json.loads(line)
        except ValueError as error:
            raise BadSample("bad_json", f"row {i}: {error}") from None
        if not isinstance(row, Mapping):
            raise BadSample("bad_json", f"row {i} is no object")
        return row

    def key(self, i: int) -> str:
        try:
            return super().key(i)
        except BadSample:
            return f"row {i}"


class CsvSource(TableSource):
    """A table with a header line (tab-separated where the name ends in .tsv), held in memory.

    The caption and label fields are columns, written like those of JSON ("json:COLUMN").
    """

    def __init__(self, path: str, image: str = "image", caption: str = "json:text", label: str | None = None,
                 classes: Sequence[str] | None = None):
        super().__init__("csv", path, image, caption, label, classes)
        with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            reader = csv.DictReader(file, delimiter="\t" if path.endswith(".tsv") else ",")
            columns = reader.fieldnames or []
            self._rows = list(reader)
        for name in [image, *(field.path for field in self._fields())]:
            if name not in columns:
                raise ValueError(f"{self.name} has no column {name!r}{nearest(name, columns)}")

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, i: int) -> Mapping[str, Any]:
        return self._rows[i]


class TfdsSource(RecordSource):
    """A TensorFlow Datasets builder read through ``tfds.data_source`` (random access, no TensorFlow).

    Images stay encoded. Captions: the field ``caption`` of the example ("json:captions/text" for nested ones), or,
    for a classification set, its class name. The dataset must have been prepared in a random-access
    format (array_record).
    """

    def __init__(self, name: str, image: str = "image", caption: str | None = None, label: str | None = None,
                 classes: Sequence[str] | None = None, data_dir: str | None = None):
        try:
            import tensorflow_datasets as tfds
        except ImportError:
            raise ImportError(f"tfds:{name} needs tensorflow_datasets (pip install tensorflow-datasets)") from None
        builder_name, _, split = name.partition(":")
        builder = tfds.builder(builder_name, data_dir=data_dir)
        features = builder.info.features
        if image not in features:
            raise ValueError(f"tfds:{builder_name} has no feature {image!r}{nearest(image, features)}")
        if label is None and "label" in features:
            label = "json:label"
        if caption is None:
            known = [f for f in ("caption", "text", "captions") if f in features]
            caption = f"json:{known[0]}" if known else "json:class_name"
            if known and "text" in (getattr(features[known[0]], "feature", None) or {}):
                caption += "/text"
        field = label.partition(":")[2] if label else ""
        feature = features[field] if field in features else None
        if classes is None and getattr(feature, "names", None):
            classes = feature.names
        super().__init__(f"tfds:{name}", caption, label, classes)
        self.image, self._release = image, f"{builder.info.full_name}:{split or 'train'}"
        self._rows = builder.as_data_source(split=split or "train",
                                            decoders={image: tfds.decode.SkipDecoding()})

    def __len__(self) -> int:
        return len(self._rows)

    def fingerprint(self) -> str:
        """Of the data set's name, configuration, version and split."""
        return digest(self._release, len(self))

    def key(self, i: int) -> str:
        return f"{self.name}/{i}"

    def record(self, i: int, kinds: tuple[str, ...] | None = None) -> dict[str, Any]:
        row = dict(self._rows[i])
        image = row.pop(self.image)
        if self._classes and self.label and "class_name" not in row:
            row["class_name"] = self._classes[int(row[self.label.path])].replace("_", " ")
        return {"json": row, "image": image if isinstance(image, (bytes, np.ndarray)) else bytes(image)}


class Mixture:
    """Several sources read side by side; by number, their concatenation.

    ``weights`` are the streams' shares of training positions (``order.MixtureOrder``); None means one
    epoch over all samples, each source by its size.
    """

    def __init__(self, parts: Sequence[Any], weights: Sequence[float] | None):
        self.parts, self.weights = list(parts), None if weights is None else [float(w) for w in weights]
        self.name = "; ".join(name_of(p) for p in self.parts)
        self._start = np.cumsum([0] + [len(p) for p in self.parts])

    def __len__(self) -> int:
        return int(self._start[-1])

    def fingerprint(self) -> str:
        return digest([fingerprint(part) for part in self.parts], self.weights)

    def place(self, i: int) -> tuple[Any, int]:
        """(source, number in it) of sample ``i``."""
        if not -len(self) <= i < len(self):
            raise IndexError(f"{self.name} has {len(self)} samples, not number {i}")
        i = int(i) % len(self)
        part = int(np.searchsorted(self._start, i, "right")) - 1
        return self.parts[part], i - int(self._start[part])

    def __getitem__(self, i: int) -> dict[str, Any]:
        source, inner = self.place(i)
        return source[inner]

    def key(self, i: int) -> str:
        source, inner = self.place(i)
        return key_of(source, inner)

    def read_text(self, i: int) -> list[str]:
        source, inner = self.place(i)
        return read_text(source, inner)


def name_of(source: Any) -> str:
    """What a source is called in messages and in the quarantine file."""
    return getattr(source, "name", type(source).__name__.lower())


def key_of(source: Any, i: int) -> str:
    """The key of a sample even where the sample cannot be read."""
    return source.key(i) if hasattr(source, "key") else f"{i}"


def read_text(source: Any, i: int) -> list[str]:
    """A sample's captions, without its image where the source can."""
    return source.read_text(i) if hasattr(source, "read_text") else source[i]["text"]


def _weighted(spec: str) -> tuple[str, float | None]:
    name, at, weight = spec.rpartition("@")
    try:
        return (name, float(weight)) if at else (spec, None)
    except ValueError:  # an "@" of the path itself
        return spec, None


def open_source(spec: Any, **options: Any) -> Any:
    """Opens a dataset.

    ``spec``: "scenes:SPLIT", "tars:PATHS" ({0000..0003}, {a,b}, globs, fsspec addresses),
    "tfds:NAME[/CONFIG][:SPLIT]", "jsonl:PATH", "csv:PATH", or a mixture: a tuple or list of these (or
    of open sources), or one string joined by ";", each with an optional "@WEIGHT" (all or none).
    ``options`` (all but scenes): ``caption`` "txt" | "json:FIELD" | weighted "txt@1;json:title@2";
    ``label`` "json:FIELD"; ``classes`` (names by label id); jsonl, csv, tfds: ``image`` (field of the image);
    tfds: ``data_dir``. Options that are None are left to the source.

    Raises ValueError for an unknown scheme or option (naming the nearest), FileNotFoundError for a missing file.
    """
    options = {k: v for k, v in options.items() if v is not None}
    if isinstance(spec, (tuple, list)) or (isinstance(spec, str) and ";" in spec):
        items = [s.strip() for s in spec.split(";") if s.strip()] if isinstance(spec, str) else list(spec)
        pairs = [_weighted(item) if isinstance(item, str) else (item, None) for item in items]
        weights = [w for _, w in pairs if w is not None]
        if not pairs or (weights and len(weights) != len(pairs)) or any(w <= 0 for w in weights):
            raise ValueError(f"mixture {spec!r}: give every part a positive @WEIGHT, or none")
        return Mixture([open_source(s, **options) for s, _ in pairs], weights or None)
    if not isinstance(spec, str):
        return spec
    scheme, colon, rest = spec.partition(":")
    if scheme not in SCHEMES or not colon:
        raise ValueError(f"data source {spec!r}: {scheme!r} is not a scheme{nearest(scheme, SCHEMES)}")
    if scheme == "scenes":
        from vlm_jax.data.scenes import open_scenes
        return open_scenes(rest)
    kind = {"tars": TarSource, "tfds": TfdsSource, "jsonl": JsonlSource, "csv": CsvSource}[scheme]
    valid = list(inspect.signature(kind).parameters)[1:]
    for name in options:
        if name not in valid:
            raise ValueError(f"{scheme}: sources have no option {name!r}{nearest(name, valid)}")
    return kind(rest, **options)
