"""Where a fusion encoder looks: Grad-CAM (arXiv 1610.02391) on its cross-attention, as ALBEF grounds texts without boxes (arXiv 2107.07651)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlm_jax.errors import ConfigError
from vlm_jax.models.bert import Bert, keys
from vlm_jax.nn.attention import attention_weights, weigh
from vlm_jax.nn.block import PostBlock


def upper_watched(text: Bert, params: Mapping[str, Any], x: jax.Array, mask: jax.Array, memory: jax.Array, layer: int,
                  nudge: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``text.upper(x, mask, memory)`` with ``nudge`` [b, h, l, m] added to the weights of one cross-attention -> (states [b, l, width],
    those weights). The gradient in ``nudge`` is that in the weights. Layers run one by one, outside of their scan."""
    block, seen = PostBlock(**text.block_fields(), memory_width=text.memory_width or text.width, roles=text.roles), []

    def watch(call, args, kwargs, context):
        if context.method_name != "attend_cached":
            return call(*args, **kwargs)
        queries, keys_, values = args[:3]
        seen.append(attention_weights(context.module.project_query(queries), keys_) + nudge)
        return context.module.merge(weigh(seen[-1], values))

    for i in range(text.cross_layers):
        own = {"params": jax.tree.map(lambda p, i=i: p[i], params["blocks_cross"])}
        with nn.intercept_methods(watch) if i == layer else contextlib.nullcontext():
            x, _ = block.apply(own, x, keys(mask), memory, None, None, None, None)
    return x, seen[0]


def heat(text: Bert, params: Mapping[str, Any], score: Callable[[jax.Array], jax.Array], x: jax.Array, mask: jax.Array, memory: jax.Array,
         layer: int | None = None) -> jax.Array:
    """fp32 [b, m - 1], largest 1: how much each image token but the class token speaks for ``score``.

    params: of ``text``. score: fused states [b, l, width] -> [b], of which each row depends on its own states. x: lower-half states
    [b, l, width]; memory [b, m, memory_width]. layer: which, of all layers of ``text``; None for the middle of those that fuse (of
    ALBEF's 6 to 11 the official 8); not the last, from which words reach no score of [CLS]. The weights times their gradient, where
    that is positive, mean over heads and over the real tokens of the text but its first and last. Rows where nothing is positive
    are 0. Raises ConfigError.
    """
    lower = text.layers - text.cross_layers
    layer = lower + (text.cross_layers - 1) // 2 if layer is None else layer
    if not lower <= layer < text.layers - 1:
        raise ConfigError(f"layer={layer} cannot be looked into; nearest: {min(max(layer, lower), text.layers - 2)}")

    def total(nudge):
        fused, weights = upper_watched(text, params, x, mask, memory, layer - lower, nudge)
        return score(fused).astype(jnp.float32).sum(), weights

    grads, weights = jax.grad(total, has_aux=True)(jnp.zeros((x.shape[0], text.heads, x.shape[1], memory.shape[1]), jnp.float32))
    told = mask & jnp.roll(mask, -1, axis=1).at[:, -1].set(False) & (jnp.arange(x.shape[1]) > 0)
    cam = (weights * jnp.maximum(grads, 0)).mean(1)[:, :, 1:] * told[..., None]
    cam = cam.sum(1) / jnp.maximum(told.sum(1), 1)[:, None]
    return cam / jnp.maximum(cam.max(1, keepdims=True), jnp.finfo(jnp.float32).tiny)
