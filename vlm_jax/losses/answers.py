"""A list of answers as the classes of a head: which of them given answers are, and what each is worth (the soft scores of VQA)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp


def table(answer_ids: Sequence[Sequence[int]], pad: int) -> jax.Array:
    """The list as rows of ids, int32 [list, l], padded on the right."""
    longest = max(map(len, answer_ids), default=0)
    return jnp.asarray([[*ids, *[pad] * (longest - len(ids))] for ids in answer_ids], jnp.int32).reshape(len(answer_ids), longest)


def equal(ids: jax.Array, real: jax.Array, listed: jax.Array, pad: int) -> jax.Array:
    """Which of the ``listed`` answers [list, l] each of ids [..., m] is: bool [..., list]. real bool [..., m]; rows without a real id are none."""
    real = real.astype(bool)
    length = max(ids.shape[-1], listed.shape[-1])

    def padded(x):
        return jnp.pad(x, (*[(0, 0)] * (x.ndim - 1), (0, length - x.shape[-1])), constant_values=pad)

    return (padded(jnp.where(real, ids, pad))[..., None, :] == padded(listed)).all(-1) & real.any(-1, keepdims=True)


def soft_targets(batch: Mapping[str, jax.Array], listed: jax.Array, pad: int) -> jax.Array:
    """fp32 [b, list]: how right each answer of the list is, min(1, 0.3 n) where n of ten people gave it."""
    same = equal(batch["answer"], batch["answer_mask"], listed, pad)      # [b, a, list]
    return jnp.minimum(1, 3 * (same * batch["answer_weight"][..., None]).sum(1))


def answer_loss(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Binary cross-entropy of each listed answer with its soft score, summed over the list, the mean over rows; "vqa_score", what the likeliest
    answers are worth, and "listed", the share of rows with any answer of the list."""
    loss = (jax.nn.softplus(logits) - targets * logits).sum(1).mean()
    worth = jnp.take_along_axis(targets, logits.argmax(1)[:, None], axis=1)
    return loss, {"vqa_score": worth.mean(), "listed": (targets.max(1) > 0).mean()}


def rank(logits: jax.Array, candidates: jax.Array, real: jax.Array, listed: jax.Array, pad: int) -> jax.Array:
    """logits fp32 [b, list] -> fp32 [b, c] of ``candidates`` int32 [c, m] (real bool [c, m]); the least number for those that are not in the list."""
    same = equal(candidates, real, listed, pad)
    return jnp.where(same.any(1), jnp.take(logits, same.argmax(1), axis=1), jnp.finfo(jnp.float32).min)
