"""A codebook of unit vectors that follows its members by moving averages, without gradient (arXiv 2208.06366, section 2.1;
microsoft/unilm ``beit2/norm_ema_quantizer.py``).

Its leaves are the collection ``codebook``: ``table`` [codes, width], ``count`` [codes] (moving average of how many vectors a batch
gives each code), ``kmeans_count`` [codes] (members at the end of the k-means start) and ``initted`` (1.0 once it has begun).
Sums go over the global batch, so that every device holds the same codebook.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlm_jax.nn.initializers import normal
from vlm_jax.nn.linear import Linear
from vlm_jax.nn.unit import unit

Book = Mapping[str, jax.Array]


class TaskLayer(nn.Module):
    """Into the codes' width or out of it: x [..., width] -> [..., features]; Linear, tanh, Linear."""
    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        hidden = Linear(x.shape[-1], ("embed", "mlp"), True, normal(0.02), dtype=self.dtype, name="hidden")(x)
        return Linear(self.features, ("mlp", "embed"), True, normal(0.02), dtype=self.dtype, name="out")(jnp.tanh(hidden))
ROUNDS = 10


def empty(codes: int, width: int) -> dict[str, jax.Array]:
    """A codebook that the first training batch will fill."""
    return {"table": jnp.zeros((codes, width)), "count": jnp.zeros(codes), "kmeans_count": jnp.zeros(codes), "initted": jnp.zeros(())}


def look_up(z: jax.Array, table: jax.Array) -> jax.Array:
    """int32 [...]: for unit vectors z [..., width] the code of largest cosine, which is the nearest; of equals the first."""
    return jnp.argmax(z @ table.T, axis=-1).astype(jnp.int32)


def members(z: jax.Array, ids: jax.Array, codes: int) -> tuple[jax.Array, jax.Array]:
    """z [n, width], ids [n] -> (how many vectors each code has [codes], their sums [codes, width])."""
    return jnp.zeros(codes).at[ids].add(1.0), jnp.zeros((codes, z.shape[-1])).at[ids].add(z)


def means(z: jax.Array, ids: jax.Array, table: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(counts [codes], unit means [codes, width]); a code without members keeps its vector of ``table``."""
    count, total = members(z, ids, len(table))
    return count, jnp.where(count[:, None] > 0, unit(total / jnp.maximum(count, 1)[:, None]), table)


def draw(key: jax.Array, count: int, codes: int) -> jax.Array:
    """int [codes]: which of ``count`` vectors k-means starts from, without repeats where there are enough."""
    if count >= codes:
        return jax.random.permutation(key, count)[:codes]
    return jax.random.randint(key, (codes,), 0, count)


def kmeans(z: jax.Array, start: jax.Array, rounds: int = ROUNDS) -> tuple[jax.Array, jax.Array]:
    """Spherical k-means of unit vectors z [n, width] from the rows ``start`` -> (table [codes, width], counts of the last round)."""
    def step(_, found):
        count, table = means(z, look_up(z, found[1]), found[1])
        return count, table

    count, table = jax.lax.fori_loop(0, rounds, step, (jnp.zeros(len(start)), z[start]))
    return table, count


def begin(book: Book, z: jax.Array, start: jax.Array) -> dict[str, jax.Array]:
    """The codebook after the k-means start from rows ``start`` of z [n, width]; as it is where it has begun before."""
    def fresh():
        table, count = kmeans(z, start)
        return {**book, "table": table, "kmeans_count": count, "initted": jnp.ones(())}

    return jax.lax.cond(book["initted"] > 0, lambda: dict(book), fresh)


def follow(book: Book, z: jax.Array, ids: jax.Array, decay: float) -> dict[str, jax.Array]:
    """The codebook after a batch z [n, width] with its codes ids [n]: moved towards their unit means, and unit again."""
    count, mean = means(z, ids, book["table"])
    return {**book, "table": unit(decay * book["table"] + (1 - decay) * mean), "count": decay * book["count"] + (1 - decay) * count}


def usage(count: jax.Array, decay: float) -> jax.Array:
    """The share of codes in use by a moving ``count``: a vector in the last 1 / (1 - decay) batches, or more of them longer ago."""
    return (count >= (1 - decay) * decay ** (1 / (1 - decay))).mean()


def perplexity(count: jax.Array) -> jax.Array:
    """exp of the entropy of the codes' shares: as many equally frequent codes would say as much."""
    share = count / jnp.maximum(count.sum(), 1e-9)
    return jnp.exp(-(share * jnp.log(jnp.maximum(share, 1e-30))).sum())
