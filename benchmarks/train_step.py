"""A train step of CLIP ViT-B/32 (batch 32), CLIP ViT-L/14 (batch 8) or CoCa ViT-B/32 (batch 16) against open_clip's, fp32, on the CPU.

    python -m benchmarks.train_step --model=clip_b32 --captions=full [--out=FILE.json]
    python -m benchmarks.train_step --model=coca_b32 --captions=natural --check
    python -m benchmarks.train_step --model=clip_l14 --batch=256 --device=gpu [--compiled]

A step is forward, backward, AdamW and the clamp of the logit scale; see benchmarks/models.py for what is made
equal and benchmarks/paired.py for how it is measured. Both sides take the same batch: the same random pixels, captions
of 8 to 20 tokens (median 11).

captions=full     equal work: both compute all 77 positions (CoCa: 76 and the class token).
                  Target: no slower than open_clip, a ratio of 1 at most.
captions=natural  the same captions as each framework trains on them: our pipeline crops a batch to the smallest
                  bucket (16, 20, 24, 32) that holds its longest caption; open_clip has no such thing and computes 77.
                  Target: clearly faster, by what the padding costs.

--device=gpu: both in bfloat16 with float32 weights (open_clip: amp_bf16; --compiled: and torch.compile), on one GPU in turn, the batch
copied to it in each step.

--check measures nothing: it prints how far our loss and gradients on the cropped batch are from those on the padded
one (fp32; at most 1e-5 of the norm, or the exit code is 1), and needs no open_clip.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
import tempfile
from collections.abc import Sequence

import numpy as np

from benchmarks import models, paired

TOLERANCE = 1e-5


def check(name: str, rows: int, quick: bool = False) -> dict[str, float]:
    """Relative differences, cropped against padded: of the loss, and of the gradient (norm of the difference / norm)."""
    import jax
    import optax

    from vlm_jax import partitioning
    from vlm_jax.stage import resolve
    from vlm_jax.system import Context
    from vlm_jax.train import init
    from vlm_jax.train.state import merge

    stage = resolve(models.our_config(name, rows, quick), name)
    mesh, key = partitioning.make_mesh(devices=jax.devices()[:1]), jax.random.key(0)
    state = init.create(stage.system, stage.plan, optax.identity(), mesh, key, stage.spec, {})
    context = Context(rng=key, step=state.step)

    @jax.jit
    def value_and_grad(batch):
        return jax.value_and_grad(lambda p: stage.system.loss(merge(p, {}, state.moving), {}, batch, context)[0])(state.params)

    (whole, grad), (cropped, cropped_grad) = (value_and_grad(models.make_batch(name, rows, quick, b)) for b in ((), models.BUCKETS))
    apart = optax.tree.norm(jax.tree.map(lambda a, b: a - b, grad, cropped_grad)) / optax.tree.norm(grad)
    return {"loss": abs(float(whole) - float(cropped)) / abs(float(whole)), "gradient": float(apart)}


def main(argv: Sequence[str] | None = None) -> None:
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--model", choices=tuple(models.COMPARED), default="clip_b32")
    flags.add_argument("--captions", choices=("full", "natural"), default="full")
    flags.add_argument("--batch", type=int, help="rows (default: 32 for CLIP, 16 for CoCa)")
    flags.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    flags.add_argument("--compiled", action="store_true", help="open_clip's model by torch.compile")
    flags.add_argument("--check", action="store_true", help="compare our loss and gradients, cropped against padded, and stop")
    paired.add_blocks(flags, rounds=6, steps=6, drop=2)
    given = paired.parse(flags, argv, quick=dict(rounds=2, steps=3, drop=1, batch=4))
    rows = given.batch or models.COMPARED[given.model].batch

    if given.check:
        found = check(given.model, rows, given.quick)
        print(f"{given.model}, batch {rows}, cropped against padded: loss differs by {found['loss']:.1e} of itself, "
              f"gradient by {found['gradient']:.1e} of its norm; allowed {TOLERANCE:.0e}")
        sys.exit(max(found.values()) > TOLERANCE)

    paired.require_peer()
    machine = paired.machine()
    with tempfile.TemporaryDirectory() as folder:
        files = {}
        for side, buckets in (("ours", models.BUCKETS if given.captions == "natural" else ()), ("open_clip", ())):
            files[side] = str(pathlib.Path(folder) / f"{side}.npz")
            np.savez(files[side], **models.make_batch(given.model, rows, given.quick, buckets))
        options = dict(name=given.model, quick=given.quick, dtype="bfloat16" if given.device == "gpu" else "float32")
        env = paired.ON_GPU if given.device == "gpu" else {}
        with paired.Worker("benchmarks.models:our_train_step", dict(options, batch=files["ours"]), **env) as ours, \
                paired.Worker("benchmarks.models:peer_train_step", dict(options, batch=files["open_clip"], compiled=given.compiled), **env) as theirs:
            facts = {"ours": ours.facts, "open_clip": theirs.facts}
            if ours.facts["parameters"] != theirs.facts["parameters"]:
                sys.exit(f"the models differ: {facts}")
            blocks = paired.alternate({"ours": lambda: ours.block(given.steps), "open_clip": lambda: theirs.block(given.steps)},
                                      given.rounds, given.drop)
    paired.report(given, f"train step of {given.model} on {ours.facts['device']}, batch {rows}, captions {given.captions}, "
                  f"text {ours.facts['text'][1]} against "
                  f"{theirs.facts['text'][1]} tokens, {ours.facts['parameters']:,} parameters", machine, blocks,
                  paired.compare(blocks, [("ours", "open_clip")]), work=rows, unit="samples", facts=facts)


if __name__ == "__main__":
    main()
