"""One stage of a config, from its sections to a finished work directory. ``main`` and notebooks call ``run``.

    workdir/<n>_<stage>/config.json      the resolved config
                       /tokenizer/       so that the directory is complete in itself
                       /metrics.jsonl    rows by step
                       /checkpoints/     Orbax, with manifests
                       /frozen/          parameters that do not train, once
                       /report/          curves, pictures, index.html
                       /DONE             the last step and its scores
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import pathlib
import pkgutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import filelock
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from vlm_jax import config as configs
from vlm_jax import evals, partitioning, report, systems
from vlm_jax.console import Console
from vlm_jax.data import pipeline, sources, tokenizers
from vlm_jax.data.order import order_of
from vlm_jax.errors import ConfigError, nearest
from vlm_jax.system import System
from vlm_jax.train import checkpoint, init, loop, optim
from vlm_jax.train.metrics import MetricsLog, read_rows
from vlm_jax.train.state import TrainState, merge
from vlm_jax.train.step import make_train_step

EXIT_DONE, EXIT_PREEMPTED, EXIT_BAD_CONFIG = 0, 42, 43


@dataclasses.dataclass(frozen=True)
class Data:
    """The data section. Sources are spec strings (vlm_jax/data/sources.py); sizes in pixels and tokens.

    microbatch: rows per pass through the towers, 0 for all at once (nn/chunk.py).
    buckets: text lengths that a batch may be cropped to, () for always ``length``.
    block, window: the two-level permutation (data/order.py); block 1 is the full shuffle.
    caption, label: which field of a sample, "" for the source's own ("txt", "json:title", "txt@1;json:title@2" by weight).
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
    prefetch: int = 4
    bad_budget: float = 0.01


@dataclasses.dataclass(frozen=True)
class Optim:
    """What of the optim section concerns the trainer; the rest goes to train/optim.py."""
    ema: float = 0.0
    max_bad_steps: int = 10


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
        return init.plan(self.system, self.spec, tuple(self.config.trainable))

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
            threads=d.threads, prefetch=d.prefetch, block=d.block, window=d.window, bad_budget=d.bad_budget,
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
            elif value != found[key]:
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


def compiled_by_shape(fn: Callable, *donated: int) -> Callable:
    """Compiles ``fn(state, batch)`` once for every batch shape (length buckets) and keeps the executables."""
    jitted, programs = jax.jit(fn, donate_argnums=donated), {}

    def lower(state, batch):
        key = tuple(sorted((k, v.shape) for k, v in batch.items()))
        if key not in programs:
            programs[key] = jitted.lower(state, batch).compile()
        return programs[key]

    def run(state, batch):
        return lower(state, batch)(state, batch)

    run.lower = lower
    return run


def run(config: ConfigDict, workdir: str | pathlib.Path, *, only: str = "", eval_only: bool = False,
        console: Console | None = None) -> int:
    """Runs the stages of ``config`` in order (or the one named ``only``) and returns the exit code.

    The same call again resumes. Raises ConfigError, BadDataError and NonFiniteError, which
    ``main`` turns into exit code 43.
    """
    console = console or Console()
    workdir = pathlib.Path(workdir)
    names = [only] if only else list(config.stage_order)
    built = {name: resolve(config.stages[name], name) for name in names
             if folder_of(config, workdir, name)}          # every stage is checked before the first one trains
    workdir.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(str(workdir / ".lock"))
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise ConfigError(f"workdir={str(workdir)!r} is in use by another run (lock {workdir / '.lock'}); "
                          "give this one a --workdir of its own") from None
    with lock:
        for name in names:
            code = run_stage(config, built[name], workdir, eval_only=eval_only, console=console)
            if code:
                return code
    return EXIT_DONE


def open_origin(config: ConfigDict, workdir: pathlib.Path, origin: str) -> Mapping[str, np.ndarray]:
    """The leaves that an ``init`` rule names as "@stage" or a directory."""
    if origin.startswith("@"):
        folder = folder_of(config, workdir, origin[1:])
        if not (folder / "DONE").exists():
            raise ConfigError(f"init takes weights from stage {origin[1:]!r}, which has not finished in {folder}: "
                              f"run --stage={origin[1:]} first")
    else:
        folder = newest_stage(pathlib.Path(origin))
    return read_weights(folder)


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


def run_stage(config: ConfigDict, stage: Stage, workdir: pathlib.Path, *, eval_only: bool, console: Console) -> int:
    folder = folder_of(config, workdir, stage.name)
    began = time.perf_counter()
    total, opt = total_steps(stage), configs.call(
        Optim, {k: v for k, v in stage.config.optim.items() if k in Optim.__dataclass_fields__}, f"stages.{stage.name}.optim")
    checkpoints = configs.call(Checkpoints, stage.config.checkpoint, f"stages.{stage.name}.checkpoint")
    logging = configs.call(Logging, stage.config.log, f"stages.{stage.name}.log")
    mesh = configs.call(partitioning.make_mesh, stage.config.mesh, f"stages.{stage.name}.mesh", stage.config.rules)
    settings = {name: configs.call(Eval, section, f"stages.{stage.name}.evals.{name}")
                for name, section in stage.config.evals.items()}
    for name, setting in settings.items():
        if setting.kind not in evals.KINDS:
            raise ConfigError(f"stages.{stage.name}.evals.{name}.kind={setting.kind!r} is not an evaluation"
                              f"{nearest(setting.kind, evals.KINDS)}")
        configs.check_keys(evals.KINDS[setting.kind], setting.options, f"stages.{stage.name}.evals.{name}.options",
                           ("predict", "batches", "tokenizer", "source"))

    if (folder / "config.json").exists():
        changed = configs.changes(configs.from_json((folder / "config.json").read_text()), stage.config)
        if changed:
            raise ConfigError(f"{folder} was started with another config; changed: " + "; ".join(changed)
                              + ". Use another --workdir, or the old values.")
    done = folder / "DONE"
    if done.exists() and json.loads(done.read_text())["step"] >= total and not eval_only:
        console.say(f"stage {stage.name}: done at step {json.loads(done.read_text())['step']} ({folder})")
        return EXIT_DONE
    if eval_only and not (folder / "checkpoints").exists():
        raise ConfigError(f"--eval_only: {folder} has no checkpoint to evaluate")

    configs.call(partitioning.check_rows, {}, f"stages.{stage.name}.data", stage.data.batch, mesh)
    with partitioning.use(mesh):
        tx, learning_rate = make_optimizer(stage)
        keeper = checkpoint.Checkpointer(folder / "checkpoints", keep=checkpoints.keep)
        start, skipped = keeper.latest_good()
        for step, reason in skipped:
            console.say(f"checkpoint {step} is left out: {reason}")
        key = jax.random.key(stage.config.seed)
        if start is None and any(reason.startswith("damaged") for _, reason in skipped):   # not merely unfinished
            raise ConfigError(f"every checkpoint in {folder / 'checkpoints'} is damaged; training anew would overwrite them: "
                              "move that folder away first")
        if start is None:
            start = 0
            if eval_only:
                raise ConfigError(f"--eval_only: {folder} has no good checkpoint to evaluate")
            given = init.take_over(tuple(stage.config.init), stage.plan, functools.partial(open_origin, config, workdir),
                                   f"stages.{stage.name}.init")
            state = init.create(stage.system, stage.plan, tx, mesh, jax.random.fold_in(key, 0), stage.spec, given, opt.ema)
        else:
            abstract = init.abstract(stage.system, stage.plan, tx, mesh, opt.ema)
            state, _ = keeper.restore(start, abstract.replace(frozen={}))
            if abstract.frozen:
                with checkpoint.Checkpointer(folder / "frozen", keep=1) as whole:
                    state = state.replace(**whole.restore(0, {"frozen": abstract.frozen})[0])
            console.say(f"resumed at step {start} of {total} ({time.perf_counter() - began:.1f} s)")

        evaluate = functools.partial(evaluate_state, stage, settings, mesh, console)
        if eval_only:
            scores, _ = evaluate(state, start, folder, last=True)
            (folder / "eval.json").write_text(json.dumps({"step": start, **scores}, indent=1))
            console.scores(scores, start)
            return EXIT_DONE

        # data first: a bad source stops the run before compiling
        source = stage.open(stage.data.train)
        for setting in settings.values():
            stage.open(setting.data or stage.data.eval)
        example = configs.call(pipeline.preview, {}, f"stages.{stage.name}.data", source, stage.tokenizer, size=stage.data.size,
                               length=stage.data.length, augment=stage.data.augment or pipeline.EVAL_AUGMENT)
        folder.mkdir(parents=True, exist_ok=True)
        if state.frozen and start == 0:      # they do not change: written once a stage, not with every save
            with checkpoint.Checkpointer(folder / "frozen", keep=1) as whole:
                if whole.latest_good()[0] is None:
                    whole.save(0, {"frozen": state.frozen})
        batches = stage.train_batches(source, start, total, folder / "quarantine.jsonl")
        (folder / "config.json").write_text(configs.to_json(stage.config))
        if stage.tokenizer is not None:
            stage.tokenizer.save(folder / "tokenizer")
        step_fn = compiled_by_shape(make_train_step(stage.system, tx, jax.random.fold_in(key, 1), opt.ema), 0)
        shapes = {k: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=partitioning.sharding(
            mesh, ("batch",) + ("none",) * (len(s.shape) - 1), s.shape)) for k, s in stage.spec.items()}
        program = None
        if not stage.data.buckets:
            with console.waiting("compiling the train step"):
                program = step_fn.lower(state, shapes)
        console.overview(stage.name, folder, stage.plan, mesh, stage.config, example, program, source)

        log = MetricsLog(folder, resume_at=start, tensorboard=logging.tensorboard, wandb=logging.wandb)
        final: dict[str, Any] = {}

        def evaluate_now(step: int, state: TrainState) -> dict[str, float]:
            scores, final["evaluations"] = evaluate(state, step, folder, last=step == total)
            final["scores"] = scores
            return scores

        def save(step: int, state: TrainState) -> None:
            keeper.save(step, state.replace(frozen={}), {"batch": stage.data.batch})

        def on_bad(step: int) -> None:
            keys = stage.keys_of_step(source, step - 1)
            with (folder / "bad_batches.jsonl").open("a") as f:
                f.write(json.dumps({"step": step, "keys": keys}) + "\n")

        # Readers hold the interpreter for 5 ms by default before the loop may have it back: a step's worth of waiting.
        sys.setswitchinterval(5e-4)
        try:
            with loop.StopRequest() as stop, console.bar(stage.name, start, total) as progress:
                state, step = loop.fit(
                    state, step_fn, batches, place=lambda b: partitioning.place(b, mesh), start=start, total=total,
                    batch_size=stage.data.batch, log=log, log_every=logging.every, learning_rate=learning_rate,
                    save=save, save_every=checkpoints.every, evaluate=evaluate_now,
                    evaluate_at=lambda s: s == total or any(e.every and s % e.every == 0 for e in settings.values()),
                    on_bad=on_bad, max_bad_steps=opt.max_bad_steps, stop=stop, progress=progress)
                keeper.wait()
        finally:
            batches.close()
            log.close()
            keeper.close()
        if step < total:
            console.say(f"stopped by signal {stop.signal}: saved at step {step} of {total}; the same command resumes")
            return EXIT_PREEMPTED
        if final.get("scores"):
            console.scores(final["scores"], step)
        write_report(stage, folder, final, console)
        done.write_text(json.dumps({"step": step, "seconds": round(time.perf_counter() - began, 1),
                                    "scores": final.get("scores", {})}, indent=1))
        console.say(f"stage {stage.name}: {step} steps, {time.perf_counter() - began:.0f} s; report: {folder / 'report' / 'report.html'}")
    return EXIT_DONE


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


def evaluate_state(stage: Stage, settings: Mapping[str, Eval], mesh: Any, console: Console, state: TrainState, step: int,
                   folder: pathlib.Path, *, last: bool) -> tuple[dict[str, float], dict[str, Any]]:
    """Runs the evaluations that are due; returns their scores by name, and the evaluations."""
    params = state.ema or state.params
    predict = bind(stage.system, merge(params, state.frozen, state.moving), mesh)
    scores, found = {}, {}
    for name, setting in settings.items():
        if not last and not (setting.every and step % setting.every == 0):
            continue
        with console.waiting(f"evaluating {name}"):
            source = stage.open(setting.data or stage.data.eval)
            result = evals.run(setting.kind, predict, stage.eval_batches(source, setting.batch, setting.examples or None),
                               tokenizer=stage.tokenizer, source=source, **setting.options)
        for key, value in result.scores.items():
            head, _, tail = key.partition("/")
            scores[f"{name}/{tail}" if tail else f"{name}/{head}"] = float(value)
        found[name] = result
        (folder / "predictions").mkdir(parents=True, exist_ok=True)
        evals.write_items(folder / "predictions" / f"{name}.jsonl", result.items)
    return scores, found


def write_report(stage: Stage, folder: pathlib.Path, final: Mapping[str, Any], console: Console) -> None:
    pictures: dict[str, Any] = {}
    for name, result in final.get("evaluations", {}).items():
        pictures.update({k: v for k, v in result.pictures.items() if k not in pictures})
    report.write_report(folder / "report", title=f"{stage.config.system}, stage {stage.name}",
                        metrics=read_rows(folder / "metrics.jsonl"), scores=final.get("scores", {}),
                        config_text=configs.to_json(stage.config), **pictures)
