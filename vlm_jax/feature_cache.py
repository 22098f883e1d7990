"""Computes what a stage's frozen tower makes of its images, once, into a ``data.features.FeatureStore``."""

from __future__ import annotations

import hashlib
import pathlib
import re
import time
from typing import Any

import jax
import numpy as np

from vlm_jax import config as configs
from vlm_jax import partitioning
from vlm_jax.console import Console, amount
from vlm_jax.data import fingerprint, ops, pipeline
from vlm_jax.data.features import FeatureStore, keys_of
from vlm_jax.data.order import order_of
from vlm_jax.errors import ConfigError
from vlm_jax.stage import Stage
from vlm_jax.train.state import TrainState, merge

COMMIT_S = 30.0      # between writes of which rows are there


def check(stage: Stage) -> None:
    """Raises ConfigError where a stage asks for features that would not be those of each step."""
    d, where = stage.data, f"stages.{stage.name}.data.cache_features={stage.data.cache_features!r}"
    if not d.cache_features:
        return
    if partitioning.process_count() > 1:
        raise ConfigError(f"{where}: features are computed by one process, not {partitioning.process_count()}; nearest: ''")
    if stage.system.cacheable is None:
        raise ConfigError(f"{where}: a {stage.config.system!r} has no frozen tower whose outputs may be kept; nearest: ''")
    trained = sorted(p for p in stage.plan.trainable if re.fullmatch(stage.system.cacheable.parameters, p))
    if trained:
        raise ConfigError(f"{where}: {trained[0]} and {len(trained) - 1} more leaves of the tower train, so that its outputs change; "
                          "nearest: '', or a trainable that leaves them out")
    drawn = ops.Chain(d.augment or pipeline.EVAL_AUGMENT, d.size).drawn
    if drawn:
        raise ConfigError(f"{where}: data.augment={d.augment!r} draws ({', '.join(drawn)}), so that a picture never comes out the same; nearest: data.augment='squash'")
    if d.swap:
        raise ConfigError(f"{where}: data.swap={d.swap!r} changes the images; nearest: data.swap=''")


def computed(stage: Stage, mesh: Any, source: Any, state: TrainState, total: int, folder: pathlib.Path, console: Console) -> FeatureStore:
    """The features of all images that steps 0 .. ``total`` read: those that a store holds already, the others computed now, as large a batch at a time as
    a step's pass through the tower. Killed, it goes on from what was there. Raises ConfigError where the disk has no room."""
    d, began = stage.data, time.perf_counter()
    variables = merge(state.params, state.frozen, state.moving)
    positions = total * d.batch
    every = positions >= len(source)
    indices = np.arange(len(source)) if every else order_of(source, stage.config.seed, d.block, d.window).index(np.arange(positions))
    told = {"data": fingerprint.describe(d.train, source), "samples": "all" if every else [stage.config.seed, positions, d.block, d.window],
            "size": d.size, "images": d.images, "augment": d.augment, "model": configs.to_plain(stage.config.model), "weights": weights_hash(stage, state),
            "kept": {name: [list(x.shape[1:]), str(x.dtype)] for name, x in stage.kept.items()}}
    place = FeatureStore.folder_of(folder / d.cache_features, told)
    store = configs.call(FeatureStore, {}, f"stages.{stage.name}.data.cache_features", place, keys_of(source, indices),
                         {name: (tuple(x.shape[1:]), str(x.dtype)) for name, x in stage.kept.items()}, told)
    missing = store.missing()
    if not missing:
        console.say(f"features: {store.count:,} images ({amount(store.bytes, 'B')}) from {place}")
        return store
    compute, image = jax.jit(stage.system.cacheable.compute), d.rows.image_key
    bad, committed = {}, time.monotonic()
    with console.waiting(f"computing features of {len(missing):,} images ({amount(store.bytes, 'B')}) into {place}"), \
            pipeline.picture_batches(source, missing, batch=d.microbatch or d.batch, size=d.size, augment=d.augment or pipeline.EVAL_AUGMENT, rows=d.rows,
                                     threads=d.threads) as batches:
        for rows, pictures, wrong in batches:
            values = jax.device_get(compute(variables, partitioning.place({image: pictures}, mesh)))
            good = [at for at, row in enumerate(rows) if row not in wrong]
            store.put([rows[at] for at in good], {name: value[good] for name, value in values.items()})
            store.leave_out(wrong)
            bad |= wrong
            if time.monotonic() - committed > COMMIT_S:
                store.commit()
                committed = time.monotonic()
    store.commit()
    seconds = time.perf_counter() - began
    console.say(f"features: {len(missing) - len(bad):,} images computed in {seconds:.1f} s, {len(bad):,} could not be read; {amount(store.bytes, 'B')} in {place}; "
                f"each is read {positions / max(1, store.count):.1f} times")
    return store


def weights_hash(stage: Stage, state: TrainState) -> str:
    """Of the tower's leaves as they lie on the devices."""
    digest = hashlib.sha256()
    for path in sorted(p for p in state.frozen if re.fullmatch(stage.system.cacheable.parameters, p)):
        digest.update(path.encode())
        digest.update(np.ascontiguousarray(jax.device_get(state.frozen[path])).tobytes())
    return digest.hexdigest()
