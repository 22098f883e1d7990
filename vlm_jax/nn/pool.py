"""Attentional pooling by learned queries."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlm_jax.nn.attention import Attention, attend
from vlm_jax.nn.norm import Norm


class AttentionPooler(nn.Module):
    """x [b, n, kv_width] -> [b, queries, width]: attention of learned queries over normed tokens.

    open_clip's ``AttentionalPooler``: ``norm_query`` on the queries, ``norm_kv`` on the tokens, one
    multi-head attention ``attn``, no residual, no MLP. Used once (open_clip's CoCa: row 0 is the
    contrastive vector), in cascade (a second pooler over the first one's rows) or in parallel.
    Queries are drawn from N(0, 1).
    """
    queries: int
    width: int
    heads: int
    use_bias: bool = True
    norm: str = "layernorm"
    eps: float = 1e-5
    qk_norm: str = "none"
    init_scheme: str = "torch"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """``mask`` [b, n], True where x is real."""
        query = self.param("query", nn.with_logical_partitioning(nn.initializers.normal(1.0), ("query", "embed")),
                           (self.queries, self.width), jnp.float32)
        attn = Attention(self.width, self.heads, kv_width=x.shape[-1], use_bias=self.use_bias, qk_norm=self.qk_norm,
                         init_scheme=self.init_scheme, dtype=self.dtype, name="attn")
        query = Norm(self.norm, self.eps, name="norm_query")(query.astype(self.dtype))[None]
        query = attn.project_query(query)  # the same for every example: projected once
        keys, values = attn.project_memory(Norm(self.norm, self.eps, name="norm_kv")(x.astype(self.dtype)))
        query = jnp.broadcast_to(query, (x.shape[0], *query.shape[1:]))
        return attn.merge(attend(query, keys, values, None if mask is None else mask[:, None, None]))
