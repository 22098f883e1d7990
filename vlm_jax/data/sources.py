"""Opening a dataset by its name. A source is a sequence of raw samples (see ``record.RecordSource``)."""

from __future__ import annotations

import array
import csv
import hashlib
import inspect
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO

import numpy as np

from vlm_jax.data.bad import BadSample
from vlm_jax.data.fingerprint import digest, fingerprint
from vlm_jax.data.folder import FolderSource
from vlm_jax.data.frames import Frames
from vlm_jax.data.json_index import scan
from vlm_jax.data.parquet import ParquetSource
from vlm_jax.data.published import PublishedSource
from vlm_jax.data.record import (
    ANSWER_NAMES,
    CAPTION_NAMES,
    IMAGE_KINDS,
    IMAGE_NAMES,
    LABEL_NAMES,
    RecordSource,
    and_more,
    listed,
    usual,
)
from vlm_jax.data.split import Split, check_sides, parse_split
from vlm_jax.data.tars import TarSource
from vlm_jax.errors import nearest

SCHEMES = ("scenes", "folder", "tars", "parquet", "jsonl", "csv", "tfds", "published")
SHARES: Mapping[str, Callable[[int], float]] = {"sqrt": math.sqrt, "proportional": float, "uniform": lambda samples: 1.0}     # of a mixture's sources


class TableSource(RecordSource):
    """Rows that name an image file, or a list of them, or a folder of a video's frames, relative to their own file. Key = that path, so rows about one image
    share it; paths of several are joined by "+". A name without an extension may be that of a .jpg.

    The fields of the image, the caption and the answers are those of the usual names (``record.IMAGE_NAMES``, ``CAPTION_NAMES``,
    ``ANSWER_NAMES``) where they are not said, and so is that of the label where the classes are. Subclasses read the rows.
    """

    def __init__(self, scheme: str, path: str, image: str | None, caption: str | None, label: str | None, classes: Sequence[str] | None,
                 answer: str | None):
        self.path = os.path.expanduser(path)
        if not os.path.isfile(self.path):
            folder = os.path.dirname(self.path) or "."
            beside = sorted(os.listdir(folder))[:20] if os.path.isdir(folder) else []
            raise FileNotFoundError(f"no file {path}{nearest(os.path.basename(path), beside) if beside else ''}")
        columns = self._open()
        self.image = usual(IMAGE_NAMES, columns) or IMAGE_NAMES[0] if image is None else image
        known = {"label": usual(LABEL_NAMES, columns) if classes else None, "answer": usual(ANSWER_NAMES, columns)}
        label, answer = (said or (f"json:{known[name]}" if known[name] else None) for name, said in (("label", label), ("answer", answer)))
        super().__init__(f"{scheme}:{path}", caption or f"json:{usual(CAPTION_NAMES, columns) or CAPTION_NAMES[0]}", label, classes, answer)
        for name in [self.image, *(field.path.split("/")[0] for field in self.fields())]:
            if columns and name and name not in columns:
                raise ValueError(f"{self.name} has no column {name!r}{nearest(name, columns)}")

    def _open(self) -> list[str]:
        """Makes rows readable; returns the names of their fields."""
        raise NotImplementedError

    def row(self, i: int) -> Mapping[str, Any]:
        raise NotImplementedError

    def fingerprint(self) -> str:
        """Of the table's bytes; the images that it names are not read."""
        with open(self.path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def key(self, i: int) -> str:
        return self._key_of(self.row(i), i)

    def _key_of(self, row: Mapping[str, Any], i: int) -> str:
        names = listed(row.get(self.image, f"row {i}"))
        return "+".join(map(str, names)) if isinstance(names, list) else str(names)

    def record(self, i: int, kinds: tuple[str, ...] | None = None) -> dict[str, Any]:
        row = self.row(i)
        record: dict[str, Any] = {"json": row}
        if kinds is None:
            names = listed(row.get(self.image))
            if not names:
                raise BadSample("missing_image", f"no field {self.image!r}")
            if isinstance(names, list):
                record["images"] = [self._image(str(name)) for name in names]
                record["image"] = record["images"][0]
            elif os.path.isdir(folder := os.path.join(os.path.dirname(self.path), str(names))):
                record["frames"] = Frames(folder)
            else:
                record["image"] = self._image(str(names))
        return record

    def _image(self, name: str) -> bytes:
        plain = os.path.splitext(name)[1][1:].lower() not in IMAGE_KINDS
        for path in (name, f"{name}.jpg") if plain else (name,):
            try:
                with open(os.path.join(os.path.dirname(self.path), path), "rb") as file:
                    return file.read()
            except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
                continue
        raise BadSample("missing_image", name)


class JsonlSource(TableSource):
    """One JSON object a line, or one list of objects, with the path of the image and the caption. Which fields there are is told by the first 64.

    Only their offsets are kept in memory (8 bytes a line, 20 an object of a list).
    """

    def __init__(self, path: str, image: str | None = None, caption: str | None = None, label: str | None = None,
                 classes: Sequence[str] | None = None, answer: str | None = None):
        super().__init__("jsonl", path, image, caption, label, classes, answer)

    def _open(self) -> list[str]:
        with open(self.path, "rb") as file:
            head = file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()
            file.seek(0)
            if head[:1] == b"[":
                places = scan(self.path, {"": lambda number, value: True})[""]
                self._start, self._end = places.start, places.start + places.size
            else:
                starts, at = array.array("q"), 0
                for line in file:
                    if line.strip():
                        starts.append(at)
                    at += len(line)
                starts.append(at)
                places = np.frombuffer(starts, np.int64)
                self._start, self._end = places[:-1], places[1:]
        columns: dict[str, None] = {}
        for i in range(min(64, len(self))):
            try:
                columns |= dict.fromkeys(self.row(i))
            except BadSample:      # told of when it is read
                continue
        return list(columns)

    def __len__(self) -> int:
        return len(self._start)

    def row(self, i: int) -> Mapping[str, Any]:
        with open(self.path, "rb") as file:
            return self._row(file, i)

    def _row(self, file: BinaryIO, i: int) -> Mapping[str, Any]:
        file.seek(self._start[i])
        try:
            row = json.loads(file.read(self._end[i] - self._start[i]))
        except ValueError as error:
            raise BadSample("bad_json", f"row {i}: {error}") from None
        if not isinstance(row, Mapping):
            raise BadSample("bad_json", f"row {i} is no object")
        return row

    def _key(self, file: BinaryIO, i: int) -> str:
        try:
            return self._key_of(self._row(file, i), i)
        except BadSample:
            return f"row {i}"

    def key(self, i: int) -> str:
        with open(self.path, "rb") as file:
            return self._key(file, i)

    def keys(self) -> Iterator[str]:
        with open(self.path, "rb") as file:
            for i in range(len(self)):
                yield self._key(file, i)


class CsvSource(TableSource):
    """A table with a header line (tab-separated where the name ends in .tsv), held in memory.

    The caption, label and answer fields are columns, written like those of JSON ("json:COLUMN"); a list is written as in JSON.
    """

    def __init__(self, path: str, image: str | None = None, caption: str | None = None, label: str | None = None,
                 classes: Sequence[str] | None = None, answer: str | None = None):
        super().__init__("csv", path, image, caption, label, classes, answer)

    def _open(self) -> list[str]:
        with open(self.path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            reader = csv.DictReader(file, delimiter="\t" if self.path.endswith(".tsv") else ",")
            self._rows = list(reader)
            return list(reader.fieldnames or [])

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
                 classes: Sequence[str] | None = None, data_dir: str | None = None, answer: str | None = None):
        try:
            import tensorflow_datasets as tfds
        except ImportError:
            raise ImportError(f"tfds:{name} needs tensorflow_datasets (pip install tensorflow-datasets)") from None
        builder_name, _, split = name.partition(":")
        builder = tfds.builder(builder_name, data_dir=data_dir)
        features = builder.info.features
        if image and image not in features:
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
        super().__init__(f"tfds:{name}", caption, label, classes, answer)
        self.image, self._release = image, f"{builder.info.full_name}:{split or 'train'}"
        self._rows = builder.as_data_source(split=split or "train",
                                            decoders={image: tfds.decode.SkipDecoding()} if image else None)

    def __len__(self) -> int:
        return len(self._rows)

    def fingerprint(self) -> str:
        """Of the data set's name, configuration, version and split."""
        return digest(self._release, len(self))

    def key(self, i: int) -> str:
        return f"{self.name}/{i}"

    def record(self, i: int, kinds: tuple[str, ...] | None = None) -> dict[str, Any]:
        row = dict(self._rows[i])
        image = row.pop(self.image, None)
        if self._classes and self.label and "class_name" not in row:
            row["class_name"] = self._classes[int(row[self.label.path])].replace("_", " ")
        return {"json": row, "image": image if image is None or isinstance(image, (bytes, np.ndarray)) else bytes(image)}


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

    def read_answers(self, i: int) -> list[str]:
        source, inner = self.place(i)
        return read_answers(source, inner)


def name_of(source: Any) -> str:
    """What a source is called in messages and in the quarantine file."""
    return getattr(source, "name", type(source).__name__.lower())


def key_of(source: Any, i: int) -> str:
    """The key of a sample even where the sample cannot be read."""
    return source.key(i) if hasattr(source, "key") else f"{i}"


def read_text(source: Any, i: int) -> list[str]:
    """A sample's captions, without its image where the source can."""
    return source.read_text(i) if hasattr(source, "read_text") else source[i]["text"]


def read_answers(source: Any, i: int) -> list[str]:
    """A sample's answers as they were given, without its image where the source can; [] where there are none."""
    return source.read_answers(i) if hasattr(source, "read_answers") else source[i].get("all_answers", [])


def left_out(source: Any) -> str:
    """What a source left out when it was opened: the first of each reason by name, and how many more; "" for nothing."""
    if isinstance(source, Mixture):
        return "; ".join(filter(None, map(left_out, source.parts)))
    first = getattr(source, "first", {})
    return "; ".join(first[reason] + and_more(count) if reason in first else f"{reason} {count:,}"
                     for reason, count in getattr(source, "counts", {}).items())


def _weighted(spec: str) -> tuple[str, float | None]:
    name, at, weight = spec.rpartition("@")
    try:
        return (name, float(weight)) if at else (spec, None)
    except ValueError:  # an "@" of the path itself
        return spec, None


def _parts(spec: Any) -> list[tuple[Any, float | None]]:
    """The parts of a mixture, or the one source, each with its weight."""
    if isinstance(spec, str) and ";" not in spec:
        return [(spec, None)]
    items = [s.strip() for s in spec.split(";") if s.strip()] if isinstance(spec, str) else list(spec)
    return [_weighted(item) if isinstance(item, str) else (item, None) for item in items]


def check_splits(train: Any, held_out: Any) -> None:
    """Raises ValueError where a spec evaluates, as the other side of a split, on what another trains on (their shares differ)."""
    check_sides(*([part for part, _ in _parts(spec or ()) if isinstance(part, str)] for spec in (train, held_out)))


def open_source(spec: Any, mixture: str = "", **options: Any) -> Any:
    """Opens a dataset.

    ``spec``: "folder:DIR" (texts beside images, or class folders), "tars:PATHS" and "parquet:PATHS" ({0000..0003}, {a,b}, globs, fsspec
    addresses), "jsonl:PATH", "csv:PATH", "tfds:NAME[/CONFIG][:SPLIT]", "scenes:SPLIT[/TASK][:canonical]", with ":1000" the first so many,
    "published:SET:SPLIT:DIR" (a data set of ``published.SETS`` in its authors' files).
    "SPEC#train" and "SPEC#val" are the two sides of one that has no splits of its own (``split``; "#train:5" and "#val:5" hold out 5% instead of
    10%). A mixture is a tuple or list of these (or of open sources), or one string joined by ";", each with an optional "@WEIGHT" (all or none).
    ``mixture``: a rule for the shares instead, of ``SHARES``: "sqrt" (the root of the number of samples: arXiv 2305.06500), "proportional"
    to it, or "uniform"; "@FACTOR" multiplies what the rule gives a source.
    ``options`` (all but scenes): ``caption`` "txt" | "json:FIELD" | weighted "txt@1;json:title@2" | a template for the name of the class,
    "a photo of a {}"; ``label`` "json:FIELD"; ``classes`` (names by label id); ``answer`` "json:FIELD", with "@0.5" the weight of one that
    stands alone; jsonl, csv, parquet, tfds: ``image`` (field of the image, "" where none is to be looked for);
    tfds: ``data_dir``. Options that are None are left to the source.

    Raises ValueError for an unknown scheme or option (naming the nearest), FileNotFoundError for a missing file.
    """
    options = {k: v for k, v in options.items() if v is not None}
    if isinstance(spec, (tuple, list)) or (isinstance(spec, str) and ";" in spec):
        pairs = _parts(spec)
        weights = [w for _, w in pairs if w is not None]
        if not pairs or (weights and len(weights) != len(pairs) and not mixture) or any(w <= 0 for w in weights):
            raise ValueError(f"mixture {spec!r}: give every part a positive @WEIGHT, or none")
        if mixture and mixture not in SHARES:
            raise ValueError(f"mixture={mixture!r} is no rule of shares{nearest(mixture, SHARES)}")
        parts = [open_source(s, **options) for s, _ in pairs]
        if mixture:
            weights = [SHARES[mixture](len(part)) * (1.0 if factor is None else factor) for part, (_, factor) in zip(parts, pairs)]
        return Mixture(parts, weights or None)
    if mixture:
        raise ValueError(f"mixture={mixture!r} is a rule for several sources, {name_of(spec) if not isinstance(spec, str) else spec!r} is one; nearest: ''")
    if not isinstance(spec, str):
        return spec
    spec, side, held_out = parse_split(spec)
    scheme, colon, rest = spec.partition(":")
    if scheme not in SCHEMES or not colon:
        if os.path.isdir(spec):
            raise ValueError(f"data source {spec!r} is a folder; nearest: 'folder:{spec}'")
        raise ValueError(f"data source {spec!r}: {scheme!r} is not a scheme{nearest(scheme, SCHEMES)}")
    if scheme == "scenes":
        from vlm_jax.data.scenes import open_scenes
        if side:
            raise ValueError(f"{spec}#{side}: scenes have splits of their own; nearest: 'scenes:{side}'")
        split, _, wording = rest.partition(":")
        if wording.isdigit():
            return open_scenes(split, count=int(wording))
        if wording not in ("", "canonical"):
            raise ValueError(f"{spec}: wording {wording!r} is not known; nearest: 'scenes:{split}:canonical'")
        return open_scenes(split, canonical_share=1.0 if wording else 0.5)
    kind = {"folder": FolderSource, "tars": TarSource, "parquet": ParquetSource, "jsonl": JsonlSource, "csv": CsvSource,
            "tfds": TfdsSource, "published": PublishedSource}[scheme]
    valid = list(inspect.signature(kind).parameters)[1:]
    if options.get("image") == "" and "image" not in valid:
        options = {k: v for k, v in options.items() if k != "image"}
    for name in options:
        if name not in valid:
            raise ValueError(f"{scheme}: sources have no option {name!r}{nearest(name, valid)}")
    source = kind(rest, **options)
    return Split(source, side, held_out) if side else source
