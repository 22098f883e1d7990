"""Language models by the name of their family, and how they go on writing: what systems with a language model share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from vlm_jax.errors import nearest
from vlm_jax.models import llama, opt, t5
from vlm_jax.models.sizes import sizes

FAMILIES = {"opt": (opt.Opt, opt.VARIANTS), "llama": (llama.Llama, llama.VARIANTS), "t5": (t5.T5, t5.VARIANTS)}
Language = opt.Opt | llama.Llama | t5.T5


def build(*, family: str, **fields: Any) -> Language:
    """The tower of a config's section: ``family``, ``variant`` (a name in the family's VARIANTS) and fields of the family's module."""
    if family not in FAMILIES:
        raise ValueError(f"family={family!r} is no family of language models{nearest(family, FAMILIES)}")
    module, variants = FAMILIES[family]
    return module(**sizes(variants, **fields))


def after_first(ids: tuple, rows: jax.Array) -> jax.Array:
    """rows [b, l] with ``ids`` (or marks) inserted after the first place."""
    middle = jnp.tile(jnp.asarray(ids, rows.dtype), (rows.shape[0], 1))
    return jnp.concatenate([rows[:, :1], middle, rows[:, 1:]], 1)


def to_the_right(ids: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """ids [b, l] and their mask with the padding in front of what is real, whose order stays."""
    order = jnp.argsort(mask.astype(jnp.int32), axis=1, stable=True)
    return jnp.take_along_axis(ids, order, axis=1), jnp.take_along_axis(mask.astype(bool), order, axis=1)


def predict_ids(tower: Language, prefix: jax.Array, prompt: jax.Array | None, prompt_mask: jax.Array | None, ids: jax.Array, mask: jax.Array) -> jax.Array:
    """States [b, l, width] whose row t predicts id t of ``ids`` [b, l], behind embeddings ``prefix`` [b, n, width] and the ids ``prompt`` [b, p].

    A decoder reads all three in a row: the prompt's padding is on its left. T5's encoder reads prefix and prompt, its decoder the ids, behind
    the id of padding (0). prompt None: there is none.
    """
    b, n = prefix.shape[:2]
    x, seen = prefix, jnp.ones((b, n), bool)
    if prompt is not None:
        x, seen = jnp.concatenate([x, tower.embed(prompt).astype(x.dtype)], 1), jnp.concatenate([seen, prompt_mask.astype(bool)], 1)
    if isinstance(tower, t5.T5):
        before = jnp.pad(ids, ((0, 0), (1, 0)))[:, :-1]
        return tower.decode(tower.embed(before), tower.encode(x, seen), seen)
    states = tower(jnp.concatenate([x, tower.embed(ids).astype(x.dtype)], 1), jnp.concatenate([seen, mask.astype(bool)], 1))
    return states[:, x.shape[1] - 1:-1]


def continuation(call: Callable[[Callable[[Any], Any]], Any], language: Language, x: jax.Array, mask: jax.Array | None, length: int
                 ) -> tuple[Callable, Callable]:
    """(prefill, extend) for ``vlm_jax.decode``, whose ``batch_axis`` is ``language.CACHE_AXES``.

    call: runs a function of the tower with its weights: ``lambda fn: run(model, variables, lambda m: fn(m.language))``.
    language: the tower itself, unbound. length: of the texts that ``decode`` makes (its ``max_length``).
    x, mask: embeddings [b, n, width] of all that comes before the continuation, and bool [b, n], True where real, None for all. A decoder
    reads them instead of the prompt, which is the caller's record of the last of their ids: padding is on the left, or in between, so that the last one is
    real. T5 encodes them; the prompt, whose first id is that of padding, is for its decoder.
    """
    rows, given = x.shape[:2]
    mask = jnp.ones((rows, given), bool) if mask is None else mask.astype(bool)

    def prefill(prompt: jax.Array):
        def begin(tower):
            if isinstance(tower, t5.T5):
                states, cache = tower.extend(tower.embed(prompt), language.init_cache(rows, length, given), tower.encode(x, mask), mask)
            else:
                states, cache = tower.extend(x, language.init_cache(rows, given), mask)
                cache = language.behind(cache, length - prompt.shape[1])
            return tower.logits(states[:, -1:])[:, 0], cache

        logits, cache = call(begin)
        return logits, (), cache

    def extend(cache, ids: jax.Array):
        def go_on(tower):
            states, grown = tower.extend(tower.embed(ids), cache)
            return tower.logits(states), grown

        logits, cache = call(go_on)
        return logits, (), cache

    return prefill, extend
