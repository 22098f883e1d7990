"""What a train step needs of a device's memory, and which changes to the config would make it fit.

A forecast comes from the compiler: the step is compiled for shapes alone, and nothing is allocated. A change is
advised only after its own program was compiled.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from ml_collections import ConfigDict

from vlm_jax import config as configs
from vlm_jax import partitioning, roofline
from vlm_jax.console import amount
from vlm_jax.errors import ConfigError
from vlm_jax.stage import Stage, make_optimizer, resolve
from vlm_jax.train import init
from vlm_jax.train.step import make_train_step

# GPUs would time kernels on the device, which has no room left, or is not there; Triton's products cannot do without.
GPU_OPTIONS = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}
MAX_SECONDS = 300.0     # of compiling; then what is known has to do


@dataclasses.dataclass(frozen=True)
class Trial:
    """A compiled train step. changes: field -> value, {} for the config as it is. size: bytes per device, None where the
    backend does not tell or the compiler itself found too little memory."""
    changes: Mapping[str, Any]
    size: int | None

    def fits(self, limit: int | None) -> bool:
        return None not in (self.size, limit) and self.size <= limit


def out_of_memory(error: BaseException) -> bool:
    return isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)


def forecast(program: Any) -> int | None:
    """Bytes per device while ``program``, a compiled train step, runs: arguments and temporaries."""
    analysis = program.memory_analysis()
    return None if analysis is None else analysis.argument_size_in_bytes + analysis.temp_size_in_bytes


def limit_of(mesh: Any) -> int | None:
    """Bytes that JAX may use on a device of ``mesh``; None where it does not tell (CPUs). Of chips that are not there, what their compiler takes."""
    if mesh.devices.flat[0] not in jax.devices():
        chip = roofline.chip_of(mesh)
        share = float(os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", 0.75)) if mesh.devices.flat[0].platform == "gpu" else 1
        return None if chip is None else int(chip.memory * share)
    return (mesh.local_devices[0].memory_stats() or {}).get("bytes_limit")


def warn(program: Any, mesh: Any, say: Callable[[str], None]) -> None:
    """Says so, before the first step, where the forecast exceeds the device."""
    size, limit = forecast(program), limit_of(mesh)
    if None not in (size, limit) and size > limit:
        say(f"warning: the memory forecast exceeds what JAX may use of a device: {amount(size, 'B')} of {amount(limit, 'B')}. "
            "If the step runs out, smaller programs are compiled and those that fit are named")


@contextlib.contextmanager
def advising(stage: Stage, mesh: Any) -> Iterator[None]:
    """Turns an out-of-memory error of its body into a ConfigError that names the changes which would fit."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not out_of_memory(error):
            raise
        limit = limit_of(mesh)
        raise ConfigError(explain(stage, mesh, limit, advise(stage, mesh, limit), str(error))) from error


def trace_step(stage: Stage, mesh: Any) -> Any:
    """The train step of ``stage`` traced for shapes alone (a ``jax.stages.Traced``): the devices of ``mesh`` need not be there. Raises ValueError."""
    partitioning.check_rows(stage.data.batch, mesh)
    ema = stage.config.optim.get("ema", 0.0)
    tx, _ = make_optimizer(stage)
    # Leaves that the step does not read (an eye whose features were kept) lie on the device all the same.
    step = jax.jit(make_train_step(stage.system, tx, jax.random.key(0), ema), donate_argnums=0, keep_unused=True)
    state = init.abstract(stage.system, stage.plan, tx, mesh, ema)      # before the mesh is in force: it may be absent, and cannot compute
    with partitioning.use(mesh):
        return step.trace(state, partitioning.abstract(stage.step_spec, mesh))


def compile_step(stage: Stage, mesh: Any) -> Any:
    """``trace_step``, compiled: no array of the state exists. Raises ValueError."""
    return compiled(trace_step(stage, mesh), mesh)


def compiled(traced: Any, mesh: Any) -> Any:
    return traced.lower().compile(compiler_options=GPU_OPTIONS if mesh.devices.flat[0].platform == "gpu" else None)


def changed(stage: Stage, mesh: Any, changes: Mapping[str, Any]) -> tuple[Stage, Any]:
    """``stage`` and its mesh with ``changes`` (field -> value). Raises ValueError where the system or the mesh refuses them."""
    if not changes:
        return stage, mesh
    config = ConfigDict(configs.to_plain(stage.config))
    for field, value in changes.items():
        *sections, key = field.split(".")
        section = config
        for name in sections:
            section = section[name]
        section[key] = value
    if "rules" in changes:
        mesh = partitioning.make_mesh(changes["rules"], devices=list(mesh.devices.flat))
    with partitioning.use(mesh):
        return resolve(config, stage.name, stage.tokenizer, stage.instruction_tokenizer), mesh


def trial(stage: Stage, mesh: Any, changes: Mapping[str, Any]) -> Trial:
    """Compiles ``stage`` with ``changes``. Raises ValueError where the system or the mesh refuses them."""
    stage, mesh = changed(stage, mesh, changes)
    try:
        return Trial(changes, forecast(compile_step(stage, mesh)))
    except jax.errors.JaxRuntimeError as error:
        if not out_of_memory(error):
            raise
        return Trial(changes, None)


def advise(stage: Stage, mesh: Any, limit: int | None, current: Trial | None = None) -> list[Trial]:
    """The config as it is (``current``, where that was compiled already) and, unless it fits, candidates, each compiled: at most six, and none
    after ``MAX_SECONDS``.

    First each kind of change by itself: half the rows in a pass through the towers (``data.microbatch``), activations
    computed again (``remat``), other ``rules`` where there are several devices. Where none fits ``limit``, a micro-batch of
    the size that the first two programs suggest, and then everything together.
    """
    began = time.monotonic()
    trials = [current or trial(stage, mesh, {})]

    def attempt(changes: Mapping[str, Any]) -> None:
        if changes and all(changes != t.changes for t in trials) and time.monotonic() - began < MAX_SECONDS:
            with contextlib.suppress(ValueError):       # refused: BatchNorm takes no micro-batch, a batch may not divide
                trials.append(trial(stage, mesh, changes))

    if trials[0].fits(limit):
        return trials
    rows = stage.data.microbatch or stage.data.batch
    shards = math.prod(mesh.shape[axis] for axis in partitioning.BATCH_AXES)
    smaller = [m for m in range(rows - 1, 0, -1) if stage.data.batch % m == 0 and m % shards == 0]
    half = next((m for m in smaller if 2 * m <= rows), None)
    remat = {f"model.{name}.remat": "full" for name, tower in stage.config.model.items() if takes_remat(stage, name, tower)}
    rules = partitioning.RULES if mesh.devices.size > 1 else ()
    alone = [{"data.microbatch": half} if half else {}, remat, *({"rules": name} for name in rules if name != stage.config.rules)]
    for changes in alone:
        attempt(changes)
    if limit is None or any(t.fits(limit) for t in trials):
        return trials
    fewer = next((m for m in smaller if half and 2 * m < half), half)
    whole, halved = trials[0], next((t for t in trials if "data.microbatch" in t.changes), None)
    if halved and whole.size and halved.size and whole.size > halved.size:
        per_row = (whole.size - halved.size) / (rows - half)
        room = (limit - whole.size) / per_row + rows
        fewer = next((m for m in smaller if m <= room), smaller[-1])
    attempt({"data.microbatch": fewer} if fewer else {})
    if not any(t.fits(limit) for t in trials):
        sharded = min((t for t in trials if "rules" in t.changes and t.size), key=lambda t: t.size, default=None)
        attempt({**({"data.microbatch": fewer} if fewer else {}), **remat, **(sharded.changes if sharded else {})})
    return trials


def takes_remat(stage: Stage, name: str, tower: Any) -> bool:
    """Whether a section of the model is a tower that could compute more again than it does."""
    if not isinstance(tower, Mapping | ConfigDict) or not {"variant", "layers"} & set(tower) or tower.get("remat") == "full":
        return False
    config = ConfigDict(configs.to_plain(stage.config))
    config.model[name].remat = "full"
    try:
        return resolve(config, stage.name, stage.tokenizer).system.model != stage.system.model
    except ConfigError:
        return False


def flags(stage: Stage, changes: Mapping[str, Any]) -> str:
    """``changes`` as main takes them."""
    known = configs.flatten(stage.config)
    return " ".join(f"--config.stages.{stage.name}.{field}={value}" if field in known
                    else f"{field}={value!r} (in the config file)" for field, value in changes.items())


def explain(stage: Stage, mesh: Any, limit: int | None, trials: list[Trial], reason: str) -> str:
    """The message for what ``advise`` found; ``reason`` is XLA's."""
    def size(t: Trial) -> str:
        return "too much for the compiler" if t.size is None else amount(t.size, "B")

    device = mesh.devices.flat[0]
    current, others = trials[0], trials[1:]
    has = "does not tell its limit" if limit is None else f"may use {amount(limit, 'B')}"
    lines = [f"out of memory: the train step needs {size(current)} on each device, and a {device.device_kind} {has}."]
    if current.fits(limit):
        lines.append("The step by itself fits: what ran out is an evaluation (see evals.*.batch), or memory that other programs hold.")
    fitting = [t for t in others if t.fits(limit)]
    listed = [t for t in others if t not in fitting]
    if fitting:
        lines += ["These fit, by their compiled programs:", *(f"  {size(t)}: {flags(stage, t.changes)}" for t in fitting)]
    if listed:
        lines += ["Their programs need (the limit is not known):" if limit is None else "Tried, and too large:",
                  *(f"  {size(t)}: {flags(stage, t.changes)}" for t in listed)]
    if others and not fitting and limit is not None:
        lines.append("Nothing tried fits: take a smaller data.batch, a smaller model, optim.name=adafactor, or more devices.")
    if device.platform == "gpu" and "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ:
        lines.append("JAX takes three quarters of a GPU; the environment variable XLA_PYTHON_CLIENT_MEM_FRACTION=0.92 gives it more.")
    return "\n".join([*lines, f"XLA said: {reason.splitlines()[0]}"])
