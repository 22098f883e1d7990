"""Runs a config: every stage from its sections to a finished work directory. ``main`` calls ``run``, notebooks ``train``.

    workdir/<n>_<stage>/config.json      the resolved config
                       /provenance.json  command, code, versions, devices, data, where weights come from, licence
                       /tokenizer/       so that the directory is complete in itself
                       /metrics.jsonl    rows by step
                       /checkpoints/     Orbax, with manifests
                       /frozen/          parameters that do not train, once
                       /best/            weights at the best evaluation, where select.metric names one
                       /result/          the chosen or averaged weights, where the stage has a ``select``
                       /predictions/     what was predicted for every evaluated item
                       /report/          report.html and its pictures
                       /profile/         what --profile traced, for xprof
                       /DONE             the last step and its scores
           /goodput.jsonl                where the time went, over all starts

Of several processes, each runs all of this; the first one alone writes what is written once, and speaks. They share the work directory, or each
has a folder of its own beside a bucket (``bucket``).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import inspect
import json
import os
import pathlib
import platform
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import filelock
import jax
import numpy as np
from ml_collections import ConfigDict

from vlm_jax import bucket, evals, feature_cache, loading, memory, partitioning, processes, profiling, provenance
from vlm_jax import config as configs
from vlm_jax import stage as stages
from vlm_jax.console import Console
from vlm_jax.data import fingerprint, pipeline, tokenizers
from vlm_jax.errors import ConfigError, nearest
from vlm_jax.importers import cli
from vlm_jax.nn import narrow
from vlm_jax.stage import BEST, IMPORTED, RESULT, Stage, folder_of
from vlm_jax.train import checkpoint, goodput, init, loop
from vlm_jax.train.metrics import MetricsLog, read_rows
from vlm_jax.train.state import TrainState, merge
from vlm_jax.train.step import make_train_step

EXIT_DONE, EXIT_PREEMPTED = 0, 42
MAX_FAILED_SAVES, SAVE_PAUSE = 3, 5.0      # in a row; seconds before the last one of a run is tried again


def run(config: ConfigDict, workdir: str | pathlib.Path, *, only: str = "", eval_only: bool = False, console: Console | None = None,
        watchdog: processes.Watchdog | None = None, began: float | None = None, profile: str = "") -> int:
    """Runs the stages of ``config`` in order (or the one named ``only``) and returns the exit code.

    The same call again resumes. ``watchdog``: of several processes, or one that may not hang; ``began``: ``time.time()`` when the process
    started; ``profile``: steps to trace (``vlm_jax.profile``). Raises ConfigError, BadDataError and NonFiniteError, which ``main`` turns into
    exit code 43.
    """
    first = partitioning.is_first()
    console = console or Console(quiet=not first)
    if partitioning.process_count() > 1:
        check_alike(config, workdir)
    if not bucket.is_address(workdir):
        return run_in(pathlib.Path(workdir), lambda: None, config, only, eval_only, console, watchdog, began, profile)

    def end(code: int, text: str) -> None:
        if watchdog:
            watchdog.leave(code, text)
        os._exit(code)

    with bucket.mirrored(str(workdir), console.say, end) as mirror:
        return run_in(mirror.folder, mirror.share, config, only, eval_only, console, watchdog, began, profile)


def run_in(workdir: pathlib.Path, share: Callable[[], None], config: ConfigDict, only: str, eval_only: bool, console: Console,
           watchdog: processes.Watchdog | None, began: float | None, profile: str) -> int:
    """``run`` in a folder. ``share``: brings what the first process wrote to the others, where they have folders of their own."""
    first = partitioning.is_first()
    names = [only] if only else list(config.stage_order)
    todo = {name: to_prepare(config, workdir, name) for name in names}
    early = {name: stages.open_stage(config, workdir, name) for name in names if not todo[name]}
    if first:
        workdir.mkdir(parents=True, exist_ok=True)              # nothing is written before what can be checked is
    with hold(workdir):
        check_shared(workdir)
        clock = goodput.Clock(workdir / "goodput.jsonl" if first and not eval_only else None, began, watchdog.notice if watchdog else lambda *_: None)
        partitioning.from_first(lambda: [prepare() for name in names for prepare in todo[name]] and None)
        share()
        built = {name: early[name] if name in early else stages.open_stage(config, workdir, name) for name in names}
        for name in names:              # every stage is checked before the first one trains
            code = StageRun(config, built[name], workdir, console, clock, watchdog, profile).run(eval_only)
            if code:
                return code
            share()
        if clock.path and clock.path.exists():
            console.say(goodput.line(goodput.total(goodput.read(clock.path))))
    return EXIT_DONE


@contextlib.contextmanager
def hold(workdir: pathlib.Path) -> Iterator[None]:
    """Keeps other runs out of the work directory. Raises ConfigError where one is in it."""
    lock = filelock.FileLock(str(workdir / ".lock"))

    def acquire() -> bool:
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            return False
        return True

    if not partitioning.from_first(acquire):
        raise ConfigError(f"workdir={str(workdir)!r} is in use by another run (lock {workdir / '.lock'}); "
                          "give this one a --workdir of its own")
    try:
        yield
    finally:
        lock.release()


def check_alike(config: ConfigDict, workdir: str | pathlib.Path) -> None:
    """Raises ConfigError where processes run another config, code or JAX than the first, or in another bucket."""
    code = provenance.revision()
    mine = {"workdir": str(workdir) if bucket.is_address(workdir) else "a path",
            "config": hashlib.sha256(configs.to_json(config).encode()).hexdigest()[:12], "code": code.get("commit", code["version"]),
            "jax": jax.__version__, "python": platform.python_version()}
    all_of_them = partitioning.exchange(mine)
    for number, other in enumerate(all_of_them):
        for what in mine:
            if other[what] != all_of_them[0][what]:
                raise ConfigError(f"process {number} has another {what} ({other[what]}) than process 0 ({all_of_them[0][what]}): "
                                  "start the same command on the same code everywhere")


def check_shared(workdir: pathlib.Path) -> None:
    """Raises ConfigError where a process does not see in the work directory what the first one writes."""
    if partitioning.process_count() == 1 or checkpoint.is_apart(workdir):
        return
    file = workdir / ".shared"

    def write() -> str:
        file.write_text(str(time.time_ns()))
        return file.read_text()

    written = partitioning.from_first(write)
    deadline = time.monotonic() + 30        # NFS shows a new file late
    while not (seen := file.exists() and file.read_text() == written) and time.monotonic() < deadline:
        time.sleep(0.2)
    hosts = partitioning.exchange([seen, socket.gethostname()])
    blind = [f"process {number} on {host}" for number, (seen, host) in enumerate(hosts) if not seen]
    if blind:
        raise ConfigError(f"workdir={str(workdir)!r} is not the same folder everywhere: {', '.join(blind[:8])} does not see what process 0 on "
                          f"{hosts[0][1]} writes; use a file system that all hosts share, or a bucket (--workdir=s3://..., gs://...)")


@dataclasses.dataclass(frozen=True)
class Trained:
    """What ``train`` returns. folder: of the last stage; done: False where a signal stopped it (the same call resumes)."""
    folder: pathlib.Path
    done: bool

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl."""
        return read_rows(self.folder / "metrics.jsonl")

    @property
    def scores(self) -> dict[str, float]:
        """The final scores; empty where the stage is not done."""
        done = self.folder / "DONE"
        return json.loads(done.read_text())["scores"] if done.exists() else {}

    @functools.cached_property
    def model(self) -> loading.Model:
        return loading.load(self.folder)


def train(config: ConfigDict | str, workdir: str | pathlib.Path, *, stage: str = "", eval_only: bool = False) -> Trained:
    """Runs a config in this process, without flags: in a notebook or a script. The same call again resumes.

    config: what a config file's ``get_config`` returns, or "configs/clip.py:small" (``vlm_jax.config.from_file``).
    stage: run this one alone. Raises ConfigError and what training raises.
    """
    config = configs.from_file(config) if isinstance(config, str) else config
    code = run(config, workdir, only=stage, eval_only=eval_only)
    return Trained(folder_of(config, pathlib.Path(workdir), stage or config.stage_order[-1]), code == EXIT_DONE)


def to_prepare(config: ConfigDict, workdir: pathlib.Path, name: str) -> list[Callable[[], Any]]:
    """What a stage needs that has to be made before it can be checked: imports from the hub, a tokenizer of its own."""
    folder, section = folder_of(config, workdir, name), config.stages[name]
    if (folder / "config.json").exists():
        return []
    todo: list[Callable[[], Any]] = [functools.partial(cli.imported, origin, workdir / IMPORTED) for origin in stages.hub_origins(section)]
    if stages.pieces(section) and not (folder / "tokenizer").exists():
        todo.append(functools.partial(train_tokenizer, section, f"stages.{name}", folder / "tokenizer"))
    return todo


def train_tokenizer(section: ConfigDict, where: str, folder: pathlib.Path) -> None:
    """data.tokenizer="train:2000": SentencePiece on the training captions."""
    def made():
        spec, _ = stages.train_and_eval(section.data)
        return tokenizers.train(tokenizers.captions(spec, 1_000_000, section.data.get("caption") or None), stages.pieces(section))
    configs.call(made, {}, f"{where}.data.tokenizer").save(str(folder))


def compiled_by_shape(fn: Callable, *donated: int) -> Callable:
    """Compiles ``fn(state, batch)`` once for every batch shape (length buckets) and keeps the executables.

    The state comes back where it lay: left to itself, XLA may lay parts of it elsewhere, and the next call would refuse them.
    """
    programs = {}

    def lower(state, batch):
        key = tuple(sorted((k, v.shape) for k, v in batch.items()))
        if key not in programs:
            where = jax.tree.map(lambda x: x.sharding, state)
            programs[key] = jax.jit(fn, donate_argnums=donated, out_shardings=(where, None)).lower(state, batch).compile()
        return programs[key]

    def run(state, batch):
        return lower(state, batch)(state, batch)

    run.lower = lower
    return run


class StageRun:
    """A stage on its way. Making one reads all its sections: what they misspell stops here."""

    def __init__(self, config: ConfigDict, stage: Stage, workdir: pathlib.Path, console: Console, clock: goodput.Clock | None = None,
                 watchdog: processes.Watchdog | None = None, profile: str = ""):
        self.config, self.stage, self.workdir, self.console = config, stage, workdir, console
        self.clock, self.watchdog, self.first = clock or goodput.Clock(), watchdog, partitioning.is_first()
        self.folder, self.where, self.began = folder_of(config, workdir, stage.name), f"stages.{stage.name}", time.perf_counter()
        own = stage.config
        self.total = stages.total_steps(stage)
        self.optim = configs.call(stages.Optim, {k: v for k, v in own.optim.items() if k in stages.Optim.__dataclass_fields__},
                                  f"{self.where}.optim")
        self.checkpoints = configs.call(stages.Checkpoints, own.checkpoint, f"{self.where}.checkpoint")
        self.logging = configs.call(stages.Logging, own.log, f"{self.where}.log")
        self.select = configs.call(stages.Select, own.select, f"{self.where}.select")
        self.mesh = configs.call(partitioning.make_mesh, own.mesh, f"{self.where}.mesh", own.rules)
        self.evals = {name: configs.call(stages.Eval, section, f"{self.where}.evals.{name}") for name, section in own.evals.items()}
        self.every = {name: stage.steps(setting.every, f"evals.{name}.every") for name, setting in self.evals.items()}
        self.save_every = stage.steps(self.checkpoints.every, "checkpoint.every")
        self.profile = configs.call(profiling.steps, {}, "--profile", profile)
        self.check()
        self.evaluations: dict[str, Any] = {}     # of the last step
        self.scores: dict[str, float] = {}
        self.notes: list[str] = []

    def check(self) -> None:
        """Raises ConfigError for sections that do not fit together, or that are not those the stage was started with."""
        for name, setting in self.evals.items():
            self.stage.scored(setting.images, setting.template)
            if setting.kind not in evals.KINDS:
                raise ConfigError(f"{self.where}.evals.{name}.kind={setting.kind!r} is not an evaluation{nearest(setting.kind, evals.KINDS)}")
            configs.check_keys(evals.KINDS[setting.kind], setting.options, f"{self.where}.evals.{name}.options",
                               ("predict", "batches", "tokenizer", "source", "train_batches", "train_source"))
        feature_cache.check(self.stage)
        metric, average = self.select.metric, self.select.average
        watched = [name for name in self.evals if self.every[name]]
        if metric and metric.partition("/")[0] not in watched:
            raise ConfigError(f"{self.where}.select.metric={metric!r} is no score of an evaluation that runs during training"
                              f"{nearest(metric, watched) if watched else ': no evaluation has an every'}")
        if not 0 <= average <= 1:
            raise ConfigError(f"{self.where}.select.average={average} is not a share; nearest: {min(max(average, 0.0), 1.0)}")
        if average < 1 and not stages.origins(self.stage.config):
            raise ConfigError(f"{self.where}.select.average={average}: the stage starts from fresh weights (init is empty), "
                              "which there is no use in averaging with; nearest: 1.0")
        if (self.folder / "config.json").exists():
            started = configs.to_plain(configs.from_json((self.folder / "config.json").read_text()))
            data = dataclasses.asdict(configs.call(stages.Data, started["data"], f"{self.folder / 'config.json'}: data"))
            started = configs.ConfigDict({**configs.DEFAULTS, **started, "data": data})      # a key may be younger than the run
            changed = configs.changes(started, self.stage.config)
            if changed:
                raise ConfigError(f"{self.folder} was started with another config; changed: " + "; ".join(changed)
                                  + ". Use another --workdir, or the old values.")

    def run(self, eval_only: bool) -> int:
        """Trains from the newest good checkpoint to the end, or evaluates it. Returns the exit code."""
        done = self.folder / "DONE"
        reached = partitioning.from_first(lambda: json.loads(done.read_text())["step"] if done.exists() else -1)
        if reached >= self.total and not eval_only:
            self.console.say(f"stage {self.stage.name}: done at step {reached} ({self.folder})")
            return EXIT_DONE
        self.clock.stage = self.stage.name
        if eval_only and not (self.folder / "checkpoints").exists():
            raise ConfigError(f"--eval_only: {self.folder} has no checkpoint to evaluate")
        configs.call(partitioning.check_rows, {}, f"{self.where}.data", self.stage.data.batch, self.mesh)
        with partitioning.use(self.mesh), memory.advising(self.stage, self.mesh):
            tx, learning_rate = stages.make_optimizer(self.stage)
            keeper = checkpoint.Checkpointer(self.folder / "checkpoints", keep=self.checkpoints.keep)
            start = self.newest(keeper)
            if eval_only:
                return self.evaluate_only(start, self.restored(keeper, start, tx) if start is not None else None)
            data = self.open_data()      # a bad source stops the run before anything is drawn or compiled
            with self.clock.spend("initialise" if start is None else "restore"):
                state = self.fresh(tx) if start is None else self.restored(keeper, start, tx)
            state, step, stop = self.train(data, state, start or 0, keeper, tx, learning_rate)
            if step < self.total:
                self.console.say(f"stopped by signal {stop}: saved at step {step} of {self.total}; the same command resumes")
                return EXIT_PREEMPTED
            with self.clock.spend("evaluate"):
                self.finish(state, step)
        return EXIT_DONE

    # ---- states

    def newest(self, keeper: checkpoint.Checkpointer) -> int | None:
        """The step to go on from, None for a fresh start."""
        start, skipped = keeper.latest_good()
        for step, reason in skipped:
            self.console.say(f"checkpoint {step} is left out: {reason}")
        if start is None and any(reason.startswith("damaged") for _, reason in skipped):   # not merely unfinished
            raise ConfigError(f"every checkpoint in {self.folder / 'checkpoints'} is damaged; training anew would overwrite them: "
                              "move that folder away first")
        return start

    @property
    def key(self) -> jax.Array:
        return jax.random.key(self.stage.config.seed)

    def fresh(self, tx: Any) -> TrainState:
        plan = self.stage.plan
        given = init.take_over(stages.init_rules(self.config, self.stage, self.workdir), dataclasses.replace(plan, shapes=narrow.unscaled(plan.shapes)),
                               self.open_origin, f"{self.where}.init")
        given = narrow.fit(given, plan.shapes, plan.axes)
        given |= {f"carry/{p}": x for p, x in stages.init_carry(self.config, self.stage, self.workdir).items()}
        return init.create(self.stage.system, self.stage.plan, tx, self.mesh, jax.random.fold_in(self.key, 0), self.stage.spec,
                           given, self.optim.ema)

    def open_origin(self, origin: str) -> Mapping[str, np.ndarray]:
        return stages.open_origin(self.config, self.workdir, origin)

    def restored(self, keeper: checkpoint.Checkpointer, start: int, tx: Any) -> TrainState:
        began = time.perf_counter()
        abstract = init.abstract(self.stage.system, self.stage.plan, tx, self.mesh, self.optim.ema)
        state, _ = keeper.restore(start, abstract.replace(frozen={}))
        if abstract.frozen:
            with checkpoint.Checkpointer(self.folder / "frozen", keep=1) as whole:
                state = state.replace(**whole.restore(0, {"frozen": abstract.frozen})[0])
        self.console.say(f"resumed at step {start} of {self.total} ({time.perf_counter() - began:.1f} s)")
        return state

    # ---- training

    def open_data(self) -> tuple[Any, Mapping[str, Any]]:
        """(training source, fingerprints of all data). Raises ConfigError."""
        stage = self.stage
        source = stage.open(stage.data.train)
        told = {"train": fingerprint.describe(stage.data.train, source)}
        for name, setting in self.evals.items():
            which = setting.data or stage.data.eval
            told[f"evals.{name}"] = fingerprint.describe(which, stage.open(which))
        return source, told

    def train(self, data: tuple[Any, Mapping[str, Any]], state: TrainState, start: int, keeper: checkpoint.Checkpointer, tx: Any,
              learning_rate: Any) -> tuple[TrainState, int, int | None]:
        """Runs the loop from ``start``; returns the state, the step reached and the signal that stopped it."""
        stage, folder, (source, told) = self.stage, self.folder, data
        if stage.tokenizer is None:
            raise ConfigError(f"{self.where}.data.tokenizer='': training reads captions; name one (train:2000 makes it from them, or clip, "
                              "sentencepiece:FILE, hf:FILE, a directory)")
        example = configs.call(pipeline.preview, {}, f"{self.where}.data", source, stage.tokenizer, size=stage.data.size,
                               length=stage.data.length, augment=stage.data.augment or pipeline.EVAL_AUGMENT, **stage.beside)
        if self.first:
            folder.mkdir(parents=True, exist_ok=True)
        if state.frozen and start == 0:      # they do not change: written once a stage, not with every save
            with checkpoint.Checkpointer(folder / "frozen", keep=1) as whole:
                if whole.latest_good()[0] is None:
                    whole.save(0, {"frozen": state.frozen})
        features = feature_cache.computed(stage, self.mesh, source, state, self.total, folder, self.console) if stage.data.cache_features else None
        quarantine = "quarantine.jsonl" if self.first else f"quarantine.{partitioning.process_number()}.jsonl"
        batches = stage.train_batches(source, start, self.total, folder / quarantine, self.mesh, features)
        record = partitioning.from_first(lambda: self.record_start(start, told))
        step_fn = compiled_by_shape(make_train_step(stage.system, tx, jax.random.fold_in(self.key, 1), self.optim.ema), 0)
        program = None
        if start < self.total and not stage.data.buckets:
            with self.console.waiting("compiling the train step"), self.clock.spend("compile"):
                program = step_fn.lower(state, partitioning.abstract(stage.step_spec, self.mesh))
            memory.warn(program, self.mesh, self.console.say)
        self.console.overview(stage.name, folder, stage.plan, self.mesh, stage.config, self.total, example, program, source)
        self.console.say(f"licence of the weights: {provenance.licence_line(record)}")
        log = MetricsLog(folder, resume_at=start or None, tensorboard=self.logging.tensorboard, wandb=self.logging.wandb, writes=self.first)
        self.clock.record(start, resumed=start)
        step_fn = profiling.traced(step_fn, self.profile, start, folder / "profile", self.console.say)
        agreed = self.watchdog.stop_together(start, self.total) if self.watchdog else None

        def evaluate_now(step: int, state: TrainState) -> dict[str, float]:
            self.scores = self.evaluate(self.predict(state), step)
            self.keep_best(step, state)
            return self.scores

        failures, tried = 0, start

        def attempt(act: Callable[[], None]) -> bool:
            """Whether it went well with a save. Raises SaveError for too many failures in a row."""
            nonlocal failures
            try:
                act()
                return True
            except checkpoint.SaveError as error:
                failures += 1
                self.console.say(f"{error}; {failures} failed save(s) in a row, the run stops at {MAX_FAILED_SAVES + 1}")
                if failures > MAX_FAILED_SAVES:
                    raise
                return False

        def save(step: int, state: TrainState) -> None:
            nonlocal failures, tried
            if keeper.busy():      # training does not wait for a network
                self.console.say(f"no save at step {step}: that of step {tried} is still on its way to the bucket")
                return
            if attempt(keeper.wait) and keeper.has(tried):
                failures = 0
            tried = step
            attempt(lambda: keeper.save(step, state.replace(frozen={}), {"batch": stage.data.batch}))

        def on_bad(step: int) -> None:
            if not self.first:
                return
            keys = stage.keys_of_step(source, step - 1)
            with (folder / "bad_batches.jsonl").open("a") as f:
                f.write(json.dumps({"step": step, "keys": keys}) + "\n")

        # Readers hold the interpreter for 5 ms by default before the loop may have it back: a step's worth of waiting.
        interval, reached = sys.getswitchinterval(), None
        sys.setswitchinterval(5e-4)
        try:
            if start == 0 and self.due(0):
                with self.clock.spend("evaluate"):
                    log.write({"step": 0, **evaluate_now(0, state)})
            with loop.StopRequest(agreed) as stop, self.clock.spend("step"), self.console.bar(stage.name, start, self.total) as progress:
                state, step = loop.fit(
                    state, step_fn, batches, place=lambda b: partitioning.place(b, self.mesh, stage.data.batch), start=start, total=self.total,
                    batch_size=stage.data.batch, log=log, log_every=self.logging.every, learning_rate=jax.jit(learning_rate),
                    save=save, save_every=self.save_every, evaluate=evaluate_now, evaluate_at=lambda s: s == self.total or bool(self.due(s)),
                    on_bad=on_bad, max_bad_steps=self.optim.max_bad_steps, stop=stop, progress=progress, clock=self.clock)
            with self.clock.spend("save"):
                while not attempt(keeper.wait) or not keeper.has(step):      # the last save has to be there
                    time.sleep(SAVE_PAUSE)
                    save(step, state)
            reached = step
        finally:
            sys.setswitchinterval(interval)
            batches.close()
            log.close()
            if reached is not None or partitioning.process_count() == 1:      # closing waits for the others, who do not know of an error here
                keeper.close()
        self.clock.record(step)
        return state, step, stop.signal

    def record_start(self, start: int, data: Mapping[str, Any]) -> Mapping[str, Any]:
        """Writes the config and the tokenizers, and adds this start to provenance.json; the first one tells where weights come from. Returns the
        record."""
        (self.folder / "config.json").write_text(configs.to_json(self.stage.config))
        if self.stage.tokenizer is not None:
            self.stage.tokenizer.save(self.folder / "tokenizer")
        if self.stage.instruction_tokenizer is not None:
            self.stage.instruction_tokenizer.save(self.folder / "instruction_tokenizer")
        origins = None if start else {o: stages.origin_folder(self.config, self.workdir, o) for o in stages.origins(self.stage.config)}
        entry = provenance.start(list(self.mesh.devices.flat), self.mesh.shape, start, data)
        return provenance.record_start(self.folder, entry, system=self.stage.config.system, papers=self.stage.system.papers, origins=origins)

    # ---- evaluating

    def due(self, step: int) -> list[str]:
        """The evaluations at ``step``: those whose ``every`` divides it, and all of them at the end."""
        return [name for name, every in self.every.items() if step == self.total or (every and step % every == 0)]

    def predict(self, state: TrainState) -> dict[str, Callable]:
        return stages.bind(self.stage.system, merge(state.ema or state.params, state.frozen, state.moving), self.mesh)

    def evaluate(self, predict: Mapping[str, Callable], step: int) -> dict[str, float]:
        """Runs the evaluations that are due at ``step``; their scores by name, and what they predicted into files."""
        stage, scores = self.stage, {}

        def told(name: str, fn: Callable) -> Callable:
            def call(*args: Any, **options: Any) -> Any:
                self.clock.notice(f"evaluating {name}", False)
                return fn(*args, **options)
            return call

        for name in self.due(step):
            setting, fitted = self.evals[name], {}
            watched = {key: told(f"{name}: {key}", fn) for key, fn in predict.items()}
            with self.console.waiting(f"evaluating {name}"):
                source = stage.open(setting.data or stage.data.eval)
                takes = inspect.signature(evals.KINDS[setting.kind]).parameters
                if "train_source" in takes:
                    fitted["train_source"] = stage.open(setting.train or stage.data.train)
                    if "train_batches" in takes:
                        fitted["train_batches"] = stage.eval_batches(fitted["train_source"], setting.batch, None, mesh=self.mesh)
                result = evals.run(setting.kind, watched, stage.eval_batches(source, setting.batch, setting.examples or None, setting.images,
                                                                               setting.template, self.mesh),
                                   tokenizer=stage.replies, source=source, **fitted, **setting.options)
            for key, value in result.scores.items():
                head, _, tail = key.partition("/")
                scores[f"{name}/{tail}" if tail else f"{name}/{head}"] = float(value)
            self.evaluations[name] = result
            if self.first:
                evals.write_items(self.folder / "predictions" / f"{name}.jsonl", result.items)
        return partitioning.from_first(lambda: scores)

    def evaluate_only(self, start: int | None, state: TrainState | None) -> int:
        if start is None:
            raise ConfigError(f"--eval_only: {self.folder} has no good checkpoint to evaluate")
        self.total = start      # all evaluations are due
        predict = self.result() if (self.folder / RESULT).exists() else self.predict(state)
        scores = self.evaluate(predict, start)
        if self.first:
            (self.folder / "eval.json").write_text(json.dumps({"step": start, **scores}, indent=1))
        self.console.scores(scores, start)
        return EXIT_DONE

    # ---- the result

    def keep_best(self, step: int, state: TrainState) -> None:
        """Keeps the weights where ``select.metric`` was never higher."""
        metric = self.select.metric
        if not metric:
            return
        if metric not in self.scores:
            raise ConfigError(f"{self.where}.select.metric={metric!r} is not among the scores{nearest(metric, self.scores, 5)}")
        with checkpoint.Checkpointer(self.folder / BEST, keep=1) as best:
            before, _ = best.latest_good()
            if before is not None and checkpoint.read_manifest(self.folder / BEST / str(before))["extra"]["score"] >= self.scores[metric]:
                return
            if before is not None and before >= step:      # of a run that went further before it was killed
                partitioning.from_first(lambda: shutil.rmtree(self.folder / BEST))
        with checkpoint.Checkpointer(self.folder / BEST, keep=1) as best:
            best.save(step, {"params": state.ema or state.params, "moving": state.moving}, {"score": self.scores[metric], "metric": metric})

    def result(self) -> dict[str, Callable]:
        """Predict functions over the stage's result, adapters merged."""
        leaves, plan = stages.read_weights(self.folder), self.stage.merged.plan
        variables = merge({p: leaves[p] for p in plan.shapes}, {}, {p: leaves[p] for p in plan.moving})
        return stages.bind(self.stage.merged.system, variables, self.mesh)

    def choose(self, step: int) -> None:
        """Writes the weights that ``select`` says into the stage's folder."""
        chosen, which = step, "checkpoints"
        if self.select.metric:
            which = BEST
            chosen, _ = checkpoint.latest_good(self.folder / BEST)
            score = checkpoint.read_manifest(self.folder / BEST / str(chosen))["extra"]["score"]
            self.notes.append(f"The result is of step {chosen}, where {self.select.metric} was highest: {score:.4g}.")
        leaves = stages.whole(stages.read_leaves(self.folder, which))
        if self.select.average < 1:
            share, plan = self.select.average, self.stage.merged.plan
            started = init.take_over(stages.init_rules(self.config, self.stage.merged, self.workdir), plan, self.open_origin, f"{self.where}.init")
            leaves |= {p: (started[p] + share * (leaves[p] - started[p])).astype(leaves[p].dtype) for p in started}
            self.notes.append(f"The result is an average: {share:.0%} trained, {1 - share:.0%} the weights that the stage started from.")
        partitioning.from_first(lambda: shutil.rmtree(self.folder / RESULT, ignore_errors=True))
        plan = self.stage.merged.plan
        with checkpoint.Checkpointer(self.folder / RESULT, keep=1) as result:
            result.save(chosen, {"params": {p: leaves[p] for p in plan.shapes}, "moving": {p: leaves[p] for p in plan.moving}},
                        {"metric": self.select.metric, "average": self.select.average})

    def finish(self, state: TrainState, step: int) -> None:
        """Scores, report and DONE."""
        if self.select.metric or self.select.average < 1:
            self.choose(step)
            for note in self.notes:
                self.console.say(note)
            self.scores = self.evaluate(self.result(), step)
        elif self.evals and set(self.evaluations) != set(self.evals):     # killed between the last save and DONE
            self.scores = self.evaluate(self.predict(state), step)
        if self.scores:
            self.console.scores(self.scores, step)
        seconds = time.perf_counter() - self.began

        def write() -> None:
            self.clock.record(step)
            if self.clock.path:
                self.notes.append("Time: " + goodput.line(goodput.total(goodput.read(self.clock.path))) + ".")
            write_report(self.stage, self.folder, self.evaluations, self.scores, self.notes)
            (self.folder / "DONE").write_text(json.dumps({"step": step, "seconds": round(seconds, 1), "scores": self.scores}, indent=1))

        partitioning.from_first(write)
        self.console.say(f"stage {self.stage.name}: {step} steps, {seconds:.0f} s; report: {self.folder / 'report' / 'report.html'}")


def write_report(stage: Stage, folder: pathlib.Path, evaluations: Mapping[str, Any], scores: Mapping[str, float], notes: list[str]) -> None:
    from vlm_jax import report  # matplotlib takes a second to import; a run needs it at its end

    pictures: dict[str, Any] = {}
    for result in evaluations.values():
        pictures.update({k: v for k, v in result.pictures.items() if k not in pictures})
    report.write_report(folder / "report", title=f"{stage.config.system}, stage {stage.name}", metrics=read_rows(folder / "metrics.jsonl"),
                        scores=scores, config_text=configs.to_json(stage.config), notes=notes, provenance=provenance.lines(provenance.read(folder)),
                        **pictures)
