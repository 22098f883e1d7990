"""Writes safetensors files: a length, a JSON header, the tensors' bytes (huggingface/safetensors, "Format")."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping

import ml_dtypes
import numpy as np

NAMES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32", "int16": "I16",
         "int8": "I8", "uint8": "U8", "bool": "BOOL"}


def dtype_of(name: str) -> np.dtype:
    """numpy's dtype by name, bfloat16 included."""
    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)


SHARD = 5 * 10**9      # bytes of a file, as transformers cuts them


def write_safetensors(path: pathlib.Path, arrays: Mapping[str, np.ndarray], shard: int = 0) -> str:
    """Tensors by name in one file, or, above ``shard`` bytes (0: any number), in several with an index. Returns what to call the result."""
    groups: list[dict[str, np.ndarray]] = [{}]
    for name in sorted(arrays):
        if shard and groups[-1] and sum(x.nbytes for x in groups[-1].values()) + arrays[name].nbytes > shard:
            groups.append({})
        groups[-1][name] = arrays[name]
    if len(groups) == 1:
        _write(path, arrays)
        return path.name
    names = [f"{path.stem}-{i + 1:05}-of-{len(groups):05}{path.suffix}" for i in range(len(groups))]
    index = dict(metadata=dict(total_size=sum(x.nbytes for x in arrays.values())), weight_map={})
    for name, group in zip(names, groups, strict=True):
        _write(path.with_name(name), group)
        index["weight_map"] |= dict.fromkeys(group, name)
    path.with_name(f"{path.name}.index.json").write_text(json.dumps(index, indent=1))
    return f"{len(groups)} files {names[0]}, ..."


def _write(path: pathlib.Path, arrays: Mapping[str, np.ndarray]) -> None:
    """The header is padded to a multiple of 8 bytes, so that tensors lie aligned."""
    header, offset = {"__metadata__": {"format": "pt"}}, 0       # "pt": transformers asks for it
    for name in sorted(arrays):
        x = arrays[name]
        header[name] = {"dtype": NAMES[str(x.dtype)], "shape": list(x.shape), "data_offsets": [offset, offset + x.nbytes]}
        offset += x.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in sorted(arrays):
            file.write(np.asarray(arrays[name], order="C").tobytes())
