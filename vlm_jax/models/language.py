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
                states, cache = tower.extend(x, language.init_cache(rows, given + length - prompt.shape[1]), mask)
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
