"""Image-text matching: is this text of this image? Negatives are drawn where the contrastive similarity is high
(ALBEF, arXiv 2107.07651, section 3.2)."""

from __future__ import annotations

import jax
import jax.numpy as jnp


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


def random_negatives(key: jax.Array, excluded: jax.Array) -> jax.Array:
    """One negative for each row, drawn evenly: the control for ``mine``."""
    return mine(key, jnp.zeros(excluded.shape), excluded)


def matching(logits: jax.Array, labels: jax.Array, weight: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """(mean cross-entropy, accuracy) of logits [n, 2] against labels [n], class 1 = match; weight [n] is 0 for pairs that do not count."""
    weight = jnp.ones(labels.shape) if weight is None else weight.astype(jnp.float32)
    nll = -jnp.take_along_axis(jax.nn.log_softmax(logits.astype(jnp.float32)), labels[:, None], axis=1)[:, 0]
    count = jnp.maximum(weight.sum(), 1)
    return (nll * weight).sum() / count, ((logits.argmax(1) == labels) * weight).sum() / count
