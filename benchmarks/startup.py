"""Time from the start of a process to its first finished train step, CLIP ViT-B/32 with batch 8, against open_clip; and our
compile time against depth.

    python -m benchmarks.startup [--out=FILE.json]

cold        ours with an empty JAX compilation cache.
warm        ours with a cache that an earlier run filled: JAX_COMPILATION_CACHE_DIR names it, and
            JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0 has it keep small programs too.
open_clip   eager torch: nothing is compiled.

Each is a new process that imports, makes the model and its optimizer and runs one step (benchmarks/models.py); the three take
turns. Target: seconds, and a warm start near open_clip's.

The second table compiles the train step of towers of width 128 and growing depth, by ahead-of-time lowering without a cache.
Target: flat, for layers are one scan, whatever their number.
"""

from __future__ import annotations

import argparse
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from benchmarks import models, paired

WIDTH = 128     # of the towers whose depth grows
CACHE = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0"}


def first_step(target: str, options: dict[str, Any], **env: str) -> list[float]:
    """Starts a worker, runs a step; [seconds from the start to the step's end]."""
    began = time.perf_counter()
    with paired.Worker(target, options, **env) as worker:
        worker.block(1)
        return [time.perf_counter() - began]


def compiling(depths: Sequence[int], rows: int, repeats: int, quick: bool) -> tuple[Callable[[], None], dict[str, Any]]:
    """A worker's function that has no steps: its facts are seconds to lower (trace) and to compile, by depth; medians of ``repeats``."""
    import jax

    from vlm_jax import partitioning
    from vlm_jax.stage import make_optimizer, resolve
    from vlm_jax.train import init
    from vlm_jax.train.step import make_train_step

    def seconds(depth: int) -> tuple[float, float]:
        config = models.our_config("clip_b32", rows, quick, layers=depth, width=WIDTH, heads=2, mlp_dim=4 * WIDTH)
        stage, mesh = resolve(config, "clip_b32"), partitioning.make_mesh(devices=jax.devices()[:1])
        with partitioning.use(mesh):
            tx, _ = make_optimizer(stage)
            state = init.abstract(stage.system, stage.plan, tx, mesh)
            step = jax.jit(make_train_step(stage.system, tx, jax.random.key(0)), donate_argnums=0)
            began = time.perf_counter()
            lowered = step.lower(state, stage.spec)
            traced = time.perf_counter()
            lowered.compile()
            return traced - began, time.perf_counter() - traced

    jax.jit(lambda x: x @ x).lower(np.ones((8, 8), np.float32)).compile()     # the first of a process also starts the compiler
    turns = [[seconds(depth) for depth in depths] for _ in range(repeats)]
    medians = [[statistics.median(values) for values in zip(*of_depth)] for of_depth in zip(*turns)]
    return lambda: None, {"depths": [{"layers": d, "lower": lower, "compile": compile} for d, (lower, compile) in zip(depths, medians)]}


def main(argv: Sequence[str] | None = None) -> None:
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--rounds", type=int, default=5, help="starts of each side (default %(default)s)")
    flags.add_argument("--batch", type=int, default=8, help="rows (default %(default)s)")
    flags.add_argument("--depths", type=int, nargs="+", default=[4, 12, 24, 48], help="layers of each tower to compile")
    flags.add_argument("--repeats", type=int, default=3, help="compilations of each depth (default %(default)s)")
    given = paired.parse(flags, argv, quick=dict(rounds=1, batch=4, depths=[1, 2], repeats=1))
    paired.require_peer()
    machine = paired.machine()
    with tempfile.TemporaryDirectory() as folder:
        batch = str(pathlib.Path(folder) / "batch.npz")
        np.savez(batch, **models.make_batch("clip_b32", given.batch, given.quick))
        options = dict(name="clip_b32", batch=batch, quick=given.quick)

        def ours(cache: str) -> list[float]:
            return first_step("benchmarks.models:our_train_step", options, JAX_COMPILATION_CACHE_DIR=cache, **CACHE)

        def cold() -> list[float]:
            with tempfile.TemporaryDirectory(dir=folder) as empty:
                return ours(empty)

        filled = str(pathlib.Path(folder) / "filled")
        ours(filled)        # also brings the libraries' files into memory, as the next line does for theirs
        first_step("benchmarks.models:peer_train_step", options)
        blocks = paired.alternate({"cold": cold, "warm": lambda: ours(filled),
                                   "open_clip": lambda: first_step("benchmarks.models:peer_train_step", options)}, given.rounds, drop=0)
        compiled = dict(depths=given.depths, rows=given.batch, repeats=given.repeats, quick=given.quick)
        with paired.Worker("benchmarks.startup:compiling", compiled) as compiler:
            depths = compiler.facts["depths"]
    print(f"\n| layers of each tower, width {WIDTH} | lower, s | compile, s | against {given.depths[0]} layers |\n|---|---|---|---|")
    for row in depths:
        print(f"| {row['layers']} | {row['lower']:.2f} | {row['compile']:.2f} | {row['compile'] / depths[0]['compile']:.2f} |")
    paired.report(given, f"process start to first train step of clip_b32, batch {given.batch}", machine, blocks,
                  paired.compare(blocks, [("cold", "open_clip"), ("warm", "open_clip"), ("warm", "cold")]), unit="starts", depths=depths)


if __name__ == "__main__":
    main()
