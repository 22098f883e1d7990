"""Outputs of a frozen tower, computed once and kept in files: what training reads instead of images.

A store has a row for each image that a run reads, however many samples are about it. It lies in a folder named by all that its
values follow from (data, weights, resolution): another run with the same finds them there, and one with others never does.
"""

from __future__ import annotations

import json
import pathlib
import shutil
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from vlm_jax.data.bad import BadSample
from vlm_jax.data.fingerprint import digest
from vlm_jax.data.sources import key_of

MISSING, THERE, BAD = 0, 1, 2
RESERVE = 1 << 30      # bytes of the disk that are left alone


class FeatureStore:
    """arrays: name -> [rows, ...], as ``kept`` (name -> shape of a row, dtype) says. Sample ``index`` has the row ``row_of(index)``; ``state`` [rows] says which rows
    are there. Opened again, and in other processes, it reads the same files. Raises ValueError where the disk has no room."""

    def __init__(self, folder: pathlib.Path, keys: Mapping[int, str], kept: Mapping[str, tuple[tuple[int, ...], str]], told: Mapping[str, Any]):
        self.folder, self.kept, self.told, self.marked = folder, dict(kept), dict(told), {}
        self.indices = np.array(sorted(keys), np.int64)
        names: dict[str, int] = {}
        self.rows = np.array([names.setdefault(keys[int(i)], len(names)) for i in self.indices], np.int64)
        self.count = len(names)
        self._open()

    @staticmethod
    def folder_of(root: pathlib.Path, told: Mapping[str, Any]) -> pathlib.Path:
        """Where the store lies whose values follow from ``told``."""
        return root / digest(told)[:16]

    @property
    def bytes(self) -> int:
        """Of all rows."""
        return self.count * sum(int(np.prod(shape)) * np.dtype(dtype).itemsize for shape, dtype in self.kept.values())

    def _open(self) -> None:
        new = not (self.folder / "state.npy").exists()
        if new:
            self.folder.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.folder).free - RESERVE
            if self.bytes > free:
                raise ValueError(f"features of {self.count:,} images take {self.bytes / 1e9:.1f} GB, the disk of {self.folder} has {max(0, free) / 1e9:.1f} GB to give; "
                                 "nearest: another folder, or none")
        self.arrays = {name: self._map(name, (self.count, *shape), dtype, new) for name, (shape, dtype) in self.kept.items()}
        self.state = self._map("state", (self.count,), "uint8", new)      # the last: it says that the others are there
        if new:
            (self.folder / "features.json").write_text(json.dumps(self.told, indent=1))

    def _map(self, name: str, shape: tuple[int, ...], dtype: str, new: bool) -> np.ndarray:
        # numpy's files know no bfloat16: it is kept as the integers of its bits
        bits = "uint16" if dtype == "bfloat16" else dtype
        array = np.lib.format.open_memmap(self.folder / f"{name}.npy", "w+" if new else "r+", np.dtype(bits) if new else None, shape if new else None)
        if array.shape != shape or array.dtype != bits:
            raise ValueError(f"{self.folder / name}.npy holds {array.dtype} {array.shape} instead of {bits} {shape}; remove the folder")
        return array.view(ml_dtypes.bfloat16) if dtype == "bfloat16" else array

    def row_of(self, index: int) -> int:
        """The row of a sample, -1 for one that the store was not made for."""
        at = int(np.searchsorted(self.indices, index))
        return int(self.rows[at]) if at < len(self.indices) and self.indices[at] == index else -1

    def missing(self) -> dict[int, int]:
        """row -> a sample of it, of those that are not there yet."""
        first = dict(zip(self.rows[::-1].tolist(), self.indices[::-1].tolist(), strict=True))
        return {row: first[row] for row in np.flatnonzero(self.state == MISSING).tolist()}

    def put(self, rows: Sequence[int], values: Mapping[str, np.ndarray]) -> None:
        """Writes rows; ``commit`` makes them count."""
        for name, value in values.items():
            self.arrays[name][rows] = value
        self.marked |= dict.fromkeys(rows, THERE)

    def leave_out(self, rows: Iterable[int]) -> None:
        """Of images that cannot be read."""
        self.marked |= dict.fromkeys(rows, BAD)

    def commit(self) -> None:
        """Says which rows are there, once their values are on the disk."""
        for array in self.arrays.values():
            array.flush()
        self.state[list(self.marked)] = list(self.marked.values())
        self.state.flush()
        self.marked = {}

    def check(self, index: int) -> None:
        """Raises BadSample for a sample without features."""
        row = self.row_of(index)
        if row < 0 or self.state[row] != THERE:
            raise BadSample("no_features", "its image could not be read when features were computed" if row >= 0 else "it was not among those computed")

    def take(self, indices: Sequence[int]) -> dict[str, np.ndarray]:
        """The features of samples: name -> [n, ...]."""
        rows = [self.row_of(int(i)) for i in indices]
        return {name: np.asarray(array[rows]) for name, array in self.arrays.items()}

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("arrays", "state")}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()


def keys_of(source: Any, indices: np.ndarray) -> dict[int, str]:
    """index -> the key of its image, of the samples that a run reads."""
    return {int(i): key_of(source, int(i)) for i in np.unique(indices)}
