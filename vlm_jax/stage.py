"""A stage of a config, checked and built: what training, evaluating and loading stand on.

The dataclasses are the sections of a stage that the trainer itself reads; their fields are the keys.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import pathlib
import pkgutil
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from vlm_jax import config as configs
from vlm_jax import partitioning, systems, weight_rules
from vlm_jax.data import pipeline, sources, tokenizers
from vlm_jax.data.order import order_of
from vlm_jax.errors import ConfigError, nearest
from vlm_jax.importers import hub
from vlm_jax.system import System
from vlm_jax.train import checkpoint, init, optim


IMPORTED = "imported"     # in a work directory: what came from the hub


@dataclasses.dataclass(frozen=True)
class Data:
    """The data section. Sources are spec strings (vlm_jax/data/sources.py); sizes in pixels and tokens.

    microbatch: rows per pass through the towers, 0 for all at once (nn/chunk.py).
    buckets: text lengths that a batch may be cropped to, () for always ``length``.
    block, window: the two-level permutation (data/order.py); block 1 is the full shuffle.
    caption, label: which field of a sample, "" for the source's own ("txt", "json:title", "txt@1;json:title@2" by weight).
    workers: processes that make batches instead of the reader threads, 0 for none.
    bad_budget: the share of samples that may be unreadable before the run stops.
    """
    train: Any
    eval: Any
    batch: int
    size: int
    length: int
    tokenizer: str
    microbatch: int = 0
    augment: str = ""
    eval_augment: str = ""
    caption: str = ""
    label: str = ""
    buckets: tuple[int, ...] = ()
    block: int = 1
    window: int = 1
    threads: int = 2
    workers: int = 0
    prefetch: int = 4
    bad_budget: float = 0.01


@dataclasses.dataclass(frozen=True)
class Optim:
    """What of the optim section concerns the trainer; the rest goes to train/optim.py."""
    ema: float = 0.0
    max_bad_steps: int = 10


@dataclasses.dataclass(frozen=True)
class Checkpoints:
    """every: steps between saves; keep: how many stay."""
    every: int = 1000
    keep: int = 2


@dataclasses.dataclass(frozen=True)
class Logging:
    """every: steps between rows of metrics.jsonl; tensorboard, wandb: extra loggers (wandb: a project name)."""
    every: int = 10
    tensorboard: bool = False
    wandb: str = ""


@dataclasses.dataclass(frozen=True)
class Eval:
    """One evaluation: its kind, data ("" for data.eval), how many examples, and the kind's own options.

    every: steps between runs, 0 for the last step only; a run every ``every`` steps also ends the training.
    """
    kind: str
    data: Any = ""
    examples: int = 0
    batch: int = 128
    every: int = 0
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Stage:
    """A stage, built: everything that training, evaluating and loading need."""
    name: str
    config: ConfigDict
    data: Data
    tokenizer: Any
    system: System

    @functools.cached_property
    def spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        d = self.data
        return {"image": jax.ShapeDtypeStruct((d.batch, d.size, d.size, 3), jnp.uint8),
                "text": jax.ShapeDtypeStruct((d.batch, d.length), jnp.int32),
                "text_mask": jax.ShapeDtypeStruct((d.batch, d.length), jnp.bool_),
                "caption_id": jax.ShapeDtypeStruct((d.batch,), jnp.int32),
                "image_id": jax.ShapeDtypeStruct((d.batch,), jnp.int32)}

    @functools.cached_property
    def plan(self) -> init.Plan:
        """What the model's leaves are; nothing is computed. Raises ConfigError for sizes that do not fit together."""
        return configs.call(init.plan, {}, f"stages.{self.name}", self.system, self.spec, tuple(self.config.trainable))

    def open(self, which: Any) -> Any:
        """The source of a spec. Raises ConfigError."""
        if not which:
            raise ConfigError(f"stages.{self.name}.data.train and data.eval must name a source, such as "
                              "tars:/data/{00000..00099}.tar or scenes:train")
        options = {k: v for k, v in (("caption", self.data.caption), ("label", self.data.label)) if v}
        return configs.call(sources.open_source, {}, f"stages.{self.name}.data", which, **options)

    def eval_batches(self, source: Any, batch: int, examples: int | None) -> Iterator[dict[str, Any]]:
        """Batches with ``meta`` beside the arrays, every sample once."""
        with pipeline.eval_batches(source, self.tokenizer, batch=batch, size=self.data.size, length=self.data.length,
                                   augment=self.data.eval_augment or pipeline.EVAL_AUGMENT, limit=examples,
                                   bad_budget=self.data.bad_budget) as batches:
            for arrays, meta in batches:
                real = iter(meta)
                yield {**arrays, "meta": [next(real) if row else {} for row in arrays["mask"]]}

    def train_batches(self, source: Any, start: int, stop: int, quarantine: pathlib.Path) -> pipeline.TrainBatches:
        d = self.data
        return configs.call(
            pipeline.train_batches, {}, f"stages.{self.name}.data", source, self.tokenizer, batch=d.batch, size=d.size,
            length=d.length, augment=d.augment or pipeline.EVAL_AUGMENT, seed=self.config.seed, start_step=start, stop_step=stop,
            threads=d.threads, workers=d.workers, prefetch=d.prefetch, block=d.block, window=d.window, bad_budget=d.bad_budget,
            buckets=d.buckets, quarantine_path=str(quarantine))

    def keys_of_step(self, source: Any, step: int) -> list[str]:
        """The samples of training step ``step`` (0-based), before any bad one was replaced."""
        positions = np.arange(step * self.data.batch, (step + 1) * self.data.batch)
        order = order_of(source, self.config.seed, self.data.block, self.data.window)
        return [sources.key_of(source, int(i)) for i in order.index(positions)]


def system_names() -> list[str]:
    return [m.name for m in pkgutil.iter_modules(systems.__path__)]


def resolve(stage_config: ConfigDict, name: str, tokenizer: Any = None) -> Stage:
    """Checks every section and builds the system; compiles and allocates nothing.

    ``model.tokens`` (vocab, bos, eos, pad) is filled from the tokenizer where it says -1, and
    must agree with it elsewhere. Raises ConfigError.
    """
    configs.check_stage(name, stage_config)
    stage_config = ConfigDict(configs.to_plain(stage_config))
    data = configs.call(Data, stage_config.data, f"stages.{name}.data")
    stage_config.data = {f.name: getattr(data, f.name) for f in dataclasses.fields(data)}     # defaults written out
    for field in ("batch", "size", "length"):
        if getattr(data, field) < 1:
            raise ConfigError(f"stages.{name}.data.{field}={getattr(data, field)} must be at least 1")
    if data.microbatch and data.batch % data.microbatch:
        divisors = [m for m in range(1, data.batch + 1) if data.batch % m == 0]
        closest = min(divisors, key=lambda m: abs(m - data.microbatch))
        raise ConfigError(f"stages.{name}.data.microbatch={data.microbatch} does not divide data.batch={data.batch}; "
                          f"nearest: {closest}")
    if tokenizer is None and data.tokenizer:
        tokenizer = configs.call(tokenizers.load, {}, f"stages.{name}.data.tokenizer", data.tokenizer)
    if tokenizer is not None and "tokens" in stage_config.model:
        found = {"vocab": tokenizer.vocab_size, "bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "pad": tokenizer.pad_id}
        for key, value in stage_config.model.tokens.items():
            if value == -1:
                stage_config.model.tokens[key] = found[key]
            elif value != found[key] and not (key == "vocab" and value > found[key]):    # a table may be padded
                raise ConfigError(f"stages.{name}.model.tokens.{key}={value}, but tokenizer {data.tokenizer!r} has "
                                  f"{found[key]}; nearest: {found[key]} (or -1 to take the tokenizer's)")
    if stage_config.system not in system_names():
        raise ConfigError(f"stages.{name}.system={stage_config.system!r} is not a system"
                          f"{nearest(stage_config.system, system_names())}")
    module = importlib.import_module(f"vlm_jax.systems.{stage_config.system}")
    system = configs.call(module.build, {}, f"stages.{name}", stage_config)
    return Stage(name, stage_config, data, tokenizer, system)


def make_optimizer(stage: Stage):
    """(optax transformation, learning rate by step) of a stage."""
    section = {k: v for k, v in stage.config.optim.items() if k not in Optim.__dataclass_fields__}
    shapes = {p: x.shape for p, x in stage.plan.trained.items()}
    axes = {p: stage.plan.axes[p] for p in shapes}
    return configs.call(optim.make_optimizer, section, f"stages.{stage.name}.optim", axes, shapes,
                        total_steps=total_steps(stage), batch=stage.data.batch)


def total_steps(stage: Stage) -> int:
    steps = int(stage.config.steps)
    if steps < 1:
        raise ConfigError(f"stages.{stage.name}.steps={steps} must be at least 1")
    return steps


def folder_of(config: ConfigDict, workdir: pathlib.Path, name: str) -> pathlib.Path:
    """workdir/<n>_<stage>: stages of the path are numbered from 1, the others follow by name."""
    order = list(config.stage_order) + sorted(set(config.stages) - set(config.stage_order))
    if name not in order:
        raise ConfigError(f"stage {name!r} is not in the config{nearest(name, order)}")
    return pathlib.Path(workdir) / f"{order.index(name) + 1}_{name}"


def origin_folder(config: ConfigDict, workdir: pathlib.Path, origin: str) -> pathlib.Path:
    """The stage directory of an origin: "@stage", a directory, or "hf:OWNER/NAME[@REVISION]", which ``run`` has
    imported into the work directory. Raises ConfigError."""
    if origin.startswith("@"):
        folder = folder_of(config, workdir, origin[1:])
        if not (folder / "DONE").exists():
            raise ConfigError(f"init takes weights from stage {origin[1:]!r}, which has not finished in {folder}: "
                              f"run --stage={origin[1:]} first")
        return folder
    if origin.startswith("hf:"):
        return newest_stage(pathlib.Path(workdir) / IMPORTED / hub.folder_name(origin))
    return newest_stage(pathlib.Path(origin))


def hub_origins(stage: Stage) -> list[str]:
    """What a stage's ``init`` takes from the hub."""
    given = (stage.config.init,) if isinstance(stage.config.init, str) else stage.config.init
    origins = [rule.rstrip(":") if isinstance(rule, str) else rule[1].rpartition(":")[0] for rule in given]
    return [origin for origin in origins if origin.startswith("hf:")]


def open_origin(config: ConfigDict, workdir: pathlib.Path, origin: str) -> Mapping[str, np.ndarray]:
    """The leaves of an origin that an ``init`` rule names."""
    return read_weights(origin_folder(config, workdir, origin))


def init_rules(config: ConfigDict, stage: Stage, workdir: pathlib.Path) -> list[weight_rules.Rule]:
    """The rules of a stage's ``init``. A string among them, or instead of them, is an origin to take every leaf
    from by its own name; where the resolution differs, image positions are resized as the origin's release does."""
    given = (stage.config.init,) if isinstance(stage.config.init, str) else stage.config.init
    rules: list[weight_rules.Rule] = []
    for rule in given:
        if not isinstance(rule, str):
            rules.append(tuple(rule))
            continue
        record = origin_folder(config, workdir, rule.rstrip(":")) / "import.json"
        resize = json.loads(record.read_text())["resize"] if record.exists() else "resize_positions"
        source, positions = rule.rstrip(":") + ":", "image/(.*/)?position_embed"
        if any(re.fullmatch(positions, path) for path in stage.plan.shapes):
            rules.append((positions, source, resize))
        rules.append((".*", source, "copy"))
    return rules


def read_weights(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """All leaves a model needs (parameters and statistics) from a stage's newest good checkpoint; the
    averaged weights where there are some. Raises ConfigError."""
    def read(collection):
        try:
            return checkpoint.load_params(folder / "checkpoints", collections=(collection,))
        except ValueError:      # nothing stored under that name
            return {}
    try:
        leaves = {**read("params"), **read("moving"), **read("ema")}
        if (folder / "frozen").exists():
            leaves |= checkpoint.load_params(folder / "frozen", collections=("frozen",))
    except FileNotFoundError as error:
        raise ConfigError(str(error)) from error
    return leaves


def newest_stage(folder: pathlib.Path) -> pathlib.Path:
    """The stage directory meant by ``folder``: itself, or the last of its stages that has a checkpoint."""
    if (folder / "config.json").exists():
        return folder
    found = [f for f in folder.glob("*_*") if (f / "config.json").exists() and (f / "checkpoints").exists()]
    if not found:
        raise ConfigError(f"{str(folder)!r} holds no trained or imported model (no config.json in it or its stages)")
    return max(found, key=lambda f: int(f.name.split("_")[0]) if f.name.split("_")[0].isdigit() else -1)


def bind(system: System, variables: Any, mesh: Any) -> dict[str, Callable]:
    """Predict functions over host batches: placed, jitted once per name and options, brought back as numpy."""
    def make(fn):
        @functools.lru_cache(maxsize=None)
        def jitted(options):
            return jax.jit(lambda variables, batch, key: fn(variables, batch, key=key, **dict(options)))

        def call(batch: Mapping[str, Any], key: jax.Array | None = None, **options: Any) -> dict[str, np.ndarray]:
            arrays = {k: v for k, v in batch.items() if k != "meta"}
            with partitioning.use(mesh):
                return jax.device_get(jitted(tuple(sorted(options.items())))(variables, partitioning.place(arrays, mesh), key))
        return call

    return {name: make(fn) for name, fn in system.predict.items()}
