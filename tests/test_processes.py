"""What processes say of each other, over a store of this process: who is silent, who keeps the others waiting, where all stop. Two that train."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import jax
import numpy as np
import pytest

from tests.tiny import tiny
from tests.two import two_processes
from vlm_jax import partitioning, processes
from vlm_jax import stage as stages
from vlm_jax.train import init
from vlm_jax.train.step import make_train_step


class Store(dict):
    """The calls of JAX's coordination service that the watchdog makes."""

    def key_value_set(self, key, value, allow_overwrite=False):
        if key in self and not allow_overwrite:
            raise RuntimeError("ALREADY_EXISTS")
        self[key] = value

    def key_value_dir_get(self, prefix):
        return [(k, v) for k, v in list(self.items()) if k.startswith(prefix)]


class Ended(BaseException):
    pass


@pytest.fixture
def group(monkeypatch):
    """Watchdogs of three processes that nobody started: ``round(now)`` lets each speak once and returns who ended, and how."""
    store = Store()
    dogs = [processes.Watchdog(10, store, index, 3, "a:1") for index in range(3)]
    ended = {}

    def end(self, code, message):
        ended.setdefault(self.index, (code, message))
        raise Ended

    monkeypatch.setattr(processes.Watchdog, "_end", end)
    monkeypatch.setattr(processes.time, "sleep", lambda seconds: None)

    def turn(now, silent=()):
        for dog in reversed(dogs):      # process 0 speaks last
            if dog.index not in silent and dog.index not in ended:
                try:
                    dog._speak(now, 0.0)
                except Ended:
                    pass
        return dict(ended)

    return dogs, turn


def test_a_silent_process_is_named_by_all(group):
    dogs, turn = group
    for dog in dogs:
        dog.notice("running step 3", True)
    assert turn(0) == {} and turn(5) == {}
    for now in (10, 14):
        assert turn(now, silent=[1]) == {}
    turn(16, silent=[1])
    ended = turn(17, silent=[1])
    assert set(ended) == {0, 2} and {code for code, _ in ended.values()} == {44}
    assert "process 1 on" in ended[0][1] and "'running step 3'" in ended[0][1] and ended[0] == ended[2]


def test_a_process_that_never_came_is_silent_too(group):
    _, turn = group
    turn(1, silent=[2])
    turn(12, silent=[2])
    assert "process 2 has given no sign" in turn(13, silent=[2])[0][1]


def test_who_keeps_the_others_waiting_is_named(group):
    dogs, turn = group
    for dog in dogs:
        dog.notice("reading the batch of step 7", True)
    for dog in dogs[:2]:
        dog.notice("running step 7", True)
    turn(0)
    assert turn(9) == {} and turn(14) == {}
    ended = turn(16)
    assert ended[0][0] == 44 and "process 2 on" in ended[0][1] and "(reading the batch of step 7), 2 other process(es) wait for it" in ended[0][1]


def test_outside_of_training_there_is_more_patience_and_slow_steps_give_more_time(group):
    dogs, turn = group
    for dog in dogs:
        dog.notice("running step 1", True)
    dogs[1].notice("evaluate", False)
    dogs[0].notice("evaluate", False)
    dogs[2].notice("compile", False)
    for now in range(0, 300, 5):
        assert turn(now) == {}
    assert "compile" in turn(15 * processes.PATIENCE + 1)[0][1]
    slow = processes.Watchdog(10)
    slow.pause = 8.0
    assert slow._stuck({0: [0, 1, True, 8.0, "running", "h"]}, 0) == "" and slow._stuck({0: [1, 1, True, 8.0, "running", "h"]}, 39) == ""
    assert slow._stuck({0: [2, 1, True, 8.0, "running", "h"]}, 41)


@pytest.mark.parametrize("code,others", [(43, 43), (1, 44), (137, 44)])
def test_an_error_of_one_ends_all_with_its_words(group, code, others):
    dogs, turn = group
    dogs[2]._say("left/2", [code, "no such tar"])
    turn(1, silent=[2])
    ended = turn(2, silent=[2])
    assert ended[1] == ended[0] == (others, f"process 2 ended with exit code {code}: no such tar")


def test_who_is_done_is_not_missed(group):
    dogs, turn = group
    turn(0)
    dogs[2]._say("left/2", [0, ""])
    assert turn(100, silent=[2]) == {} and turn(101, silent=[2]) == {}


def test_all_stop_after_the_step_that_the_farthest_has_begun(group):
    dogs, turn = group
    stops = [dog.stop_together(10, 100) for dog in dogs]
    assert not stops[0].due(11) and not stops[0].due(12) and not stops[1].due(11)      # begun: 13, 12, 11
    stops[2].signal = signal.SIGTERM
    turn(1)
    turn(2)
    turn(3)
    assert [stop.signal for stop in stops] == [signal.SIGTERM] * 3
    reached = []
    for stop, step in zip(stops, (13, 12, 11), strict=True):
        while not stop.due(step):
            step += 1
        reached.append(step)
    assert reached == [13, 13, 13]


def test_no_step_begins_between_the_question_and_the_answer():
    stop, began = processes.Stop(0, 50), []

    def train():
        step = 1
        while not stop.due(step):
            step += 1
            began.append(step)
            time.sleep(0.001)

    thread = threading.Thread(target=train)
    thread.start()
    while len(began) < 5:
        time.sleep(0.001)
    begun = stop.close(15)
    stop.decide(begun + 3)
    thread.join(10)
    assert began[-1] == begun + 3


def test_a_stop_never_goes_beyond_the_end(group):
    dogs, turn = group
    stop = dogs[0].stop_together(4, 5)
    assert not stop.due(4) and stop.close(15) == 5


PARENT = """
    import os, signal, sys, time
    from vlm_jax import processes
    processes.supervise("127.0.0.1:1")
    print(os.getpid(), flush=True)
    if sys.argv[1] == "signal":
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(42))
        time.sleep(60)
    if sys.argv[1] == "sleep":
        time.sleep(60)
    os.abort() if sys.argv[1] == "abort" else sys.exit(int(sys.argv[1]))
"""


def parent(what):
    return subprocess.Popen([sys.executable, "-c", textwrap.dedent(PARENT), what], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs POSIX")
def test_a_parent_passes_codes_and_signals_on_and_turns_an_abort_into_44():
    started = {what: parent(what) for what in ("0", "43", "abort", "signal", "sleep")}
    for what, process in started.items():
        child = int(process.stdout.readline())
        if what == "signal":
            process.terminate()
        if what == "sleep":
            process.kill()
            for _ in range(1000):
                if not os.path.exists(f"/proc/{child}") or "State:\tZ" in open(f"/proc/{child}/status").read():
                    break
                time.sleep(0.01)
            else:
                raise AssertionError("the child lives on")
        _, errors = process.communicate(timeout=60)
        assert process.returncode == {"0": 0, "43": 43, "abort": 44, "signal": 42, "sleep": -9}[what], errors
        if what == "abort":
            assert "process 0 at 127.0.0.1:1 is gone" in errors


def losses_of(mesh):
    """Of three steps of a tiny CLIP; each process reads its own rows of a batch."""
    stage, rng = stages.resolve(tiny("clip").stages.pretrain, "pretrain"), np.random.default_rng(0)
    given = {path: np.float32(0.1) * rng.standard_normal(leaf.shape, np.float32) for path, leaf in sorted(stage.plan.shapes.items())}
    source, losses = stage.open(stage.data.train), []
    with partitioning.use(mesh):
        tx, _ = stages.make_optimizer(stage)
        state = init.create(stage.system, stage.plan, tx, mesh, jax.random.key(0), stage.spec, given)
        step = jax.jit(make_train_step(stage.system, tx, jax.random.key(1)))
        with stage.train_batches(source, 0, 3, None, mesh) as batches:
            for _, batch in batches:
                state, metrics = step(state, partitioning.place(batch, mesh, stage.data.batch))
                losses.append(float(metrics["loss"]))
    return losses


def one_of_two(process, port, pipe):
    os.environ["XLA_FLAGS"] = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")
    processes.join(f"127.0.0.1:{port}", 2, process)
    pipe.send(losses_of(partitioning.make_mesh("fsdp")))


def test_two_processes_have_the_losses_of_one():
    """On the same mesh of two devices. ``tests/faults`` does it with whole runs, which it stops, kills and resumes."""
    with two_processes(one_of_two, preload="vlm_jax.stage") as two:
        alone = losses_of(partitioning.make_mesh("fsdp", devices=jax.devices()[:2]))
        for losses in two.answers():
            assert losses == pytest.approx(alone, rel=1e-6)
    assert len(set(alone)) == 3
