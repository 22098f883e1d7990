"""Out of memory: forecasts of really compiled programs, and the changes that they show to fit."""

import jax
import jax.numpy as jnp
import pytest

from tests.tiny import tiny
from vlm_jax import memory, partitioning, run, stage
from vlm_jax.errors import ConfigError
from vlm_jax.memory import Trial


@pytest.fixture(scope="module")
def small():
    """A stage whose train step compiles in two seconds: activations are nearly all of its memory."""
    config = tiny("clip", batch=64).stages.pretrain
    config.model.text = dict(tower="cbow", variant="mini", width=32)
    config.model.image.update(qk_norm="none", stem="patch")
    config.model.image_pool = "mean"
    return stage.resolve(config, "pretrain")


def one():
    return partitioning.make_mesh(devices=jax.devices()[:1])


def exhausted():
    """The error of a real allocation that no machine can serve."""
    with pytest.raises(jax.errors.JaxRuntimeError) as caught:
        jnp.zeros(1 << 45).block_until_ready()
    return caught.value


def test_changes_that_fit_are_found_by_compiling_them(small, monkeypatch):
    limit = memory.trial(small, one(), {}).size // 3
    monkeypatch.setattr(memory, "limit_of", lambda mesh: limit)
    with pytest.raises(ConfigError) as caught, memory.advising(small, one()):
        raise exhausted()
    text = str(caught.value)
    fits, large = text.split("These fit")[1].split("Tried, and too large:")
    assert "microbatch=32" in large and "microbatch=16" in fits      # half does not fit; two programs tell that a quarter does
    assert "Out of memory allocating 140737488355328 bytes" in text


def test_other_errors_pass(small):
    with pytest.raises(ZeroDivisionError), memory.advising(small, one()):
        raise ZeroDivisionError
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"), memory.advising(small, one()):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")


def test_a_run_that_finds_no_room_ends_with_the_advice(monkeypatch, tmp_path):
    def no_room(*_):
        return jnp.zeros(1 << 45).block_until_ready()

    monkeypatch.setattr(stage, "make_optimizer", no_room)      # the first that happens on the mesh
    monkeypatch.setattr(memory, "advise", lambda *_: [Trial({}, 1 << 45), Trial({"data.microbatch": 4}, 1 << 44)])
    with pytest.raises(ConfigError, match="17.6 TB: --config.stages.pretrain.data.microbatch=4"):      # main exits with 43
        run.run(tiny("clip"), tmp_path)


def model(batch=64, devices=1):
    """Sizes as a device would have them: 100 for the state, 10 for each row that it holds at once."""
    def trial(stage, mesh, changes):
        if changes.get("data.microbatch") in (8,) and devices > 8:
            raise ConfigError("refused")
        share = devices if changes.get("rules", "dp") != "dp" else 1
        rows = changes.get("data.microbatch", batch) / devices
        saved = 0.75 if "model.image.remat" in changes else 1
        return Trial(changes, int(100 / share + 10 * rows * saved))
    return trial


@pytest.mark.parametrize("devices,limit,fitting", [
    (1, 800, []),                                                              # the step itself fits: nothing is compiled beside it
    (1, 600, [{"data.microbatch": 32}, {"model.image.remat": "full"}]),
    (1, 200, [{"data.microbatch": 8}]),
    (1, 108, [{"data.microbatch": 1, "model.image.remat": "full"}]),           # everything together
    (1, 90, []),
    (8, 70, [{"data.microbatch": 8, "model.image.remat": "full", "rules": "fsdp"}]),
])
def test_candidates(small, monkeypatch, devices, limit, fitting):
    monkeypatch.setattr(memory, "trial", model(devices=devices))
    mesh = partitioning.make_mesh(devices=jax.devices()[:devices])
    trials = memory.advise(small, mesh, limit)
    assert [t.changes for t in trials[1:] if t.fits(limit)] == fitting
    assert len(trials) <= 7 and (len(trials) == 1) == (limit == 800)
    text = memory.explain(small, mesh, limit, trials, "RESOURCE_EXHAUSTED: x")
    assert ("Nothing tried fits" in text) == (not fitting and limit != 800)
    assert ("by itself fits" in text) == (limit == 800)


def test_without_a_known_limit_the_sizes_are_given(small, monkeypatch):
    monkeypatch.setattr(memory, "trial", model())
    assert memory.limit_of(one()) is None       # a CPU
    with pytest.raises(ConfigError, match=r"(?s)needs 740 B.*does not tell its limit.*420 B: --config.stages.pretrain.data.microbatch=32"), \
            memory.advising(small, one()):
        raise exhausted()


def test_the_compiler_may_run_out_itself(small, monkeypatch):
    def compile_step(stage, mesh):
        if stage.data.microbatch in (0, 32):
            raise exhausted()
        return Program(100)
    monkeypatch.setattr(memory, "compile_step", compile_step)
    trials = memory.advise(small, one(), 200)
    assert trials[0].size is None and [t.changes for t in trials if t.fits(200)][0]["data.microbatch"] < 32


class Program:
    """What is asked of a compiled program."""
    def __init__(self, size):
        self.argument_size_in_bytes, self.temp_size_in_bytes = size, 0

    def memory_analysis(self):
        return self


def test_a_forecast_beyond_the_device_is_said_before_the_first_step(monkeypatch):
    said = []
    for size in (2000, 500):
        monkeypatch.setattr(memory, "limit_of", lambda mesh: 1000)
        memory.warn(Program(size), one(), said.append)
    assert len(said) == 1 and "2 kB of 1 kB" in said[0]


def test_options_of_the_forecast_on_gpus_are_known_to_xla():
    jax.jit(lambda x: x + 1).lower(1.0).compile(compiler_options=memory.GPU_OPTIONS)
    with pytest.raises(jax.errors.JaxRuntimeError):
        jax.jit(lambda x: x + 1).lower(1.0).compile(compiler_options={"xla_gpu_no_such_level": 0})
