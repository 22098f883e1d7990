"""From logits to the next token: constraints, truncation, drawing."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def penalise_repetition(scores: jax.Array, text: jax.Array, position: jax.Array, penalty: float) -> jax.Array:
    """Makes ids that already stand in the text less likely (CTRL, arXiv:1909.05858, section 4.1).

    Positive scores are divided by ``penalty``, negative ones multiplied.

    Args:
        scores: [..., V] logits or log-probabilities.
        text: int32 [..., L], of which the first ``position`` ids count, the prompt included.
        penalty: 1 changes nothing.
    """
    if penalty == 1.0:
        return scores
    flat, ids = scores.reshape(-1, scores.shape[-1]), text.reshape(-1, text.shape[-1])
    stands = jnp.broadcast_to(jnp.arange(ids.shape[-1]) < position, ids.shape)
    rows = jnp.arange(flat.shape[0])[:, None]
    seen = jnp.zeros(flat.shape, bool).at[rows, ids].max(stands)
    flat = jnp.where(seen, jnp.where(flat > 0, flat / penalty, flat * penalty), flat)
    return flat.reshape(scores.shape)


def forbid_early_end(scores: jax.Array, position: jax.Array, min_length: int, eos_ids: tuple[int, ...]) -> jax.Array:
    """[..., V] scores without the ends while fewer than ``min_length`` ids stand."""
    if min_length <= 0:
        return scores
    ends = jnp.zeros(scores.shape[-1], bool).at[jnp.array(eos_ids)].set(True)
    return jnp.where(ends & (position < min_length), -jnp.inf, scores)


def truncate(logits: jax.Array, top_k: int = 0, top_p: float = 1.0) -> tuple[jax.Array, jax.Array]:
    """Keeps the likeliest ids: first the ``top_k`` best (0: all), then of these the smallest set whose
    probability reaches ``top_p`` (nucleus, arXiv:1904.09751), never fewer than one.

    Args:
        logits: [b,V].

    Returns:
        (logits [b,c] in falling order, -inf where cut; ids int32 [b,c]).
    """
    size = logits.shape[-1]
    logits, ids = jax.lax.top_k(logits, min(top_k, size) if top_k else size)
    if top_p < 1.0:
        probabilities = jax.nn.softmax(logits, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        keep = (before < top_p).at[:, 0].set(True)
        logits = jnp.where(keep, logits, -jnp.inf)
    return logits, ids


def draw(key: jax.Array, logits: jax.Array, temperature: float, top_k: int, top_p: float) -> jax.Array:
    """Draws one id per row of [b,V] logits; temperature first, then the cuts. Returns int32 [b]."""
    logits = logits / temperature
    if not top_k and top_p >= 1.0:
        return jax.random.categorical(key, logits).astype(jnp.int32)
    logits, ids = truncate(logits, top_k, top_p)
    drawn = jax.random.categorical(key, logits)
    return jnp.take_along_axis(ids, drawn[:, None], axis=-1)[:, 0]
