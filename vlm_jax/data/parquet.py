"""Parquet tables of images, as Hugging Face data sets are stored: rows by number, without loading a file.

A row is read with its whole row group, since that is what Parquet compresses together. Decoded groups are kept, the last used
ones up to ``CACHE_BYTES``, and shared by the threads. Reading in order, or in shuffled blocks of neighbours (``data.block`` near the rows of a
group, ``data.window`` a few), decodes each group about once; a full shuffle decodes a group for every row: pack such data
into tars first (``python -m vlm_jax.data.pack``).
"""

from __future__ import annotations

import collections
import concurrent.futures
import json
import os
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from vlm_jax.data.bad import BadSample
from vlm_jax.data.record import CAPTION_NAMES, IMAGE_NAMES, TEMPLATE, RecordSource, and_more, parse_field, usual
from vlm_jax.data.tars import filesystem, find_files, is_remote
from vlm_jax.errors import nearest

CACHE_BYTES = 2**30


class ParquetSource(RecordSource):
    """Rows of Parquet files with an image column: Hugging Face's struct of bytes and path, encoded bytes, or paths beside the file.

    What is not said is told by the table: ``image`` by the schema (Hugging Face's "Image"), or the usual names; captions by the usual names (text,
    caption, captions, sentence, sentences, question), or, where there are classes alone, "a photo of a {}"; ``label`` and ``classes`` by
    Hugging Face's "ClassLabel", or a column "label". A list of texts is several captions. Fields are written like those of JSON ("json:COLUMN").

    Key = the path where the column holds paths, else "FILE/ROW" (with as many folders as tell the files apart).
    Raises FileNotFoundError, ValueError for a file that is not Parquet and for a missing column, naming the nearest.
    """

    def __init__(self, pattern: str, image: str | None = None, caption: str | None = None, label: str | None = None,
                 classes: Sequence[str] | None = None, threads: int = 8, answer: str | None = None):
        name = f"parquet:{pattern}"
        self.paths = find_files(pattern, "parquet")
        with concurrent.futures.ThreadPoolExecutor(max(1, threads)) as pool:
            footers = list(pool.map(_footer, self.paths))
        schema = footers[0][0]
        features = _features(schema)
        self.image = (_image_column(schema, features) or "") if image is None else image
        if image is None and not self.image:
            raise ValueError(f"{name}: no column holds images (looked for {', '.join(IMAGE_NAMES)}, and columns of bytes); "
                             f"its columns are {', '.join(schema.names)}")
        if label is None:
            known = [c for c, feature in features.items() if feature.get("_type") == "ClassLabel" and c in schema.names]
            known = known or [c for c in (usual(["label"], schema.names),) if c and _is_label(schema.field(c).type)]
            label = f"json:{known[0]}" if known else None
        column = _top(label)
        if classes is None and column:
            classes = features.get(column, {}).get("names")
        if caption is None:
            caption = _default_caption(schema, name, label, classes)
        super().__init__(name, caption, label, classes, answer)
        self._text = list(dict.fromkeys(field.path.split("/")[0] for field in self.fields()))
        for path, (other, _) in zip(self.paths, footers):
            for column in filter(None, (self.image, *self._text)):
                if column not in other.names:
                    lacking = sum(column not in names.names for names, _ in footers)
                    raise ValueError(f"{path} has no column {column!r}{and_more(lacking)}{nearest(column, other.names)}")
        kind = schema.field(self.image).type if self.image else None
        if kind is not None and not _holds_image(kind):
            raise ValueError(f"{name}: the column {self.image!r} is {kind}, which holds no images; give a column of bytes, of paths, or of "
                             f"both{nearest(self.image, [c for c in schema.names if _holds_image(schema.field(c).type)])}")
        self._by_path = kind is not None and _is_text(kind)
        self._others = [c for c in schema.names if c != self.image and (c in self._text or not _has_bytes(schema.field(c).type))]
        groups = [(file, group, rows) for file, (_, counts) in enumerate(footers) for group, rows in enumerate(counts)]
        self._file, self._group = (np.array([g[k] for g in groups], np.int32) for k in (0, 1))
        self._start = np.cumsum([0] + [rows for _, _, rows in groups])
        self._first_of_file = np.cumsum([0] + [sum(counts) for _, counts in footers])
        if not len(self):
            raise ValueError(f"{name} has no rows")
        self._stems = _told_apart([p.removesuffix(".parquet") for p in self.paths])
        self._reset()

    def _reset(self):
        self._tables = _Kept(self._read_group, CACHE_BYTES)

    def __getstate__(self):
        return {k: v for k, v in self.__dict__.items() if k != "_tables"}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._reset()

    def __len__(self) -> int:
        return int(self._start[-1])

    def key(self, i: int) -> str:
        if self._by_path:
            table, row = self._table(i, (self.image,))
            return str(table.column(self.image)[row].as_py() or f"row {i}")
        file = int(self._file[np.searchsorted(self._start, i, "right") - 1])
        return f"{self._stems[file]}/{i - int(self._first_of_file[file])}"

    def record(self, i: int, kinds: tuple[str, ...] | None = None) -> dict[str, Any]:
        if kinds is not None:
            table, row = self._table(i, tuple(self._text))
            return {"json": table.slice(row, 1).to_pylist()[0]}
        if not self.image:
            raise BadSample("missing_image", "no column of images was named")
        table, row = self._table(i, (self.image, *self._others))
        record = {"json": table.select(self._others).slice(row, 1).to_pylist()[0]}
        value = table.column(self.image)[row].as_py()
        path = value if isinstance(value, str) else None
        if isinstance(value, dict):
            path, value = value.get("path"), value.get("bytes")
        record["image"] = value if isinstance(value, bytes) else self._beside(i, path)
        return record

    def _beside(self, i: int, path: str | None) -> bytes:
        """The image file that a row names, relative to its Parquet file."""
        parquet = self.paths[int(self._file[np.searchsorted(self._start, i, "right") - 1])]
        if not path or is_remote(parquet):
            raise BadSample("missing_image", f"no bytes{f' and no file {path}' if path else ''} in {self.image!r}")
        try:
            with open(os.path.join(os.path.dirname(parquet), path), "rb") as file:
                return file.read()
        except OSError:
            raise BadSample("missing_image", path) from None

    # ---- row groups

    def _table(self, i: int, columns: tuple[str, ...]) -> tuple[Any, int]:
        """(the decoded columns of a sample's row group, its row in them)."""
        group = int(np.searchsorted(self._start, i, "right")) - 1
        try:
            return self._tables((group, columns)), i - int(self._start[group])
        except (OSError, ValueError) as error:      # Arrow's errors are of these two
            raise BadSample("broken_row_group", f"{self.paths[int(self._file[group])]}: {error}") from None

    def _read_group(self, wanted: tuple[int, tuple[str, ...]]):
        group, columns = wanted
        with _open(self.paths[int(self._file[group])]) as file:      # opened anew: a handle is not for several threads
            return file.read_row_group(int(self._group[group]), columns=list(columns), use_threads=False)


class _Kept:
    """A function of one argument whose last results are kept, up to ``limit`` bytes and at least one. Threads may share it; what several ask for
    is made once."""

    def __init__(self, make: Callable[[Any], Any], limit: int):
        self.make, self.limit = make, limit
        self.lock = threading.Lock()
        self.held: collections.OrderedDict[Any, concurrent.futures.Future] = collections.OrderedDict()

    def __call__(self, argument: Any) -> Any:
        with self.lock:
            future = self.held.get(argument)
            mine = future is None
            if mine:
                future = self.held[argument] = concurrent.futures.Future()
            self.held.move_to_end(argument)
        if not mine:
            return future.result()
        try:
            result = self.make(argument)
        except BaseException as error:
            with self.lock:
                del self.held[argument]
            future.set_exception(error)
            raise
        future.set_result(result)
        with self.lock:
            sizes = {key: f.result().nbytes for key, f in self.held.items() if f.done() and not f.exception()}
            total = sum(sizes.values())
            for key, size in sizes.items():      # the longest unused first
                if total <= self.limit or key == argument:
                    break
                total -= size
                del self.held[key]
        return result


# ---- files and columns

def _open(path: str):
    import pyarrow.parquet
    if is_remote(path):
        fs, inner = filesystem(path)
        return pyarrow.parquet.ParquetFile(fs.open(inner, "rb"))
    return pyarrow.parquet.ParquetFile(path, memory_map=True)


def _footer(path: str) -> tuple[Any, list[int]]:
    """(schema, rows of each row group)."""
    try:
        with _open(path) as file:
            return file.schema_arrow, [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)]
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not a Parquet file that can be read ({error})") from None


def _features(schema: Any) -> dict[str, dict]:
    """What Hugging Face's ``datasets`` wrote about the columns; empty without it."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {name: feature for name, feature in features.items() if isinstance(feature, dict)}
    except (KeyError, TypeError, ValueError, AttributeError):
        return {}


def _image_column(schema: Any, features: dict[str, dict]) -> str | None:
    marked = [c for c, feature in features.items() if feature.get("_type") == "Image" and c in schema.names]
    held = [c for c in schema.names if _holds_image(schema.field(c).type)]
    bytes_alone = [c for c in held if not _is_text(schema.field(c).type)]
    return next(iter(marked), None) or usual(IMAGE_NAMES, bytes_alone) or next(iter(bytes_alone), None) or usual(IMAGE_NAMES, held)


def _default_caption(schema: Any, name: str, label: str | None, classes: Sequence[str] | None) -> str:
    column = usual(CAPTION_NAMES, schema.names)
    if column:
        kind = schema.field(column).type
        while hasattr(kind, "value_type"):
            kind = kind.value_type
        inner = usual((*CAPTION_NAMES, "raw"), [field.name for field in kind]) if kind.num_fields else None
        return f"json:{column}/{inner}" if inner else f"json:{column}"
    if label and (classes or _is_text(schema.field(_top(label)).type)):
        return TEMPLATE
    raise ValueError(f"{name}: no column holds captions (looked for {', '.join(CAPTION_NAMES)}, and for named classes); give caption=json:COLUMN; "
                     f"its columns are {', '.join(schema.names)}")


def _top(field: str | None) -> str:
    """The column that a field "json:a/b" stands in."""
    return parse_field(field).path.split("/")[0] if field else ""


def _is_text(kind: Any) -> bool:
    return str(kind) in ("string", "large_string", "string_view") or str(kind).startswith("dictionary<values=string")


def _is_bytes(kind: Any) -> bool:
    return str(kind) in ("binary", "large_binary", "binary_view")


def _is_label(kind: Any) -> bool:
    return _is_text(kind) or str(kind).lstrip("u").startswith("int")


def _holds_image(kind: Any) -> bool:
    if kind.num_fields and not hasattr(kind, "value_type"):
        return any(field.name == "bytes" and _is_bytes(field.type) for field in kind)
    return _is_bytes(kind) or _is_text(kind)


def _has_bytes(kind: Any) -> bool:
    return _is_bytes(kind) or any(_has_bytes(kind.field(i).type) for i in range(kind.num_fields))


def _told_apart(paths: list[str]) -> list[str]:
    """The last parts of the paths, as few as make them different."""
    parts = [path.split("/") for path in paths]
    for count in range(1, max(map(len, parts))):
        tails = ["/".join(p[-count:]) for p in parts]
        if len(set(tails)) == len(set(paths)):
            return tails
    return paths
