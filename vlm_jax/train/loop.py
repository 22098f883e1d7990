"""The loop: step, flush metrics, evaluate, save - in this order, and nothing on the step's path waits for the host."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax

from vlm_jax.train.goodput import Clock
from vlm_jax.train.metrics import MetricsLog
from vlm_jax.train.state import TrainState


class NonFiniteError(RuntimeError):
    """Loss or gradient was not finite for too many steps in a row."""


ECHO = 1.0      # seconds: schedulers and supervising parents repeat a signal


class StopRequest:
    """SIGTERM, SIGINT and SIGUSR1 ask for an orderly stop at the next step; a second signal, a second later, acts at once.

    ``agreed``: of several processes, when they stop together (``processes.Stop``).
    """

    def __init__(self, agreed: Any = None):
        self.agreed = agreed
        self.signal: int | None = None
        self.asked = 0.0
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            names = [n for n in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, n)]
            self.previous = {getattr(signal, n): signal.signal(getattr(signal, n), self._receive) for n in names}
        return self

    def _receive(self, number, frame):
        if self.signal is None:
            self.signal, self.asked = number, time.monotonic()
            if self.agreed:
                self.agreed.signal = number
        elif time.monotonic() - self.asked > ECHO:
            signal.signal(number, self.previous.get(number) or signal.SIG_DFL)
            signal.raise_signal(number)

    def __exit__(self, *exc):
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def due(self, step: int) -> bool:
        """Whether the run stops after ``step``; False lets the next one begin."""
        if self.agreed is None:
            return self.signal is not None
        due = self.agreed.due(step)
        self.signal = self.agreed.signal if due else self.signal
        return due


def resident_mb() -> float | None:
    """Resident memory of this process in MB, where the system tells."""
    try:
        with open("/proc/self/statm") as f:
            return int(f.read().split()[1]) * 4096 / 1e6
    except OSError:
        return None


def fit(state: TrainState, step_fn: Callable[[TrainState, Mapping[str, jax.Array]], tuple[TrainState, Mapping]],
        batches: Iterable[tuple[int, Mapping[str, Any]]], *, place: Callable[[Mapping], Mapping], start: int, total: int,
        batch_size: int, log: MetricsLog, log_every: int, learning_rate: Callable[[int], float],
        save: Callable[[int, TrainState], None], save_every: int, evaluate: Callable[[int, TrainState], Mapping[str, float]],
        evaluate_at: Callable[[int], bool], on_bad: Callable[[int], None], max_bad_steps: int,
        stop: StopRequest, progress: Callable[[Mapping[str, Any], int], None], clock: Clock | None = None) -> tuple[TrainState, int]:
    """Runs steps ``start`` .. ``total`` and returns the state and the step reached.

    batches: yields (step index, host batch). Waiting for it counts as data wait when the device has
    finished the step before by the time the batch is there: until then it loses nothing. Metrics of step s are read after step s+1 is under way. Returns early, saved,
    when ``stop`` is due. ``clock`` is told what the time goes to. Raises NonFiniteError after ``max_bad_steps`` bad steps in a row.
    """
    pending: list[tuple[int, Mapping[str, jax.Array]]] = []
    since, waited, counted = time.perf_counter(), 0.0, start
    clock = clock or Clock()

    def flush(upto: int) -> None:
        nonlocal pending, since, waited, counted
        ready = [(s, m) for s, m in pending if s <= upto]
        pending = [(s, m) for s, m in pending if s > upto]
        if not ready:
            return
        values = jax.device_get([m for _, m in ready])
        now = time.perf_counter()
        speed = {"time/images_per_s": (ready[-1][0] - counted) * batch_size / max(now - since, 1e-9),
                 "time/data_wait": waited / max(now - since, 1e-9)}
        memory = resident_mb()
        if memory is not None:
            speed["time/resident_mb"] = memory
        since, waited, counted = now, 0.0, ready[-1][0]
        clock.record(counted)
        for (step, _), metrics in zip(ready, values):
            row = {"step": step, **{k: float(v) for k, v in metrics.items()}}
            bad = int(row.pop("bad_steps"))
            if bad:
                on_bad(step)
                row["bad_steps"] = bad
            if step % log_every == 0 or step in (1, total) or bad:
                row["lr"] = float(learning_rate(step - 1))
                if step == ready[-1][0]:
                    row.update(speed)
                log.write(row)
                progress(row, step)
            if bad >= max_bad_steps:
                log.flush()
                raise NonFiniteError(f"loss or gradient was not finite for {bad} steps in a row, up to step {step} "
                                     f"(loss {row['loss']}, grad_norm {row['grad_norm']}); optim.max_bad_steps={max_bad_steps}")

    step, stream = start, iter(batches)
    while True:
        asked = time.perf_counter()
        clock.now(f"reading the batch of step {step + 1}")
        try:
            index, batch = next(stream)
        except StopIteration:
            break
        if step == start or metrics["loss"].is_ready():
            clock.move(time.perf_counter() - asked, "step", "data wait")
            waited += time.perf_counter() - asked if step > start else 0.0
        clock.now(f"running step {step + 1}")
        state, metrics = step_fn(state, place(batch))
        step = index + 1
        pending.append((step, metrics))
        stopping = step < total and stop.due(step)
        saving = stopping or step >= total or step % save_every == 0
        if saving or evaluate_at(step):
            flush(step)
        elif (step - 1) % log_every == 0:
            flush(step - 1)
        if evaluate_at(step):
            with clock.spend("evaluate"):
                log.write({"step": step, **evaluate(step, state)})
        if saving:
            with clock.spend("save"):
                log.flush()
                save(step, state)
            clock.record(step)
        if saving or evaluate_at(step):
            since = time.perf_counter()
        if stopping or step >= total:
            break
    return state, step
