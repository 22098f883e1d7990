"""Reader processes: the batches of threads, errors that arrive, deaths that are noticed, and no process left behind."""

import itertools
import json
import os
import signal
import subprocess
import sys

import pytest

from tests.test_data_pipeline import OPTIONS, collect, picture, same, tar_of
from vlm_jax.data.bad import BadSample
from vlm_jax.data.pipeline import train_batches
from vlm_jax.data.reader import Readers
from vlm_jax.data.sources import open_source
from vlm_jax.data.tokenizers import train
from vlm_jax.errors import ConfigError


@pytest.fixture(scope="module")
def tokenizer():
    return train([f"number {i} of the cats" for i in range(100)], 200)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tar with bad samples, a jsonl and a csv file of images."""
    folder = tmp_path_factory.mktemp("data")
    tar_of(folder / "s.tar", [(f"k{i:02}", b"<html>" if i % 5 == 0 else picture(i), "number" + " of the cats" * (i % 3)) for i in range(40)])
    for i in range(10):
        (folder / f"{i}.png").write_bytes(picture(i))
    (folder / "d.jsonl").write_text("".join(json.dumps({"image": f"{i}.png", "text": [f"number {i}", "cats"]}) + "\n" for i in range(10)))
    (folder / "d.csv").write_text("image,text\n" + "".join(f"{i}.png,number {i}\n" for i in range(10)))
    return folder


def test_processes_make_the_batches_of_threads(folder, tokenizer):
    sources = [open_source(f"{kind}:{folder}/{name}") for kind, name in (("tars", "s.tar"), ("jsonl", "d.jsonl"), ("csv", "d.csv"))]
    mixture = open_source([*sources, open_source("scenes:train")])
    mixture.weights = [4.0, 1.0, 1.0, 1.0]
    options = dict(augment="random_resized_crop|flip", bad_budget=1.0, start_step=5)
    with train_batches(mixture, tokenizer, **{**OPTIONS, **options}, workers=2) as batches:
        made = list(itertools.islice(batches, 8))
        counts = batches.ledger.counts.total(), batches.ledger.seen
    with train_batches(mixture, tokenizer, **{**OPTIONS, **options}, threads=0) as batches:
        assert same(made, list(itertools.islice(batches, 8)))
        assert counts == (batches.ledger.counts.total(), batches.ledger.seen) and counts[0] > 0
    assert all(array.flags.writeable for _, batch in made for array in batch.values())
    cropped = collect(sources[0], tokenizer, 4, workers=1, buckets=(6, 9), bad_budget=1.0)      # the lengths' file is opened there
    assert same(cropped, collect(sources[0], tokenizer, 4, threads=0, buckets=(6, 9), bad_budget=1.0))


ANSWERS = """
import os, sys
import numpy as np
import vlm_jax.data.pipeline
from vlm_jax.data.bad import BadSample

class Odd(Exception):
    def __init__(self, one, two):
        super().__init__(f"{one} and {two}")

def answer(step):
    if step == 0:
        print("what libraries print is no answer")
        return [m for m in ("jax", "grain") if m in sys.modules], np.arange(6)[::2], np.zeros((0, 3))
    if step == 1:
        raise BadSample("short_read", "k1")
    if step == 2:
        raise Odd("this", "that")
    os._exit(3)
"""


def test_answers_errors_and_deaths(tmp_path, monkeypatch):
    (tmp_path / "answers_of_readers.py").write_text(ANSWERS)
    monkeypatch.syspath_prepend(str(tmp_path))      # the path of the parent holds in the process
    import answers_of_readers
    readers = Readers(answers_of_readers.answer, 1)
    loaded, numbers, empty = readers(0)
    assert loaded == [] and numbers.tolist() == [0, 2, 4] and empty.shape == (0, 3)
    for stop in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):     # Ctrl-C and a preemption reach the whole group: the parent decides
        readers.processes[0].send_signal(stop)
    with pytest.raises(BadSample, match="^short_read: k1") as caught:
        readers(1)
    assert "answers_of_readers.py" in caught.value.__notes__[0]
    with pytest.raises(RuntimeError, match="Odd: this and that"):       # one that cannot be pickled
        readers(2)
    readers.check()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="workers=1, ended with exit status 3"):
            readers(3)
    readers.close()
    readers.close()


def test_a_killed_process_stops_the_run(folder, tokenizer):
    with train_batches(open_source(f"tars:{folder}/s.tar"), tokenizer, **OPTIONS, workers=1, bad_budget=1.0) as batches:
        next(batches)
        process, = batches.readers.processes
        process.kill()
        process.wait()
        with pytest.raises(RuntimeError, match=f"reader process {process.pid}, one of workers=1, was killed by signal 9 .out of memory"):
            next(batches)


def test_what_cannot_be_sent_is_refused():
    with pytest.raises(ConfigError, match="workers=1: the source or tokenizer cannot be sent.*workers=0 reads in threads"):
        Readers(lambda step: step, 1)


SCRIPT = """
import itertools, sys
from vlm_jax.data import pipeline, sources, tokenizers

source, tokenizer = sources.open_source(sys.argv[1]), tokenizers.load("scenes")
options = dict(batch=4, size=16, length=8, augment="squash", seed=0, bad_budget=1.0)

class Own:
    def __len__(self):
        return 9

try:
    next(pipeline.train_batches(Own(), tokenizer, **options, workers=1))
except ValueError as error:
    print(error)
batches = pipeline.train_batches(source, tokenizer, **options, workers=2)
print([step for step, _ in itertools.islice(batches, 5)], *(p.pid for p in batches.readers.processes), flush=True)
sys.stdin.read()
"""


def test_an_unguarded_script_runs_and_no_process_outlives_it(folder, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    script = subprocess.Popen([sys.executable, str(tmp_path / "script.py"), f"tars:{folder}/s.tar"], stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
                              env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    refused, answer = script.stdout.readline(), script.stdout.readline()
    assert "Own" in refused and "importable, not defined in the script" in refused
    assert answer.startswith("[0, 1, 2, 3, 4] "), script.communicate()
    script.kill()
    _, errors = script.communicate(timeout=60)      # ends when the last process that holds its stderr is gone
    assert errors == ""
    for pid in answer.split("] ")[1].split():
        if os.path.exists(f"/proc/{pid}/stat"):     # at most a zombie, where nobody reaps orphans
            with open(f"/proc/{pid}/stat") as file:
                assert file.read().rpartition(")")[2].split()[0] == "Z"
