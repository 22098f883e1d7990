"""Which patches of an image are masked: rectangles, one after the other (BEiT, arXiv 2106.08254, algorithm 1; microsoft/unilm beit2)."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

TRIES = 10
ASPECT = 0.3      # of a rectangle: from this to its inverse


def block_mask(key: jax.Array, rows: int, side: int, count: int, min_cells: int = 16) -> jax.Array:
    """bool [rows, side * side], True where masked: exactly ``count`` cells of each grid, cell by cell in raster order.

    While cells are wanting, up to ten tries for a rectangle: its area uniform between ``min_cells`` and what is wanting, its aspect
    log-uniform; it is taken if it is smaller than the grid and brings at least one new cell and no more than are wanting. Where ten
    tries fail, single cells make up the rest.
    Raises ValueError for a ``count`` that the grid has not.
    """
    if not 0 < count <= side * side:
        raise ValueError(f"{count} masked cells of {side * side} are none or too many; nearest: {min(max(count, 1), side * side)}")
    return jax.vmap(lambda k: _one(k, side, count, min_cells))(jax.random.split(key, rows))


def _one(key: jax.Array, side: int, count: int, min_cells: int) -> jax.Array:
    at = jnp.arange(side)

    def rectangle(key, mask):
        """The mask with another rectangle, or the same where it does not fit."""
        area_key, aspect_key, top_key, left_key = jax.random.split(key, 4)
        wanting = count - mask.sum()
        area = min_cells + jax.random.uniform(area_key) * (wanting - min_cells)      # between the two, whichever is the larger
        aspect = jnp.exp(jax.random.uniform(aspect_key, minval=math.log(ASPECT), maxval=-math.log(ASPECT)))
        height, width = (jnp.round(jnp.sqrt(x)).astype(jnp.int32) for x in (area * aspect, area / aspect))
        top, left = (jax.random.randint(k, (), 0, jnp.maximum(side - n, 0) + 1) for k, n in ((top_key, height), (left_key, width)))
        within = [(at >= start) & (at < start + n) for start, n in ((top, height), (left, width))]
        grown = mask | (within[0][:, None] & within[1][None])
        new = grown.sum() - mask.sum()
        return jnp.where((height < side) & (width < side) & (new > 0) & (new <= wanting), grown, mask)

    def step(state):
        mask, key, failed = state
        key, own = jax.random.split(key)
        grown = rectangle(own, mask)
        return grown, key, jnp.where((grown != mask).any(), 0, failed + 1)

    def going(state):
        mask, _, failed = state
        return (mask.sum() < count) & (failed < TRIES)

    blocks_key, rest_key = jax.random.split(key)
    mask, _, _ = jax.lax.while_loop(going, step, (jnp.zeros((side, side), bool), blocks_key, jnp.int32(0)))
    mask = mask.reshape(-1)
    order = jnp.argsort(jnp.where(mask, -1.0, jax.random.uniform(rest_key, mask.shape)))
    return jnp.zeros_like(mask).at[order[:count]].set(True)


def masked_neighbours(mask: jax.Array, side: int) -> jax.Array:
    """The mean number of masked neighbours (up to four) of masked cells; mask [rows, side * side]. How blocky a mask is."""
    grid = jnp.pad(mask.reshape(-1, side, side), ((0, 0), (1, 1), (1, 1)))
    near = sum(grid[:, 1 + i:side + 1 + i, 1 + j:side + 1 + j].astype(jnp.float32) for i, j in ((0, 1), (0, -1), (1, 0), (-1, 0)))
    own = mask.reshape(-1, side, side)
    return (near * own).sum() / own.sum()
