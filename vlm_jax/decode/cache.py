"""Moving the rows of an opaque cache."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

SHARED = -1                                                 # a leaf without a batch axis


def gather_rows(cache: Any, rows: jax.Array, batch_axis: Any = 0) -> Any:
    """Row ``r`` of the result is row ``rows[r]`` of ``cache``.

    Args:
        cache: pytree of arrays.
        rows: int32 [n]; n may differ from the number of rows in the cache (repeating them).
        batch_axis: the rows' axis, one int for all leaves or a pytree prefix of ``cache`` with an
            int for each part: 0 for ``[b, ...]``, 1 for caches stacked over layers ``[L, b, ...]``,
            ``SHARED`` (-1) for a leaf that all rows share. Scalars are always shared.

    Raises:
        ValueError: when a leaf has no such axis.
    """
    def move(axis, part):
        def leaf(x):
            if axis == SHARED or jnp.ndim(x) == 0:
                return x
            if not 0 <= axis < x.ndim:
                raise ValueError(f"batch_axis={axis} is no axis of a cache leaf of shape {x.shape}; nearest: "
                                 f"{x.ndim - 1 if axis > 0 else SHARED} ({SHARED} = shared by all rows)")
            return jnp.take(x, rows, axis=axis)
        return jax.tree.map(leaf, part)

    return jax.tree.map(move, batch_axis, cache)
