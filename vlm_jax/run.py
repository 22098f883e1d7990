"""Runs a config: every stage from its sections to a finished work directory. ``main`` and notebooks call ``run``.

    workdir/<n>_<stage>/config.json      the resolved config
                       /tokenizer/       so that the directory is complete in itself
                       /metrics.jsonl    rows by step
                       /checkpoints/     Orbax, with manifests
                       /frozen/          parameters that do not train, once
                       /predictions/     what was predicted for every evaluated item
                       /report/          report.html and its pictures
                       /DONE             the last step and its scores
"""

from __future__ import annotations

import functools
import json
import pathlib
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import filelock
import jax
from ml_collections import ConfigDict

from vlm_jax import config as configs
from vlm_jax import evals, partitioning
from vlm_jax.console import Console
from vlm_jax.data import pipeline
from vlm_jax.errors import ConfigError, nearest
from vlm_jax.importers import cli
from vlm_jax.stage import (
    IMPORTED,
    Checkpoints,
    Eval,
    Logging,
    Optim,
    Stage,
    bind,
    folder_of,
    hub_origins,
    init_rules,
    make_optimizer,
    open_origin,
    resolve,
    total_steps,
)
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
        for name in names:      # what comes from the hub is here before the first stage trains
            if not (folder_of(config, workdir, name) / "config.json").exists():
                for origin in hub_origins(built[name]):
                    cli.imported(origin, workdir / IMPORTED)
        for name in names:
            code = run_stage(config, built[name], workdir, eval_only=eval_only, console=console)
            if code:
                return code
    return EXIT_DONE


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
        if eval_only:
            if start is None:
                raise ConfigError(f"--eval_only: {folder} has no good checkpoint to evaluate")
        else:           # data first: a source that is not there stops the run before anything is compiled
            source = stage.open(stage.data.train)
            for setting in settings.values():
                stage.open(setting.data or stage.data.eval)
        if start is None:
            start = 0
            given = init.take_over(init_rules(config, stage, workdir), stage.plan, functools.partial(open_origin, config, workdir),
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
        if start < total and not stage.data.buckets:
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
                    batch_size=stage.data.batch, log=log, log_every=logging.every, learning_rate=jax.jit(learning_rate),
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
        if settings and "scores" not in final:     # killed between the last save and DONE
            evaluate_now(step, state)
        if final.get("scores"):
            console.scores(final["scores"], step)
        write_report(stage, folder, final, console)
        done.write_text(json.dumps({"step": step, "seconds": round(time.perf_counter() - began, 1),
                                    "scores": final.get("scores", {})}, indent=1))
        console.say(f"stage {stage.name}: {step} steps, {time.perf_counter() - began:.0f} s; report: {folder / 'report' / 'report.html'}")
    return EXIT_DONE


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
    from vlm_jax import report      # matplotlib takes a second to import; a run needs it at its end

    pictures: dict[str, Any] = {}
    for name, result in final.get("evaluations", {}).items():
        pictures.update({k: v for k, v in result.pictures.items() if k not in pictures})
    report.write_report(folder / "report", title=f"{stage.config.system}, stage {stage.name}",
                        metrics=read_rows(folder / "metrics.jsonl"), scores=final.get("scores", {}),
                        config_text=configs.to_json(stage.config), **pictures)
