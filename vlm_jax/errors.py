"""Errors that a user caused and can mend: every one names the field, the value and the nearest valid one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class ConfigError(ValueError):
    """A config or its data cannot be used; the message names the field. Exit code 43."""


def nearest(value: Any, valid: Iterable[Any], show: int = 24) -> str:
    """An error's tail: the valid name closest to ``value``, and the first ``show`` valid names."""
    valid = [str(v) for v in valid]
    close = difflib.get_close_matches(str(value), valid, n=1, cutoff=0.0)
    listed = ", ".join(valid[:show]) + (f", and {len(valid) - show} more" if len(valid) > show else "")
    return (f"; nearest: {close[0]!r}" if close else "") + f" (valid: {listed or 'none'})"
