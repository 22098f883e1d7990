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
    """What matching looks at, in each of the groups: (text, its image), (text, a negative image), (a negative text, image); g rows of a group come to 3g
    pairs. Which text and which image is said for ``nn.rows.select``."""
    text: jax.Array       # int [groups, 3g], numbered within the group
    image: jax.Array      # int [groups, 3g]
    label: jax.Array      # int [3b]: 1 = match
    weight: jax.Array     # bool [3b]: False where a row has no negative


def pairs(negative_image: jax.Array, negative_text: jax.Array, group: int = 0) -> Pairs:
    """The pairs of rows with their negatives int [b], of their own group of ``group`` rows (0: the whole batch); -1: there is none."""
    b = len(negative_image)
    g = group or b
    own = jnp.tile(jnp.arange(g), (b // g, 1))
    image, text = negative_image.reshape(-1, g), negative_text.reshape(-1, g)
    there = jnp.concatenate([own >= 0, image >= 0, text >= 0], 1)
    label = jnp.broadcast_to(jnp.arange(3 * g) < g, there.shape).astype(jnp.int32)
    return Pairs(jnp.concatenate([own, own, jnp.maximum(text, 0) % g], 1), jnp.concatenate([own, jnp.maximum(image, 0) % g, own], 1),
                 label.reshape(-1), there.reshape(-1))


def matching(logits: jax.Array, labels: jax.Array, weight: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """(mean cross-entropy, accuracy) of logits [n, 2] against labels [n], class 1 = match; weight [n] is 0 for pairs that do not count."""
    weight = jnp.ones(labels.shape) if weight is None else weight.astype(jnp.float32)
    nll = -jnp.take_along_axis(jax.nn.log_softmax(logits.astype(jnp.float32)), labels[:, None], axis=1)[:, 0]
    count = jnp.maximum(weight.sum(), 1)
    return (nll * weight).sum() / count, ((logits.argmax(1) == labels) * weight).sum() / count
