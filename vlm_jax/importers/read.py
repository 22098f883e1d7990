"""Weight files of other frameworks, opened as what they are: names, shapes and bytes.

The one place where such files are opened: safetensors, torch's zip archives (state dicts, training
checkpoints, TorchScript), and folders of either, whole or in shards. Which one a file is, its first
bytes say and not its suffix. Nothing in a file is executed, imported or fetched: the pickle in a torch
archive is walked by a small interpreter (``_unpickle``) that knows containers, numbers, strings and
tensors, and refuses the rest. Opening reads the headers; a tensor's bytes are mapped by its ``read()``.

Every fault of a file is a ConfigError that names the file, what is wrong and what to do about it.
"""

from __future__ import annotations

import json
import math
import os
import pathlib
import pickletools
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np

from vlm_jax.errors import ConfigError, nearest


@dataclass(frozen=True)
class Tensor:
    """A tensor in a file. ``read()`` gives its values, a C-contiguous array of ``shape`` and ``dtype`` that may
    be the file's own pages (read-only). It raises ConfigError where the file is no longer what was opened."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]


_KINDS = (  # torch's dtype, its storage class, safetensors' code
    ("float64", "Double", "F64"), ("float32", "Float", "F32"), ("float16", "Half", "F16"), ("bfloat16", "BFloat16", "BF16"),
    ("int64", "Long", "I64"), ("int32", "Int", "I32"), ("int16", "Short", "I16"), ("int8", "Char", "I8"),
    ("uint8", "Byte", "U8"), ("bool", "Bool", "BOOL"), ("uint16", "", "U16"), ("uint32", "", "U32"), ("uint64", "", "U64"))
_DTYPES = {f"torch.{name}": np.dtype(getattr(ml_dtypes, name, name)) for name, _, _ in _KINDS}
_CODES = {code: _DTYPES[f"torch.{name}"] for name, _, code in _KINDS}
_HEADER_LIMIT = 2**26                    # bytes of a header, a pickle, an index: far above any real one
_ELEMENT_LIMIT = 2**48
_REPEATED_LIMIT = 2**30                  # bytes of a tensor whose strides repeat its storage (an expanded view)
_NAMES_LIMIT = 2**27                     # characters of all names in nested modules
_AGAIN, _SAVE_AS = "download it again", "save the state dict as safetensors"
_FOREIGN = (
    (b"version https://git-lfs", "a git-lfs pointer and not the file it stands for", "run 'git lfs pull' or download the file"),
    (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", "a bare pickle, torch's format of before version 1.6",
     f"load it with a newer torch and save it again, or {_SAVE_AS}"),
    (b"\x80", "a bare pickle, which is not read since it can run code", _SAVE_AS),
    (b"PK\x05\x06", "an empty zip archive", _AGAIN),
    (b"\x89HDF", "an HDF5 file", _SAVE_AS),
    (b"\x1f\x8b", "compressed by gzip", "unpack it (gunzip)"))


# ---- files and folders -------------------------------------------------------------------------

def open_weights(path: str | os.PathLike, prefer: Sequence[str] = ()) -> dict[str, Tensor]:
    """The tensors, by name, of what ``files_of`` finds: a file, or shards with their index."""
    first, *shards = files_of(path, prefer)
    return _without_wrappers(_open_shards(str(first)) if shards else _open(str(first)))


def files_of(path: str | os.PathLike, prefer: Sequence[str] = ()) -> list[pathlib.Path]:
    """The files of weights of a path: a file, an index of shards (``*.index.json``) and those, or of a folder either.

    In a folder the first of the names in ``prefer`` that is there is taken. Else safetensors go before torch's
    archives; of either an index goes before the known names, and those before the only file of that kind.
    Raises ConfigError where that leaves several or none.
    """
    path = pathlib.Path(path).expanduser()
    if not path.is_dir():
        shards = set(_weight_map(str(path)).values()) if path.name.endswith(".index.json") else ()
        return [path, *(path.with_name(n) for n in sorted(shards))]
    names = sorted(f.name for f in path.iterdir() if f.is_file())
    found = [n for n in prefer if n in names][:1]
    for index, known, suffixes in (
            (".safetensors.index.json", ("model.safetensors", "open_clip_model.safetensors", "pytorch_model.safetensors"),
             (".safetensors",)),
            (".bin.index.json", ("open_clip_pytorch_model.bin", "pytorch_model.bin"), (".pt", ".pth", ".bin", ".ckpt"))):
        found = (found or [n for n in names if n.endswith(index)] or [n for n in names if n in known]
                 or [n for n in names if n.endswith(suffixes)])
    if len(found) > 1:
        raise ConfigError(f"{path} holds several files of weights: {', '.join(found)}; name the one you mean")
    if not found:
        raise ConfigError(f"{path} holds no weights (*.safetensors, *.bin, *.pt, *.pth, *.ckpt) but {', '.join(names[:12]) or 'nothing'}")
    return files_of(path / found[0])


def open_file(path: str | os.PathLike) -> dict[str, Tensor]:
    """The tensors of one safetensors file or torch archive, by name.

    Of a training checkpoint they are those below "state_dict", "module" or "model", of TorchScript the parameters
    and buffers. A leading "module." or "_orig_mod." that all names share is dropped.
    """
    return _without_wrappers(_open(os.path.expanduser(os.fspath(path))))


def _open(path: str) -> dict[str, Tensor]:
    if not os.path.isfile(path):
        folder = os.path.dirname(path) or "."
        beside = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
        raise ConfigError(f"no file {path}{nearest(os.path.basename(path), beside, 8) if beside else ''}")
    head, size = _bytes_of(path, 0, 64), os.path.getsize(path)
    if head.startswith(b"PK\x03\x04"):
        tensors = _open_torch(path)
    elif head[4:9] == b"\0\0\0\0{":  # a header's length, below 4 GiB, and its first character
        tensors = _open_safetensors(path, size)
    else:
        raise ConfigError(f"{path} is {_foreign(head, size)}")
    if not tensors:
        raise ConfigError(f"{path} holds no tensors")
    return tensors


def _foreign(head: bytes, size: int) -> str:
    """What a file that we do not read seems to be, and what to do."""
    for magic, what, todo in _FOREIGN:
        if head.startswith(magic):
            return f"{what}; {todo}"
    if head.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return "a web page (a login, an error?) and not weights; download the file itself"
    if size < 16:
        return f"{f'cut off after {size} bytes' if size else 'empty'}; {_AGAIN}"
    return f"neither safetensors nor an archive of torch (it begins with {head[:8]!r}); {_SAVE_AS}"


def _weight_map(index: str) -> dict[str, str]:
    """{tensor: file beside the index}, all of them there."""
    if not os.path.isfile(index):
        raise ConfigError(f"no file {index}")
    folder, base = os.path.split(index)
    weights = _json(index, _bytes_of(index, 0, _HEADER_LIMIT)).get("weight_map")
    if not isinstance(weights, dict) or not weights:
        raise ConfigError(f"{index} has no 'weight_map', so it is no index of shards")
    for shard in weights.values():
        if not isinstance(shard, str) or not re.fullmatch(r"[^/\\\0]+", shard) or shard in (".", "..", base):
            raise ConfigError(f"{index} names the shard {str(shard)[:80]!r}; a shard is a file in the same folder")
    missing = sorted(n for n in set(weights.values()) if not os.path.isfile(os.path.join(folder, n)))
    if missing:
        raise ConfigError(f"{index} names shards that are not beside it: {', '.join(missing[:8])}; download them too")
    return weights


def _open_shards(index: str) -> dict[str, Tensor]:
    weights, folder = _weight_map(index), os.path.dirname(index)
    shards = {n: _open(os.path.join(folder, n)) for n in sorted(set(weights.values()))}
    for name, shard in weights.items():
        if name not in shards[shard]:
            raise ConfigError(f"{index}: {shard} lacks the tensor {name!r}{nearest(name, shards[shard], 5)}")
    return {name: shards[shard][name] for name, shard in weights.items()}


def _without_wrappers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names without what DistributedDataParallel and torch.compile put before all of them (in either order)."""
    for prefix in ("module.", "_orig_mod.", "module."):
        if all(name.startswith(prefix) for name in tensors):
            tensors = {n.removeprefix(prefix): replace(t, name=n.removeprefix(prefix)) for n, t in tensors.items()}
    return tensors


def _bytes_of(path: str, start: int, size: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(start)
        return file.read(size)


def _json(where: str, text: bytes) -> dict[str, Any]:
    def once(pairs):
        if len(out := dict(pairs)) < len(pairs):
            raise ValueError("a name is given twice")
        return out

    try:
        value = json.loads(text.decode(), object_pairs_hook=once)
        if not isinstance(value, dict):
            raise ValueError("it is no object")
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: its JSON cannot be read ({error}); {_AGAIN}") from error
    return value


# ---- bytes to arrays ---------------------------------------------------------------------------

def _are_sizes(value: Any) -> bool:
    """Whether it is a list of at most 32 integers, none below 0 (a JSON true, or 2.0, is none)."""
    return isinstance(value, (tuple, list)) and len(value) <= 32 and all(type(v) is int and v >= 0 for v in value)


def _show(value: Any) -> str:
    """A value for a message, where it is sizes: a forged list may be nested until its text fills the memory."""
    return str(tuple(value))[:80] if _are_sizes(value) else f"a {type(value).__name__}, no list of sizes,"


def _count(where: str, shape: Any) -> int:
    """Number of elements of a shape; ConfigError where it is none, or beyond all reason."""
    if not _are_sizes(shape) or math.prod(max(d, 1) for d in shape) > _ELEMENT_LIMIT:
        raise ConfigError(f"{where}: {_show(shape)} is no shape of a tensor; {_AGAIN}")
    return math.prod(shape)


def _map(path: str, start: int, size: int) -> np.ndarray:
    """``size`` bytes of a file as uint8, mapped."""
    try:
        return np.asarray(np.memmap(path, np.uint8, "r", start, (size,)))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: it changed since it was opened ({error})") from error


def _tensor(shape: Sequence[int], dtype: np.dtype, size: int, source: Callable[[], np.ndarray],
            strides: Sequence[int] | None = None) -> Tensor:
    """A tensor, yet without a name, over the ``size`` bytes (uint8) that ``source()`` gives; strides in bytes."""
    shape = tuple(shape)

    def read() -> np.ndarray:  # copied only where it is strided or lies askew; an empty file part cannot be mapped
        return np.require(np.ndarray(shape, dtype, source(), strides=strides), None, ("C", "A")) if size else np.empty(shape, dtype)
    return Tensor("", shape, dtype, read)


def _open_safetensors(path: str, size: int) -> dict[str, Tensor]:
    """The format: the header's length (uint64), {name: {dtype, shape, data_offsets}} as JSON, the data without a hole."""
    length, = struct.unpack("<Q", _bytes_of(path, 0, 8))
    if length > min(size - 8, _HEADER_LIMIT):
        raise ConfigError(f"{path}: its header takes {length} bytes and the file has {size}, so it is cut off; {_AGAIN}")
    header = _json(path, _bytes_of(path, 8, length))
    header.pop("__metadata__", None)
    tensors, spans = {}, []
    for name, entry in header.items():
        where, entry = f"{path}: {name}", entry if isinstance(entry, dict) else {}
        code, shape, span = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
        if not isinstance(code, str) or code not in _CODES:
            raise ConfigError(f"{where} has the dtype {str(code)[:40]!r}{nearest(str(code)[:40], _CODES)}")
        nbytes = _count(where, shape) * _CODES[code].itemsize
        if not _are_sizes(span) or len(span) != 2 or span[1] - span[0] != nbytes:
            raise ConfigError(f"{where} takes {nbytes} bytes and lies at {str(span)[:80]}; {_AGAIN}")
        spans.append((*span, name))
        tensors[name] = replace(
            _tensor(shape, _CODES[code], nbytes, lambda at=8 + length + span[0], n=nbytes: _map(path, at, n)), name=name)
    end = 0
    for low, high, name in sorted(spans):
        if low != end:
            raise ConfigError(f"{path}: {name} begins at byte {low} of the data, where the tensor before it ends at {end}; {_AGAIN}")
        end = high
    if 8 + length + end != size:
        raise ConfigError(f"{path} has {size} bytes, by its header {8 + length + end}; {_AGAIN}")
    return tensors


# ---- torch archives ----------------------------------------------------------------------------

@dataclass(frozen=True)
class _Global:
    name: str


@dataclass
class _Record:
    """An object of a class that we neither have nor want: what it is called, and what was in it."""

    kind: str
    state: Any = None


@dataclass(frozen=True)
class _Storage:
    key: str
    nbytes: int
    dtype: np.dtype | None   # None where the tensors on it bring their own


_STORAGES: Mapping[str, np.dtype | None] = {
    **{f"torch.{kind}Storage": _DTYPES[f"torch.{name}"] for name, kind, _ in _KINDS if kind},
    "torch.storage.UntypedStorage": None, "torch.UntypedStorage": None}
_INERT = ("torch.device", "__builtin__.set", "builtins.set", "__builtin__.bytes", "_codecs.encode")
_GLOBALS = {"collections.OrderedDict", "torch.Size", "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3",
            "torch._utils._rebuild_parameter", *_INERT, *_STORAGES, *_DTYPES}
_SCRIPTED = re.compile(r"(__torch__|torch\.jit\._pickle)\..+")
_LITERALS = frozenset("INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE"
                      " SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8".split())
_ZIP_FAULTS = (zipfile.BadZipFile, RuntimeError, ValueError, ArithmeticError, OSError, EOFError, zlib.error, struct.error)


class _Archive:
    """A torch archive: a zip of ROOT/data.pkl (names, shapes, places), ROOT/data/KEY (the bytes of a storage) and,
    of TorchScript, ROOT/code/*.py. Attributes: ``members`` and ``texts`` (what is small), by name without ROOT/."""

    def __init__(self, path: str):
        self.path, self.texts = path, {}
        try:
            with zipfile.ZipFile(path) as file:
                roots = [i.filename[:-8] for i in file.infolist() if re.fullmatch(r"[^/]+/data\.pkl", i.filename)]
                self.members = {i.filename.removeprefix(roots[0]): i for i in file.infolist()} if len(roots) == 1 else {}
                small = {n: i for n, i in self.members.items() if n in ("data.pkl", "byteorder") or re.fullmatch(r"code/.*\.py", n)}
                if sum(i.file_size for i in small.values()) <= _HEADER_LIMIT:
                    self.texts = {n: file.read(i) for n, i in small.items()}
        except _ZIP_FAULTS as error:
            raise ConfigError(f"{path} is a zip archive that is cut off or damaged ({error}); {_AGAIN}") from error
        if not self.texts:
            raise ConfigError(f"{path} is a zip archive without one */data.pkl of a sensible size, so it is none of torch; {_SAVE_AS}")
        if self.texts.get("byteorder", b"little") != b"little":
            raise ConfigError(f"{path}: its byte order is {self.texts['byteorder'][:20]!r} and not little; {_SAVE_AS} where it was written")

    def storage(self, pid: Any) -> _Storage:
        """What a reference in the pickle, ("storage", class, key, device, number of elements), stands for."""
        _, kind, key, _, count = pid
        if not isinstance(key, str) or not _are_sizes([count]) or pid[0] != "storage":
            raise ValueError("a reference is to no storage")
        dtype, info = _STORAGES[kind.name], self.members.get(f"data/{key}")
        nbytes = count * (dtype.itemsize if dtype else 1)
        if info is None or info.file_size < nbytes:
            raise ValueError(f"storage {key[:40]!r} has {info.file_size if info else 'none'} of its {nbytes} bytes")
        return _Storage(key, nbytes, dtype)

    def bytes(self, key: str, start: int, size: int) -> np.ndarray:
        """uint8 [size] of a storage, mapped unless it is compressed (torch compresses none)."""
        info = self.members[f"data/{key}"]
        try:
            if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
                with zipfile.ZipFile(self.path) as file:
                    return np.frombuffer(file.read(info), np.uint8, size, start)
            magic, name, extra = struct.unpack("<4s22xHH", _bytes_of(self.path, info.header_offset, 30))
            if magic != b"PK\x03\x04":
                raise ValueError("it is not where the archive says")
        except _ZIP_FAULTS as error:
            raise ConfigError(f"{self.path}: {info.filename} cannot be read ({error}); {_AGAIN}") from error
        return _map(self.path, info.header_offset + 30 + name + extra + start, size)

    def tensor(self, storage: _Storage, offset: int, shape: Any, strides: Any, dtype: np.dtype) -> Tensor:
        """A view of a storage, ``offset`` and ``strides`` in elements; ConfigError where it reaches out of it."""
        where, item = f"{self.path}: a tensor in storage {storage.key[:40]!r}", dtype.itemsize
        count = _count(where, shape)
        if not _are_sizes(strides) or len(strides) != len(shape) or not _are_sizes([offset]):
            raise ConfigError(f"{where}: {_show(strides)} from {_show([offset])} on are no strides of {tuple(shape)}; {_AGAIN}")
        steps = [s * item if d > 1 else item for d, s in zip(shape, strides, strict=True)]  # the stride of a single row says nothing
        start, size = offset * item, sum((d - 1) * s for d, s in zip(shape, steps, strict=True)) + item if count else 0
        if start + size > storage.nbytes:
            raise ConfigError(f"{where} reaches out to byte {start + size} of {storage.nbytes}; {_AGAIN}")
        if count * item > max(storage.nbytes, _REPEATED_LIMIT):
            raise ConfigError(f"{where} spreads {storage.nbytes} bytes over {count * item}; save a contiguous copy")
        return _tensor(shape, dtype, size, lambda: self.bytes(storage.key, start, size), steps)

    def call(self, function: _Global, args: tuple) -> Any:
        """What calling an admitted global gives: a container, a tensor, or a record that holds the arguments."""
        match function.name:
            case "collections.OrderedDict":
                return _put([x for key, value in (args[0] if args else ()) for x in (key, value)], {})
            case "torch.Size":
                return tuple(args[0])
            case "torch._utils._rebuild_parameter":
                return args[0]
            case "torch._utils._rebuild_tensor_v2":  # storage, offset, shape, strides, requires_grad, hooks, metadata
                if any(args[6:]):
                    raise ValueError("a tensor is conjugate or negated")
                return self.tensor(*args[:4], args[0].dtype)
            case "torch._utils._rebuild_tensor_v3":  # the same, and the dtype before the metadata
                return self.tensor(*args[:4], _DTYPES[args[6].name])
            case name if name in _INERT or _SCRIPTED.fullmatch(name):
                return _Record(name, args)
        raise ValueError(f"{function.name} is called")

    def admit(self, name: str) -> _Global:
        if name not in _GLOBALS and not _SCRIPTED.fullmatch(name):
            raise ConfigError(f"{self.path} asks for {name[:120]!r}, so it is no plain archive of tensors and is refused; {_SAVE_AS}")
        return _Global(name)


def _put(items: list, into: dict) -> dict:
    """Keys and values in turn, into a dict. Other keys than strings and integers are left out: none is wanted, and
    hashing a tuple nested without end would end the process."""
    if type(into) is not dict or len(items) % 2:
        raise ValueError("items are put into what is no dict")
    into.update((k, v) for k, v in zip(items[::2], items[1::2], strict=True) if isinstance(k, (str, int)))
    return into


def _extend(items: list, into: list) -> list:
    if type(into) is not list:
        raise ValueError("items are put into what is no list")
    into += items
    return into


def _new(kind: _Global, args: tuple) -> _Record:
    if not _SCRIPTED.fullmatch(kind.name):
        raise ValueError(f"an object of {kind.name} is made")
    return _Record(kind.name, args)


def _restore(value: Any, state: Any) -> Any:
    if isinstance(value, _Record):
        value.state = state
    elif type(value) is not dict:  # an OrderedDict: what it has beside its items (_metadata) is not wanted
        raise ValueError("a state is given to what has none")
    return value


def _unpickle(archive: _Archive) -> Any:
    """The value of an archive's pickle, of dicts, lists, tuples, strings, numbers, Tensor and _Record; a set comes out
    as a list. Raises ConfigError for a global or an opcode that tensors have no need of, and for a damaged pickle."""
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def top(n: int) -> list[Any]:
        if not 0 <= n <= len(stack):
            raise IndexError("its stack is empty")
        at = len(stack) - n
        items, stack[at:] = stack[at:], []
        return items

    def marked() -> list[Any]:
        return top(len(stack) - marks.pop())

    gives = {  # opcode -> the value that it leaves on the stack
        "NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False, "DUP": lambda: stack[-1],
        "EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_SET": list, "EMPTY_TUPLE": tuple,
        "DICT": lambda: _put(marked(), {}), "LIST": marked, "FROZENSET": marked, "TUPLE": lambda: tuple(marked()),
        "TUPLE1": lambda: tuple(top(1)), "TUPLE2": lambda: tuple(top(2)), "TUPLE3": lambda: tuple(top(3)),
        "SETITEM": lambda: _put(top(2), stack.pop()), "SETITEMS": lambda: _put(marked(), stack.pop()),
        "APPEND": lambda: _extend(top(1), stack.pop()), "APPENDS": lambda: _extend(marked(), stack.pop()),
        "ADDITEMS": lambda: _extend(marked(), stack.pop()), "STACK_GLOBAL": lambda: archive.admit(".".join(top(2))),
        "BINPERSID": lambda: archive.storage(stack.pop()), "REDUCE": lambda: archive.call(*top(2)),
        "NEWOBJ": lambda: _new(*top(2)), "BUILD": lambda: _restore(*top(2))}
    try:
        for op, arg, _ in pickletools.genops(archive.texts["data.pkl"]):
            match op.name:
                case name if name in _LITERALS:
                    stack.append(arg)
                case name if name in gives:
                    stack.append(gives[name]())
                case "PUT" | "BINPUT" | "LONG_BINPUT" | "MEMOIZE":
                    memo[len(memo) if arg is None else arg] = stack[-1]
                case "GET" | "BINGET" | "LONG_BINGET":
                    stack.append(memo[arg])
                case "GLOBAL":
                    stack.append(archive.admit(arg.replace(" ", ".", 1)))
                case "MARK":
                    marks.append(len(stack))
                case "POP" | "POP_MARK":
                    top(1) if op.name == "POP" else marked()
                case "STOP":
                    return stack.pop()
                case "PROTO" | "FRAME":
                    pass
                case name:
                    raise ConfigError(f"{archive.path}: its pickle has the opcode {name}, so it is no plain archive of tensors "
                                      f"and is refused; {_SAVE_AS}")
    except ConfigError:
        raise
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, struct.error) as error:
        raise ConfigError(f"{archive.path}: its pickle is damaged ({error}); {_AGAIN}, or {_SAVE_AS}") from error


def _open_torch(path: str) -> dict[str, Tensor]:
    archive = _Archive(path)
    value = _unpickle(archive)
    if isinstance(value, _Record):
        found = _scripted(path, value, _modules(archive.texts))
    elif isinstance(value, dict):
        inner = (v for v in (value.get("state_dict"), value.get("module"), value.get("model"), value) if isinstance(v, dict))
        found = next(filter(None, ({k: t for k, t in v.items() if isinstance(t, Tensor) and isinstance(k, str)} for v in inner)), {})
        if not found:
            raise ConfigError(f"{path} holds no tensors by name, nor below 'state_dict', 'module' or 'model', only: "
                              f"{', '.join(str(k)[:40] for k in list(value)[:12]) or 'nothing'}")
    else:
        raise ConfigError(f"{path} holds no dict of tensors but one {type(value).__name__.lower()}; {_SAVE_AS}")
    return {name: replace(tensor, name=name) for name, tensor in found.items()}


def _modules(texts: Mapping[str, bytes]) -> dict[str, set[str] | None]:
    """{class: the names of its parameters and buffers} of the modules in TorchScript's code, which is read as text.

    None where the code lists no buffers, as an old torch wrote it: then every tensor counts, lest statistics be lost.
    """
    pattern = re.compile(r"^class (\w+)\(Module\):\n +__parameters__ = (\[.*\])(?:\n +__buffers__ = (\[.*\]))?", re.M)
    return {f"{file[5:-3].replace('/', '.')}.{name}": set(re.findall(r'"([^"]*)"', parameters + buffers)) if buffers else None
            for file, text in texts.items() if file.startswith("code/")
            for name, parameters, buffers in pattern.findall(text.decode("utf-8", "replace"))}


def _scripted(path: str, root: _Record, modules: Mapping[str, set[str] | None]) -> dict[str, Tensor]:
    """The tensors of nested modules, their names joined by "."; other attributes are passed over."""
    found: dict[str, Tensor] = {}
    pending, characters = [("", root)], 0
    while pending:
        prefix, record = pending.pop()
        if not isinstance(record.state, dict) or (modules and record.kind not in modules):
            continue
        wanted = modules.get(record.kind)
        for attribute, value in record.state.items():
            name = f"{prefix}{attribute}"
            characters += len(name) + 1
            if characters > _NAMES_LIMIT:  # modules may be shared, and a forged one may hold itself
                raise ConfigError(f"{path}: its modules are nested without end; {_SAVE_AS}")
            if isinstance(value, _Record):
                pending.append((f"{name}.", value))
            elif isinstance(value, Tensor) and (wanted is None or attribute in wanted):
                found[name] = value
    return found
