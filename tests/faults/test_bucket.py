"""A run of one process, and of two, whose work directory is a bucket, killed while it sends."""

import json
import os
import re
import time

import numpy as np
import pytest

from tests import bucket
from tests.faults import runs
from vlm_jax import stage
from vlm_jax.train.metrics import read_rows

pytestmark = pytest.mark.slow
OFTEN = ("-c", "import sys; from vlm_jax import bucket, main; bucket.EVERY = 0.1; sys.exit(main.main(sys.argv))")


def start(address, *args, **options):
    return runs.start(address, *args, program=OFTEN, **options)


def copy(server, target):
    """What the bucket holds under "a/", as a folder."""
    for key, data in list(server.objects.items()):
        file = target / key.removeprefix("a/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)


@pytest.mark.parametrize("store", bucket.PACKAGES)
def test_killed_while_it_sends_a_run_ends_in_the_bucket_as_on_a_disk(store, tmp_path):
    steps = "steps=60"
    with bucket.serving(store) as server:
        for kill in range(3):
            one, before = start(f"{store}://runs/a", steps), len(server.writes)
            while one.poll() is None and not any(key.endswith("manifest.json") for key in server.writes[before:]):
                time.sleep(0.02)
            time.sleep(0.03 * kill)
            one.kill()
            one.communicate()
        (code, output), = runs.finish([start(f"{store}://runs/a", steps)])
        assert code == 0, output[-3000:]
        (code, output), = runs.finish([start(f"{store}://runs/a", steps)])
        assert code == 0 and "done at step 60" in output
        copy(server, tmp_path / "bucket")
    (code, output), = runs.finish([runs.start(tmp_path / "disk", "steps=60", devices=1)])
    assert code == 0, output[-3000:]
    name = f"{runs.FOLDER}/metrics.jsonl"
    one, other = ([{k: v for k, v in row.items() if not k.startswith("time/")} for row in read_rows(tmp_path / where / name)] for where in ("bucket", "disk"))
    assert one == other and len(one) > 60
    assert sorted(p.name for p in (tmp_path / "bucket" / runs.FOLDER / "checkpoints").iterdir()) == ["58", "60"]
    assert (tmp_path / "bucket" / runs.FOLDER / "report" / "report.html").exists() and (tmp_path / "bucket" / "goodput.jsonl").exists()


def steps_told(server):
    return [json.loads(line)["step"] for line in server.objects[f"a/{runs.FOLDER}/metrics.jsonl"].decode().splitlines()]


def kill(two):
    for child in [runs.child_of(process) for process in two]:
        runs.send(child)
    return runs.finish(two)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs POSIX")
@pytest.mark.parametrize("store", bucket.PACKAGES)
def test_two_processes_without_a_common_folder_are_killed_in_a_save_and_end_as_on_a_disk(store, tmp_path):
    """Killed once before the second process' list of a save is there, once before its manifest; then one process goes on from what two wrote."""
    settings = ("rules=fsdp_tp", "steps=120", "checkpoint.every=4")
    (code, output), (other, said) = runs.finish(runs.start_two(tmp_path / "disk", *settings, devices=2))
    assert code == other == 0, (output + said)[-3000:]
    with bucket.serving(store) as server:
        def again(name, *more):
            folders = [tmp_path / f"{name}{host}" for host in (0, 1)]      # nothing of the start before
            for folder in folders:
                folder.mkdir()
            return runs.start_two(f"{store}://runs/a", *settings, *more, devices=2, program=OFTEN, folders=folders)

        steps = []
        for number, last in enumerate((r"part\.1\.json", r"manifest\.json")):
            two, server.hold = again(number), ""
            while not any(key.endswith("manifest.json") and int(key.split("/")[-2]) > max(steps, default=0) for key in list(server.objects)):
                assert all(process.poll() is None for process in two), [process.communicate()[0][-3000:] for process in two]
                time.sleep(0.02)
            server.held.clear()
            server.hold = rf"checkpoints/\d+/{last}$"
            assert server.held.wait(100)
            if number == 0:      # the second process waits for the network, and the training of both does not
                held = max(int(key.split("/")[3]) for key in server.objects if "/checkpoints/" in key)
                while max(steps_told(server)) < min(held + 12, 120):
                    assert all(process.poll() is None for process in two)
                    time.sleep(0.05)
            kill(two)
            server.released.set()
            server.hold = ""
            time.sleep(0.1)
            server.released.clear()
            files = [key for key in server.objects if "/checkpoints/" in key]
            whole = {int(key.split("/")[-2]) for key in files if key.endswith("manifest.json")}
            assert whole and {int(key.split("/")[3]) for key in files} - whole, files      # a good one, and a torn one
            steps.append(max(whole))
        for code, output in runs.finish(again("last")):
            assert code == 0, output[-3000:]
        copy(server, tmp_path / "bucket")
        parts = [{re.search(r"process_(\d)", name)[1] for name in server.objects if f"/checkpoints/120/ocdbt.process_{n}" in name} for n in (0, 1)]
        assert parts == [{"0"}, {"1"}]
        assert not [key for key in server.objects if re.search(r"checkpoints/\d+/d/", key)]      # readers' index stays with them
        (code, output), = runs.finish([start(f"{store}://runs/a", *settings[:1], "steps=122", "checkpoint.every=4", devices=4)])
        assert code == 0 and "resumed at step 120" in output, output[-3000:]
    assert 0 < steps[0] < steps[1]
    one, other = (runs.losses(tmp_path / name) for name in ("bucket", "disk"))
    assert one == other and len(one) == 120
    one, other = (stage.read_weights(tmp_path / name / runs.FOLDER) for name in ("bucket", "disk"))
    assert one.keys() == other.keys()
    for path in one:
        np.testing.assert_array_equal(one[path], other[path], path)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs POSIX")
def test_two_processes_hand_the_best_weights_from_stage_to_stage_through_the_bucket(tmp_path):
    settings = ("rules=fsdp_tp", "steps=8", "--config.stages.again.steps=4")
    for code, output in runs.finish(runs.start_two(tmp_path / "disk", *settings, devices=2, system="clip,twice")):
        assert code == 0, output[-3000:]
    with bucket.serving() as server:
        for code, output in runs.finish(runs.start_two("s3://runs/a", *settings, devices=2, system="clip,twice", program=OFTEN)):
            assert code == 0, output[-3000:]
        copy(server, tmp_path / "bucket")
    for stage_folder in (runs.FOLDER, "2_again"):
        one, other = (json.loads((tmp_path / where / stage_folder / "DONE").read_text()) for where in ("disk", "bucket"))
        assert one["scores"] == other["scores"] and one["scores"]
        one, other = ([row["loss"] for row in read_rows(tmp_path / where / stage_folder / "metrics.jsonl") if "loss" in row] for where in ("disk", "bucket"))
        assert one == other and one
    one, other = (stage.read_weights(tmp_path / where / runs.FOLDER) for where in ("disk", "bucket"))
    for path in one:
        np.testing.assert_array_equal(one[path], other[path], path)
