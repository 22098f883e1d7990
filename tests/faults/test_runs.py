"""One process whose disk refuses, whose data is short, or that goes on elsewhere."""

import resource
import signal
import time

import numpy as np
import pytest

from tests.faults import runs
from vlm_jax.data import pipeline, sources, tokenizers
from vlm_jax.train import checkpoint

SLOW = pytest.mark.slow
LONG = ("steps=100000", "checkpoint.every=2", "log.every=1")


def of_kind(output, word):
    return [line for line in output.splitlines() if word in line]


@SLOW
def test_a_disk_that_refuses_for_a_while_costs_saves_alone(tmp_path):
    """The kernel refuses every file beyond 16 kB, as a full disk does: training goes on, and so do saves once it lets them."""
    one = runs.start(tmp_path, *LONG, "checkpoint.every=40", devices=1)
    runs.wait_for_step(tmp_path, 42, [one])
    _, hard = resource.prlimit(one.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(one.pid, resource.RLIMIT_FSIZE, (16384, hard))
    at = max(runs.losses(tmp_path))
    while f"{tmp_path}/{runs.FOLDER}/checkpoints/" not in (said := one.stdout.readline()) or "1 failed save(s) in a row" not in said:
        assert said, "it ended"
    resource.prlimit(one.pid, resource.RLIMIT_FSIZE, (hard, hard))
    runs.wait_for_step(tmp_path, at + 150, [one])
    one.send_signal(signal.SIGTERM)
    (code, output), = runs.finish([one])
    assert code == 42, output[-3000:]
    losses = runs.losses(tmp_path)
    assert list(losses) == list(range(1, max(losses) + 1))      # rows that had to wait are there too
    assert checkpoint.latest_good(tmp_path / runs.FOLDER / "checkpoints")[0] == max(losses)


@SLOW
def test_a_disk_that_stays_full_stops_the_run_and_keeps_what_was_good(tmp_path):
    one = runs.start(tmp_path, *LONG, "checkpoint.every=20")
    saved = tmp_path / runs.FOLDER / "checkpoints"
    deadline = time.monotonic() + 200
    while not list(saved.glob(f"*/{checkpoint.MANIFEST}")):      # a busy machine may be many steps past the first save before it is done
        assert time.monotonic() < deadline and one.poll() is None
        time.sleep(0.02)
    good, _ = checkpoint.latest_good(saved)
    resource.prlimit(one.pid, resource.RLIMIT_FSIZE, (16384, resource.RLIM_INFINITY))
    (code, output), = runs.finish([one])
    assert code == 1 and of_kind(output, "4 failed save(s) in a row"), output[-3000:]
    assert good is not None and checkpoint.latest_good(saved)[0] >= good


@SLOW
def test_a_second_signal_ends_at_once_and_spoils_nothing(tmp_path):
    one = runs.start(tmp_path, *LONG, "checkpoint.every=1000")
    runs.wait_for_step(tmp_path, 6, [one])
    one.send_signal(signal.SIGTERM)
    time.sleep(1.2)
    one.send_signal(signal.SIGTERM)
    (code, output), = runs.finish([one])
    assert code in (42, -signal.SIGTERM), output[-3000:]
    (code, output), = runs.finish([runs.start(tmp_path, "checkpoint.every=1000", f"steps={max(runs.losses(tmp_path)) + 3}")])
    assert code == 0, output[-3000:]


@SLOW
def test_a_run_goes_on_on_other_devices_under_other_rules(tmp_path):
    (code, output), = runs.finish([runs.start(tmp_path / "one", "steps=6")])
    assert code == 0, output[-3000:]
    for devices, rules in ((2, "dp"), (4, "fsdp"), (8, "fsdp_tp")):
        runs.copy_unfinished(tmp_path / "one", tmp_path / rules, 4)
        (code, output), = runs.finish([runs.start(tmp_path / rules, "steps=6", f"rules={rules}", devices=devices)])
        assert code == 0 and "resumed at step 4" in output, output[-3000:]
        mine, other = runs.losses(tmp_path / rules), runs.losses(tmp_path / "one")
        assert mine.keys() == other.keys() and all(mine[s] == pytest.approx(other[s], rel=1e-6) for s in mine)


def test_a_batch_that_does_not_divide_over_the_mesh_is_refused(tmp_path):
    import vlm_jax
    from tests.tiny import tiny
    whole = tiny("clip", batch=12)
    with pytest.raises(ValueError, match="batch=12 does not divide over 8 devices; nearest: 16"):
        vlm_jax.train(whole, tmp_path)
    assert not (tmp_path / runs.FOLDER / "config.json").exists()


class Few:
    """Three samples, for a batch of eight and more readers than that."""

    name = "few"

    def __len__(self):
        return 3

    def __getitem__(self, index):
        return {"image": np.full((8, 8, 3), index, np.uint8), "text": [f"a red {index}"], "key": str(index)}

    def text(self, index):
        return [f"a red {index}"]


def test_less_data_than_a_batch_and_fewer_samples_than_readers():
    options = dict(batch=8, size=8, length=8, augment="squash", seed=0, stop_step=3)
    with pipeline.train_batches(Few(), tokenizers.load("scenes"), threads=6, **options) as batches:
        whole = [batch for _, batch in batches]
    assert len(whole) == 3
    seen = np.concatenate([batch["image"][:, 0, 0, 0] for batch in whole])
    assert all(sorted(seen[i:i + 3]) == [0, 1, 2] for i in range(0, 24, 3))      # every epoch is exact
    parts = []
    for mine in (np.array([0, 1, 2, 7]), np.array([3, 4, 5, 6])):      # as two processes read them
        with pipeline.train_batches(Few(), tokenizers.load("scenes"), threads=1, mine=mine, **options) as batches:
            parts.append([batch for _, batch in batches])
    for step, batch in enumerate(whole):
        for key in batch:
            assert np.array_equal(batch[key][[0, 1, 2, 7]], parts[0][step][key]) and np.array_equal(batch[key][3:7], parts[1][step][key]), key


def test_a_source_without_lengths_has_no_buckets_among_processes():
    with pytest.raises(ValueError, match="no column of text lengths.*nearest: buckets=()"):
        pipeline.train_batches(Few(), tokenizers.load("scenes"), batch=8, size=8, length=8, augment="squash", seed=0, buckets=(4,), mine=np.arange(4))


def test_every_sample_is_evaluated_once_by_some_process():
    tokenizer, mine = tokenizers.load("scenes"), (np.array([0, 2]), np.array([1, 3]))
    found = []
    for rows in mine:
        with pipeline.eval_batches(Few(), tokenizer, batch=4, size=8, length=8, augment="squash", mine=rows) as batches:
            found += [(batch["mask"].tolist(), [one["key"] for one in meta]) for batch, meta in batches]
    assert found == [([True, True], ["0", "2"]), ([True, False], ["1"])]
    assert sources.name_of(Few()) == "few"
