"""Image-text matching: is this text of this image? Negatives are drawn where the contrastive similarity is high
(ALBEF, arXiv 2107.07651, section 3.2)."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

NEGATIVES = ("hard", "random")     # drawn by similarity, or evenly


def mine(key: jax.Array, similarity: jax.Array, excluded: jax.Array, epsilon: float = 0.0) -> jax.Array:
    """One hard negative for each row: int [b], drawn with probability softmax(similarity) + epsilon off ``excluded`` [b, b].

    Drawn in log space, so that a row whose own pair has all the mass still has negatives. A row that has no candidate
    gets -1. No gradient.
    """
    logp = jax.nn.log_softmax(jax.lax.stop_gradient(similarity), axis=1)
    if epsilon:
        logp = jnp.logaddexp(logp, jnp.log(epsilon))
    drawn = jax.random.categorical(key, jnp.where(excluded, -jnp.inf, logp), axis=1)
    return jnp.where(excluded.all(1), -1, drawn).astype(jnp.int32)


def draw(kind: str, key: jax.Array, similarity: jax.Array, excluded: jax.Array, epsilon: float = 0.0) -> jax.Array:
    """Negatives of a ``kind``: "hard" by ``mine``, "random" evenly, the control for it."""
    return mine(key, similarity, excluded, epsilon) if kind == "hard" else mine(key, jnp.zeros(excluded.shape), excluded)


class Pairs(NamedTuple):
    """What matching looks at, [3b] each: (text, its image), (text, a negative image), (a negative text, image)."""
    text: jax.Array       # int: which text
    image: jax.Array      # int: which image
    label: jax.Array      # int: 1 = match
    weight: jax.Array     # bool: False where a row has no negative


def pairs(negative_image: jax.Array, negative_text: jax.Array) -> Pairs:
    """The pairs of rows with their negatives int [b]; -1: there is none."""
    rows = jnp.arange(len(negative_image))
    there = jnp.concatenate([rows >= 0, negative_image >= 0, negative_text >= 0])
    return Pairs(jnp.concatenate([rows, rows, jnp.maximum(negative_text, 0)]), jnp.concatenate([rows, jnp.maximum(negative_image, 0), rows]),
                 (jnp.arange(3 * len(rows)) < len(rows)).astype(jnp.int32), there)


def matching(logits: jax.Array, labels: jax.Array, weight: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """(mean cross-entropy, accuracy) of logits [n, 2] against labels [n], class 1 = match; weight [n] is 0 for pairs that do not count."""
    weight = jnp.ones(labels.shape) if weight is None else weight.astype(jnp.float32)
    nll = -jnp.take_along_axis(jax.nn.log_softmax(logits.astype(jnp.float32)), labels[:, None], axis=1)[:, 0]
    count = jnp.maximum(weight.sum(), 1)
    return (nll * weight).sum() / count, ((logits.argmax(1) == labels) * weight).sum() / count
