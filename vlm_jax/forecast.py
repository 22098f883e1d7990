"""What the train step of a config needs, told by the compiler before anything runs: on the devices at hand, or on chips that are not there.

python -m vlm_jax.main --config=configs/clip.py:l14 --compile_only --topology=v5p:4x4x4

compiles for a TPU slice on any x86 Linux machine with libtpu (pip install -e ".[tpu]"), or, with --topology=h100:4x8, for GPUs with JAX's CUDA plugin.
Nothing is downloaded, opened or allocated.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import pathlib
import re
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
from ml_collections import ConfigDict

from vlm_jax import config as configs
from vlm_jax import memory, partitioning, roofline
from vlm_jax import stage as stages
from vlm_jax.console import amount
from vlm_jax.data import tokenizers
from vlm_jax.errors import ConfigError, nearest
from vlm_jax.stage import Stage

# device_kind, compute capability, multiprocessors, floating-point units and shared memory of one, shared memory of a block at most, L2, GHz, memory
GPUS = {"a100": ("NVIDIA A100-SXM4-80GB", 8, 108, 64, 167_936, 166_912, 41_943_040, 1.41, 85_100_068_864),
        "h100": ("NVIDIA H100 80GB HBM3", 9, 132, 128, 233_472, 232_448, 52_428_800, 1.98, 84_942_979_072),
        "rtx4090": ("NVIDIA GeForce RTX 4090", 8, 128, 128, 102_400, 101_376, 75_497_472, 2.52, 25_757_220_864),
        "rtx4080": ("NVIDIA GeForce RTX 4080", 8, 76, 128, 102_400, 101_376, 67_108_864, 2.51, 17_171_480_576)}
GENERATIONS = {"v5e": 2, "v5p": 3, "v6e": 2, "tpu7x": 3}     # dimensions of their tori
PRESENT_NOWHERE = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_WORKER_HOSTNAMES": "localhost",
                   "TPU_STDERR_LOG_LEVEL": "3", "TPU_MIN_LOG_LEVEL": "3"}
ROOMY, MOST_TIMES = 0.45, 16      # a batch is worth raising where the step takes less of the memory; how far at most
MEASURED = "measured"
EXAMPLES = 1_000_000        # of data that need not be there: how long an epoch is changes no program


@dataclasses.dataclass(frozen=True)
class Forecast:
    """Of one train step. parameters, trained: numbers of them; sizes in bytes, seconds and flops of each device; limit and seconds are None where
    the device's are not known; collectives: name -> (how often, bytes that a device sends); batch: rows of all devices."""
    config: str
    stage: str
    devices: int
    device: str
    chip: str
    mesh: Mapping[str, int]
    rules: str
    batch: int
    parameters: int
    trained: int
    state_bytes: int
    temporary_bytes: int
    limit_bytes: int | None
    flops: float
    traffic_bytes: float
    collectives: Mapping[str, tuple[int, float]]
    seconds: Mapping[str, float] | None
    compile_seconds: float

    @property
    def peak_bytes(self) -> int:
        return self.state_bytes + self.temporary_bytes

    @property
    def fits(self) -> bool | None:
        return None if self.limit_bytes is None else self.peak_bytes <= self.limit_bytes

    @property
    def step_seconds(self) -> float | None:
        """The least that a step can take: its slowest part."""
        return None if not self.seconds else max(self.seconds.values())

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "peak_bytes": self.peak_bytes, "fits": self.fits, "step_seconds": self.step_seconds}

    def lines(self) -> list[str]:
        """As a person reads it."""
        limit = "unknown" if self.limit_bytes is None else amount(self.limit_bytes, "B")
        share = "" if not self.limit_bytes else f", {self.peak_bytes / self.limit_bytes:.0%}"
        sizes = " x ".join(f"{a}={n}" for a, n in self.mesh.items())
        out = [f"{self.config}, stage {self.stage}: batch {self.batch:,} on {self.devices} x {self.device} ({sizes}), rules {self.rules}; "
               f"compiled in {self.compile_seconds:.0f} s",
               f"parameters: {self.parameters:,}, {self.trained:,} of them trained",
               f"memory of a device: {amount(self.peak_bytes, 'B')} of {limit}{share} (state and batch {amount(self.state_bytes, 'B')}, temporaries "
               f"{amount(self.temporary_bytes, 'B')})",
               f"of a device in a step: {amount(self.flops, 'FLOP')}, {amount(self.traffic_bytes, 'B')} of memory moved"]
        out += [f"collective: {name}, {count:,} times, {amount(sent, 'B')} sent" for name, (count, sent) in self.collectives.items()]
        out += [] if self.collectives else ["collectives: none"]
        if self.seconds:
            parts = ", ".join(f"{name} {value * 1e3:.3g} ms" for name, value in self.seconds.items())
            bound = max(self.seconds, key=self.seconds.get)
            speed = "at the speed of matrix products here" if self.chip == MEASURED else f"at the peaks of a {self.chip}"
            out.append(f"a step {speed}: at least {self.step_seconds * 1e3:.3g} ms, {self.batch / self.step_seconds:,.0f} examples/s "
                       f"(bound by {bound}: {parts})")
        return out


def forecast(stage: Stage, mesh: Any, name: str = "", chip: roofline.Chip | None = None, limit: int | None = None) -> Forecast:
    """Compiles the train step. ``chip``, ``limit``: the device's speeds and memory, where the table of chips and the device itself do not know them.

    Raises ValueError where the batch does not divide over the mesh, and JaxRuntimeError where the compiler itself finds too little memory
    (``memory.out_of_memory``).
    """
    began = time.perf_counter()
    traced = memory.trace_step(stage, mesh)
    program = memory.compiled(traced, mesh)
    seconds, device = time.perf_counter() - began, mesh.devices.flat[0]
    chip = chip or roofline.chip_of(mesh)
    need = roofline.demand(traced, program, mesh.devices.size)
    analysis = program.memory_analysis()
    return Forecast(
        config=name or stage.config.system, stage=stage.name, devices=mesh.devices.size, device=device.device_kind,
        chip=chip.name if chip else "", mesh=dict(mesh.shape), rules=stage.config.rules, batch=stage.data.batch,
        parameters=stage.plan.count(), trained=stage.plan.count(trained=True),
        state_bytes=analysis.argument_size_in_bytes, temporary_bytes=analysis.temp_size_in_bytes, limit_bytes=limit or memory.limit_of(mesh),
        flops=need.flops, traffic_bytes=need.traffic, collectives={k: (c.count, c.sent) for k, c in need.collectives.items()},
        seconds=need.seconds(chip) if chip else None, compile_seconds=seconds)


class Unread(tokenizers.Tokenizer):
    """A tokenizer that is not there, with the ids that a model says it has."""
    kind = "unread"

    def __init__(self, vocab: int, bos: int, eos: int, pad: int, **_: int):
        self.vocab_size, self.bos_id, self.eos_id, self.pad_id = vocab, bos, eos, pad

    def encode(self, text: str) -> list[int]:
        raise ConfigError("this tokenizer is not there")


def open_stage(config: ConfigDict, name: str, workdir: pathlib.Path = pathlib.Path()) -> Stage:
    """A stage for its shapes alone: neither its data nor, where the model says how large the vocabulary is, its tokenizer need be there.
    Raises ConfigError."""
    section = stages.inherit(config, workdir, name)
    asked, tokens = stages.pieces(section), section.model.get("tokens", {})
    if asked and tokens.get("vocab") == -1:
        tokens.vocab = asked
    try:
        tokenizer = None if asked or not section.data.tokenizer else tokenizers.load(section.data.tokenizer)
    except (OSError, ValueError, ImportError):
        if tokens.get("vocab", 0) == -1:
            raise ConfigError(f"stages.{name}.data.tokenizer={section.data.tokenizer!r} cannot be opened, and the model does not say how large its "
                              f"vocabulary is; nearest: --config.stages.{name}.model.tokens.vocab=32000") from None
        tokenizer = None
    if tokenizer is None:
        section.data.tokenizer = ""
        for key, value in tokens.items():
            tokens[key] = max(value, 0)
        if isinstance(section.model.get("prompt"), str):      # as many ids as words
            with section.model.ignore_type():
                section.model.prompt = (0,) * len(section.model.prompt.split())
    second = None
    if section.data.get("instruction_tokenizer"):
        try:
            second = tokenizers.load(section.data.instruction_tokenizer)
        except (OSError, ValueError, ImportError):
            second = Unread(**{"bos": -1, "eos": -1, "pad": 0, **section.model.instruction_tokens})
    stage = stages.resolve(section, name, tokenizer, second)
    if not stage.data.train:
        vars(stage)["examples"] = EXAMPLES
    return stage


# ---- chips that are not there --------------------------------------------------------------------

def absent_devices(topology: str) -> list[Any]:
    """The devices of a TPU slice, "v5p:8x8x8", of several, "v5e:16x16*2", or of machines with GPUs, "h100:8" and "h100:4x8". Raises ConfigError."""
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)(?:\*(\d+))?", topology)
    kind = topology.partition(":")[0]
    known = {**{name: f"{name}:{'x'.join('4' * n)}" for name, n in GENERATIONS.items()}, **{name: f"{name}:8" for name in GPUS}}
    if not match or kind not in known:
        raise ConfigError(f"--topology={topology!r} is neither a TPU slice nor machines with GPUs" +
                          (f"; nearest: {known[kind]}" if kind in known else nearest(kind, known)))
    shape, slices = match.group(2), int(match.group(3) or 1)
    sizes = [int(n) for n in shape.split("x")]
    if kind in GPUS:
        if len(sizes) > 2 or slices > 1:
            raise ConfigError(f"--topology={topology!r}: write {kind}:8, or {kind}:4x8 for four machines with eight each")
        return absent_gpus(kind, *([1, *sizes] if len(sizes) == 1 else sizes))
    if len(sizes) != GENERATIONS[kind]:
        raise ConfigError(f"--topology={topology!r}: chips of {kind} are wired in {GENERATIONS[kind]} dimensions; nearest: {known[kind]}")
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError('--topology needs the TPU compiler, which is not installed: pip install -e ".[tpu]" (on Linux; no TPU is needed)')
    os.environ.update({k: v for k, v in PRESENT_NOWHERE.items() if k not in os.environ})
    return described(topology, platform="tpu", topology_name=f"{kind}:{shape}", **({"num_slices": slices} if slices > 1 else {}),
                     **({"chips_per_host_bounds": [1, 1, 1]} if math.prod(sizes) == 1 else {}))


def absent_gpus(kind: str, machines: int, each: int) -> list[Any]:
    """GPUs of a kind that XLA's compiler knows by these numbers alone. It takes plain attention for them: cuDNN is asked on the device."""
    if not any(importlib.util.find_spec(f"jax_plugins.{plugin}") for plugin in ("xla_cuda12", "xla_cuda13") if importlib.util.find_spec("jax_plugins")):
        raise ConfigError('--topology needs the GPU compiler, which is not installed: pip install -e ".[cuda]" (on Linux; no GPU is needed)')
    name, major, cores, units, shared, most, cache, clock, memory = GPUS[kind]
    target = f"""gpu_device_info {{
        cuda_compute_capability {{ major: {major} }} core_count: {cores} fpus_per_core: {units} clock_rate_ghz: {clock} device_memory_size: {memory}
        memory_bandwidth: {int(roofline.CHIPS[name].bandwidth)} l2_cache_size: {cache} shared_memory_per_core: {shared} shared_memory_per_block_optin: {most}
        shared_memory_per_block: 49152 threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048 registers_per_core_limit: 65536
        registers_per_block_limit: 65536 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535 thread_dim_limit_x: 1024
        thread_dim_limit_y: 1024 thread_dim_limit_z: 64 }}
        platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 8 }} runtime_version {{ major: 12 minor: 8 }} device_description_str: "{name}" """
    return described(f"{kind}:{machines}x{each}", platform="cuda", topology_name=kind, target_config=target, topology=f"1x{machines}x{each}")


def described(asked: str, /, **options: Any) -> list[Any]:
    from jax.experimental import topologies
    try:
        return list(topologies.get_topology_desc(**options).devices)
    except Exception as error:      # of several kinds; the compiler says what it knows
        raise ConfigError(f"--topology={asked!r}: the compiler does not know it ({str(error).splitlines()[0]})") from error


def mesh_of(stage: Stage, devices: list[Any]) -> Any:
    """The mesh that the stage would have on ``devices``. Raises ConfigError."""
    return configs.call(partitioning.make_mesh, dict(stage.config.mesh), f"stages.{stage.name}.mesh", stage.config.rules, devices=devices)


def compile_only(config: ConfigDict, topology: str = "", *, name: str = "", only: str = "", say: Callable[[str], None] = print) -> list[Forecast]:
    """Compiles the stages of a config, or the one named ``only``, for a topology, "" for the devices at hand, and says what each needs. Raises
    ConfigError for one that does not fit, with what would."""
    devices = absent_devices(topology) if topology else jax.devices()
    out = []
    for stage_name in [only] if only else config.stage_order:
        if stage_name not in config.stages:
            raise ConfigError(f"--stage={stage_name!r} is not a stage{nearest(stage_name, config.stages)}")
        with partitioning.use(partitioning.make_mesh(devices=devices)):      # for dtype="auto"
            stage = open_stage(config, stage_name)
        mesh = mesh_of(stage, devices)
        try:
            with memory.advising(stage, mesh):
                found = forecast(stage, mesh, name)
        except ConfigError:
            raise
        except ValueError as error:
            raise ConfigError(f"stages.{stage_name}: {error}") from error
        for line in found.lines():
            say(line)
        out.append(found)
    return out


def advise(stage: Stage, mesh: Any, name: str = "", host_memory: int | None = None) -> tuple[Forecast, list[str]]:
    """The forecast on devices at hand, and changes that pay: no recomputation where it fits, a larger batch where most of the memory stays empty.
    Each was compiled. host_memory: bytes, the limit of CPUs. Raises ConfigError, with what would fit, where the config does not."""
    limit, chip = memory.limit_of(mesh), roofline.chip_of(mesh) or measured_chip(mesh)
    if limit is None and host_memory and mesh.devices.flat[0].platform == "cpu":
        limit = host_memory // mesh.devices.size
    try:
        found = forecast(stage, mesh, name, chip, limit)
        current = memory.Trial({}, found.peak_bytes)
    except jax.errors.JaxRuntimeError as error:
        if not memory.out_of_memory(error):
            raise
        found, current = None, memory.Trial({}, None)
    if found is None or found.fits is False:
        raise ConfigError(memory.explain(stage, mesh, limit, memory.advise(stage, mesh, limit, current), "the train step was compiled, not run"))
    changes = []

    def attempt(change: Mapping[str, Any], why: Callable[[Forecast], str]) -> None:
        try:
            other = forecast(*memory.changed(stage, mesh, change), name, chip, limit)
        except (ValueError, jax.errors.JaxRuntimeError):      # refused, or too large
            return
        if other.fits:
            changes.append(f"{memory.flags(stage, change)}: {why(other)}, {amount(other.peak_bytes, 'B')} of {amount(limit, 'B')}")

    again = {f"model.{key}.remat": "none" for key, tower in stage.config.model.items()
             if isinstance(tower, Mapping | ConfigDict) and tower.get("remat", "none") != "none"}
    if limit and again:
        attempt(again, lambda other: f"nothing is computed twice, {1 - other.flops / found.flops:.0%} of the work saved")
    if limit and found.peak_bytes < ROOMY * limit:
        times = int((0.9 * limit - found.state_bytes) / max(1, found.temporary_bytes))
        larger = stage.data.batch * 2 ** (min(times, MOST_TIMES).bit_length() - 1) if times > 1 else 0
        if larger:
            attempt({"data.batch": larger}, lambda other: "a larger batch fits too (it is another recipe)")
    return found, changes


def measured_chip(mesh: Any) -> roofline.Chip:
    """The speed of matrix products on a device at hand, for one that the table does not know; its memory and links count as free."""
    import jax.numpy as jnp
    n, dtype = (1024, jnp.float32) if mesh.devices.flat[0].platform == "cpu" else (4096, jnp.bfloat16)
    x = jax.device_put(jnp.ones((n, n), dtype), mesh.local_devices[0])
    product = jax.jit(lambda a: a @ a * (1 / n)).lower(x).compile()
    product(x).block_until_ready()
    best = math.inf
    for _ in range(5):
        began = time.perf_counter()
        product(x).block_until_ready()
        best = min(best, time.perf_counter() - began)
    share = mesh.devices.size if mesh.devices.flat[0].platform == "cpu" else 1      # virtual devices of a CPU share its cores
    return roofline.Chip(MEASURED, 2 * n**3 / best / share, math.inf, math.inf, math.inf)
