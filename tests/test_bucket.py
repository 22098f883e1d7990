"""A work directory in a bucket: what goes up in which order, what comes down, and who holds it."""

import json
import os
import shutil
import threading
import time

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from tests import bucket as buckets
from tests.two import two_processes
from vlm_jax import bucket, partitioning
from vlm_jax.errors import ConfigError
from vlm_jax.train import checkpoint
from vlm_jax.train.checkpoint import MANIFEST


@pytest.fixture(params=buckets.PACKAGES)
def server(request):
    with buckets.serving(request.param) as found:
        found.address = f"{request.param}://runs/clip"
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


def opened(server, folder, **options):
    mirror = bucket.Mirror(server.address, folder, **options)
    mirror.acquire()
    mirror.fetch()
    return mirror


def opened_by_two(server, folder):
    mirrors = [bucket.Mirror(server.address, folder / str(process), process=process, count=2) for process in (0, 1)]
    mirrors[0].acquire()
    for mirror in mirrors:
        mirror.turn = mirrors[0].turn
        mirror.fetch()
    return mirrors


def save_part(folder, step, process, save="x", text="of"):
    """What a process leaves of a checkpoint in a folder of its own (``train.checkpoint``)."""
    whole = folder / str(process) / "1_a" / "checkpoints" / str(step)
    write(whole / f"ocdbt.process_{process}", data=f"{text} {step} by {process}")
    checkpoint._commit(whole, {"format": checkpoint.FORMAT, "step": step, "leaves": {}, "extra": None, "save": save}, checkpoint.part(process))
    return whole


def test_a_checkpoint_counts_there_once_its_manifest_does(server, tmp_path):
    one = opened(server, tmp_path / "one")
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
    one = opened(server, tmp_path / "one")
    assert sorted(f.relative_to(tmp_path / "one").as_posix() for f in (tmp_path / "one").rglob("*") if f.is_file()) == [
        "1_a/checkpoints/2/data", f"1_a/checkpoints/2/{MANIFEST}", "goodput.jsonl"]
    one.send()
    assert not any("torn" in data.decode() for data in server.objects.values())


def test_older_checkpoints_come_when_they_are_looked_at(server, tmp_path):
    for step in (2, 10):
        whole = tmp_path / "made" / "1_a" / "checkpoints" / str(step)
        write(whole, data=f"of {step}")
        checkpoint._commit(whole, {"format": checkpoint.FORMAT, "step": step, "leaves": {}, "extra": None})
        server.objects.update({f"clip/1_a/checkpoints/{step}/{file.name}": file.read_bytes() for file in whole.iterdir()})
    one, folder = opened(server, tmp_path / "one"), tmp_path / "one" / "1_a" / "checkpoints"
    assert sorted(f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file()) == ["10/data", f"10/{MANIFEST}", f"2/{MANIFEST}"]
    (folder / "10" / "data").write_text("harmed")
    with checkpoint.behind(one.folder, one.complete):
        assert checkpoint.latest_good(folder)[0] == 2 and (folder / "2" / "data").read_text() == "of 2"
    one.send()
    assert "clip/1_a/checkpoints/2/data" in server.objects
    shutil.rmtree(folder / "2")
    one.send()
    assert not any("checkpoints/2/" in key for key in server.objects)


def test_a_run_speaks_while_a_file_takes_long(server, tmp_path):
    one = bucket.Mirror(server.address, tmp_path / "one", every=60, stale=0.4)
    one.begin()
    one.start()
    one._busy.acquire()      # as of a send that takes long
    before = server.objects["clip/.lock/1"]
    deadline = time.monotonic() + 30
    while server.objects["clip/.lock/1"] == before:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    one._busy.release()
    one.close()
    assert json.loads(server.objects["clip/.lock/1"])["released"]


def test_one_run_at_a_time(server, tmp_path, monkeypatch):
    monkeypatch.setattr(bucket, "_alive_here", lambda owner: True)
    one = bucket.Mirror(server.address, tmp_path / "one", every=0.05, stale=0.6)
    one.begin()
    one.start()
    with pytest.raises(ConfigError, match="in use by another run"):
        bucket.Mirror(server.address, tmp_path / "two", stale=0.6).acquire()
    one.close()
    two = bucket.Mirror(server.address, tmp_path / "two", stale=60)
    two.acquire()      # at once: it was let go
    assert two.turn == 2
    silent = bucket.Mirror(server.address, tmp_path / "three", stale=0.3)
    silent.acquire()      # the second says nothing
    assert silent.turn == 3
    with pytest.raises(bucket.LostError, match="taken over"):
        two.send()


def test_a_dead_process_of_this_host_holds_nothing(server, tmp_path):
    one = bucket.Mirror(server.address, tmp_path)
    one.acquire()
    lock = json.loads(server.objects["clip/.lock/1"])
    server.objects["clip/.lock/1"] = json.dumps({**lock, "by": lock["by"].replace(f":{os.getpid()}:", ":999999999:")}).encode()
    began = time.monotonic()
    two = bucket.Mirror(server.address, tmp_path)
    two.acquire()
    assert two.turn == 2 and time.monotonic() - began < 30


def test_a_number_is_won_by_one_alone(server, tmp_path):
    mirrors = [bucket.Mirror(server.address, tmp_path) for _ in range(4)]
    won = []
    threads = [threading.Thread(target=lambda m=m: won.append(m._create(".lock/1"))) for m in mirrors]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(won) == [False, False, False, True]
    held = server.objects["clip/.lock/1"]
    assert not any(m._create(".lock/1") for m in mirrors if m.me != json.loads(held)["by"]) and server.objects["clip/.lock/1"] == held


def test_a_file_too_large_for_one_request_of_gcsfs(server, tmp_path):
    one = opened(server, tmp_path / "one")
    data = os.urandom(6 * 2**20)
    (tmp_path / "one" / "large").write_bytes(data)
    one.send()
    assert server.objects["clip/large"] == data


def test_parts_of_two_processes_count_once_both_are_there(server, tmp_path):
    one, two = opened_by_two(server, tmp_path)
    write(tmp_path / "0" / "1_a", **{"config.json": "of the first"})
    first = save_part(tmp_path, 2, 0)
    one.send()
    one.send()
    assert f"clip/1_a/checkpoints/2/{checkpoint.part(0)}" in server.objects and not any(MANIFEST in key for key in server.objects)
    second = save_part(tmp_path, 2, 1)
    two.send()
    assert not (second / MANIFEST).exists()
    one.send()
    two.send()
    assert server.writes[-1] == f"clip/1_a/checkpoints/2/{MANIFEST}" and (first / MANIFEST).read_bytes() == (second / MANIFEST).read_bytes()
    assert set(checkpoint.read_manifest(first)["files"]) == {"ocdbt.process_0/data", "ocdbt.process_1/data"}
    two.receive()
    assert (tmp_path / "1" / "1_a" / "config.json").read_text() == "of the first"
    assert checkpoint.damage(first) == "damaged: ocdbt.process_1/data is missing"
    one.complete(first)
    assert checkpoint.damage(first) is None
    bucket.Mirror(server.address, tmp_path / "three").fetch()      # whoever starts has all of it
    assert checkpoint.damage(tmp_path / "three" / "1_a" / "checkpoints" / "2") is None


def test_what_another_process_sends_stays_while_its_save_is_under_way_and_goes_with_it(server, tmp_path):
    one, two = opened_by_two(server, tmp_path)
    write(tmp_path / "0" / "1_a" / "checkpoints" / "2.orbax-checkpoint-tmp", data="")      # the first process is slower
    save_part(tmp_path, 2, 1)
    two.send()
    one.send()
    assert "clip/1_a/checkpoints/2/ocdbt.process_1/data" in server.objects
    shutil.rmtree(tmp_path / "0" / "1_a" / "checkpoints")
    one.send()
    assert not any("checkpoints" in key for key in server.objects)


def test_a_save_that_is_tried_again_is_not_joined_with_the_first_try(server, tmp_path):
    one, two = opened_by_two(server, tmp_path)
    save_part(tmp_path, 2, 1, save="first")
    two.send()
    save_part(tmp_path, 2, 0, save="second")
    one.send()
    assert not any(MANIFEST in key for key in server.objects)
    shutil.rmtree(tmp_path / "1" / "1_a")
    save_part(tmp_path, 2, 1, save="second", text="again")
    two.send()
    one.send()
    two.send()
    assert (tmp_path / "1" / "1_a" / "checkpoints" / "2" / MANIFEST).exists()
    assert server.objects["clip/1_a/checkpoints/2/ocdbt.process_1/data"] == b"again 2 by 1"


class Ended(BaseException):
    pass


def test_who_finds_another_run_or_no_bucket_ends_all(server, tmp_path, monkeypatch):
    def end(code, text):
        raise Ended(code, text)

    monkeypatch.setattr(bucket, "GONE", 0.05)
    mirrors = opened_by_two(server, tmp_path)
    for mirror in mirrors:
        mirror.end, mirror.every = end, 0.02
        write(mirror.folder, news=str(mirror.process))
    server.refuse = True
    for mirror in mirrors:
        with pytest.raises(Ended, match="44, .*cannot be written"):
            mirror._watch()
    server.refuse = False
    server.objects["clip/.lock/2"] = server.objects["clip/.lock/1"]
    for mirror in mirrors:
        with pytest.raises(Ended, match="43, .*taken over by another run"):
            mirror._watch()


def test_the_first_process_holds_the_lock_and_keeps_what_others_send(server, tmp_path):
    one, two = opened_by_two(server, tmp_path)
    write(tmp_path / "0", **{"goodput.jsonl": "{}"})
    write(tmp_path / "1" / "1_a", **{"quarantine.1.jsonl": "{}"})
    two.send()
    one.send()
    two.send()
    assert {"clip/goodput.jsonl", "clip/1_a/quarantine.1.jsonl"} <= set(server.objects)
    assert json.loads(server.objects["clip/.lock/1"])["by"] == one.me


def test_a_bucket_that_cannot_be_written_is_named(server, tmp_path):
    server.refuse = True
    with pytest.raises(ConfigError, match=f"workdir='{server.address}' cannot be written"):
        bucket.Mirror(server.address, tmp_path).acquire()


def split_state(step):
    """A leaf over all devices of all processes, and one of the host."""
    mesh = jax.make_mesh((jax.device_count(),), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    whole, split = np.arange(16, dtype=np.int32) + step, NamedSharding(mesh, PartitionSpec("fsdp"))
    return {"w": jax.make_array_from_callback((16,), split, lambda index: whole[index]), "host": np.int32(step)}


def is_of(state, step):
    return int(state["host"]) == step and all((np.asarray(s.data) == np.arange(16)[s.index] + step).all() for s in state["w"].addressable_shards)


def abstract():
    return {path: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None)) for path, x in split_state(0).items()}


def one_of_two(process, port, environment, address, folder, pipe):
    os.environ.update(environment, XLA_FLAGS="--xla_force_host_platform_device_count=2")
    jax.distributed.initialize(f"localhost:{port}", 2, process)
    commit, failures = checkpoint._commit, ["No space left on device"] * process

    def full_once(path, *args):
        if path.name == "3" and failures:
            raise OSError(28, failures.pop())
        commit(path, *args)

    def import_alone():
        with checkpoint.Checkpointer(imported, keep=1) as keeper:
            keeper.save(0, {"params": {"a": np.arange(3)}}, lent=True)

    checkpoint._commit = full_once
    mirror = bucket.Mirror(address, folder / str(process), every=0.05, process=process, count=2)
    mirror.begin()
    mirror.start()
    imported, series = mirror.folder / "imported" / "m" / "checkpoints", mirror.folder / "1_a" / "checkpoints"
    with checkpoint.behind(mirror.folder, mirror.complete):
        partitioning.from_first(import_alone)
        mirror.share()
        pipe.send(checkpoint.load_params(imported)["a"].tolist())
        with checkpoint.Checkpointer(series, keep=2) as keeper:
            for step in (1, 2):
                keeper.save(step, split_state(step), {"at": step})
            keeper.save(3, split_state(3))
            try:
                keeper.wait()
            except checkpoint.SaveError as error:
                pipe.send(str(error))
            assert not keeper.busy() and not keeper.has(3)
            keeper.save(3, split_state(3), {"at": 3})
            keeper.wait()
            here = {file.relative_to(series).parts[:2] for file in series.rglob("*") if file.is_file()}
            pipe.send(sorted("/".join(parts) for parts in here if "ocdbt" in parts[1]))
            state, extra = keeper.restore(3, abstract())
            pipe.send((is_of(state, 3), extra))
            if process:      # on its disk alone
                next(file for file in (series / "3").glob("ocdbt.process_1/d/*") if file.stat().st_size).write_bytes(b"harmed")
            pipe.send(keeper.latest_good())
    mirror.close()


@pytest.mark.parametrize("server", ["s3"], indirect=True)
def test_two_processes_save_fail_and_restore_together(server, tmp_path):
    """With folders of their own: one fails in a save, which is tried again; an import by one alone is read by both; one process reads it all."""
    with two_processes(one_of_two, server.environment, server.address, tmp_path, preload="vlm_jax.train.checkpoint") as two:
        assert two.answers() == [[0, 1, 2]] * 2
        first, second = two.answers()
        assert "see the other processes" in first and "No space left" in second
        assert two.answers() == [[f"{step}/ocdbt.process_{i}" for step in (2, 3)] for i in (0, 1)]
        assert two.answers() == [(True, {"at": 3})] * 2
        for step, skipped in two.answers():
            assert step == 2 and [s for s, _ in skipped] == [3]
        two.end()
    alone = opened(server, tmp_path / "alone")
    with checkpoint.behind(alone.folder, alone.complete), checkpoint.Checkpointer(alone.folder / "1_a" / "checkpoints") as keeper:
        assert keeper.latest_good() == (3, [])
        for step in (3, 2):
            state, extra = keeper.restore(step, abstract())
            assert is_of(state, step) and extra == {"at": step}
    alone.send()
    assert not any("checkpoints/3/manifest.ocdbt" in key for key in server.objects)      # made by each reader


@pytest.mark.parametrize("path,whole", [("1_a/checkpoints/2/d/x", "1_a/checkpoints/2"), ("1_a/metrics.jsonl", None),
                                        ("imported/m/checkpoints/0/x", "imported/m/checkpoints/0"),
                                        ("1_a/best/3/" + MANIFEST, "1_a/best/3"), ("1_a/report/best.png", None)])
def test_what_belongs_to_a_checkpoint(path, whole):
    assert bucket.checkpoint_of(path) == whole
