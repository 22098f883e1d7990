"""Runs of ``main`` in processes of their own, one or two of them, for tests that harm them."""

import contextlib
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

from vlm_jax.train.metrics import read_rows

ROOT = pathlib.Path(__file__).resolve().parents[2]
FOLDER = "1_pretrain"
STARTED = []      # ended with the test that started them (conftest.py)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start(workdir, *args, devices=1, system="clip", program=("-m", "vlm_jax.main"), **environment):
    """One process with ``devices`` virtual devices; ``args`` are flags, or "optim.lr=1" for a field of the stage."""
    flags = [a if a.startswith("--") else f"--config.stages.pretrain.{a}" for a in args]
    own = {"XLA_FLAGS": os.environ["XLA_FLAGS"].replace("device_count=8", f"device_count={devices}"), "PYTHONPATH": str(ROOT)}
    STARTED.append(subprocess.Popen([sys.executable, *program, f"--config=tests/tiny.py:{system}", f"--workdir={workdir}", "--platform=cpu",
                                     *flags], cwd=ROOT, env={**os.environ, **own, **environment}, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
    return STARTED[-1]


def start_two(workdir, *args, devices=4, folders=None, **options):
    """Two processes of one run; --hang_timeout=20: noticed soon, by the standards of a busy machine. folders: of each one's temporary files."""
    port = free_port()
    own = [{"TMPDIR": str(folder)} for folder in folders] if folders else [{}, {}]
    return [start(workdir, f"--coordinator=127.0.0.1:{port}", "--num_processes=2", f"--process_id={i}", "--rendezvous_timeout=150",
                  "--hang_timeout=20", *args, devices=devices, **options, **own[i]) for i in (0, 1)]


def finish(processes, timeout=300):
    """[(exit code, output)]"""
    try:
        outputs = [p.communicate(timeout=timeout)[0] for p in processes]
        return [(p.returncode, o) for p, o in zip(processes, outputs, strict=True)]
    finally:
        for p in processes:
            p.kill()


def child_of(process):
    """The process that trains, where a parent watches over it."""
    for entry in pathlib.Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(entry.read_text().rpartition(")")[2].split()[1]) == process.pid:
                return int(entry.parent.name)
        except OSError:
            continue
    raise AssertionError("no child")


def readers_of(pid):
    found = []
    for entry in pathlib.Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(entry.read_text().rpartition(")")[2].split()[1]) == pid and "vlm_jax.data.reader" in (entry.parent / "cmdline").read_text():
                found.append(int(entry.parent.name))
        except OSError:
            continue
    return found


def rows(workdir, timings=False):
    """What metrics.jsonl says so far."""
    path = pathlib.Path(workdir) / FOLDER / "metrics.jsonl"
    found = read_rows(path) if path.exists() else []
    return found if timings else [{k: v for k, v in row.items() if not k.startswith("time/")} for row in found]


def wait_for_step(workdir, step, processes, seconds=200):
    deadline = time.monotonic() + seconds
    while not any(row["step"] >= step and "loss" in row for row in rows(workdir)):
        assert time.monotonic() < deadline and all(p.poll() is None for p in processes), [p.communicate()[0][-3000:] for p in processes if p.poll() is not None]
        time.sleep(0.02)


def losses(workdir):
    return {row["step"]: row["loss"] for row in rows(workdir) if "loss" in row}


def copy_unfinished(source, target, last):
    """A copy of a finished run whose checkpoints after step ``last`` and DONE are gone."""
    shutil.copytree(source, target)
    (target / FOLDER / "DONE").unlink()
    for entry in (target / FOLDER / "checkpoints").iterdir():
        if int(entry.name) > last:
            shutil.rmtree(entry)


def send(pid, number=signal.SIGKILL):
    """A signal, to a process that may be gone."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
