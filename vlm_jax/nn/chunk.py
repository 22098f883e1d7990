"""Large batches in little memory: gradient caching without touching the training step.

Contrastive losses need the features of the whole batch at once but not the activations behind
them. ``chunked`` computes features a chunk at a time and, in the backward pass, computes each
chunk's activations again (GradCache, arXiv 2101.06983; BASIC, arXiv 2111.10050, section 4).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from vlm_jax.partitioning import BATCH_AXES, current_sizes, shard


def chunked(fn: Callable[[Any, jax.Array], Any], microbatch: int) -> Callable[[Any], Any]:
    """Turns ``fn(chunk, chunk_index)`` into a function of the whole batch.

    Batch and result are trees of arrays with a leading example axis; the result is in the batch's
    order, values and gradients (also to what ``fn`` closes over) equal the direct call's. With
    ``microbatch`` 0, or at least the batch, it is the direct call ``fn(batch, 0)``.

    ``fn`` must be pure: call ``module.apply(variables, ...)`` in it, not a bound module. Whatever
    mixes examples (BatchNorm in training) is not chunkable; dropout folds in ``chunk_index``.

    Raises ValueError when the microbatch does not divide the batch, or when the devices that the
    batch lies on do not divide the microbatch.
    """
    def run(batch):
        size = jax.tree.leaves(batch)[0].shape[0]
        if microbatch <= 0 or microbatch >= size:
            return fn(batch, jnp.int32(0))
        check(size, microbatch)
        count = size // microbatch

        # Chunk j holds rows j, count + j, ...: of a batch that lies in contiguous runs on the
        # devices, every device owns a part of every chunk.
        def cut(x):
            x = x.reshape(microbatch, count, *x.shape[1:]).swapaxes(0, 1)
            return shard(x, "none", "batch", *["none"] * (x.ndim - 2))

        def join(x):
            x = x.swapaxes(0, 1).reshape(size, *x.shape[2:])
            return shard(x, "batch", *["none"] * (x.ndim - 1))

        step = jax.checkpoint(lambda item: fn(*item), prevent_cse=False)
        return jax.tree.map(join, jax.lax.map(step, (jax.tree.map(cut, batch), jnp.arange(count))))

    return run


def check(size: int, microbatch: int) -> None:
    devices = math.prod(current_sizes().get(a, 1) for a in BATCH_AXES)
    valid = [m for m in range(1, size + 1) if size % m == 0 and m % devices == 0] or [size]
    if size % microbatch or microbatch % devices:
        raise ValueError(f"microbatch={microbatch} must divide the batch of {size} and be a multiple of the {devices} "
                         f"devices it lies on; nearest: {min(valid, key=lambda m: abs(m - microbatch))}")
