"""Where the time of a run goes, kills included; traces of steps."""

import json

import jax.numpy as jnp
import pytest

from vlm_jax import profiling
from vlm_jax.train import goodput


@pytest.fixture
def hands(monkeypatch):
    """A clock that the test moves."""
    class Hands:
        at = 1000.0

        def time(self):
            return self.at

        perf_counter = time
    hands = Hands()
    monkeypatch.setattr(goodput, "time", hands)
    return hands


def spend(clock, hands, kind, seconds):
    with clock.spend(kind):
        hands.at += seconds


def test_every_second_belongs_to_the_innermost_kind(tmp_path, hands):
    hands.at += 2
    clock = goodput.Clock(tmp_path / "g.jsonl", began=1000.0)
    with clock.spend("step"):
        hands.at += 3
        spend(clock, hands, "save", 1)
        clock.move(0.5, "step", "data wait")
    hands.at += 1
    clock.record(1)
    assert goodput.read(tmp_path / "g.jsonl")[0]["seconds"] == {**dict.fromkeys(goodput.KINDS, 0.0), "initialise": 3, "step": 2.5, "save": 1, "data wait": 0.5}


def test_what_a_kill_lost_is_counted_once(tmp_path, hands):
    path = tmp_path / "g.jsonl"
    first = goodput.Clock(path)
    first.stage = "a"
    first.record(0, resumed=0)
    spend(first, hands, "step", 4)
    spend(first, hands, "save", 1)
    first.record(10)                        # saved
    spend(first, hands, "step", 6)
    first.record(25)                        # killed
    with path.open("a") as file:
        file.write('{"start": 1000, "at"')
    path.write_text(path.read_text() + "\n")
    hands.at += 100
    second = goodput.Clock(path)
    second.stage = "a"
    spend(second, hands, "restore", 2)
    second.record(10, resumed=10)
    spend(second, hands, "step", 9)
    second.record(40)
    found = goodput.total(goodput.read(path))
    assert found["step"] == 13 and found["save"] == 1 and found[goodput.LOST] == 6 and found["restore"] == 2
    assert found["away"] == 100 and found["starts"] == 2
    assert goodput.line(found).startswith("goodput 59.1% of 22.0 s in 2 start(s); 100 s between them: restore 2.0 s (9.1%), step 13.0 s")
    third = goodput.Clock(path)             # the next stage loses nothing of this one
    third.stage = "b"
    third.record(0, resumed=0)
    assert goodput.total(goodput.read(path))[goodput.LOST] == 6


def test_which_steps_are_traced():
    assert profiling.steps("") is None and profiling.steps("5") == (0, 5) and profiling.steps("10-12") == (10, 12)
    for wrong in ("0", "5-4", "a", "-3"):
        with pytest.raises(ValueError, match="nearest: '5'"):
            profiling.steps(wrong)


def test_a_trace_is_written_for_the_steps_asked_for(tmp_path):
    said = []
    step = profiling.traced(lambda state, batch: (state + batch, {}), (7, 8), 5, tmp_path / "profile", said.append)
    state, there = jnp.zeros(3), []
    for _ in range(4):
        state, _ = step(state, 1.0)
        there.append(bool(list((tmp_path / "profile").rglob("*.xplane.pb"))))
    assert there == [False, False, True, True] and "steps 7 to 8" in said[0] and float(state[0]) == 4
    assert profiling.traced(step, None, 0, tmp_path, said.append) is step
    assert json.dumps(said)
