"""Random access into WebDataset tars: an index built once per tar, then reads by offset.

A sample is the members KEY.EXT that share a KEY (the path up to the first dot of its last part),
adjacent or not. ``python -m vlm_jax.data.tars 'GLOB' --processes=N`` builds the indices ahead of
time; opening the source builds those that are missing. An index is a small file beside its tar, or
in ``$VLM_JAX_CACHE`` (default ~/.cache/vlm_jax) where the folder cannot be written or is remote. It
is rebuilt when the tar's size or time of change differs.

Index file: magic, header length, JSON header (stamp of the tar, what was left out by reason, the
distinct sets of member extensions with their counts, columns), then the columns, 64-byte aligned:
``set`` uint16 [n] (which extensions the sample has, sorted), ``first`` int64 [n+1] (its first row
in the member columns), ``offset`` and ``size`` int64 [members], ``key_end`` int64 [n] and ``keys``
uint8 (UTF-8).

A tar that ``vlm_jax.data.pack`` wrote ends in a member ``__pack__`` (JSON): the keys that its samples had in their
source, which stand for the names of the members, whether they have labels, and the names of the classes.
"""

from __future__ import annotations

import bisect
import collections
import concurrent.futures
import glob
import hashlib
import itertools
import json
import mmap
import os
import re
import struct
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from vlm_jax.data.bad import BadSample
from vlm_jax.data.fingerprint import digest, spread
from vlm_jax.data.record import IMAGE_KINDS, Field, RecordSource, field_value
from vlm_jax.errors import ConfigError, nearest

PACK = "__pack__"
OPEN_FILES = 256
_MAGIC = b"VLMTAR01"
_BLOCK = 512
_ADLER = 65521
_META = (b"L", b"K", b"x", b"g")  # long name, long link, pax records of the next member, of all
_REFUSED = {b"1": "link", b"2": "link", b"3": "device", b"4": "device", b"6": "device"}


# ---- names -------------------------------------------------------------------------------------

def expand_braces(pattern: str) -> list[str]:
    """"a-{00..02}.tar" -> a-00.tar a-01.tar a-02.tar; "{a,b}.tar" -> a.tar b.tar; several groups multiply."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if not match:
        return [pattern]
    span = re.fullmatch(r"(\d+)\.\.(\d+)", match.group(1))
    if span:
        low, high = span.groups()
        if int(low) > int(high):
            raise ValueError(f"{match.group(0)} in {pattern!r} counts down")
        middle = [str(i).zfill(len(low)) for i in range(int(low), int(high) + 1)]
    else:
        middle = match.group(1).split(",")
    return [out for m in middle for out in expand_braces(pattern[:match.start()] + m + pattern[match.end():])]


def is_remote(path: str) -> bool:
    return "://" in path


def filesystem(path: str):
    """fsspec's file system of an address, and the path in it. Raises ConfigError where its protocol needs a package that is absent."""
    import fsspec
    try:
        return fsspec.core.url_to_fs(path)
    except ImportError as error:
        raise ConfigError(f"{path!r}: {error}; the common ones come with pip install -e \".[bucket]\"") from error


def find_files(pattern: str, kind: str = "tar") -> list[str]:
    """Paths of a pattern with braces and * ? [] in the order written, each glob sorted. ``kind`` is their extension.

    Raises FileNotFoundError naming what is missing and the nearest file beside it.
    """
    paths = []
    for name in expand_braces(pattern):
        if re.search(r"[*?\[]", name):
            if is_remote(name):
                fs, inner = filesystem(name)
                found = sorted(fs.unstrip_protocol(p) for p in fs.glob(inner))
            else:
                found = sorted(glob.glob(os.path.expanduser(name), recursive=True))
            found = [p for p in found if not p.endswith((".idx", ".tmp"))]  # our own, beside the tars
            if not found:
                raise FileNotFoundError(f"no file matches {name}")
            paths += found
        else:
            name = name if is_remote(name) else os.path.expanduser(name)
            if not is_remote(name) and not os.path.isfile(name):
                folder = os.path.dirname(name) or "."
                beside = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
                hint = nearest(os.path.basename(name), beside[:20]) if beside else f" (no folder {folder})"
                if os.path.isdir(name):
                    raise FileNotFoundError(f"{name} is a folder; nearest: {os.path.join(name, '*.' + kind)!r}")
                raise FileNotFoundError(f"no {kind} {name}{hint}")
            paths.append(name)
    return paths


# ---- scanning a tar ----------------------------------------------------------------------------

def _number(field: bytes) -> int:
    """A tar number: octal text, or base-256 where the first bit is set. Raises ValueError."""
    if field[0] & 0x80:
        return int.from_bytes(field, "big") & ((1 << (8 * len(field) - 1)) - 1)
    text = field.split(b"\0")[0].strip()
    return int(text, 8) if text else 0


def _pax(data: bytes) -> dict[str, str]:
    """The records "LENGTH KEY=VALUE\\n" of an extended header; what follows a broken one is left."""
    out, at = {}, 0
    while match := re.compile(rb"(\d+) ([^=]*)=").match(data, at):
        end = at + int(match.group(1))
        if end <= match.end():
            break
        out[match.group(2).decode("utf-8", "replace")] = data[match.end():end - 1].decode("utf-8", "surrogateescape")
        at = end
    return out


def scan_members(read: Callable[[int, int], bytes], total: int,
                 counts: collections.Counter) -> Iterator[tuple[str, int, int]]:
    """Yields (name, offset, size) of the whole regular files of a tar (ustar, GNU and pax names).

    ``read(offset, size)`` gives bytes of the tar, ``total`` is its size. What is refused or broken is
    counted: "link", "device", "unsafe_name", "name_not_utf8", "other_type", "truncated", "no_end_mark",
    "corrupt_header".
    """
    at, long_name, extended = 0, None, {}
    while at + _BLOCK <= total:
        head = read(at, _BLOCK)
        if len(head) < _BLOCK or not head.strip(b"\0"):
            return
        kind, data = head[156:157], at + _BLOCK
        try:
            if _checksum(head) != _number(head[148:156]) % _ADLER:
                raise ValueError("checksum")
            size = _number(head[124:136])
            if kind not in _META:
                size = int(extended.get("size", size))
        except ValueError:
            counts["corrupt_header"] += 1
            return
        if kind in b"123456":  # links, devices, folders and pipes carry no data
            size = 0
        if data + size > total:
            counts["truncated"] += 1
            return
        at = data + -(-size // _BLOCK) * _BLOCK
        if kind in _META:
            if kind == b"L":
                long_name = read(data, size).split(b"\0")[0].decode("utf-8", "surrogateescape")
            elif kind == b"x":
                extended = _pax(read(data, size))
            continue
        name = extended.get("path") or long_name
        if name is None:
            raw = head[:100].split(b"\0")[0]
            prefix = head[345:500].split(b"\0")[0] if head[257:263] == b"ustar\0" else b""
            name = (prefix + b"/" + raw if prefix else raw).decode("utf-8", "surrogateescape")
        long_name, extended = None, {}
        if kind == b"5":
            continue
        if kind not in (b"0", b"\0", b"7"):
            counts[_REFUSED.get(kind, "other_type")] += 1
        elif name.startswith("/") or ".." in name.split("/"):
            counts["unsafe_name"] += 1
        elif any("\ud800" <= c <= "\udfff" for c in name):
            counts["name_not_utf8"] += 1
        else:
            yield name, data, size
    counts["truncated" if at < total else "no_end_mark"] += 1


def _checksum(head: bytes) -> int:
    """The sum of a header's bytes, its own field counted as spaces, modulo 65521: Adler-32's lower half is
    that sum plus one, and many times faster than a loop."""
    return (zlib.adler32(head[:148] + b"        " + head[156:]) % 2**16 - 1) % _ADLER


def join_members(members: Iterator[tuple[str, int, int]],
                 counts: collections.Counter) -> dict[str, dict[str, tuple[int, int]]]:
    """{key: {extension: (offset, size)}} in order of first appearance.

    A second member of the same key and extension is counted as "duplicate" and the first one kept;
    names without an extension, and hidden files, are counted as "no_extension".
    """
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    for name, offset, size in members:
        folder, slash, base = name.removeprefix("./").rpartition("/")
        stem, dot, kind = base.partition(".")
        if not stem or not kind:
            counts["no_extension"] += 1
            continue
        kinds = samples.setdefault(folder + slash + stem, {})
        if kind.lower() in kinds:
            counts["duplicate"] += 1
        else:
            kinds[kind.lower()] = (offset, size)
    return samples


# ---- the index ---------------------------------------------------------------------------------

def stamp_of(path: str) -> list:
    """What tells one state of a tar from another: [size, time of change]."""
    if is_remote(path):
        fs, inner = filesystem(path)
        info = fs.info(inner)
        changed = next((str(info[k]) for k in ("ETag", "etag", "mtime", "LastModified", "last_modified", "updated")
                        if info.get(k)), "")
        return [int(info["size"]), changed]
    stat = os.stat(path)
    return [stat.st_size, str(stat.st_mtime_ns)]


def index_places(path: str) -> list[str]:
    """Where the index of a tar may lie, best first: beside it unless its folder is remote or marked read-only.

    The folder's permission bits count, not what this user could do: root can write anywhere, and should not.
    """
    root = os.environ.get("VLM_JAX_CACHE") or os.path.join(os.path.expanduser("~"), ".cache", "vlm_jax")
    full = path if is_remote(path) else os.path.abspath(path)
    digest = hashlib.blake2s(full.encode(), digest_size=12).hexdigest()
    cached = os.path.join(root, "index", f"{os.path.basename(path)}.{digest}.idx")
    if is_remote(path) or not os.stat(os.path.dirname(full)).st_mode & 0o222:
        return [cached]
    return [path + ".idx", cached]


def build_index(path: str, stamp: list) -> bytes:
    """Scans a tar and returns the index file's content."""
    counts: collections.Counter[str] = collections.Counter()
    if is_remote(path):
        fs, inner = filesystem(path)
        with fs.open(inner, "rb") as file:
            def read(offset, size):
                file.seek(offset)
                return file.read(size)
            samples, pack = _scan(path, read, stamp[0], counts)
    else:
        with open(path, "rb", buffering=0) as file:
            samples, pack = _scan(path, lambda offset, size: read_at(file, size, offset), stamp[0], counts)

    sets: dict[tuple[str, ...], int] = {}
    set_of, first, offset, size = [], [0], [], []
    for kinds in samples.values():
        names = tuple(sorted(kinds))
        set_of.append(sets.setdefault(names, len(sets)))
        offset += [kinds[k][0] for k in names]
        size += [kinds[k][1] for k in names]
        first.append(len(offset))
    if len(sets) > 2**16:
        raise ValueError(f"{path} has {len(sets)} different sets of member extensions; keys must end at the first dot")
    keys = [key.encode() for key in (pack.pop("keys") if pack else samples)]
    columns = {"set": np.array(set_of, np.uint16), "first": np.array(first, np.int64),
               "offset": np.array(offset, np.int64), "size": np.array(size, np.int64),
               "key_end": np.cumsum([len(k) for k in keys], dtype=np.int64),
               "keys": np.frombuffer(b"".join(keys), np.uint8)}
    per_set = np.bincount(columns["set"], minlength=len(sets)).tolist()
    header = {"stamp": stamp, "counts": dict(counts), "samples": len(samples), "pack": pack,
              "sets": [[list(names), count] for names, count in zip(sets, per_set)],
              "columns": [[name, str(c.dtype), len(c)] for name, c in columns.items()]}
    text = json.dumps(header).encode()
    out = bytearray(_MAGIC + struct.pack("<Q", len(text)) + text)
    for column in columns.values():
        out += b"\0" * (-len(out) % 64) + column.tobytes()
    return bytes(out)


def _scan(path: str, read, total: int, counts: collections.Counter) -> tuple[dict, dict | None]:
    """(samples as of ``join_members``, what the member ``__pack__`` says or None)."""
    if read(0, 2) == b"\x1f\x8b":
        raise ValueError(f"{path} is compressed; samples are read by offset, so unpack it first (gunzip)")
    told: list[bytes] = []

    def members():
        for name, offset, size in scan_members(read, total, counts):
            if name == PACK:
                told.append(read(offset, size))
            else:
                yield name, offset, size

    samples = join_members(members(), counts)
    return samples, _pack(told[-1], len(samples)) if told else None


def _pack(content: bytes, samples: int) -> dict | None:
    """The content of ``__pack__``; None where it is not that of this tar."""
    try:
        pack = json.loads(content)
        keys = pack["keys"]
        if len(keys) == samples and "\n".join(keys).encode() is not None:      # text that UTF-8 can write
            return {"label": bool(pack["label"]), "classes": pack["classes"], "keys": keys, "rows": pack["rows"],
                    "left_out": pack["left_out"]}
    except (ValueError, KeyError, TypeError):
        pass
    return None


if hasattr(os, "pread"):
    def read_at(file, size: int, offset: int) -> bytes:
        """``size`` bytes of an open file from ``offset`` on; safe in many threads."""
        return os.pread(file.fileno(), size, offset)
else:       # Windows
    _seeking = threading.Lock()

    def read_at(file, size: int, offset: int) -> bytes:
        with _seeking:
            file.seek(offset)
            return file.read(size)


class TarIndex:
    """An index file, memory-mapped. Attributes: ``samples`` (number), ``counts``, ``sets`` (extensions,
    number of samples), ``pack`` (of ``__pack__`` all but the keys, or None), and the columns as read-only arrays."""

    def __init__(self, path: str):
        self.path = path
        with open(path, "rb") as file:
            start = file.read(16)
            if len(start) < 16 or start[:8] != _MAGIC:
                raise ValueError(f"{path} is not an index of this version")
            length = struct.unpack("<Q", start[8:])[0]
            header = json.loads(file.read(min(length, 2**30)))
            file_size = os.fstat(file.fileno()).st_size
        self.stamp, self.counts, self.samples = header["stamp"], header["counts"], header["samples"]
        self.pack = header.get("pack")
        self.sets = [(tuple(names), count) for names, count in header["sets"]]
        self._columns, at = {}, 16 + length
        for name, dtype, count in header["columns"]:
            at += -at % 64
            self._columns[name] = (dtype, at, count)
            at += np.dtype(dtype).itemsize * count
        if at != file_size:
            raise ValueError(f"{path} has {file_size} bytes, its header says {at}")

    def __getattr__(self, name: str) -> np.ndarray:
        if name.startswith("_") or name not in self._columns:
            raise AttributeError(name)
        if "_map" not in self.__dict__:
            with open(self.path, "rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        dtype, at, count = self._columns[name]
        column = np.frombuffer(self._map, dtype, count, at) if count else np.empty(0, dtype)
        setattr(self, name, column)
        return column

    def __getstate__(self):
        return {k: v for k, v in self.__dict__.items() if k != "_map" and k not in self._columns}

    def key(self, row: int) -> str:
        start = self.key_end.item(row - 1) if row else 0
        return self.keys[start:self.key_end.item(row)].tobytes().decode()

    def members(self, row: int) -> dict[str, tuple[int, int]]:
        """{extension: (offset, size)} of a sample."""
        names, at = self.sets[self.set.item(row)][0], self.first.item(row)
        end = at + len(names)
        return dict(zip(names, zip(self.offset[at:end].tolist(), self.size[at:end].tolist())))


def open_index(path: str) -> TarIndex:
    """The current index of a tar, built and written (atomically) where it is missing or stale."""
    stamp = stamp_of(path)
    places = index_places(path)
    for place in places:
        try:
            index = TarIndex(place)
        except (OSError, ValueError, KeyError, TypeError):  # missing, or cut by a crash: built again
            continue
        if index.stamp == stamp:
            return index
    content = build_index(path, stamp)
    error = None
    for place in places:
        temporary = f"{place}.{os.getpid()}.{threading.get_ident()}.tmp"
        try:
            os.makedirs(os.path.dirname(place) or ".", exist_ok=True)
            with open(temporary, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, place)
            return TarIndex(place)
        except OSError as caught:
            error = caught
    raise OSError(f"the index of {path} can be written to none of {places}; set VLM_JAX_CACHE to a folder "
                  f"that can ({error})")


# ---- the source --------------------------------------------------------------------------------

class TarSource(RecordSource):
    """Samples of one or many tars by number, in the order of the tars and of their first members.

    Samples without an image or without any wanted caption member are left out and counted in
    ``counts`` ("missing_image", "missing_caption"), beside what building the index left out.
    Keys read "SHARD/KEY". Threads may share it; processes may fork or pickle it.

    Tars written by ``vlm_jax.data.pack`` give the keys, captions, labels and classes that their source gave; ``caption`` "txt" (also
    the default of other tars) takes the first caption alone.
    """

    def __init__(self, pattern: str, caption: str | None = None, label: str | None = None,
                 classes: Sequence[str] | None = None, threads: int = 8, answer: str | None = None):
        self.paths = find_files(pattern)
        with concurrent.futures.ThreadPoolExecutor(max(1, threads)) as pool:
            self._indices = list(pool.map(open_index, self.paths))
        packs = [index.pack for index in self._indices]
        packed = all(packs)
        self._all_captions = packed and caption is None
        if packed and all(pack["label"] for pack in packs) and label in (None, "json:label"):
            label = "json:label"
            if classes is None:
                classes = packs[0]["classes"]
                other = [path for path, pack in zip(self.paths, packs) if pack["classes"] != classes]
                if other:
                    raise ValueError(f"tars:{pattern}: {other[0]} was packed with other classes than {self.paths[0]}"
                                     f"{f', and {len(other) - 1} more' if other[1:] else ''}; their labels do not mean the same")
        super().__init__(f"tars:{pattern}", caption or ("txt;json:captions" if packed else "txt"), label, classes, answer)
        self._wanted = set(self._caption_kinds())
        self._kinds = {field.kind for field in self.fields()}
        self._prefixes = [self._prefix(shard) for shard in range(len(self.paths))]
        sizes = []
        for path, index in zip(self.paths, self._indices):
            self.counts.update(index.counts)
            for at, (names, count) in enumerate(index.sets):
                reason = self._lacks(names)
                if reason:
                    self.counts[reason] += count
                    key = index.key(int(np.argmax(index.set == at)))
                    self.first.setdefault(reason, f"{path}: {key} has no {reason.removeprefix('missing_')} (only {', '.join(names)})")
            sizes.append(sum(count for names, count in index.sets if not self._lacks(names)))
        self._start = [0, *itertools.accumulate(sizes)]
        if not len(self):
            raise ValueError(f"{self.name} holds no sample with an image and a caption ({caption}); left out: "
                             f"{dict(self.counts) or 'nothing'}")
        self._rows: dict[int, np.ndarray] = {}
        self._reset()

    def _reset(self):
        self._files: dict[int, object] = {}
        self._lock = threading.Lock()

    def __getstate__(self):
        return {k: v for k, v in self.__dict__.items() if k not in ("_files", "_lock")}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._reset()

    def _lacks(self, names: Sequence[str]) -> str | None:
        if not any(k in IMAGE_KINDS for k in names):
            return "missing_image"
        if not any(k in self._wanted for k in names):
            return "missing_caption"
        return None

    def __len__(self) -> int:
        return self._start[-1]

    def _place(self, i: int) -> tuple[int, int]:
        """(shard, row in its index) of a sample."""
        shard = bisect.bisect_right(self._start, i) - 1
        return shard, int(self._usable(shard)[i - self._start[shard]])

    def _usable(self, shard: int) -> range | np.ndarray:
        """The rows of a tar's index that are samples, in order."""
        index = self._indices[shard]
        if self._start[shard + 1] - self._start[shard] == index.samples:
            return range(index.samples)
        if shard not in self._rows:
            usable = np.array([not self._lacks(names) for names, _ in index.sets])
            self._rows[shard] = np.flatnonzero(usable[index.set])
        return self._rows[shard]

    def key(self, i: int) -> str:
        shard, row = self._place(i)
        return self._prefixes[shard] + self._indices[shard].key(row)

    def keys(self) -> Iterator[str]:
        for shard, index in enumerate(self._indices):
            ends, text, prefix = index.key_end.tolist(), index.keys.tobytes(), self._prefix(shard)
            for row in self._usable(shard):
                yield prefix + text[ends[row - 1] if row else 0:ends[row]].decode()

    def _prefix(self, shard: int) -> str:
        """What makes the names in a tar keys: its own name, where they are not keys already."""
        return "" if self._indices[shard].pack else os.path.basename(self.paths[shard]).removesuffix(".tar") + "/"

    def fingerprint(self) -> str:
        """Of every tar's name, size and kinds of samples, and of keys and members of samples spread over them."""
        tars = [[os.path.basename(path), index.stamp[0], index.samples, index.sets] for path, index in zip(self.paths, self._indices)]
        places = [self._place(i) for i in spread(len(self))]
        return digest(tars, [[self._indices[shard].key(row), self._indices[shard].members(row)] for shard, row in places])

    def rows_of(self, shard: int) -> range:
        """The numbers of a tar's samples."""
        return range(self._start[shard], self._start[shard + 1])

    def stamp(self, shard: int) -> Any:
        """What a tar was when it was indexed; differs once its size or time of change does."""
        return self._indices[shard].stamp

    def index_places(self, shard: int) -> list[str]:
        """Where files beside a tar's index may lie, best first."""
        return index_places(self.paths[shard])

    def record(self, i: int, kinds: tuple[str, ...] | None = None) -> dict[str, bytes]:
        shard, row = self._place(i)
        members = self._indices[shard].members(row)
        image = next((k for k in members if k in IMAGE_KINDS), None)
        members = {k: v for k, v in members.items() if (k in kinds if kinds else k == image or k in self._kinds)}
        record = self._read(shard, members)
        if image in record:
            record["image"] = record.pop(image)
        return record

    def _read_captions(self, record: dict[str, Any]) -> tuple[list[str], list[float]]:
        texts = field_value(record, Field("json", "captions")) if self._all_captions else None
        if texts is None:
            return super()._read_captions(record)
        return texts, field_value(record, Field("json", "weights")) or [1 / len(texts)] * len(texts)

    def _read(self, shard: int, members: dict[str, tuple[int, int]]) -> dict[str, bytes]:
        if not members:
            return {}
        places = members.values()
        low, high = min(places)[0], max(map(sum, places))
        if high - low <= sum(size for _, size in places) + 64 * _BLOCK:  # neighbours: one read for all
            span = self._bytes(shard, low, high - low)
            return {k: span[offset - low:offset - low + size] for k, (offset, size) in members.items()}
        return {k: self._bytes(shard, offset, size) for k, (offset, size) in members.items()}

    def _bytes(self, shard: int, offset: int, size: int) -> bytes:
        path = self.paths[shard]
        if is_remote(path):
            fs, inner = filesystem(path)
            data = fs.cat_file(inner, start=offset, end=offset + size)
        else:
            file = self._files.get(shard)
            if file is None:
                with self._lock:
                    while len(self._files) >= OPEN_FILES:  # closed when the last reader lets go of it
                        self._files.pop(next(iter(self._files)))
                    file = self._files.setdefault(shard, open(path, "rb", buffering=0))
            data = read_at(file, size, offset)
        if len(data) != size:
            raise BadSample("short_read", f"{path} is shorter than when it was indexed")
        return data


def _with_lengths(path: str, caption: str, tokenizer: str) -> TarIndex:
    """A tar's index, and beside it the column of its captions' lengths where a tokenizer is named."""
    index = open_index(path)
    if tokenizer and index.samples:
        from vlm_jax.data import lengths, tokenizers
        lengths.token_lengths(TarSource(path, caption or None), tokenizers.load(tokenizer))
    return index


def main(argv: Sequence[str] | None = None) -> None:
    import argparse
    import multiprocessing

    parser = argparse.ArgumentParser(prog="python -m vlm_jax.data.tars",
                                     description="Builds tar indices ahead of training.")
    parser.add_argument("pattern", help="paths with braces or globs")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--tokenizer", default="", help="also count the captions' tokens, for data.buckets (a name as in data.tokenizer)")
    parser.add_argument("--caption", default="", help="with --tokenizer: the caption field, as in data.caption")
    args = parser.parse_args(argv)
    paths = find_files(args.pattern)
    counts: collections.Counter[str] = collections.Counter()
    samples = 0
    with concurrent.futures.ProcessPoolExecutor(args.processes, multiprocessing.get_context("spawn")) as pool:
        for path, index in zip(paths, pool.map(_with_lengths, paths, itertools.repeat(args.caption), itertools.repeat(args.tokenizer))):
            counts.update(index.counts)
            samples += index.samples
            print(f"{path}: {index.samples} samples, left out {index.counts or 'nothing'} -> {index.path}", flush=True)
    print(f"{len(paths)} tars, {samples} samples, left out {dict(counts) or 'nothing'}")


if __name__ == "__main__":
    main()
