"""Two processes of one run: what they compute, how they stop, and what the one does when the other is gone."""

import json
import os
import re
import signal
import time

import pytest

import vlm_jax
from tests.faults import runs
from tests.tiny import get_config
from vlm_jax.run import EXIT_PREEMPTED
from vlm_jax.train import checkpoint

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs POSIX")
SLOW = pytest.mark.slow


def config(rules, steps=6, **evals):
    whole = get_config("clip")
    stage = whole.stages.pretrain
    stage.rules, stage.steps = rules, steps
    stage.evals.retrieval.update(evals)
    return whole


def flags(whole):
    stage = whole.stages.pretrain
    return [f"rules={stage.rules}", f"steps={stage.steps}", f"evals.retrieval.every={stage.evals.retrieval.every}"]


def close(mine, other):
    assert mine.keys() == other.keys()
    for step in mine:
        assert mine[step] == pytest.approx(other[step], rel=1e-6), step


@SLOW
def test_two_processes_stop_together_and_one_goes_on(tmp_path):
    """SIGTERM to one of two: both save after the same step, and a single process ends where it would have ended alone."""
    whole = config("fsdp_tp", every=2)
    alone = vlm_jax.train(whole, tmp_path / "alone")
    two = runs.start_two(tmp_path / "two", *flags(whole))
    runs.wait_for_step(tmp_path / "two", 1, two)
    two[1].send_signal(signal.SIGTERM)
    two[1].send_signal(signal.SIGTERM)      # an echo, as of a scheduler that tells the parent and the child
    for code, output in runs.finish(two):
        assert code == EXIT_PREEMPTED, output[-3000:]
    reached, _ = checkpoint.latest_good(tmp_path / "two" / runs.FOLDER / "checkpoints")
    assert 1 <= reached < 6 and max(runs.losses(tmp_path / "two")) == reached
    assert vlm_jax.train(whole, tmp_path / "two").done
    close(runs.losses(tmp_path / "two"), runs.losses(tmp_path / "alone"))
    scores = [{k: v for k, v in row.items() if k.startswith("retrieval/")} for row in runs.rows(tmp_path / "two") if row["step"] == 0 and "loss" not in row]
    assert scores == [{k: v for k, v in row.items() if k.startswith("retrieval/")} for row in alone.rows if row["step"] == 0 and "loss" not in row]
    starts = json.loads((tmp_path / "two" / runs.FOLDER / "provenance.json").read_text())["starts"]
    assert [s["step"] for s in starts] == [0, reached]


@SLOW
@pytest.mark.parametrize("rules", ["dp", "fsdp", "fsdp_tp"])
def test_two_processes_train_and_resume_as_one(tmp_path, rules):
    whole = config(rules)
    alone = vlm_jax.train(whole, tmp_path / "alone")
    runs.copy_unfinished(tmp_path / "alone", tmp_path / "resumed", 4)
    for name in ("fresh", "resumed"):
        for code, output in runs.finish(runs.start_two(tmp_path / name, *flags(whole), "evals.retrieval.examples=13")):
            assert code == 0, output[-3000:]
        close(runs.losses(tmp_path / name), runs.losses(tmp_path / "alone"))
    fresh = [json.loads(line) for line in (tmp_path / "fresh" / runs.FOLDER / "predictions" / "retrieval.jsonl").read_text().splitlines()]
    assert fresh and alone.scores
    whole.stages.pretrain.evals.retrieval.examples = 13      # does not divide over anything
    vlm_jax.train(whole, tmp_path / "alone", eval_only=True)
    found = json.loads((tmp_path / "alone" / runs.FOLDER / "eval.json").read_text())
    done = json.loads((tmp_path / "fresh" / runs.FOLDER / "DONE").read_text())["scores"]
    assert done == {k: v for k, v in found.items() if k != "step"}
    reference = [json.loads(line) for line in (tmp_path / "alone" / runs.FOLDER / "predictions" / "retrieval.jsonl").read_text().splitlines()]
    assert [item["key"] for item in fresh] == [item["key"] for item in reference] if "key" in reference[0] else len(fresh) == len(reference)


LONG = ("steps=100000", "checkpoint.every=2", "log.every=1")


@SLOW
@pytest.mark.parametrize("victim,number,said", [(1, signal.SIGKILL, "process 1 on .* given no sign of life"),
                                                (0, signal.SIGKILL, "process 0 at 127.0.0.1:.* is gone"),
                                                (1, signal.SIGSTOP, "process 1 on .* given no sign of life"),
                                                (0, signal.SIGSTOP, "process 0 at 127.0.0.1:.* has not answered")])
def test_a_process_that_is_gone_is_named_with_stacks_and_44(tmp_path, victim, number, said, record_property):
    two = runs.start_two(tmp_path, *LONG, devices=2)
    runs.wait_for_step(tmp_path, 4, two)
    child = runs.child_of(two[victim])
    began = time.monotonic()
    runs.send(child, number)
    other = two[1 - victim]
    output, _ = other.communicate(timeout=100)
    record_property("seconds_to_notice", round(time.monotonic() - began, 1))
    runs.send(child)
    runs.finish(two)
    assert other.returncode == 44, output[-3000:]
    assert re.search(said, output), output[-3000:]
    assert "Thread 0x" in output and "run.py" in output
    for code, output in runs.finish(runs.start_two(tmp_path, *LONG[1:], f"steps={max(runs.losses(tmp_path)) + 4}", devices=2)):
        assert code == 0, output[-3000:]


@SLOW
def test_a_reader_that_dies_in_one_process_ends_both(tmp_path):
    two = runs.start_two(tmp_path, *LONG, "data.workers=1", devices=2)
    runs.wait_for_step(tmp_path, 4, two)
    reader, = runs.readers_of(runs.child_of(two[1]))
    runs.send(reader)
    (first, said), (second, own) = runs.finish(two)
    assert second == 1 and f"reader process {reader}" in own
    assert first == 44 and "process 1 ended with exit code 1: RuntimeError: reader process" in said, said[-3000:]


@SLOW
def test_a_reader_that_hangs_is_named(tmp_path):
    """One process, asked to look after itself: its reader is stopped, and main says what it waits for."""
    one = runs.start(tmp_path, *LONG, "data.workers=1", "--hang_timeout=3")
    runs.wait_for_step(tmp_path, 4, [one])
    reader, = runs.readers_of(one.pid)
    runs.send(reader, signal.SIGSTOP)
    assert one.wait(100) == 44
    deadline = time.monotonic() + 30
    runs.send(reader, signal.SIGCONT)      # it holds our end of main's output, too
    output, _ = one.communicate(timeout=30)
    assert "reading the batch of step" in output and "pipeline.py" in output, output[-3000:]
    while os.path.exists(f"/proc/{reader}") and open(f"/proc/{reader}/stat").read().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.05)


@SLOW
def test_processes_with_other_configs_are_refused(tmp_path):
    port = runs.free_port()
    two = [runs.start(tmp_path, f"--coordinator=127.0.0.1:{port}", "--num_processes=2", f"--process_id={i}", f"optim.lr={i + 1}e-3", devices=1) for i in (0, 1)]
    for code, output in runs.finish(two):
        assert code == 43 and "process 1 has another config" in output, output[-3000:]
    assert not (tmp_path / runs.FOLDER).exists()
