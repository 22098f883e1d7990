"""Checkpoints: what was saved comes back on any mesh, and nothing short of it passes for a checkpoint."""

import json
import multiprocessing
import random
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from tests.two import two_processes
from vlm_jax.train import checkpoint
from vlm_jax.train.checkpoint import MANIFEST, Checkpointer, load_params


class State(NamedTuple):
    step: jax.Array
    params: dict
    opt_state: tuple
    key: jax.Array
    ema: dict | None = None


def sharding(devices: int, *spec) -> NamedSharding:
    return NamedSharding(jax.make_mesh((devices,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,),
                                       devices=jax.devices()[:devices]), PartitionSpec(*spec))


def make_state(step: int, devices: int = 8) -> State:
    params = {"image/blocks/attn/query/kernel": jnp.arange(64.0).reshape(2, 16, 2) + step,
              "image/norm/scale": jnp.full((16,), step, jnp.bfloat16), "logit_scale": jnp.float32(step)}
    params = {path: jax.device_put(x, sharding(devices, None, "fsdp") if x.ndim == 3 else sharding(devices))
              for path, x in params.items()}
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))
    return State(jnp.int32(step), params, tx.init(params), jax.random.key(step))


def abstract(state, devices: int):
    def leaf(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding(
            devices, *(None, "fsdp") if x.ndim == 3 else ()))
    return jax.tree.map(leaf, state)


def same(a, b) -> bool:
    def data(x):
        return np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x)
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        x.dtype == y.dtype and np.array_equal(data(x), data(y)) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)))


def saved(directory: Path, *steps: int, keep: int = 3) -> None:
    with Checkpointer(directory, keep) as checkpointer:
        for step in steps:
            checkpointer.save(step, make_state(step), {"position": step})


@pytest.mark.parametrize("devices", [1, 2, 8])
def test_state_comes_back_on_any_number_of_devices(tmp_path, devices):
    saved(tmp_path, 5)
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.latest_good() == (5, [])
        state, extra = checkpointer.restore(5, abstract(make_state(0), devices))
    assert extra == {"position": 5}
    assert same(state, make_state(5))
    kernel = state.params["image/blocks/attn/query/kernel"]
    assert len(kernel.sharding.device_set) == devices
    assert kernel.addressable_shards[0].data.shape == (2, 16 // devices, 2)
    assert jax.random.uniform(state.key) == jax.random.uniform(jax.random.key(5))


def test_host_leaves_empty_arrays_and_containers_survive(tmp_path):
    state = {"none": None, "empty": (), "queue": np.zeros((0, 4), np.float32), "rows": np.arange(3, dtype=np.int64),
             "flag": np.bool_(True), "ratio": np.float64(0.1), "nested": [{}, (np.int8(-3), optax.EmptyState())]}
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(0, state)
        state["rows"][:] = 7                               # the caller's buffer is its own again once save returns
        restored, extra = checkpointer.restore(0, state)
    assert extra is None and jax.tree.structure(restored) == jax.tree.structure(state)
    assert restored["rows"].tolist() == [0, 1, 2] and restored["rows"].dtype == np.int64
    assert restored["ratio"] == 0.1 and restored["flag"] and restored["nested"][1][0] == -3
    assert restored["queue"].shape == (0, 4)


def test_donated_buffers_are_copied_before_save_returns(tmp_path):
    shape = jax.ShapeDtypeStruct((1 << 21,), jnp.float32, sharding=sharding(8, "fsdp"))
    x = jax.jit(lambda: jnp.zeros(shape.shape), out_shardings=shape.sharding)()
    advance = jax.jit(lambda x: x + 1, donate_argnums=0)
    with Checkpointer(tmp_path, keep=4) as checkpointer:
        for step in range(4):
            checkpointer.save(step, {"x": x})
            for _ in range(5):
                x = advance(x)
        for step in range(4):
            restored = checkpointer.restore(step, {"x": shape})[0]["x"]
            assert (np.asarray(restored) == 5 * step).all()


def test_only_large_arrays_are_cut_among_the_devices_that_hold_them(tmp_path, caplog):
    """A cut is a program for every shape and device, compiled at the first save."""
    small, large = (jax.device_put(np.arange(n, dtype=np.float32), sharding(8)) for n in (48, 2 * checkpoint.SMALLEST_PART))
    with Checkpointer(tmp_path) as checkpointer, jax.log_compiles():
        checkpointer.save(1, {"small": small})
        assert "XLA compilation" not in caplog.text
        checkpointer.save(2, {"small": small, "large": large})
        assert "XLA compilation" in caplog.text
        state, _ = checkpointer.restore(2, {"small": small, "large": large})
    assert np.array_equal(state["small"], small) and np.array_equal(state["large"], large)


def test_only_the_newest_are_kept(tmp_path):
    saved(tmp_path, 1, 2, 3, 10, keep=2)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["10", "3"]
    with pytest.raises(ValueError, match="keep=0"):
        Checkpointer(tmp_path, keep=0)


def test_old_checkpoint_goes_only_after_the_new_manifest(tmp_path, monkeypatch):
    saved(tmp_path, 1)
    seen, commit = [], checkpoint._commit
    monkeypatch.setattr(checkpoint, "_commit", lambda path, content: (
        seen.append((tmp_path / "1" / MANIFEST).exists()), commit(path, content), seen.append(checkpoint.damage(path))))
    monkeypatch.setattr(checkpoint, "_remove", lambda path: seen.append(path.name))
    saved(tmp_path, 2, keep=1)
    assert seen == [True, None, "1"]


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def largest(directory: Path) -> Path:
    return max((f for f in directory.rglob("d/*") if f.is_file()), key=lambda f: f.stat().st_size)


DAMAGES = {
    "bit flip": (lambda d: flip(largest(d)), "do not match their hash"),
    "truncation": (lambda d: largest(d).write_bytes(largest(d).read_bytes()[:-1]), "bytes, not"),
    "emptied": (lambda d: largest(d).write_bytes(b""), "has 0 bytes"),
    "missing file": (lambda d: largest(d).unlink(), "is missing"),
    "no manifest": (lambda d: (d / MANIFEST).unlink(), "uncommitted"),
    "manifest cut": (lambda d: (d / MANIFEST).write_text((d / MANIFEST).read_text()[:-9]), "unreadable"),
    "manifest empty": (lambda d: (d / MANIFEST).write_text(""), "unreadable"),
    "manifest altered": (lambda d: (d / MANIFEST).write_text(
        (d / MANIFEST).read_text().replace('"position": 3', '"position": 4')), "checksum"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_falls_back_and_says_why(tmp_path, kind):
    harm, reason = DAMAGES[kind]
    saved(tmp_path, 1, 2, 3)
    harm(tmp_path / "3")
    with Checkpointer(tmp_path, keep=2) as checkpointer:
        with pytest.raises(ValueError, match=reason):      # asked for by name, it is refused
            checkpointer.restore(3, make_state(0))
        step, skipped = checkpointer.latest_good()
        assert step == 2 and [s for s, _ in skipped] == [3] and reason in skipped[0][1]
        assert same(checkpointer.restore(2, make_state(0))[0], make_state(2))
        # The run goes on from 2 with other save points: the damaged one must not be kept in place of 2.
        checkpointer.save(4, make_state(4))
        checkpointer.wait()
        assert sorted(entry.name for entry in tmp_path.iterdir()) == ["2", "4"]
        assert checkpointer.latest_good() == (4, [])


def test_damaged_step_is_written_again_under_its_name(tmp_path):
    saved(tmp_path, 1, 2)
    flip(largest(tmp_path / "2"))
    (tmp_path / "2.orbax-checkpoint-tmp" / "d").mkdir(parents=True)
    (tmp_path / "2.orbax-checkpoint-tmp" / "d" / "junk").write_text("left by a dead run")
    saved(tmp_path, 2)
    assert not list(tmp_path.glob("*tmp*")) and not list(tmp_path.rglob("junk"))
    assert checkpoint.latest_good(tmp_path) == (2, [])


def test_every_byte_of_a_checkpoint_is_guarded(tmp_path):
    saved(tmp_path, 1)
    files = [f for f in (tmp_path / "1").rglob("*") if f.is_file() and f.stat().st_size]
    assert len(files) > 5
    for file in files:
        good = file.read_bytes()
        flip(file)
        assert checkpoint.damage(tmp_path / "1") is not None, file
        file.write_bytes(good)
    assert checkpoint.damage(tmp_path / "1") is None


def test_nothing_good_is_reported_as_such(tmp_path):
    assert checkpoint.latest_good(tmp_path / "absent") == (None, [])
    saved(tmp_path, 1, 2)
    for step in ("1", "2"):
        (tmp_path / step / MANIFEST).unlink()
    step, skipped = checkpoint.latest_good(tmp_path)
    assert step is None and [s for s, _ in skipped] == [2, 1]
    with pytest.raises(FileNotFoundError, match="1: uncommitted"):
        load_params(tmp_path)


def test_another_format_is_refused_rather_than_passed_over(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "FORMAT", 99)
    saved(tmp_path, 1)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="format 99"), Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(2, make_state(2))
    assert (tmp_path / "1" / MANIFEST).exists()


def test_restore_is_strict_and_names_paths(tmp_path):
    saved(tmp_path, 1)
    like = make_state(0)
    with Checkpointer(tmp_path) as checkpointer:
        def refuses(params, *words):
            with pytest.raises(ValueError) as error:
                checkpointer.restore(1, like._replace(params=params))
            assert all(word in str(error.value) for word in words), error.value

        refuses(like.params | {"text/norm/scale": jnp.ones(3)}, "missing 'params/text/norm/scale'")
        refuses({p: x for p, x in like.params.items() if p != "logit_scale"}, "unexpected 'params/logit_scale'")
        refuses({**{p: x for p, x in like.params.items() if p != "logit_scale"}, "logit_scales": jnp.float32(0)},
                "missing 'params/logit_scales' (nearest: 'params/logit_scale')", "unexpected 'params/logit_scale'")
        refuses(like.params | {"image/norm/scale": jnp.ones(17, jnp.bfloat16)},
                "'params/image/norm/scale' is bfloat16[16]", "bfloat16[17] is wanted")
        refuses(like.params | {"image/norm/scale": jnp.ones(16)}, "float32[16] is wanted")
        with pytest.raises(ValueError, match="key<fry>"):
            checkpointer.restore(1, like._replace(key=jax.random.key(0, impl="rbg")))
        with pytest.raises(ValueError, match="uncommitted"):
            checkpointer.restore(7, like)


def test_save_refuses_what_it_cannot_keep(tmp_path):
    saved(tmp_path, 5)
    with Checkpointer(tmp_path) as checkpointer:
        for step in (5, 4):
            with pytest.raises(ValueError, match=f"step {step} is not newer"):
                checkpointer.save(step, make_state(step))
        with pytest.raises(TypeError, match="leaf 'name' is str"):
            checkpointer.save(6, {"name": "clip"})
        with pytest.raises(TypeError, match="JSON"):
            checkpointer.save(6, {"x": 1}, {"array": np.ones(2)})
        with pytest.raises(ValueError, match="share the path 'a/b'"):
            checkpointer.save(6, {"a/b": 1, "a": {"b": 2}})
    assert checkpoint.latest_good(tmp_path) == (5, [])


@pytest.mark.parametrize("surfaces", ["wait", "save", "close"])
def test_background_failure_surfaces(tmp_path, monkeypatch, surfaces):
    commit = checkpoint._commit

    def full_at_first(path, content):
        if path.name == "1":
            raise OSError(28, "No space left on device")
        commit(path, content)

    monkeypatch.setattr(checkpoint, "_commit", full_at_first)
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(1, make_state(1))
    with pytest.raises(RuntimeError, match="saving checkpoint .*1 failed: OSError.*No space left"):
        checkpointer.save(2, make_state(2)) if surfaces == "save" else getattr(checkpointer, surfaces)()
    if surfaces != "close":                                # said once; the same object can go on
        checkpointer.save(2, make_state(2))
        checkpointer.close()
        assert checkpoint.latest_good(tmp_path) == (2, [])


def test_save_does_not_wait_for_the_disk(tmp_path, monkeypatch):
    commit, released = checkpoint._commit, multiprocessing.Event()
    monkeypatch.setattr(checkpoint, "_commit", lambda *a: (released.wait(20), commit(*a)))
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, make_state(1))               # returns although the commit cannot proceed
        assert checkpoint.latest_good(tmp_path)[0] is None
        released.set()
    assert checkpoint.latest_good(tmp_path) == (1, [])


def test_parameters_are_read_without_the_optimizer(tmp_path):
    saved(tmp_path, 1, 2)
    params = load_params(tmp_path)
    assert set(params) == set(make_state(0).params)
    assert all(isinstance(x, np.ndarray) for x in params.values())
    assert all(np.array_equal(params[path], x) for path, x in make_state(2).params.items())
    assert params["image/norm/scale"].dtype == jnp.bfloat16
    some = load_params(tmp_path, "image/.*", sharding=lambda path, shape: sharding(4))
    assert set(some) == {"image/blocks/attn/query/kernel", "image/norm/scale"}
    assert all(len(x.sharding.device_set) == 4 for x in some.values())
    mu = load_params(tmp_path, "logit_scale", collections=("opt_state/1/0/mu",))
    assert mu["logit_scale"] == 0
    with pytest.raises(ValueError, match="'imag/.*' matches nothing .* nearest: params/image"):
        load_params(tmp_path, "imag/.*")
    flip(largest(tmp_path / "2"))
    assert load_params(tmp_path)["logit_scale"] == 1


def test_manifest_is_plain_json(tmp_path):
    saved(tmp_path, 1)
    content = json.loads((tmp_path / "1" / MANIFEST).read_text())["content"]
    assert content["step"] == 1 and content["format"] == checkpoint.FORMAT
    assert content["leaves"]["params/logit_scale"] == {"shape": [], "dtype": "float32"}
    assert set(content["files"]) == {f.relative_to(tmp_path / "1").as_posix() for f in (tmp_path / "1").rglob("*")
                                     if f.is_file() and f.name != MANIFEST}


# ---------------------------------------------------------------- SIGKILL

def save_until_killed(directory: str, first: int, keep: int, pipe) -> None:
    with Checkpointer(directory, keep) as checkpointer:
        checkpointer.latest_good()
        for step in range(first, first + 1000):
            checkpointer.save(step, {"x": np.full(5000, step, np.float32), "y": {"z": jnp.int32(step)}}, {"at": step})
            if step % 3 == 0:
                checkpointer.wait()
                pipe.send(step)


def test_sigkill_at_any_moment_leaves_a_good_checkpoint(tmp_path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["vlm_jax.train.checkpoint"])
    chance, first, found, debris = random.Random(0), 0, None, 0
    like = {"x": jax.ShapeDtypeStruct((5000,), np.float32), "y": {"z": jax.ShapeDtypeStruct((), np.int32)}}
    for round_ in range(8):
        reader, writer = context.Pipe(duplex=False)
        child = context.Process(target=save_until_killed, args=(str(tmp_path), first, 1 + round_ % 2, writer))
        child.start()
        writer.close()
        assert reader.poll(30)                            # the first promise that a step is safe
        time.sleep(chance.random() * 0.15)
        child.kill()
        child.join()
        promised = found if found is not None else -1
        try:
            while reader.poll():
                promised = reader.recv()
        except EOFError:
            pass
        debris += len(list(tmp_path.glob("*tmp*"))) + sum(not (d / MANIFEST).exists() for d in tmp_path.glob("[0-9]*"))
        with Checkpointer(tmp_path) as checkpointer:
            found, skipped = checkpointer.latest_good()
            assert found is not None and found >= promised, (promised, found, skipped)
            assert all(reason.startswith("uncommitted") for _, reason in skipped), skipped
            state, extra = checkpointer.restore(found, like)
        assert extra == {"at": found} and state["y"]["z"] == found and (state["x"] == found).all()
        first = found + 1
    assert debris, "no round was killed in the middle of a save: the test shows nothing"


# ---------------------------------------------------------------- several processes

def one_of_two(process: int, port: int, directory: Path, pipe) -> None:
    jax.distributed.initialize(f"localhost:{port}", 2, process)
    mesh = jax.make_mesh((jax.device_count(),), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    split = NamedSharding(mesh, PartitionSpec("fsdp"))
    rows = 2 * jax.device_count()

    def state(step):
        whole = np.arange(rows, dtype=np.int32) + step
        return {"w": jax.make_array_from_callback((rows,), split, lambda index: whole[index]), "host": np.int32(step)}

    commit = checkpoint._commit

    def full_at_last(path, content):
        if path.name == "3":
            raise OSError(28, "No space left on device")
        commit(path, content)

    checkpoint._commit = full_at_last
    with Checkpointer(directory, keep=2) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, state(step), {"at": step})
        pipe.send(checkpointer.latest_good())
        pipe.recv()                                       # the test damages step 2 meanwhile
        pipe.send(checkpointer.latest_good())
        like = {"w": jax.ShapeDtypeStruct((rows,), np.int32, sharding=split), "host": np.int32(0)}
        restored, extra = checkpointer.restore(1, like)
        shards = {s.index[0].start: s.data.tolist() for s in restored["w"].addressable_shards}
        pipe.send((all(data == [start + 1, start + 2] for start, data in shards.items()), int(restored["host"]), extra))
        checkpointer.save(3, state(3))
        try:
            checkpointer.wait()
        except RuntimeError as error:
            pipe.send(str(error))


def test_two_processes_agree(tmp_path):
    with two_processes(one_of_two, tmp_path, preload="vlm_jax.train.checkpoint") as two:
        assert two.answers() == [(2, [])] * 2
        flip(largest(tmp_path / "2"))
        two.tell("go on")
        for step, skipped in two.answers():
            assert step == 1 and skipped[0][0] == 2 and "hash" in skipped[0][1]
        assert two.answers() == [(True, 1, {"at": 1})] * 2
        first, second = two.answers()
        assert "No space left" in first and "see the other processes" in second
        two.end()
