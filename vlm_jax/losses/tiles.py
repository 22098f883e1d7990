"""Cutting a long leading axis into equal pieces that a scan walks over."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def cut(tree: Any, chunk: int) -> Any:
    """Leaves [n, ...] -> [pieces, size, ...] with size <= chunk, the tail filled with zeros.

    Pieces are as even as they can be, so fewer than ``pieces`` rows are padding.
    Raises ValueError when ``chunk`` is not positive.
    """
    if chunk < 1:
        raise ValueError(f"chunk={chunk} holds no rows; nearest: 1")

    def one(x):
        pieces = max(1, -(-x.shape[0] // chunk))
        size = -(-x.shape[0] // pieces)
        x = jnp.pad(x, [(0, pieces * size - x.shape[0])] + [(0, 0)] * (x.ndim - 1))
        return x.reshape(pieces, size, *x.shape[1:])

    return jax.tree.map(one, tree)


def join(tree: Any, rows: int) -> Any:
    """Undoes ``cut``: leaves [pieces, size, ...] -> [rows, ...], padding dropped."""
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:rows], tree)
