"""What an asynchronous save costs the training that goes on beside it.

    python -m benchmarks.save_cost [--config=configs/clip.py] [--batch=256] [--steps=30] [--rounds=5] [--every=1000] [--dir DIR] [--out FILE.json]

Blocks of ``--steps`` steps take turns: plain ones, and ones that begin with a save, which goes on in the background. The save is waited for
between blocks, outside of the clock. Prints the seconds that a save holds the loop, how much longer its block takes in all, and what share of
the time that is with one save every ``--every`` steps. The time is the wall's: the machine must have nothing else to do.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/clip.py")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--steps", type=int, default=30, help="of a block")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--every", type=int, default=1000, help="steps between saves")
    parser.add_argument("--dir", type=pathlib.Path, help="where checkpoints go (default: a temporary folder)")
    parser.add_argument("--out", type=pathlib.Path)
    args = parser.parse_args(argv)

    import jax

    from vlm_jax import config as configs
    from vlm_jax import partitioning
    from vlm_jax.run import compiled_by_shape
    from vlm_jax.stage import make_optimizer, resolve
    from vlm_jax.train import checkpoint, init
    from vlm_jax.train.step import make_train_step

    whole = configs.from_file(args.config)
    section = whole.stages[whole.stage_order[0]]
    section.data.batch = args.batch
    stage = resolve(section, whole.stage_order[0])
    mesh, key = partitioning.make_mesh(section.rules), jax.random.key(0)
    with partitioning.use(mesh), tempfile.TemporaryDirectory(dir=args.dir) as folder:
        tx, _ = make_optimizer(stage)
        state = init.create(stage.system, stage.plan, tx, mesh, key, stage.spec, {})
        step_fn = compiled_by_shape(make_train_step(stage.system, tx, key), 0)
        with stage.train_batches(stage.open(stage.data.train), 0, 1, pathlib.Path(folder) / "quarantine.jsonl") as batches:
            _, arrays = next(batches)
        batch = partitioning.place(arrays, mesh)
        size = sum(x.nbytes for x in jax.tree.leaves(state))

        with checkpoint.Checkpointer(pathlib.Path(folder) / "checkpoints", keep=1) as keeper:
            saved, held = 0, []

            def block(save: bool) -> float:
                nonlocal state, saved
                began = time.perf_counter()
                if save:
                    saved += 1
                    keeper.save(saved, state)
                    held.append(time.perf_counter() - began)
                for _ in range(args.steps):
                    state, metrics = step_fn(state, batch)
                jax.block_until_ready(metrics)
                seconds = time.perf_counter() - began
                keeper.wait()
                return seconds

            for save in (False, True):      # compiles, and what a first save alone costs
                block(save)
            held.clear()
            sides: dict[bool, list[float]] = {False: [], True: []}
            for round_ in range(args.rounds):
                for save in (False, True) if round_ % 2 else (True, False):
                    sides[save].append(block(save))
    plain = statistics.median(sides[False])
    extra = statistics.median(b - a for a, b in zip(sides[False], sides[True], strict=True))
    step = plain / args.steps
    found = {"config": args.config, "device": jax.devices()[0].device_kind, "bytes": size, "step_s": step, "held_s": statistics.median(held), "extra_s": extra,
             "extra_quartiles_s": statistics.quantiles([b - a for a, b in zip(sides[False], sides[True], strict=True)], n=4)[::2],
             "share": extra / (args.every * step + extra), "every": args.every}
    print(f"{args.config}, state of {size / 1e6:.1f} MB on {found['device']}: a step takes {step * 1e3:.1f} ms; a save holds the loop for "
          f"{found['held_s'] * 1e3:.1f} ms, and costs {extra * 1e3:.1f} ms in all: {found['share']:.2%} of the time with one every {args.every} steps")
    if args.out:
        args.out.write_text(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
