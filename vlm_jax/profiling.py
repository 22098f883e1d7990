"""Traces of some training steps (``--profile=STEPS``), in the form that xprof and TensorBoard's profile plugin read."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Callable
from typing import Any

import jax

AFTER = 3      # steps of a start that are not traced where only a number is asked for: the first ones compile and fill queues


def steps(text: str) -> tuple[int, int] | None:
    """"100-104" -> (100, 104); "5" -> five steps after the third of this start, as (0, 5); "" -> None. Raises ValueError."""
    if not text:
        return None
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)", text)
    first, last = (int(match[1] or 0), int(match[2])) if match else (0, 0)
    if last < 1 or first > last:
        raise ValueError(f"steps {text!r} are not FIRST-LAST or a number of steps from 1 on; nearest: '5'")
    return first, last


def traced(step_fn: Callable, wanted: tuple[int, int] | None, start: int, folder: pathlib.Path, say: Callable[[str], None]) -> Callable:
    """``step_fn`` with the wanted steps of a run that goes on from ``start`` traced into ``folder``."""
    if wanted is None:
        return step_fn
    first, last = wanted if wanted[0] else (start + AFTER + 1, start + AFTER + wanted[1])
    step = start

    def run(state: Any, batch: Any) -> Any:
        nonlocal step
        step += 1
        if step == first:
            jax.block_until_ready(state)      # what was in flight is no part of it
            jax.profiler.start_trace(folder)
        out = step_fn(state, batch)
        if first <= step == last:
            jax.block_until_ready(out)
            jax.profiler.stop_trace()
            say(f"steps {first} to {last} are traced in {folder}: xprof --logdir={folder}")
        return out

    return run
