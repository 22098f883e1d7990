"""How many tokens captions have: the column that length buckets are chosen from.

A batch's bucket must be known before its rows are read, and be the same to every process that reads a part of them: it
follows from (seed, step) and this column alone. Tars keep the column beside their index, one file for each tar, tokenizer
and caption field; ``python -m vlm_jax.data.tars 'GLOB' --tokenizer=SPEC`` builds it ahead of time. Other
stored sources are read once when a run starts; a source that is computed (scenes) has no column.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from vlm_jax.data.bad import BadSample
from vlm_jax.data.clean import Clean
from vlm_jax.data.record import RecordSource
from vlm_jax.data.sources import Mixture
from vlm_jax.data.split import Split
from vlm_jax.data.tars import TarSource
from vlm_jax.data.tokenizers import Tokenizer

MOST = np.iinfo(np.uint16).max


class Lengths:
    """Tokens of each sample's longest caption, begin and end included; 0 where none can be read. Parts may be memory-mapped."""

    def __init__(self, parts: Sequence[np.ndarray]):
        self.parts = list(parts)
        self._start = np.array([0, *itertools.accumulate(len(p) for p in parts)])

    def __reduce__(self):      # a file is opened again, not sent
        return _opened, ([p.filename if isinstance(p, np.memmap) else p for p in self.parts],)

    def __len__(self) -> int:
        return int(self._start[-1])

    def __getitem__(self, index: np.ndarray) -> np.ndarray:
        """int64 [n] sample numbers -> uint16 [n]."""
        index = np.asarray(index)
        which = np.searchsorted(self._start, index, "right") - 1
        out = np.empty(index.shape, np.uint16)
        for part in np.unique(which):
            rows = which == part
            out[rows] = self.parts[part][index[rows] - self._start[part]]
        return out


def _opened(parts: Sequence[Any]) -> Lengths:
    return Lengths([p if isinstance(p, np.ndarray) else np.memmap(p, np.uint16, "r") for p in parts])


def token_lengths(source: Any, tokenizer: Tokenizer, text_clean: str = "") -> Lengths | None:
    """The column of a source, None where it has none (see above), of texts cleaned as training reads them (``clean.Clean``)."""
    if isinstance(source, Mixture):
        parts = [token_lengths(part, tokenizer, text_clean) for part in source.parts]
        return None if any(p is None for p in parts) else Lengths([x for p in parts for x in p.parts])
    if isinstance(source, Split) and isinstance(source.source, TarSource):      # the tars' own files serve both sides
        return Lengths([token_lengths(source.source, tokenizer, text_clean)[source.rows]])
    if isinstance(source, TarSource):
        return Lengths([_of_tar(source, shard, tokenizer, text_clean) for shard in range(len(source.paths))])
    if isinstance(source, (RecordSource, Split)):
        return Lengths([_count(source, range(len(source)), tokenizer, text_clean)])
    return None


def _count(source: RecordSource | Split, rows: range, tokenizer: Tokenizer, text_clean: str) -> np.ndarray:
    out, clean = np.zeros(len(rows), np.uint16), Clean(text_clean, training=True)
    for at, i in enumerate(rows):
        try:
            out[at] = min(MOST, max((len(tokenizer.encode(clean(text))) for text in source.read_text(i)), default=0))
        except BadSample:      # told of, and replaced, when it is read
            continue
    return out


def _of_tar(source: TarSource, shard: int, tokenizer: Tokenizer, text_clean: str) -> np.ndarray:
    """A tar's column from its file, which is made where it is missing; memory-mapped where it could be written."""
    rows = source.rows_of(shard)
    told = repr((source.stamp(shard), str(source.captions), tokenizer.fingerprint(), *filter(None, [text_clean])))
    places = [f"{place}.{hashlib.sha256(told.encode()).hexdigest()[:16]}.len" for place in source.index_places(shard)]
    for place in places:
        if os.path.isfile(place) and os.path.getsize(place) == 2 * len(rows):
            return np.memmap(place, np.uint16, "r") if len(rows) else np.zeros(0, np.uint16)
    column = _count(source, rows, tokenizer, text_clean)
    for place in places:
        temporary = f"{place}.{os.getpid()}.{threading.get_ident()}.tmp"
        try:
            os.makedirs(os.path.dirname(place) or ".", exist_ok=True)
            column.tofile(temporary)
            os.replace(temporary, place)
            break
        except OSError:      # the next place, or memory
            continue
    return column
