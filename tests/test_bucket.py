"""A work directory in a bucket: what goes up in which order, what comes down, and who holds it."""

import json
import os
import shutil
import threading
import time

import pytest

from tests import bucket as s3
from vlm_jax import bucket
from vlm_jax.errors import ConfigError
from vlm_jax.train.checkpoint import MANIFEST

ADDRESS = "s3://runs/clip"


@pytest.fixture
def server():
    with s3.serving() as found:
        yield found


def write(folder, **files):
    for name, text in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def save(folder, step, series="checkpoints", finished=True):
    whole = folder / "1_a" / series / str(step)
    whole.mkdir(parents=True)
    (whole / "data").write_text(f"of {step}")
    if finished:
        (whole / MANIFEST).write_text("{}")


def opened(folder, **options):
    mirror = bucket.Mirror(ADDRESS, folder, **options)
    mirror.acquire()
    mirror.fetch()
    return mirror


def test_a_checkpoint_counts_there_once_its_manifest_does(server, tmp_path):
    one = opened(tmp_path / "one")
    write(tmp_path / "one" / "1_a", **{"metrics.jsonl": "{}", "DONE": "1"})
    save(tmp_path / "one", 2)
    save(tmp_path / "one", 4, finished=False)
    save(tmp_path / "one", "6.orbax-checkpoint-tmp-1", finished=False)
    one.send()
    sent = [key for key in server.writes if ".lock" not in key]
    assert sent == ["clip/1_a/metrics.jsonl", "clip/1_a/checkpoints/2/data", f"clip/1_a/checkpoints/2/{MANIFEST}", "clip/1_a/DONE"]
    one.send()
    assert [key for key in server.writes if ".lock" not in key] == sent      # nothing new, nothing sent
    save(tmp_path / "one", 8)
    shutil.rmtree(tmp_path / "one" / "1_a" / "checkpoints" / "2")
    one.send()
    there = {key for key in server.objects if "checkpoints" in key}
    assert there == {"clip/1_a/checkpoints/8/data", f"clip/1_a/checkpoints/8/{MANIFEST}"}


def test_a_start_finds_what_was_sent_and_nothing_unfinished(server, tmp_path):
    server.objects.update({"clip/goodput.jsonl": b"{}", "clip/1_a/checkpoints/2/data": b"x", f"clip/1_a/checkpoints/2/{MANIFEST}": b"{}",
                           "clip/1_a/checkpoints/4/data": b"torn", "clip/1_a/best/0/data": b"torn"})
    write(tmp_path / "one", stale="from another day")
    one = opened(tmp_path / "one")
    assert sorted(f.relative_to(tmp_path / "one").as_posix() for f in (tmp_path / "one").rglob("*") if f.is_file()) == [
        "1_a/checkpoints/2/data", f"1_a/checkpoints/2/{MANIFEST}", "goodput.jsonl"]
    one.send()
    assert not any("torn" in data.decode() for data in server.objects.values())


def test_one_run_at_a_time(server, tmp_path, monkeypatch):
    monkeypatch.setattr(bucket, "_alive_here", lambda owner: True)
    one = opened(tmp_path / "one", every=0.05, stale=0.6)
    one.start()
    with pytest.raises(ConfigError, match="in use by another run"):
        bucket.Mirror(ADDRESS, tmp_path / "two", stale=0.6).acquire()
    one.close()
    two = bucket.Mirror(ADDRESS, tmp_path / "two", stale=60)
    two.acquire()      # at once: it was let go
    assert two.turn == 2
    silent = bucket.Mirror(ADDRESS, tmp_path / "three", stale=0.3)
    silent.acquire()      # the second says nothing
    assert silent.turn == 3
    with pytest.raises(bucket.LostError, match="taken over"):
        two.send()


def test_a_dead_process_of_this_host_holds_nothing(server, tmp_path):
    one = bucket.Mirror(ADDRESS, tmp_path)
    one.acquire()
    lock = json.loads(server.objects["clip/.lock/1"])
    server.objects["clip/.lock/1"] = json.dumps({**lock, "by": lock["by"].replace(f":{os.getpid()}:", ":999999999:")}).encode()
    began = time.monotonic()
    two = bucket.Mirror(ADDRESS, tmp_path)
    two.acquire()
    assert two.turn == 2 and time.monotonic() - began < 30


def test_a_number_is_won_by_one_alone(server, tmp_path):
    mirrors = [bucket.Mirror(ADDRESS, tmp_path) for _ in range(4)]
    won = []
    threads = [threading.Thread(target=lambda m=m: won.append(m._create(".lock/1"))) for m in mirrors]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(won) == [False, False, False, True]


@pytest.mark.parametrize("path,whole", [("1_a/checkpoints/2/d/x", "1_a/checkpoints/2"), ("1_a/metrics.jsonl", None),
                                        ("imported/m/checkpoints/0/x", "imported/m/checkpoints/0"),
                                        ("1_a/best/3/" + MANIFEST, "1_a/best/3"), ("1_a/report/best.png", None)])
def test_what_belongs_to_a_checkpoint(path, whole):
    assert bucket.checkpoint_of(path) == whole
