"""Where several loss terms meet: their weighted sum, with each raw term kept for the log."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from vlm_jax.errors import nearest


def wanted(weights: Mapping[str, float], name: str) -> bool:
    """Whether a term is worth computing: named in the config with a weight other than 0."""
    return weights.get(name, 0) != 0


def weigh(terms: Mapping[str, jax.Array], weights: Mapping[str, float]) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Sum of weight * term over scalars (float32), and the raw terms under their names as metrics.

    Terms and weights must name the same things, except that a term of weight 0 may be left out
    (see ``wanted``). Raises ValueError naming the term that has no weight or the weight that has
    no term, and the nearest name on the other side.
    """
    for name in terms:
        if name not in weights:
            raise ValueError(f"loss term {name!r} has no weight{nearest(name, tuple(weights))}")
    for name in weights:
        if name not in terms and wanted(weights, name):
            raise ValueError(f"loss weight {name}={weights[name]} has no term{nearest(name, tuple(terms))}")
    total = sum((weights[name] * term for name, term in terms.items()), jnp.float32(0))
    return total, dict(terms)
