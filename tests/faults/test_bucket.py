"""A run whose work directory is a bucket, killed while it sends."""

import os
import subprocess
import sys
import time

import pytest

from tests import bucket
from tests.faults import runs
from vlm_jax.train.metrics import read_rows

pytestmark = pytest.mark.slow
OFTEN = "import sys; from vlm_jax import bucket, main; bucket.EVERY = 0.05; sys.exit(main.main(sys.argv))"


def start(address, *args):
    environment = {**os.environ, "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1"),
                   "PYTHONPATH": os.pathsep.join([str(runs.ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])}
    return subprocess.Popen([sys.executable, "-c", OFTEN, "--config=tests/tiny.py:clip", f"--workdir={address}", "--platform=cpu", *args],
                            cwd=runs.ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def test_killed_while_it_sends_a_run_ends_in_the_bucket_as_on_a_disk(tmp_path):
    steps = "--config.stages.pretrain.steps=60"
    with bucket.serving() as server:
        for kill in range(3):
            one, before = start("s3://runs/a", steps), len(server.writes)
            while one.poll() is None and not any(key.endswith("manifest.json") for key in server.writes[before:]):
                time.sleep(0.005)
            time.sleep(0.03 * kill)
            one.kill()
            one.communicate()
        (code, output), = runs.finish([start("s3://runs/a", steps)])
        assert code == 0, output[-3000:]
        (code, output), = runs.finish([start("s3://runs/a", steps)])
        assert code == 0 and "done at step 60" in output
        for key, data in list(server.objects.items()):
            target = tmp_path / "bucket" / key.removeprefix("a/")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)
    (code, output), = runs.finish([runs.start(tmp_path / "disk", "steps=60", devices=1)])
    assert code == 0, output[-3000:]
    name = f"{runs.FOLDER}/metrics.jsonl"
    one, other = ([{k: v for k, v in row.items() if not k.startswith("time/")} for row in read_rows(tmp_path / where / name)] for where in ("bucket", "disk"))
    assert one == other and len(one) > 60
    assert sorted(p.name for p in (tmp_path / "bucket" / runs.FOLDER / "checkpoints").iterdir()) == ["58", "60"]
    assert (tmp_path / "bucket" / runs.FOLDER / "report" / "report.html").exists() and (tmp_path / "bucket" / "goodput.jsonl").exists()
