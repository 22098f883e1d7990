"""Runs what a claim needs that has not run yet."""

from __future__ import annotations

import json
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.claims.claim import MADE, Claim, Scores, variant_config
from vlm_jax import config as configs
from vlm_jax.errors import ConfigError, nearest


def finished(record: pathlib.Path, plain: Any, runs: pathlib.Path | None) -> dict[str, Any] | None:
    """What a run of the config ``plain`` left: its own record, or one of the same seed among other claims' (``runs``)."""
    others = () if runs is None else sorted(runs.glob(f"*/*/{record.parent.name}/{record.name}"))
    for path in (record, *others):
        if path.exists() and (done := json.loads(path.read_text()))["config"] == plain:
            return done
    return None


def measure(claim: Claim, folder: pathlib.Path, seeds: Sequence[int], train: Callable[..., Any],
            data: str = "", runs: pathlib.Path | None = None) -> tuple[Scores, dict[str, float]] | None:
    """Prepares and runs what is not done: (scores, seconds of each run), None where a signal stopped a run. ``train``: ``vlm_jax.train``.
    ``runs``: the folder of all claims, whose runs of the same config and seed are not run again."""
    scores: dict[str, dict[int, Mapping[str, float]]] = {variant: {} for variant in claim.scores()}
    seconds, made = {}, folder.parent / claim.together if claim.together else folder / MADE
    for seed in seeds:      # all variants of a seed before the next one: an early look compares like with like
        if claim.prepare:
            found = claim.prepare(made, seed, train, data)
            if found is None:
                return None
            scores[MADE][seed] = found
        for variant in claim.variants:
            config, workdir = variant_config(claim, variant, seed, made=made, data=data), folder / variant / str(seed)
            plain, record = json.loads(configs.to_json(config)), workdir / "run.json"
            done = finished(record, plain, runs)
            if done is None:
                print(f"{folder.name}: {variant}, seed {seed}", file=sys.stderr, flush=True)
                run = train(config, workdir, stage=claim.stage)
                if not run.done:
                    return None
                stages = [json.loads(path.read_text()) for path in workdir.glob("*/DONE")]
                done = {"config": plain, "scores": run.scores, "seconds": sum(stage["seconds"] for stage in stages)}
                record.write_text(json.dumps(done, indent=1))
            for name in claim.scores()[variant]:
                if name not in done["scores"]:
                    raise ConfigError(f"claim {folder.name!r}: variant {variant!r} has no score {name!r}{nearest(name, done['scores'], 5)}; "
                                      f"where its evaluations have changed since it was run, remove {workdir}")
            scores[variant][seed], seconds[f"{variant}/{seed}"] = done["scores"], done["seconds"]
    return scores, seconds
