"""Rows of a batch that are picked within groups, so that what lies on different devices stays there.

A pick from the whole batch, ``x[rows]``, is computed from all rows on every device, and its gradient summed over all of them. Where each
group of rows picks among itself (negatives as the official codes' GPUs mine them), groups come first in every array, [groups * rows of a
group, ...], and nothing is sent if a device has whole groups.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp


def select(x: jax.Array, rows: jax.Array) -> jax.Array:
    """x [b, ...] at rows int [n] -> [n, ...]; at rows int [groups, n], numbered within each of the groups of x -> [groups * n, ...]."""
    if rows.ndim == 1:
        return x[rows]
    picked = jax.vmap(lambda part, at: part[at])(x.reshape(len(rows), -1, *x.shape[1:]), rows)
    return picked.reshape(-1, *x.shape[1:])


def join(parts: Sequence[jax.Array], groups: int) -> jax.Array:
    """Arrays [groups * n_i, ...], group by group beside each other -> [groups * sum of n_i, ...]."""
    whole = jnp.concatenate([x.reshape(groups, -1, *x.shape[1:]) for x in parts], 1)
    return whole.reshape(-1, *whole.shape[2:])


def part(x: jax.Array, groups: int, first: int, last: int | None) -> jax.Array:
    """Rows first .. last - 1 of each group of x [groups * n, ...] -> [groups * (last - first), ...]."""
    return x.reshape(groups, -1, *x.shape[1:])[:, first:last].reshape(-1, *x.shape[1:])
