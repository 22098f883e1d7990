"""Foreign weight files of every kind, whole, damaged and forged: read as they are or refused, and never executed."""

import ast
import itertools
import json
import os
import pathlib
import pickle
import pickletools
import struct
import zipfile

import ml_dtypes
import numpy as np
import pytest

from vlm_jax.errors import ConfigError
from vlm_jax.importers import read

BF16 = np.dtype(ml_dtypes.bfloat16)
KINDS = {"float64": "Double", "float32": "Float", "float16": "Half", "bfloat16": "BFloat16", "int64": "Long", "int32": "Int",
         "int16": "Short", "int8": "Char", "uint8": "Byte", "bool": "Bool"}


# ---- pickles by hand (what torch writes, opcode by opcode) ---------------------------------------

def lit(value):
    """The opcodes of a plain value."""
    return pickletools.optimize(pickle.dumps(value, 2))[2:-1]


def name_of(module, name):
    return f"c{module}\n{name}\n".encode()


def items(*parts):
    return b"(" + b"".join(parts) + b"t"


def dict_of(pairs):
    return b"}(" + b"".join(lit(k) + v for k, v in pairs.items()) + b"u"


ORDERED = name_of("collections", "OrderedDict") + b")R"


def storage(key, kind, count):
    return items(lit("storage"), name_of("torch", f"{kind}Storage"), lit(key), lit("cpu"), lit(count)) + b"Q"


def tensor(key, kind, count, shape, strides, offset=0):
    return (name_of("torch._utils", "_rebuild_tensor_v2")
            + items(storage(key, kind, count), lit(offset), lit(shape), lit(strides), lit(False), ORDERED) + b"R")


def parameter(inner):
    return name_of("torch._utils", "_rebuild_parameter") + items(inner, lit(True), ORDERED) + b"R"


def record(module, name, pairs):
    return name_of(module, name) + b")\x81" + dict_of(pairs) + b"b"


class Parts:
    """Arrays on their way into an archive, each with a storage of its own."""

    def __init__(self):
        self.data = {}

    def __call__(self, x):
        key = str(len(self.data))
        self.data[key] = x.tobytes()
        strides = tuple(s // x.itemsize for s in np.empty(x.shape, x.dtype).strides)
        return tensor(key, KINDS[str(x.dtype)], x.size, x.shape, strides)


def archive(path, pickled, data=(), compression=zipfile.ZIP_STORED, **members):
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("any/data.pkl", pickled if pickled.startswith(b"\x80") else b"\x80\x02" + pickled + b".")
        for name, content in {"byteorder": b"little", "version": b"3\n", **members}.items():
            file.writestr(f"any/{name}", content)
        for key, content in dict(data).items():
            file.writestr(f"any/data/{key}", content)
    return path


def values(n=12, dtype="float32", seed=0):
    x = np.random.default_rng(seed).normal(size=n) * 50
    return (x > 0) if dtype == "bool" else x.astype(BF16 if dtype == "bfloat16" else dtype)


def same(found, expected):
    assert set(found) == set(expected)
    for name, x in expected.items():
        got = found[name].read()
        assert (found[name].name, found[name].shape, found[name].dtype) == (name, x.shape, x.dtype)
        assert got.shape == x.shape and got.dtype == x.dtype and got.flags.c_contiguous and got.flags.aligned
        assert got.tobytes() == x.tobytes(), name


def refused(path, *words):
    """Opening and reading everything ends in a ConfigError that names the file and says ``words``."""
    with pytest.raises(ConfigError) as caught:
        for found in read.open_weights(path).values():
            found.read()
    for word in (str(path), *words):
        assert word in str(caught.value), caught.value


# ---- torch archives ----------------------------------------------------------------------------

def test_state_dict_of_every_dtype(tmp_path):
    parts, expected = Parts(), {f"a.{d}": values(12, d).reshape(3, 4) for d in KINDS}
    expected |= {"scalar": np.float32(2.5).reshape(()), "none": np.empty((0, 3), np.float32)}
    body = ORDERED + b"(" + b"".join(lit(k) + parameter(parts(x)) for k, x in expected.items()) + b"u"
    body += dict_of({"_metadata": ORDERED}) + b"b"          # torch hangs versions on the OrderedDict
    same(read.open_file(archive(tmp_path / "m.pt", body, parts.data)), expected)


def test_views_of_one_storage(tmp_path):
    x, b = values(48).reshape(6, 8), values(40, "bfloat16")
    body = dict_of({
        "whole": tensor("0", "Float", 48, (6, 8), (8, 1)), "tied": tensor("0", "Float", 48, (6, 8), (8, 1)),
        "turned": tensor("0", "Float", 48, (8, 6), (1, 8)), "part": tensor("0", "Float", 48, (2, 5), (16, 1), 10),
        "last": tensor("0", "Float", 48, (1, 1), (999, 7), 47), "spread": tensor("0", "Float", 48, (3, 2), (0, 1), 46),
        "half": tensor("1", "BFloat16", 40, (3, 4), (10, 3), 7)})
    found = read.open_file(archive(tmp_path / "m.pt", body, {"0": x.tobytes(), "1": b.tobytes()}))
    strided = np.lib.stride_tricks.as_strided(b[7:], (3, 4), (20, 6)).copy()
    same(found, {"whole": x, "tied": x, "turned": x.T.copy(), "part": x[1:5:2, 2:7].copy(), "last": x[5:, 7:].copy(),
                 "spread": np.tile(x[5, 6:], (3, 1)), "half": strided})


def test_dtypes_without_a_storage_class(tmp_path):
    x = np.array([1, 65535, 7], np.uint16)
    untyped = items(lit("storage"), name_of("torch.storage", "UntypedStorage"), lit("0"), lit("cpu"), lit(6)) + b"Q"
    body = dict_of({"u": name_of("torch._utils", "_rebuild_tensor_v3") + items(
        untyped, lit(1), lit((2,)), lit((1,)), lit(False), ORDERED, name_of("torch", "uint16")) + b"R"})
    same(read.open_file(archive(tmp_path / "m.pt", body, {"0": x.tobytes()})), {"u": x[1:]})


def test_newer_pickle_protocol_and_memo(tmp_path):
    def new(text):
        return b"\x8c" + bytes([len(text)]) + text.encode()

    x = values(4)
    pid = b"(" + new("storage") + new("torch") + new("FloatStorage") + b"\x93\x94" + new("0") + new("cpu") + b"K\x04tQ\x94"
    one = new("torch._utils") + new("_rebuild_tensor_v2") + b"\x93\x94(" + pid + b"K\x00K\x04\x85K\x01\x85\x89" \
        + new("collections") + new("OrderedDict") + b"\x93)Rt\x94R\x94"
    body = b"\x80\x04\x95" + struct.pack("<Q", 9999) + b"}\x94(" + new("a") + one + new("b") + b"h\x05" + new("s") + b"\x8f(K\x01\x90u."
    same(read.open_file(archive(tmp_path / "m.bin", body, {"0": x.tobytes()})), {"a": x, "b": x})


@pytest.mark.parametrize("key", ["state_dict", "module", "model"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.module.", "module._orig_mod."])
def test_training_checkpoint(tmp_path, key, prefix):
    parts, expected = Parts(), {"visual.w": values(6), "logit_scale": values(1).reshape(())}
    inner = dict_of({prefix + name: parts(x) for name, x in expected.items()})
    optimizer = dict_of({"state": b"}(" + lit(0) + dict_of({"exp_avg": parts(values(6))}) + b"u", "param_groups": b"](" + dict_of(
        {"lr": lit(1e-3), "betas": lit((0.9, 0.98)), "params": lit([0, 1]), "fused": b"N", "long": lit(2**70)}) + b"e"})
    body = dict_of({"epoch": lit(3), "name": lit("run"), key: inner, "optimizer": optimizer, "ema": parts(values(3)),
                    "size": name_of("torch", "Size") + b"(" + lit([1, 2]) + b"tR",
                    "where": name_of("torch", "device") + items(lit("cpu")) + b"R",
                    "seen": name_of("__builtin__", "set") + items(lit([1, 2])) + b"R"})
    same(read.open_file(archive(tmp_path / "epoch_3.pt", body, parts.data)), expected)


def test_a_prefix_that_not_all_names_share_stays(tmp_path):
    parts, expected = Parts(), {"module.w": values(6), "b": values(2)}
    same(read.open_file(archive(tmp_path / "m.pt", dict_of({n: parts(x) for n, x in expected.items()}), parts.data)), expected)


def test_compressed_archive_and_byte_order(tmp_path):
    parts, expected = Parts(), {"w": values(600, "float16").reshape(20, 30)}
    body = dict_of({n: parts(x) for n, x in expected.items()})
    same(read.open_file(archive(tmp_path / "m.pt", body, parts.data, zipfile.ZIP_DEFLATED)), expected)
    refused(archive(tmp_path / "big.pt", body, parts.data, byteorder=b"big"), "byte order", "big")
    short = archive(tmp_path / "m.pt", dict_of({"w": tensor("0", "Byte", 48, (48,), (1,))}), {"0": bytes(40)}, zipfile.ZIP_DEFLATED)
    refused(short, "40 of its 48 bytes")
    raw, info = short.read_bytes(), zipfile.ZipFile(short).getinfo("any/data/0")
    sizes = [struct.pack("<LLL", info.CRC, info.compress_size, n) for n in (40, 48)]
    short.write_bytes(raw.replace(*sizes))                                        # a size that is not so
    refused(short, "any/data/0 cannot be read")


CODE = """class Conv2d(Module):
  __parameters__ = ["weight", ]
  __buffers__ = ["stat", ]
  weight : Tensor
  def forward(self: __torch__.nn.Conv2d, input: Tensor) -> Tensor:
    return input
"""


def scripted(parts, expected):
    conv = record("__torch__.nn", "Conv2d", {
        "weight": parts(expected["visual.0.weight"]), "bias": b"N", "stat": parts(expected["visual.0.stat"]),
        "plain": parts(values(2)), "sizes": name_of("torch.jit._pickle", "build_intlist") + items(lit([1, 2])) + b"R"})
    packed = record("__torch__.torch.classes", "Packed", {"inside": parts(values(2))})
    visual = record("__torch__.___torch_mangle_1", "Sequential", {"0": conv, "training": b"\x89", "packed": packed})
    return record("__torch__", "CLIP", {"logit_scale": parts(expected["logit_scale"]), "visual": visual,
                                        "extra": name_of("torch.jit._pickle", "build_tensorlist") + items(b"]") + b"R"})


def test_torchscript_gives_parameters_and_buffers(tmp_path):
    expected = {"visual.0.weight": values(24, "float16").reshape(2, 3, 4), "visual.0.stat": values(3), "logit_scale": values(1).reshape(())}
    empty = 'class Sequential(Module):\n  __parameters__ = []\n  __buffers__ = []\n'
    code = {"code/__torch__/nn.py": CODE, "code/__torch__/___torch_mangle_1.py": empty,
            "code/__torch__.py": 'class CLIP(Module):\n  __parameters__ = ["logit_scale", ]\n  __buffers__ = []\n'}
    parts = Parts()
    body = scripted(parts, expected)
    same(read.open_file(archive(tmp_path / "jit.pt", body, parts.data, **code)), expected)
    found = read.open_file(archive(tmp_path / "no_code.pt", body, parts.data))  # then all that is a tensor
    assert set(found) == {*expected, "visual.0.plain", "visual.packed.inside"}


def test_opening_reads_no_tensor(tmp_path, monkeypatch):
    parts, expected = Parts(), {"w": values(6)}
    path = archive(tmp_path / "m.pt", dict_of({n: parts(x) for n, x in expected.items()}), parts.data)
    mapped = []
    real = read._map
    monkeypatch.setattr(read, "_map", lambda *a: mapped.append(a) or real(*a))
    found = read.open_file(path)
    assert not mapped
    same(found, expected)
    assert len(mapped) == 1
    at = path.read_bytes().index(expected["w"].tobytes())
    for size, words in ((at + 4, "changed since"), (20, "cannot be read")):
        os.truncate(path, size)
        with pytest.raises(ConfigError, match=words):
            found["w"].read()


# ---- hostile archives --------------------------------------------------------------------------

def test_the_reader_imports_nothing_that_runs_pickles():
    tree = ast.parse(pathlib.Path(read.__file__).read_text())
    names = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    assert names == {"json", "math", "os", "pathlib", "pickletools", "re", "struct", "zipfile", "zlib", "ml_dtypes", "numpy"}


class Payload:
    def __init__(self, call, *args):
        self.call = call, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_nothing_is_executed(tmp_path, protocol):
    mark = tmp_path / "executed"
    payloads = Payload(os.system, f"touch {mark}"), Payload(open, str(mark), "w"), Payload(eval, f"open({str(mark)!r}, 'w')")
    for i, payload in enumerate(payloads):
        data = pickle.dumps({"state_dict": payload}, protocol)
        path = archive(tmp_path / f"{i}.pt", data[:-1] if protocol == 0 else data)
        refused(path, "refused", ("posix.system", "open", "eval")[i], "safetensors")
        (tmp_path / f"{i}.pkl").write_bytes(data)
        refused(tmp_path / f"{i}.pkl", "safetensors")
    assert not mark.exists()


def test_globals_that_are_refused_or_misused(tmp_path):
    path = tmp_path / "x.pt"
    refused(archive(path, dict_of({"m": name_of("open_clip.model", "CLIP") + b")\x81"})), "'open_clip.model.CLIP'", "refused")
    refused(archive(path, name_of("torch._utils", "_rebuild_sparse_tensor")), "_rebuild_sparse_tensor")
    refused(archive(path, name_of("collections", "OrderedDict.fromkeys")), "fromkeys")
    for body in (name_of("torch", "FloatStorage") + b")R", name_of("collections", "OrderedDict") + b")\x81", lit("x") + b")R",
                 name_of("torch", "Size") + b")R", ORDERED + b"R", b"]}b", name_of("torch._utils", "_rebuild_tensor_v2") + b")R"):
        refused(archive(path, body), "damaged")


def test_unknown_and_damaged_opcodes(tmp_path):
    path = tmp_path / "x.pt"
    for body, word in [(b"(ios\nsystem\n", "INST"), (b"\x82\x01", "EXT1"), (lit("a") + b"Pabc\n", "PERSID"), (b"]\x92", "NEWOBJ_EX"),
                       (b"\xff", "\\xff"), (b"h\x05", "damaged"), (b"q\x01", "damaged"), (b"t", "damaged"), (b"((00t", "damaged"),
                       (b"R", "damaged"), (b"](", "list"), (b"}(K\x01u", "damaged"), (b"K\x01K\x02a", "damaged"),
                       (b"]}K\x01K\x02s0K\x01K\x02s", "damaged"),
                       (b"\x8a\xff", "damaged"), (b"X\xff\xff\xff\xff", "damaged"), (b"J", "damaged"),
                       (b"I" + b"9" * 5000 + b"\n", "damaged")]:
        refused(archive(path, body), word)
    refused(archive(path, b"\x80\x02}"), "damaged")         # no STOP
    refused(archive(path, b"\x80\x02."), "damaged")


@pytest.mark.parametrize("shape, strides, offset, count, word", [
    ((3, 4), (4, 1), 1, 12, "52 of 48"), ((4,), (4,), 0, 12, "reaches out"), ((1,), (1,), 12, 12, "reaches out"),
    ((0,), (1,), 13, 12, "reaches out"),
    ((-1,), (1,), 0, 12, "no shape"), ((3, -4), (4, 1), 0, 12, "no shape"), ((2**62, 2**62), (0, 0), 0, 12, "no shape"),
    ((0, 2**70), (1, 1), 0, 12, "no shape"), ((1,) * 40, (1,) * 40, 0, 12, "no shape"), ((2.0,), (1,), 0, 12, "no shape"),
    (([],), (1,), 0, 12, "no shape"), (None, (1,), 0, 12, "no shape"), ((True,), (1,), 0, 12, "no shape"),
    ((3,), (-1,), 2, 12, "no strides"), ((3,), (1,), -1, 12, "no strides"), ((3,), (1, 1), 0, 12, "no strides"),
    ((3,), (1,), "0", 12, "no strides"),
    ((2**40,), (0,), 0, 12, "spreads"), ((2**20, 2**20), (0, 0), 0, 12, "spreads"),
    ((3,), (1,), 0, 13, "48 of its 52"), ((3,), (1,), 0, -1, "no storage"), ((3,), (1,), 0, 2**64, "of its"),
    ((3,), (1,), 0, 1.0, "no storage")])
def test_views_out_of_bounds(tmp_path, shape, strides, offset, count, word):
    path = archive(tmp_path / "x.pt", dict_of({"w": tensor("0", "Float", count, shape, strides, offset)}), {"0": b"\0" * 48})
    refused(path, word)


def test_storages_that_are_not_there(tmp_path):
    path = tmp_path / "x.pt"
    for key in ("1", "../data.pkl", "/etc/passwd"):
        refused(archive(path, dict_of({"w": tensor(key, "Float", 2, (2,), (1,))}), {"0": b"\0" * 8}), "none of its 8 bytes")
    refused(archive(path, items(lit("module"), lit(1)) + b"Q"), "damaged")
    refused(archive(path, storage("0", "Complex", 1)), "torch.ComplexStorage")


def test_nesting_without_end(tmp_path):
    path, deep = tmp_path / "x.pt", 100_000
    refused(archive(path, b")" + b"\x85" * deep), "tuple")
    refused(archive(path, b"}" + b")" + b"\x85" * deep + b"K\x01s"), "no tensors by name")           # as a dict's key
    refused(archive(path, b"]" * deep + b"a" * (deep - 1)), "list")
    build = name_of("torch._utils", "_rebuild_tensor_v2") + b"(" + storage("0", "Float", 1) + lit(0)
    twice = b"]" + b"q\x010]h\x01ah\x01a" * 60                                                      # 2**60 lists if written out
    refused(archive(path, build + twice + lit((1,)) + b"\x89" + ORDERED + b"tR", {"0": b"\0" * 4}), "no shape")
    refused(archive(path, build + b"]" * deep + b"a" * (deep - 1) + lit((1,)) + b"\x89" + ORDERED + b"tR", {"0": b"\0" * 4}), "no shape")
    itself = name_of("__torch__", "A") + b")\x81q\x01}(" + lit("a") + b"h\x01" + lit("b") + b"h\x01ub"
    refused(archive(path, itself), "nested without end")


def test_zips_that_are_none_of_torch(tmp_path):
    path = tmp_path / "x.pt"
    parts = Parts()
    whole = archive(path, dict_of({"w": parts(values(50))}), parts.data).read_bytes()
    for cut in (5, 40, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        refused(path, "cut off", "download it again")
    path.write_bytes(whole.replace(b"PK\x03\x04", b"PK\x03\x05").replace(b"PK\x03\x05", b"PK\x03\x04", 1))
    refused(path, "damaged", "download it again")
    for name in ("array.npy", "data.pkl", "a/b/data.pkl"):
        with zipfile.ZipFile(path, "w") as file:
            file.writestr(name, b"\x80\x02}.")
        refused(path, "none of torch")
    refused(archive(path, dict_of({"a": lit(1), "b": lit("x")})), "no tensors by name", "a, b")
    refused(archive(path, b"K\x05"), "one int")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(read, "_HEADER_LIMIT", 100)
        refused(archive(path, lit("x" * 200), compression=zipfile.ZIP_DEFLATED), "sensible size")


@pytest.mark.parametrize("content, words", [
    (b"", ("empty", "download")), (b"PK", ("cut off after 2 bytes",)), (b"PK\x05\x06" + b"\0" * 18, ("empty zip",)),
    (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.", ("before version 1.6", "newer torch")),
    (pickle.dumps({"a": [1, 2, 3]}), ("bare pickle", "safetensors")),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 605157884\n", ("git-lfs pointer", "git lfs pull")),
    (b"\n<!DOCTYPE html><html><body>Sign in to continue</body></html>", ("web page", "download")),
    (b"\x89HDF\r\n\x1a\n" + b"\0" * 50, ("HDF5",)), (b"\x1f\x8b" + b"\0" * 50, ("gzip", "gunzip")),
    (b"these are no weights but a note", ("neither", "these ar"))])
def test_other_files_are_named(tmp_path, content, words):
    (tmp_path / "w.pt").write_bytes(content)
    refused(tmp_path / "w.pt", *words)


def test_a_missing_file(tmp_path):
    (tmp_path / "ViT-B-32.pt").write_bytes(b"")
    refused(tmp_path / "ViT-B32.pt", "no file", "'ViT-B-32.pt'")
    refused(tmp_path / "m.index.json", "no file")


# ---- safetensors -------------------------------------------------------------------------------

CODES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32", "int16": "I16",
         "int8": "I8", "uint8": "U8", "bool": "BOOL", "uint16": "U16", "uint32": "U32", "uint64": "U64"}


def safetensors(path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def write(path, arrays):
    ends = list(itertools.accumulate((x.nbytes for x in arrays.values()), initial=0))
    header = {"__metadata__": {"format": "pt"}} | {
        name: {"dtype": CODES[str(x.dtype)], "shape": x.shape, "data_offsets": [ends[i], ends[i + 1]]}
        for i, (name, x) in enumerate(arrays.items())}
    return safetensors(path, header, b"".join(x.tobytes() for x in arrays.values()))


def test_safetensors_of_every_dtype(tmp_path):
    expected = {d: np.abs(values(12, d)).reshape(3, 2, 2) if d != "bool" else values(12, d) for d in CODES}
    expected |= {"empty": np.empty((0, 4), BF16), "scalar": np.float16(3).reshape(())}
    same(read.open_file(write(tmp_path / "m.bin", {"odd": values(3, "int8"), **expected})), {"odd": values(3, "int8"), **expected})
    refused(write(tmp_path / "none.safetensors", {}), "no tensors")
    same(read.open_file(write(tmp_path / "ddp.safetensors", {"module.w": values(3)})), {"w": values(3)})


def entry(low, high, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [low, high]}


@pytest.mark.parametrize("header, data, word", [
    ({"a": entry(0, 8)}, 7, "by its header"), ({"a": entry(0, 8)}, 9, "by its header"),
    ({"a": entry(0, 8), "b": entry(4, 12)}, 12, "b begins at byte 4"),
    ({"a": entry(0, 8), "b": entry(12, 20)}, 20, "b begins at byte 12"), ({"a": entry(8, 16)}, 16, "begins at byte 8"),
    ({"a": entry(0, 8, (3,))}, 8, "takes 12 bytes"), ({"a": entry(8, 0)}, 8, "takes 8 bytes"), ({"a": entry(-8, 0)}, 8, "takes 8 bytes"),
    ({"a": entry(0, 8.0)}, 8, "takes 8 bytes"), ({"a": entry(0, 8, (-2,))}, 8, "no shape"),
    ({"a": entry(0, 8, (2**40, 2**40))}, 8, "no shape"),
    ({"a": entry(0, 0, (0, 2**60))}, 0, "no shape"), ({"a": entry(0, 8, (True, 2))}, 8, "no shape"),
    ({"a": entry(0, 8, dtype="F33")}, 8, "'F33'; nearest"),
    ({"a": entry(0, 8, dtype=[1])}, 8, "dtype"), ({"a": {"dtype": "F32", "shape": [2]}}, 8, "lies at"),
    ({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, 8, "no shape"),
    ({"a": 5}, 0, "dtype"), (b'["a", "b"]', 0, "neither"), (b'{"a": ', 0, "JSON"), (b'{"a": \xff}', 0, "JSON"), (b"{" * 9, 0, "JSON"),
    (b'{"a":' * 50_000, 0, "JSON"), (b'{"a": %b, "a": %b}' % ((json.dumps(entry(0, 8)).encode(),) * 2), 8, "given twice")])
def test_safetensors_that_do_not_add_up(tmp_path, header, data, word):
    refused(safetensors(tmp_path / "x.safetensors", header, b"\0" * data), word)


def test_safetensors_cut_in_the_header(tmp_path):
    path = write(tmp_path / "x.safetensors", {"a": values(4)})
    whole = path.read_bytes()
    path.write_bytes(whole[:60])
    refused(path, "cut off", "has 60")
    path.write_bytes(whole[:8])
    refused(path, "cut off")
    refused(safetensors(path, {"a": entry(0, 8)}, b"\0" * 8, length=2**31), "cut off")


# ---- folders and shards ------------------------------------------------------------------------

def index(path, weights):
    path.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weights}))
    return path


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_shards(tmp_path, kind):
    expected = {"module.a": values(3), "module.b": values(4, seed=1), "module.c": values(5, seed=2)}
    for i, names in enumerate((("module.a", "module.c"), ("module.b",))):
        part, parts = {n: expected[n] for n in names}, Parts()
        if kind == "bin":
            archive(tmp_path / f"part-{i}.bin", dict_of({n: parts(x) for n, x in part.items()}), parts.data)
        else:
            write(tmp_path / f"part-{i}.safetensors", part)
    first, second = f"part-0.{kind}", f"part-1.{kind}"
    path = index(tmp_path / f"model.{kind}.index.json", {"module.a": first, "module.b": second, "module.c": first})
    whole = {n.removeprefix("module."): x for n, x in expected.items()}
    same(read.open_weights(tmp_path), whole)
    same(read.open_weights(path), whole)
    assert read.files_of(tmp_path) == read.files_of(path) == [path, tmp_path / first, tmp_path / second]
    refused(index(path, {"module.a": second}), second, "lacks the tensor 'module.a'")
    refused(index(path, {"module.a": first, "d": "part-7.bin"}), "part-7.bin", "not beside it")


@pytest.mark.parametrize("shard", ["../x.safetensors", "/etc/passwd", "a/b.safetensors", "..\\x", "..", ".", "", "https://h/x", 5, None,
                                   "m.safetensors.index.json"])
def test_shards_outside_the_folder(tmp_path, shard):
    (tmp_path / "in").mkdir()
    write(tmp_path / "x.safetensors", {"a": values(3)})
    refused(index(tmp_path / "in" / "m.safetensors.index.json", {"a": shard}), "same folder")
    for text in ("{}", "[]", '{"weight_map": {}}', '{"weight_map": ["a"]}', "{"):
        (tmp_path / "in" / "m.safetensors.index.json").write_text(text)
        refused(tmp_path / "in")


def test_which_file_of_a_folder(tmp_path):
    def put(name):
        parts, x = Parts(), np.frombuffer(name.encode(), np.uint8)
        if name.endswith(".safetensors"):
            write(tmp_path / name, {"w": x})
        else:
            archive(tmp_path / name, dict_of({"w": parts(x)}), parts.data)

    def taken(prefer=()):
        found = read.open_weights(tmp_path, prefer)["w"].read().tobytes().decode()
        assert read.files_of(tmp_path, prefer) == [tmp_path / found]
        return found

    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "deeper.safetensors").mkdir()
    refused(tmp_path, "holds no weights", "config.json")
    put("weights.pt")
    assert taken() == "weights.pt"
    put("rng.pth")
    refused(tmp_path, "several", "rng.pth, weights.pt")
    put("pytorch_model.bin")
    assert taken() == "pytorch_model.bin"
    put("open_clip_pytorch_model.bin")
    refused(tmp_path, "several", "open_clip_pytorch_model.bin, pytorch_model.bin")
    put("any.safetensors")
    assert taken() == "any.safetensors"
    put("other.safetensors")
    refused(tmp_path, "several", "any.safetensors, other.safetensors")
    put("model.safetensors")
    assert taken() == "model.safetensors"
    put("open_clip_model.safetensors")
    refused(tmp_path, "several", "model.safetensors, open_clip_model.safetensors")
    assert taken(("no.bin", "open_clip_model.safetensors", "model.safetensors")) == "open_clip_model.safetensors"
    assert taken(("weights.pt",)) == "weights.pt"
