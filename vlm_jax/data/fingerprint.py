"""Telling data sets apart: a hash of what a source holds that copying it elsewhere does not change.

A source may have a method ``fingerprint() -> str`` of its own (tars: names, sizes and the index; tables: their bytes; scenes: what
the generator draws). It tells data sets apart at the cost of opening them; it does not read every image.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np

SAMPLED = 64


def fingerprint(source: Any) -> str:
    """SHA-256, as hex. Sources without a method of their own: their length and the keys of 64 samples spread over them."""
    if hasattr(source, "fingerprint"):
        return source.fingerprint()
    return digest(len(source), [source.key(i) if hasattr(source, "key") else i for i in spread(len(source))])


def describe(spec: Any, source: Any) -> dict[str, Any]:
    """What a record keeps of a data set: ``spec`` as given (open sources by their names), samples, fingerprint."""
    parts = spec if isinstance(spec, (tuple, list)) else [spec]
    names = [part if isinstance(part, str) else getattr(part, "name", type(part).__name__) for part in parts]
    return {"spec": "; ".join(names), "samples": len(source), "fingerprint": fingerprint(source)}


def digest(*parts: Any) -> str:
    """SHA-256 of values that JSON can hold."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def spread(length: int, count: int = SAMPLED) -> list[int]:
    """At most ``count`` numbers below ``length``, the first and the last among them."""
    return sorted({int(i) for i in np.linspace(0, length - 1, min(count, length)).round()}) if length else []
