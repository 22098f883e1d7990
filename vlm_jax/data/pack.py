"""Packs a source into WebDataset tars with their indices, so that runs start at once and read by offset.

    python -m vlm_jax.data.pack folder:photos --out=packed
    python -m vlm_jax.data.pack 'parquet:data/train-*.parquet' --out=packed --size=288

A sample is KEY.jpg (or png, webp, gif, bmp), KEY.txt with its first caption, and, where there is more, KEY.json: all ``captions``,
their ``weights`` where they differ, the ``label``, and what else the sample's record says. ``tars:`` reads from it the same samples in
the same order, with the same keys (so that "#train" and "#val" split it the same way), captions, labels and classes.

Every image is decoded once, and a sample that cannot be read is left out and told. Its bytes are copied untouched, unless --size=N
shrinks it: an image whose shorter side has more than N pixels is brought to N (bicubic) and written again, JPEG and WebP as JPEG of
quality 95, the others as PNG, upright and without its metadata. Pixels that a source gives without a file become PNG.

The tars follow from the source and the options alone. Each is written under a temporary name and renamed when it is whole; the same
command again keeps those that are, and goes on.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import contextlib
import io
import itertools
import json
import os
import re
import sys
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import filelock
import numpy as np
from PIL import Image

from vlm_jax.data import ops
from vlm_jax.data.bad import BadSample
from vlm_jax.data.record import IMAGE_KINDS, and_more
from vlm_jax.data.sources import Mixture, key_of, left_out, name_of, open_source
from vlm_jax.data.split import Split
from vlm_jax.data.tars import PACK, open_index
from vlm_jax.errors import ConfigError

SETTINGS = "pack.json"      # in the folder of the tars: what they were packed from
_STARTS = ((b"\xff\xd8", "jpg"), (b"\x89PNG", "png"), (b"RIFF", "webp"), (b"GIF8", "gif"), (b"BM", "bmp"))


class Packed(NamedTuple):
    """What ``pack`` wrote: numbers of tars, samples and bytes; and for each reason how many samples it left out, and the first."""
    tars: int
    samples: int
    bytes: int
    left_out: Mapping[str, tuple[int, str]]


# ---- one sample ----------------------------------------------------------------------------------

class _Members(NamedTuple):
    """A sample as it is written: its key, whether it has a label, and the content of its members by extension."""
    key: str
    labelled: bool
    members: dict[str, bytes]


def shrink(data: bytes, image: Image.Image, size: int) -> tuple[str, bytes]:
    """(extension, bytes) of a decoded image with its shorter side brought to ``size``; see above."""
    lossy = data[:2] == b"\xff\xd8" or data[:4] == b"RIFF"
    out = io.BytesIO()
    ops.resize(image, None, size).convert("RGB").save(out, "JPEG" if lossy else "PNG", **({"quality": 95} if lossy else {}))
    return "jpg" if lossy else "png", out.getvalue()


def _encode(image: Any, size: int) -> tuple[str, bytes]:
    """(extension, bytes) of a sample's image. Raises BadSample where it cannot be decoded."""
    if image is None:
        raise BadSample("missing_image")
    if not isinstance(image, bytes):
        out = io.BytesIO()
        Image.fromarray(np.asarray(image)).save(out, "PNG")
        image = out.getvalue()
    decoded = ops.decode(image)
    if size and min(decoded.size) > size:
        return shrink(image, decoded, size)
    return next(kind for start, kind in _STARTS if image.startswith(start)), image


def _plain(value: Any) -> Any:
    """For ``json``: arrays as lists, bytes as text, anything else by its name."""
    if isinstance(value, (np.ndarray, np.generic)):
        return value.tolist()
    return value.decode("utf-8") if isinstance(value, bytes) else str(value)


def _rest(source: Any, i: int, row: Any) -> dict[str, Any]:
    """What a sample's record says beside the image, the captions and the label."""
    if isinstance(source, Mixture):
        source, _ = source.place(i)
    if isinstance(source, Split):
        source = source.source
    answer = getattr(source, "answer", None)      # has no member of its own: it stays where it is
    fields = [field for field in source.fields() if not (answer and field == answer[0])] if hasattr(source, "fields") else []
    told = {getattr(source, "image", None), *(field.path.split("/")[0] for field in fields)}
    rest = {}
    for name, value in (row or {}).items():
        try:
            if name not in told:
                rest[name] = json.loads(json.dumps(value, default=_plain))
        except ValueError:      # bytes that are no text
            continue
    return rest


def _read(source: Any, i: int, size: int) -> _Members | BadSample:
    """A sample, or what is wrong with it."""
    try:
        sample = source[i]
        texts = list(sample["text"])
        if not texts:
            raise BadSample("missing_caption")
        if len(sample.get("images", ())) > 1:
            raise BadSample("several_images", "a sample of a tar has one")
        kind, image = _encode(sample["image"], size)
        row = _rest(source, i, sample.get("json"))
        sample["key"].encode()
    except BadSample as error:
        return error
    except UnicodeEncodeError:
        return BadSample("name_not_utf8")
    weights = list(sample.get("text_weight", ()))
    uneven = bool(weights) and weights != [1 / len(texts)] * len(texts)
    if len(texts) > 1 or "captions" in row:
        row["captions"] = texts
        if uneven or "weights" in row:
            row["weights"] = weights
    if "label" in sample:
        row["label"] = int(sample["label"])
    members = {kind: image, "txt": texts[0].encode()}
    if row:
        members["json"] = json.dumps(row, ensure_ascii=False).encode("utf-8", "replace")
    return _Members(sample["key"], "label" in sample, members)


# ---- tars ----------------------------------------------------------------------------------------

def _member_name(key: str, taken: set[str]) -> str:
    """A name for the members of a sample that reads like its key, has no dot in its last part, and is not taken yet."""
    stem, dot, kind = key.rpartition(".")
    parts = re.split(r"[/\\]", stem if kind.lower() in IMAGE_KINDS else key)
    parts = [re.sub(r"[\x00-\x1f:]|^\.+", "_", part) for part in parts if part not in ("", ".", "..")] or ["sample"]
    name = "/".join([*parts[:-1], parts[-1].replace(".", "_")])
    name = next(n for n in itertools.chain([name], (f"{name}-{i}" for i in itertools.count(2))) if n not in taken)
    taken.add(name)
    return name


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.mode = len(content), 0o644
    tar.addfile(info, io.BytesIO(content))


def _write(path: str, rows: Iterator[tuple[int, str, _Members | BadSample]], start: int, total: int, shard: int, limit: int,
           classes: Sequence[str] | None) -> dict[str, Any]:
    """Writes one tar from the next rows; returns what its ``__pack__`` says."""
    about: dict[str, Any] = {"keys": [], "rows": [start, start], "label": True, "classes": classes, "left_out": {}}
    taken: set[str] = set()
    temporary = f"{path}.tmp"
    try:
        with open(temporary, "wb") as file:
            with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
                while about["rows"][1] < total and len(about["keys"]) < shard and not (limit and about["keys"] and file.tell() >= limit):
                    i, key, result = next(rows)
                    about["rows"][1] = i + 1
                    if isinstance(result, BadSample):
                        told = about["left_out"].setdefault(result.reason, [0, f"{key} ({result})"])
                        told[0] += 1
                        continue
                    about["keys"].append(result.key)
                    about["label"] &= result.labelled
                    name = _member_name(result.key, taken)
                    for kind, content in result.members.items():
                        _add(tar, f"{name}.{kind}", content)
                _add(tar, PACK, json.dumps(about, ensure_ascii=False).encode("utf-8", "replace"))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)
    return about


def _finished(path: str, start: int, source: Any, classes: Sequence[str] | None) -> dict[str, Any] | None:
    """What a tar's ``__pack__`` says, where it is whole and holds the rows from ``start`` on; else None."""
    if not os.path.exists(path):
        return None
    index = open_index(path)
    if not index.pack or index.counts or index.pack["rows"][0] != start or index.pack["classes"] != classes:
        return None
    stored = [index.key(row) for row in range(index.samples)]
    keys = (key_of(source, i) for i in range(*index.pack["rows"]))
    return index.pack if all(key in keys for key in stored) else None      # in the same order; what was left out is passed over


def _ahead(make: Callable[[int], Any], rows: Iterable[int], threads: int) -> Iterator[Any]:
    """``map(make, rows)`` with the next few made by threads."""
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        waiting: collections.deque[concurrent.futures.Future] = collections.deque()
        try:
            for i in rows:
                waiting.append(pool.submit(make, i))
                if len(waiting) > 2 * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def pack(source: Any, out: str, *, shard: int = 1000, limit: int = 0, size: int = 0, threads: int = 2,
         settings: Mapping[str, Any] | None = None, say: Callable[[str], None] = lambda text: None) -> Packed:
    """Packs an open source into ``out``/00000.tar and so on.

    ``shard``: samples in a tar; ``limit``: bytes after which a tar is closed, 0 for no limit; ``size``: pixels of the shorter side
    above which images are shrunk, 0 for none; ``settings``: what else the tars depend on, for the note that keeps a second pack from
    mixing with a first.

    Raises ConfigError where ``out`` holds other tars, for a mixture with weights, and where no sample can be read.
    """
    if shard < 1 or limit < 0 or size < 0 or threads < 1:
        raise ConfigError(f"shard={shard}, bytes={limit}, size={size}, threads={threads}: at least 1, 0, 0 and 1")
    if getattr(source, "weights", None):
        raise ConfigError(f"{name_of(source)} is mixed by weight, which tars cannot say: pack each part, and mix the tars")
    classes = getattr(source, "classes", None)
    classes = None if classes is None else [str(name) for name in classes]
    rows: Iterator[Any] | None = None
    start = number = samples = written = 0
    told: dict[str, tuple[int, str]] = {}
    with _claimed(out, {"source": name_of(source), "samples": len(source), "shard": shard, "bytes": limit, "size": size, **(settings or {})}):
        while start < len(source):
            path = os.path.join(out, f"{number:05}.tar")
            about = _finished(path, start, source, classes) if rows is None else None
            kept = about is not None
            if about is None:
                if rows is None:
                    rows = _ahead(lambda i: (i, key_of(source, i), _read(source, i, size)), range(start, len(source)), threads)
                about = _write(path, rows, start, len(source), shard, limit, classes)
            inside, length = open_index(path).samples, os.path.getsize(path)      # the index is written beside it
            start, number, samples, written = about["rows"][1], number + 1, samples + inside, written + length
            for reason, (count, first) in about["left_out"].items():
                before, name = told.get(reason, (0, first))
                told[reason] = before + count, name
            say(f"{path}: {inside:,} samples, {length / 1e6:,.1f} MB{' (kept)' if kept else ''}")
    if not samples:
        raise ConfigError(f"none of the {len(source):,} samples of {name_of(source)} can be read: {_tell(told)}")
    return Packed(number, samples, written, told)


@contextlib.contextmanager
def _claimed(out: str, settings: dict[str, Any]) -> Iterator[None]:
    """The folder is ours alone, and notes what it is packed from. Raises ConfigError where it holds something else."""
    os.makedirs(out, exist_ok=True)
    lock = filelock.FileLock(os.path.join(out, ".lock"))
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise ConfigError(f"{out} is being packed by another process") from None
    try:
        path = os.path.join(out, SETTINGS)
        if os.path.exists(path):
            with open(path, encoding="utf-8") as file:
                found = json.load(file)
            for name, value in settings.items():
                if found.get(name) != value:
                    raise ConfigError(f"{out} was packed with {name}={found.get(name)!r}, not {value!r}; give another --out, or remove that folder")
        else:
            tars = sorted(name for name in os.listdir(out) if name.endswith(".tar"))
            if tars:
                raise ConfigError(f"{out} holds tars already ({tars[0]}{and_more(len(tars))}); give another --out")
            with open(f"{path}.tmp", "w", encoding="utf-8") as file:
                json.dump(settings, file, indent=1)
            os.replace(f"{path}.tmp", path)
        yield
    finally:
        lock.release()


def _tell(told: Mapping[str, tuple[int, str]]) -> str:
    return "; ".join(f"{first}{and_more(count)}" for count, first in told.values())


def _share(spec: str) -> str:
    """What stands after "#val": the smallest share that holds out something of a small set."""
    for share in ("", ":10", ":20"):
        try:
            open_source(f"{spec}#val{share}")
            return share
        except ValueError:      # that side is empty
            continue
    return ":50"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m vlm_jax.data.pack", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="what to pack, as in data.train: folder:DIR, parquet:FILES, jsonl:FILE, ...")
    parser.add_argument("--out", required=True, help="folder for the tars")
    parser.add_argument("--shard", type=int, default=1000, help="samples in a tar")
    parser.add_argument("--bytes", type=lambda text: int(float(text)), default=0, help="close a tar that has this many bytes, 0 for no limit")
    parser.add_argument("--size", type=int, default=0, help="shrink images whose shorter side has more pixels than this, 0 for none")
    parser.add_argument("--caption", help="caption field, as in data.caption")
    parser.add_argument("--label", help="label field, as in data.label")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="images read at once")
    args = parser.parse_args(argv)
    try:
        source = open_source(args.source, caption=args.caption or None, label=args.label or None)
        packed = pack(source, args.out, shard=args.shard, limit=args.bytes, size=args.size, threads=args.threads,
                      settings={"caption": args.caption or "", "label": args.label or ""}, say=lambda text: print(text, flush=True))
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 43
    print(f"{args.out}: {packed.tars:,} tar{'s' if packed.tars > 1 else ''}, {packed.samples:,} samples, {packed.bytes / 1e6:,.1f} MB")
    lost = "; ".join(filter(None, (left_out(source), _tell(packed.left_out))))
    print(f"left out: {lost or 'nothing'}")
    tars = f"tars:{os.path.join(args.out, '*.tar')}"
    print("to train on it:")
    for line in [f"train='{tars}'"] if isinstance(source, Split) else [f"train='{tars}#train{_share(tars)}'", f"eval='{tars}#val{_share(tars)}'"]:
        print(f"    --config.stages.pretrain.data.{line}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
