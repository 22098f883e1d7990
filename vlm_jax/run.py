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
                       /DONE             the last step and its scores
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import pathlib
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import filelock
import jax
import numpy as np
from ml_collections import ConfigDict

from vlm_jax import config as configs
from vlm_jax import evals, feature_cache, loading, memory, partitioning, provenance
from vlm_jax import stage as stages
from vlm_jax.console import Console
from vlm_jax.data import fingerprint, pipeline, tokenizers
from vlm_jax.errors import ConfigError, nearest
from vlm_jax.importers import cli
from vlm_jax.nn import narrow
from vlm_jax.stage import BEST, IMPORTED, RESULT, Stage, folder_of
from vlm_jax.train import checkpoint, init, loop
from vlm_jax.train.metrics import MetricsLog, read_rows
from vlm_jax.train.state import TrainState, merge
from vlm_jax.train.step import make_train_step

EXIT_DONE, EXIT_PREEMPTED = 0, 42


def run(config: ConfigDict, workdir: str | pathlib.Path, *, only: str = "", eval_only: bool = False,
        console: Console | None = None) -> int:
    """Runs the stages of ``config`` in order (or the one named ``only``) and returns the exit code.

    The same call again resumes. Raises ConfigError, BadDataError and NonFiniteError, which
    ``main`` turns into exit code 43.
    """
    console = console or Console()
    workdir = pathlib.Path(workdir)
    names = [only] if only else list(config.stage_order)
    early = {name: stages.open_stage(config, workdir, name) for name in names if not to_prepare(config, workdir, name)}
    workdir.mkdir(parents=True, exist_ok=True)              # nothing is written before what can be checked is
    lock = filelock.FileLock(str(workdir / ".lock"))
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise ConfigError(f"workdir={str(workdir)!r} is in use by another run (lock {workdir / '.lock'}); "
                          "give this one a --workdir of its own") from None
    with lock:
        for name in names:
            for prepare in to_prepare(config, workdir, name):
                prepare()
        built = {name: early[name] if name in early else stages.open_stage(config, workdir, name) for name in names}
        for name in names:              # every stage is checked before the first one trains
            code = StageRun(config, built[name], workdir, console).run(eval_only)
            if code:
                return code
    return EXIT_DONE


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


class StageRun:
    """A stage on its way. Making one reads all its sections: what they misspell stops here."""

    def __init__(self, config: ConfigDict, stage: Stage, workdir: pathlib.Path, console: Console):
        self.config, self.stage, self.workdir, self.console = config, stage, workdir, console
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
        if done.exists() and json.loads(done.read_text())["step"] >= self.total and not eval_only:
            self.console.say(f"stage {self.stage.name}: done at step {json.loads(done.read_text())['step']} ({self.folder})")
            return EXIT_DONE
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
            state = self.fresh(tx) if start is None else self.restored(keeper, start, tx)
            state, step, stop = self.train(data, state, start or 0, keeper, tx, learning_rate)
            if step < self.total:
                self.console.say(f"stopped by signal {stop}: saved at step {step} of {self.total}; the same command resumes")
                return EXIT_PREEMPTED
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
        folder.mkdir(parents=True, exist_ok=True)
        if state.frozen and start == 0:      # they do not change: written once a stage, not with every save
            with checkpoint.Checkpointer(folder / "frozen", keep=1) as whole:
                if whole.latest_good()[0] is None:
                    whole.save(0, {"frozen": state.frozen})
        features = feature_cache.computed(stage, self.mesh, source, state, self.total, folder, self.console) if stage.data.cache_features else None
        batches = stage.train_batches(source, start, self.total, folder / "quarantine.jsonl", features)
        (folder / "config.json").write_text(configs.to_json(stage.config))
        record = self.record_start(start, told)
        if stage.tokenizer is not None:
            stage.tokenizer.save(folder / "tokenizer")
        if stage.instruction_tokenizer is not None:
            stage.instruction_tokenizer.save(folder / "instruction_tokenizer")
        step_fn = compiled_by_shape(make_train_step(stage.system, tx, jax.random.fold_in(self.key, 1), self.optim.ema), 0)
        program = None
        if start < self.total and not stage.data.buckets:
            with self.console.waiting("compiling the train step"):
                program = step_fn.lower(state, partitioning.abstract(stage.step_spec, self.mesh))
            memory.warn(program, self.mesh, self.console.say)
        self.console.overview(stage.name, folder, stage.plan, self.mesh, stage.config, self.total, example, program, source)
        self.console.say(f"licence of the weights: {provenance.licence_line(record)}")
        log = MetricsLog(folder, resume_at=start or None, tensorboard=self.logging.tensorboard, wandb=self.logging.wandb)

        def evaluate_now(step: int, state: TrainState) -> dict[str, float]:
            self.scores = self.evaluate(self.predict(state), step)
            self.keep_best(step, state)
            return self.scores

        def save(step: int, state: TrainState) -> None:
            keeper.save(step, state.replace(frozen={}), {"batch": stage.data.batch})

        def on_bad(step: int) -> None:
            keys = stage.keys_of_step(source, step - 1)
            with (folder / "bad_batches.jsonl").open("a") as f:
                f.write(json.dumps({"step": step, "keys": keys}) + "\n")

        # Readers hold the interpreter for 5 ms by default before the loop may have it back: a step's worth of waiting.
        interval = sys.getswitchinterval()
        sys.setswitchinterval(5e-4)
        try:
            if start == 0 and self.due(0):
                log.write({"step": 0, **evaluate_now(0, state)})
            with loop.StopRequest() as stop, self.console.bar(stage.name, start, self.total) as progress:
                state, step = loop.fit(
                    state, step_fn, batches, place=lambda b: partitioning.place(b, self.mesh), start=start, total=self.total,
                    batch_size=stage.data.batch, log=log, log_every=self.logging.every, learning_rate=jax.jit(learning_rate),
                    save=save, save_every=self.save_every, evaluate=evaluate_now, evaluate_at=lambda s: s == self.total or bool(self.due(s)),
                    on_bad=on_bad, max_bad_steps=self.optim.max_bad_steps, stop=stop, progress=progress)
                keeper.wait()
        finally:
            sys.setswitchinterval(interval)
            batches.close()
            log.close()
            keeper.close()
        return state, step, stop.signal

    def record_start(self, start: int, data: Mapping[str, Any]) -> Mapping[str, Any]:
        """Adds this start to provenance.json; the first one tells where weights come from. Returns the record."""
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
        for name in self.due(step):
            setting, fitted = self.evals[name], {}
            with self.console.waiting(f"evaluating {name}"):
                source = stage.open(setting.data or stage.data.eval)
                takes = inspect.signature(evals.KINDS[setting.kind]).parameters
                if "train_source" in takes:
                    fitted["train_source"] = stage.open(setting.train or stage.data.train)
                    if "train_batches" in takes:
                        fitted["train_batches"] = stage.eval_batches(fitted["train_source"], setting.batch, None)
                result = evals.run(setting.kind, predict, stage.eval_batches(source, setting.batch, setting.examples or None, setting.images,
                                                                               setting.template),
                                   tokenizer=stage.replies, source=source, **fitted, **setting.options)
            for key, value in result.scores.items():
                head, _, tail = key.partition("/")
                scores[f"{name}/{tail}" if tail else f"{name}/{head}"] = float(value)
            self.evaluations[name] = result
            evals.write_items(self.folder / "predictions" / f"{name}.jsonl", result.items)
        return scores

    def evaluate_only(self, start: int | None, state: TrainState | None) -> int:
        if start is None:
            raise ConfigError(f"--eval_only: {self.folder} has no good checkpoint to evaluate")
        self.total = start      # all evaluations are due
        predict = self.result() if (self.folder / RESULT).exists() else self.predict(state)
        scores = self.evaluate(predict, start)
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
                shutil.rmtree(self.folder / BEST)
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
        shutil.rmtree(self.folder / RESULT, ignore_errors=True)
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
        write_report(self.stage, self.folder, self.evaluations, self.scores, self.notes)
        seconds = time.perf_counter() - self.began
        (self.folder / "DONE").write_text(json.dumps({"step": step, "seconds": round(seconds, 1), "scores": self.scores}, indent=1))
        self.console.say(f"stage {self.stage.name}: {step} steps, {seconds:.0f} s; report: {self.folder / 'report' / 'report.html'}")


def write_report(stage: Stage, folder: pathlib.Path, evaluations: Mapping[str, Any], scores: Mapping[str, float], notes: list[str]) -> None:
    from vlm_jax import (
        report,  # matplotlib takes a second to import; a run needs it at its end
    )

    pictures: dict[str, Any] = {}
    for result in evaluations.values():
        pictures.update({k: v for k, v in result.pictures.items() if k not in pictures})
    report.write_report(folder / "report", title=f"{stage.config.system}, stage {stage.name}", metrics=read_rows(folder / "metrics.jsonl"),
                        scores=scores, config_text=configs.to_json(stage.config), notes=notes, provenance=provenance.lines(provenance.read(folder)),
                        **pictures)
