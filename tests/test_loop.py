"""The loop alone, over a step that is a few lines: what is logged, when it waits, when it gives up."""

import time

import jax
import jax.numpy as jnp
import pytest

from vlm_jax.train import loop
from vlm_jax.train.metrics import MetricsLog, read_rows


def run(tmp_path, batches, step_fn, total, stop=None, saved=None, **options):
    log = MetricsLog(tmp_path)
    options = {"log_every": 2, "save_every": 4, "max_bad_steps": 3, "on_bad": lambda s: None, "start": 0, **options}
    result = loop.fit(0, step_fn, batches, place=lambda b: b, total=total, batch_size=1, log=log, learning_rate=lambda s: 0.1,
                      save=lambda step, state: (saved if saved is not None else []).append(step), evaluate=lambda step, state: {"x/y": 1.0},
                      evaluate_at=lambda s: s == total, stop=loop.StopRequest() if stop is None else stop, progress=lambda row, step: None, **options)
    log.close()
    return result, read_rows(tmp_path / "metrics.jsonl")


def step(state, batch):
    return state + 1, {"loss": jnp.float32(batch), "grad_norm": jnp.float32(1), "bad_steps": jnp.int32(0)}


def test_rows_and_saves_come_at_their_steps(tmp_path):
    saved = []
    (state, reached), rows = run(tmp_path, ((i, i) for i in range(10)), step, 10, saved=saved)
    assert (state, reached, saved) == (10, 10, [4, 8, 10])
    assert [r["step"] for r in rows] == [1, 2, 4, 6, 8, 10, 10] and rows[-1] == {"step": 10, "x/y": 1.0}
    assert [r["loss"] for r in rows[:-1]] == [0, 1, 3, 5, 7, 9]


def test_a_stop_saves_at_the_next_step(tmp_path):
    saved, stop = [], loop.StopRequest()

    def stopping(state, batch):
        if batch == 2:
            stop.signal = 15
        return step(state, batch)
    (_, reached), _ = run(tmp_path, ((i, i) for i in range(10)), stopping, 10, stop=stop, saved=saved)
    assert reached == 3 and saved == [3]


def test_bad_steps_in_a_row_end_the_run(tmp_path):
    bad = [0, 1, 0, 1, 2, 3, 0, 0]
    seen = []

    def failing(state, batch):
        return state + 1, {"loss": jnp.float32("nan" if bad[batch] else 1), "grad_norm": jnp.float32(1),
                           "bad_steps": jnp.int32(bad[batch])}
    with pytest.raises(loop.NonFiniteError, match="3 steps in a row, up to step 6"):
        run(tmp_path, ((i, i) for i in range(8)), failing, 8, on_bad=seen.append)
    assert seen == [2, 4, 5, 6]
    assert [r["step"] for r in read_rows(tmp_path / "metrics.jsonl") if "bad_steps" in r] == [2, 4, 5, 6]


def test_waiting_for_data_counts_when_the_device_is_idle(tmp_path):
    def slow():
        for i in range(8):
            time.sleep(0.05)
            yield i, i
    _, rows = run(tmp_path, slow(), step, 8)
    assert all(r["time/data_wait"] > 0.5 for r in rows if "time/data_wait" in r and r["step"] > 2)

    @jax.jit
    def busy(x):
        return jax.lax.fori_loop(0, 60, lambda _, y: y @ y / 500, x)

    x = jnp.ones((500, 500))
    jax.block_until_ready(busy(x))

    def working(state, batch):
        return state + 1, {"loss": busy(x).mean(), "grad_norm": jnp.float32(1), "bad_steps": jnp.int32(0)}

    def prompt():
        for i in range(8):
            time.sleep(0.001)
            yield i, i
    (tmp_path / "busy").mkdir()
    _, rows = run(tmp_path / "busy", prompt(), working, 8)
    assert all(r["time/data_wait"] < 0.5 for r in rows if "time/data_wait" in r)


def test_rows_that_the_disk_refuses_wait_for_it(tmp_path):
    log = MetricsLog(tmp_path)
    log.write({"step": 1})
    file, log.file = log.file, Full(log.file)
    log.write({"step": 2})
    log.write({"step": 3})
    assert read_rows(tmp_path / "metrics.jsonl") == [{"step": 1}]
    log.file = file
    log.close()
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1, 2, 3]


class Full:
    """A file that takes three bytes."""

    def __init__(self, file):
        self.file, self.fileno, self.truncate = file, file.fileno, file.truncate

    def write(self, data):
        return self.file.write(data[:3])
