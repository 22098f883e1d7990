"""Memory of the losses against their plain formulas, as compiled: nothing large is run.

    python -m benchmarks.loss_memory [--rows 1024 4096 ...] [--width 512] [--out FILE.json]

Prints, per device, the temporary bytes that XLA plans for value and gradient, on one device and on eight virtual ones (batch
split over them): the plain formula, what open_clip's ``--local-loss --gather-with-grad`` holds (each device's rows against the
gathered features of all), and ours; then the same with a fixed number of rows a device, on 1 to 8 devices.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
from collections.abc import Callable, Sequence
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import jax  # noqa: E402  (after the flags it reads)
import jax.numpy as jnp  # noqa: E402
from jax.sharding import PartitionSpec  # noqa: E402

from vlm_jax import partitioning  # noqa: E402
from vlm_jax.losses.captioning import caption_nll, captioning  # noqa: E402
from vlm_jax.losses.contrastive import contrastive, sigmoid  # noqa: E402

CAPTION = {"length": 77, "width": 768, "vocab": 49408}  # CLIP's text length and vocabulary, a B/32's width


def plain_contrastive(image, text, scale):
    logits = scale * image @ text.T
    lse = jax.nn.logsumexp(logits, 1) + jax.nn.logsumexp(logits, 0)
    return (lse / 2 - jnp.diagonal(logits)).mean()


def local_contrastive(image, text, scale):
    """open_clip's ClipLoss with local_loss and gather_with_grad: [rows of a device, batch] logits, twice."""
    def local(image, text, scale):
        rows, first = len(image), jax.lax.axis_index("data") * len(image)
        labels = first + jnp.arange(rows)

        def entropy(mine, all_):
            log_p = jax.nn.log_softmax(scale * mine @ all_.T)
            return -jnp.take_along_axis(log_p, labels[:, None], 1).mean()

        every = [jax.lax.all_gather(x, "data", tiled=True) for x in (image, text)]
        return jax.lax.pmean((entropy(image, every[1]) + entropy(text, every[0])) / 2, "data")

    if not partitioning.current_sizes():
        return plain_contrastive(image, text, scale)
    rows, whole = PartitionSpec("data"), PartitionSpec()
    return jax.shard_map(local, in_specs=(rows, rows, whole), out_specs=whole)(image, text, scale)


def plain_sigmoid(image, text, scale):
    logits = scale * image @ text.T - 10
    return jax.nn.softplus(jnp.where(jnp.eye(len(image), dtype=bool), -logits, logits)).sum() / len(image)


def plain_captioning(states, vocab, targets, mask):
    log_p = jax.nn.log_softmax(states @ vocab)
    return -jnp.where(mask, jnp.take_along_axis(log_p, targets[..., None], -1)[..., 0], 0).sum() / mask.sum()


def ratio_of_sums(nll, tokens, correct):
    return nll.sum() / tokens.sum()


def temporary_bytes(loss: Callable, shapes: Sequence[tuple[tuple[int, ...], Any, str]], wrt: tuple[int, ...],
                    devices: int) -> int:
    """Temporaries per device of value_and_grad(loss). shapes: (shape, dtype, "batch" or "none") each."""
    mesh = partitioning.make_mesh(devices=jax.devices()[:devices])

    def argument(shape, dtype, first):
        axes = (first, *("none" for _ in shape[1:])) if shape else ()
        return jax.ShapeDtypeStruct(shape, dtype, sharding=partitioning.sharding(mesh, axes, shape))

    with partitioning.use(mesh) if devices > 1 else contextlib.nullcontext():
        step = jax.jit(jax.value_and_grad(loss, argnums=wrt))
        compiled = step.lower(*(argument(*s) for s in shapes)).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def compare(rows: Sequence[int], caption_rows: Sequence[int], width: int) -> list[dict[str, Any]]:
    """One record per loss, batch and number of devices: temporary bytes of ours and of the plain formula."""
    records = []

    def record(name, batch, devices, ours, plain, shapes, wrt, local=None):
        measured = {"loss": name, "batch": batch, "devices": devices, "plain": temporary_bytes(plain, shapes, wrt, devices),
                    "local_loss": temporary_bytes(local, shapes, wrt, devices) if local else None,
                    "ours": temporary_bytes(ours, shapes, wrt, devices)}
        records.append(measured)
        mib = [f"{measured[k] / 2**20:,.1f}" if measured[k] is not None else "" for k in ("plain", "local_loss", "ours")]
        print(f"| {name} | {devices} | {batch:,} | {' | '.join(mib)} | {measured['plain'] / measured['ours']:.1f} |", flush=True)

    print("| loss | devices | batch | plain MiB | local_loss MiB | ours MiB | plain / ours |\n|---|---|---|---|---|---|---|")
    f32 = jnp.float32
    for devices in (1, 8):
        for batch in rows:
            shapes = (((batch, width), f32, "batch"), ((batch, width), f32, "batch"), ((), f32, "none"))
            record("contrastive", batch, devices, lambda *a: contrastive(*a)[0], plain_contrastive, shapes, (0, 1, 2), local_contrastive)
            record("sigmoid", batch, devices, lambda *a: sigmoid(*a, -10.0)[0], plain_sigmoid, shapes, (0, 1, 2))
        for batch in caption_rows:
            length, d, vocab = CAPTION["length"], CAPTION["width"], CAPTION["vocab"]
            shapes = (((batch, length, d), f32, "batch"), ((d, vocab), f32, "none"),
                      ((batch, length), jnp.int32, "batch"), ((batch, length), bool, "batch"))
            for loss in (captioning, caption_nll):
                record(loss.__name__, batch, devices, lambda *a: ratio_of_sums(*loss(*a)), plain_captioning, shapes, (0, 1))
    for devices in (1, 2, 4, 8):      # batch and devices grow together
        batch = devices * 8192
        shapes = (((batch, width), f32, "batch"), ((batch, width), f32, "batch"), ((), f32, "none"))
        record("contrastive", batch, devices, lambda *a: contrastive(*a)[0], plain_contrastive, shapes, (0, 1, 2), local_contrastive)
        batch, length, d, vocab = devices * 16, CAPTION["length"], CAPTION["width"], CAPTION["vocab"]
        shapes = (((batch, length, d), f32, "batch"), ((d, vocab), f32, "none"), ((batch, length), jnp.int32, "batch"), ((batch, length), bool, "batch"))
        record("captioning", batch, devices, lambda *a: ratio_of_sums(*captioning(*a)), plain_captioning, shapes, (0, 1))
    return records


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--rows", type=int, nargs="+", default=[1024, 8192, 32768, 65536, 262144],
                       help="global batches of the contrastive losses")
    flags.add_argument("--caption-rows", type=int, nargs="+", default=[16, 64, 256],
                       help="global batches of the captioning losses (77 tokens, 49,408 ids)")
    flags.add_argument("--width", type=int, default=512, help="width of the shared embedding")
    flags.add_argument("--out", help="JSON file to write the records to")
    given = flags.parse_args()
    records = compare(given.rows, given.caption_rows, given.width)
    if given.out:
        with open(given.out, "w") as file:
            json.dump({"jax": jax.__version__, "width": given.width, "caption": CAPTION, "records": records}, file, indent=1)


if __name__ == "__main__":
    main()
