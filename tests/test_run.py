"""Whole runs: resume after kills bitwise, signals, refusals, fallbacks. Real processes, real signals, real files."""

import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from vlm_jax.train import checkpoint
from vlm_jax.train.metrics import read_rows

ROOT = pathlib.Path(__file__).resolve().parents[1]
STEPS = 12


def command(workdir, *args, system="clip"):
    return [sys.executable, "-m", "vlm_jax.main", f"--config=tests/tiny.py:{system}", f"--workdir={workdir}", "--platform=cpu",
            f"--config.stages.pretrain.steps={STEPS}", *args]


def environment():
    return {**os.environ, "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1"), "PYTHONPATH": str(ROOT)}


def start(workdir, *args, **kwargs):
    return subprocess.Popen(command(workdir, *args, **kwargs), cwd=ROOT, env=environment(), text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def finish(workdir, *args, **kwargs):
    process = start(workdir, *args, **kwargs)
    output, _ = process.communicate(timeout=300)
    return process.returncode, output


def stage_of(workdir):
    return pathlib.Path(workdir) / "1_pretrain"


def end_of(workdir):
    """The last checkpoint's arrays and the metric rows without timings."""
    folder = stage_of(workdir)
    step, _ = checkpoint.latest_good(folder / "checkpoints")
    leaves = checkpoint.load_params(folder / "checkpoints", collections=("params",))
    slots = checkpoint.load_params(folder / "checkpoints", collections=("opt_state",))
    rows = [{k: v for k, v in row.items() if not k.startswith("time/")} for row in read_rows(folder / "metrics.jsonl")]
    return step, {**leaves, **slots}, rows


def same(a, b):
    assert a[0] == b[0] == STEPS
    assert a[1].keys() == b[1].keys()
    for path in a[1]:
        assert np.array_equal(a[1][path], b[1][path]), path
    assert a[2] == b[2]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run") / "unbroken"
    code, output = finish(workdir)
    assert code == 0, output[-3000:]
    return workdir, end_of(workdir), output


def test_a_run_killed_between_its_last_save_and_done_evaluates_again(unbroken, tmp_path):
    shutil.copytree(unbroken[0], tmp_path / "run")
    folder = stage_of(tmp_path / "run")
    scores = json.loads((folder / "DONE").read_text())["scores"]
    (folder / "DONE").unlink()
    shutil.rmtree(folder / "report")
    code, output = finish(tmp_path / "run")
    assert code == 0, output[-3000:]
    assert scores and json.loads((folder / "DONE").read_text())["scores"] == scores
    assert (folder / "report" / "report.html").exists()


def test_a_run_leaves_what_the_readme_promises(unbroken):
    workdir, (step, _, rows), output = unbroken
    folder = stage_of(workdir)
    for name in ("config.json", "metrics.jsonl", "checkpoints", "report/report.html", "report/curves.png", "tokenizer", "DONE",
                 "predictions/retrieval.jsonl"):
        assert (folder / name).exists(), name
    assert [r["step"] for r in rows if "loss" in r] == list(range(1, STEPS + 1))
    assert all({"con", "loss", "lr", "grad_norm"} <= set(r) for r in rows if "loss" in r)
    scores = rows[-1]
    assert {"retrieval/text_to_image/R@1", "retrieval/image_to_text/R@1"} <= set(scores)
    for said in ("trained", "mesh:", "memory forecast", "captions:", "example", "ids", "left"):
        assert said in output, said


def test_the_same_command_again_does_nothing(unbroken):
    workdir, before, _ = unbroken
    code, output = finish(workdir)
    assert code == 0 and "done at step" in output
    same(before, end_of(workdir))


def test_killed_at_random_moments_it_ends_bitwise_the_same(unbroken, tmp_path):
    workdir, chance = tmp_path / "killed", random.Random(0)
    metrics = stage_of(workdir) / "metrics.jsonl"
    for kill in range(3):
        process = start(workdir)
        want = (kill + 1) * 3
        deadline = time.time() + 120
        while time.time() < deadline and process.poll() is None:
            if metrics.exists() and any(r["step"] >= want for r in read_rows(metrics)):
                break
            time.sleep(0.002)
        time.sleep(chance.random() * 0.05)      # saves run every other step: many a kill falls into one
        process.send_signal(signal.SIGKILL)
        process.communicate()
    code, output = finish(workdir)
    assert code == 0, output[-3000:]
    assert "resumed at step" in output
    same(unbroken[1], end_of(workdir))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_exits_42(unbroken, tmp_path, number):
    rare = "--config.stages.pretrain.checkpoint.every=1000"
    for attempt in range(5):        # twelve steps may all be done before the signal arrives
        workdir = tmp_path / f"stopped{attempt}"
        process, metrics = start(workdir, rare), stage_of(workdir) / "metrics.jsonl"
        while process.poll() is None and not (metrics.exists() and metrics.read_text()):
            time.sleep(0.001)
        process.send_signal(number)
        output, _ = process.communicate(timeout=120)
        if process.returncode:
            break
    assert process.returncode == 42, output[-3000:]
    assert "the same command resumes" in output
    code, output = finish(workdir, rare)
    assert code == 0 and "resumed at step" in output
    same(unbroken[1], end_of(workdir))


def test_a_changed_config_is_refused_key_by_key(unbroken):
    code, output = finish(unbroken[0], "--config.stages.pretrain.optim.lr=0.5", "--config.stages.pretrain.data.batch=16")
    assert code == 43
    assert "optim.lr: 0.003 -> 0.5" in output and "data.batch: 8 -> 16" in output
    same(unbroken[1], end_of(unbroken[0]))


def test_two_runs_in_one_directory_the_second_refuses(unbroken):
    import filelock
    with filelock.FileLock(str(unbroken[0] / ".lock")):
        code, output = finish(unbroken[0])
    assert code == 43 and "in use by another run" in output


def test_damaged_checkpoints_fall_back_and_say_why(unbroken, tmp_path):
    workdir = tmp_path / "damaged"
    shutil.copytree(unbroken[0], workdir)
    folder = stage_of(workdir)
    (folder / "DONE").unlink()
    newest = folder / "checkpoints" / str(STEPS)
    victim = max((f for f in newest.rglob("*") if f.is_file() and f.name != "manifest.json"), key=lambda f: f.stat().st_size)
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    code, output = finish(workdir)
    assert code == 0, output[-3000:]
    assert f"checkpoint {STEPS} is left out" in output and "hash" in output and f"resumed at step {STEPS - 2}" in output
    same(unbroken[1], end_of(workdir))
    for manifest in (folder / "checkpoints").glob("*/manifest.json"):
        manifest.write_text(manifest.read_text()[:-20])
    (folder / "DONE").unlink()
    code, output = finish(workdir)
    assert code == 43 and "every checkpoint" in output


def test_eval_only_scores_the_newest_checkpoint(unbroken):
    workdir, (_, _, rows), _ = unbroken
    code, output = finish(workdir, "--eval_only")
    assert code == 0, output[-3000:]
    found = json.loads((stage_of(workdir) / "eval.json").read_text())
    assert found["retrieval/text_to_image/R@1"] == rows[-1]["retrieval/text_to_image/R@1"]
    code, output = finish(workdir.parent / "nothing_here", "--eval_only")
    assert code == 43 and "no checkpoint" in output


def test_a_loss_that_stays_infinite_stops_the_run(tmp_path):
    code, output = finish(tmp_path / "nan", "--config.stages.pretrain.optim.lr=1e38",
                          "--config.stages.pretrain.optim.max_bad_steps=3", "--config.stages.pretrain.optim.clip_norm=1e38")
    assert code == 43, output[-3000:]
    assert "not finite for 3 steps" in output
    bad = [json.loads(line) for line in (stage_of(tmp_path / "nan") / "bad_batches.jsonl").read_text().splitlines()]
    assert len(bad) >= 3 and len(bad[0]["keys"]) == 8 and bad[0]["keys"][0].startswith("train/")


def test_frozen_parameters_are_written_once_and_come_back(tmp_path):
    workdir = tmp_path / "frozen"
    half = ["--config.stages.pretrain.trainable=('text.*','logit_scale')", "--config.stages.pretrain.frozen_dtype=bfloat16"]
    code, output = finish(workdir, *half, "--config.stages.pretrain.steps=4")
    assert code == 0, output[-3000:]
    folder = stage_of(workdir)
    (folder / "DONE").unlink()
    shutil.rmtree(folder / "checkpoints" / "4")
    code, output = finish(workdir, *half, "--config.stages.pretrain.steps=4")
    assert code == 0 and "resumed at step 2" in output, output[-3000:]
    stored = checkpoint.read_manifest(folder / "checkpoints" / "4")["leaves"]
    assert not any("image" in path for path in stored)
    assert checkpoint.read_manifest(folder / "frozen" / "0")["leaves"]["frozen/image/blocks/attn/query/kernel"]["dtype"] == "bfloat16"
    import vlm_jax
    assert vlm_jax.load(workdir).embed_image(np.zeros((48, 48, 3), np.uint8)).shape == (1, 16)
