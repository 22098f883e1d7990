"""Masked modelling: what is hidden of texts and images, and the loss, with a teacher's distribution beside the truth (BERT; ALBEF, arXiv 2107.07651,
sections 3.2-3.3)."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def mask_tokens(key: jax.Array, ids: jax.Array, eligible: jax.Array, *, vocab: int, mask_id: int, share: float = 0.15) -> tuple[jax.Array, jax.Array]:
    """BERT's corruption of ids [b, l]: each eligible position is chosen with probability ``share``. Returns (corrupted ids, chosen bool [b, l])."""
    pick, how, what = jax.random.split(key, 3)
    chosen = jax.random.bernoulli(pick, share, ids.shape) & eligible
    return _corrupt(how, what, ids, chosen, vocab, mask_id), chosen


def mask_words(key: jax.Array, ids: jax.Array, mask: jax.Array, fixed: jax.Array, continues: jax.Array, *, vocab: int, mask_id: int,
               share: float = 0.15) -> tuple[jax.Array, jax.Array]:
    """The same for whole words: their pieces are chosen together (Hugging Face's DataCollatorForWholeWordMask).

    mask bool [b, l]: real tokens. fixed bool [b, l]: begins and ends, which are no words. continues bool [b, l]: the piece goes on with the
    word before it. Words are met in random order, and each is taken that still fits into a budget of ``share`` of all l positions;
    padding is drawn as words of one position, and comes to nothing, as in that collator on texts of one length.
    """
    order, how, what = jax.random.split(key, 3)
    (rows, length), row = ids.shape, jnp.arange(len(ids))[:, None]
    budget = max(1, round(share * length))
    word = jnp.cumsum(~continues | (jnp.arange(length) == 0), axis=1) - 1      # which word each position belongs to
    size = jnp.zeros(ids.shape, jnp.int32).at[row, word].add(~fixed)
    drawn = jnp.argsort(jax.random.uniform(order, ids.shape), axis=1)

    def take(used, at):
        count = jnp.take_along_axis(size, drawn[:, at][:, None], axis=1)[:, 0]
        fits = (count > 0) & (used + count <= budget)
        return used + jnp.where(fits, count, 0), fits

    _, taken = jax.lax.scan(take, jnp.zeros(rows, jnp.int32), jnp.arange(length))
    taken = jnp.zeros(ids.shape, bool).at[row, drawn].set(taken.T)
    chosen = jnp.take_along_axis(taken, word, axis=1) & mask & ~fixed
    return _corrupt(how, what, ids, chosen, vocab, mask_id), chosen


def _corrupt(how: jax.Array, what: jax.Array, ids: jax.Array, chosen: jax.Array, vocab: int, mask_id: int) -> jax.Array:
    """Of the chosen, 80% become ``mask_id``, 10% one of all ``vocab`` ids, 10% stay."""
    kind = jax.random.uniform(how, ids.shape)
    other = jnp.where(kind < 0.8, mask_id, jnp.where(kind < 0.9, jax.random.randint(what, ids.shape, 0, vocab), ids))
    return jnp.where(chosen, other, ids)


def mask_share(key: jax.Array, ids: jax.Array, real: jax.Array, *, share: float, mask_id: int, first_id: int = 3) -> tuple[jax.Array, jax.Array]:
    """Corrupts a fixed share of ids [b, l] whose first ``n`` are ``real`` (bool [b, l]): of n, int(n share + 1/2), at least 1 and at most n - 1
    (microsoft/unilm beit3 ``datasets.py``). The first is never chosen; of the chosen, 80% become ``mask_id``, 10% one of ``first_id`` ..
    ``mask_id``, 10% stay. Returns (corrupted ids, chosen bool [b, l])."""
    pick, how, what = jax.random.split(key, 3)
    length = real.sum(1)
    count = jnp.maximum(jnp.minimum((length * share + 0.5).astype(jnp.int32), length - 1), jnp.minimum(length - 1, 1))
    open_ = real.astype(bool) & (jnp.arange(ids.shape[1]) > 0)
    rank = jnp.argsort(jnp.argsort(jnp.where(open_, jax.random.uniform(pick, ids.shape), 2.0)))
    chosen = open_ & (rank < count[:, None])
    kind = jax.random.uniform(how, ids.shape)
    other = jnp.where(kind < 0.8, mask_id, jnp.where(kind < 0.9, ids, jax.random.randint(what, ids.shape, first_id, mask_id + 1)))
    return jnp.where(chosen, other, ids), chosen


def gather_chosen(chosen: jax.Array, most: int) -> tuple[jax.Array, jax.Array]:
    """Where a row's chosen places are: (int32 [b, most], bool [b, most], False where there are fewer). chosen bool [b, l], at most ``most`` a row."""
    at = jnp.argsort(~chosen, axis=1, stable=True)[:, :most]
    return at, jnp.take_along_axis(chosen, at, axis=1)


def masked_lm(states: jax.Array, vocabulary: jax.Array, targets: jax.Array, chosen: jax.Array, *, teacher: tuple[jax.Array, jax.Array] | None = None,
              alpha: jax.Array | float = 0.0, weight: jax.Array | None = None) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Sums over chosen positions: (loss in nats, positions, hits).

    loss = (1 - alpha) CE(target) + alpha CE(teacher's distribution). states [b, l, d] @ vocabulary [d, V] are the logits; ``teacher`` has
    its own states and vocabulary. weight [b]: of each row's loss. Logits are in float32.
    """
    logits = jnp.einsum("bld,dv->blv", states, vocabulary.astype(states.dtype), preferred_element_type=jnp.float32)
    logp = jax.nn.log_softmax(logits)
    nll = -jnp.take_along_axis(logp, targets[..., None], axis=-1)[..., 0]
    if teacher is not None:
        taught = jnp.einsum("bld,dv->blv", teacher[0], teacher[1].astype(teacher[0].dtype), preferred_element_type=jnp.float32)
        soft = -(jax.nn.softmax(jax.lax.stop_gradient(taught)) * logp).sum(-1)
        nll = (1 - alpha) * nll + alpha * soft
    if weight is not None:
        nll = nll * weight[:, None]
    return (nll * chosen).sum(), chosen.sum(), ((logits.argmax(-1) == targets) & chosen).sum()
