"""CoCa's upper half: a causal decoder over text states that also looks at image tokens."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlm_jax.nn.block import Stack, init_cache
from vlm_jax.nn.norm import Norm

# width x layers: 512x12 and 768x12 are also open_clip's (layout "double"), the rest CoCa's paper's
VARIANTS = {
    "512x12": dict(width=512, layers=12, heads=8, mlp_dim=2048),
    "768x12": dict(width=768, layers=12, heads=12, mlp_dim=3072),
    "1024x12": dict(width=1024, layers=12, heads=16, mlp_dim=4096),
    "1408x18": dict(width=1408, layers=18, heads=16, mlp_dim=5632),
    "mini": dict(width=96, layers=1, heads=3, mlp_dim=288),
}


class MultimodalDecoder(nn.Module):
    """states [b, l, width] and image memory [b, m, memory_width] -> normed states [b, l, width].

    ``logits`` maps them to the vocabulary (bias-free, untied from the input table); losses that
    never hold [b, l, vocab] take ``vocab_matrix`` instead: logits = states @ vocab_matrix.

    Fields:
      layout: "single", a layer is self-attention, cross-attention, one MLP (arXiv 2205.01917);
        "double", a layer is a whole self block, then a whole cross block (open_clip).
      memory_width: of the image memory; default ``width``.
    """
    vocab: int
    width: int
    layers: int
    heads: int
    mlp_dim: int
    memory_width: int | None = None
    layout: str = "single"
    activation: str = "gelu"
    norm: str = "layernorm"
    eps: float = 1e-5
    qk_norm: str = "none"
    init_scheme: str = "openai_text"
    remat: str = "none"
    dtype: Any = jnp.float32

    def setup(self):
        self.stack = Stack(self.layers, dict(
            width=self.width, heads=self.heads, mlp_dim=self.mlp_dim, activation=self.activation, norm=self.norm, eps=self.eps,
            qk_norm=self.qk_norm, causal="causal", cross_layout=self.layout, memory_width=self.memory_width, init_scheme=self.init_scheme),
            self.remat, self.dtype)
        nn.share_scope(self, self.stack)  # parameters at blocks/..., not stack/blocks/...
        self.final_norm = Norm(self.norm, self.eps)
        self.vocab_kernel = self.param("vocab_kernel", nn.with_logical_partitioning(
            nn.initializers.normal(self.width ** -0.5), ("embed", "vocab")), (self.width, self.vocab), jnp.float32)

    def __call__(self, states: jax.Array, memory: jax.Array, memory_mask: jax.Array | None = None) -> jax.Array:
        """``memory_mask`` bool [b, m], True where memory is real."""
        x, _ = self.stack(states, memory=memory, memory_mask=_as_keys(memory_mask))
        return self.final_norm(x)

    def logits(self, states: jax.Array) -> jax.Array:
        """Result of ``__call__`` or ``extend`` [b, l, width] -> fp32 [b, l, vocab]; row t predicts id t + 1."""
        return jnp.matmul(states.astype(self.dtype), self.vocab_kernel.astype(self.dtype), preferred_element_type=jnp.float32)

    def vocab_matrix(self) -> jax.Array:
        """fp32 [width, vocab]."""
        return self.vocab_kernel

    def init_cache(self, batch: int, length: int, memory_length: int) -> dict[str, jax.Array]:
        """An empty cache for ``length`` tokens and ``memory_length`` image tokens. Needs no parameters."""
        return init_cache(self.layers, batch, length, self.heads, self.width // self.heads, memory_length, self.dtype)

    def extend(self, states: jax.Array, cache: dict[str, jax.Array], index: jax.Array, memory: jax.Array | None = None,
               memory_mask: jax.Array | None = None) -> tuple[jax.Array, dict[str, jax.Array]]:
        """New states [b, k, width] at positions index, index + 1, ... -> (normed states, cache).

        Prefill is ``extend`` at 0 with ``memory``, whose keys and values the cache then keeps;
        later calls leave memory out (its mask, if any, is given each time).
        """
        x, cache = self.stack(states, memory=memory, memory_mask=_as_keys(memory_mask), cache=cache, index=index)
        return self.final_norm(x), cache


def _as_keys(mask: jax.Array | None) -> jax.Array | None:
    return None if mask is None else mask.astype(bool)[:, None, None]
