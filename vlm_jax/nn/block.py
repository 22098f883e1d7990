"""Transformer blocks and their scanned stack."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from vlm_jax.errors import nearest
from vlm_jax.nn.attention import Attention
from vlm_jax.nn.mlp import Mlp
from vlm_jax.nn.norm import Norm
from vlm_jax.partitioning import shard

CROSS = ("none", "single", "double")

# What a block keeps for its backward pass; the rest is computed again.
REMAT = {
    "none": None,                                                                    # keep everything
    "full": jax.checkpoint_policies.nothing_saveable,                                # keep the block's input only
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,                # keep dense products, not attention scores
    "outputs": jax.checkpoint_policies.save_only_these_names("attn_out", "mlp_out"), # keep what enters the residual stream
}


class Block(nn.Module):
    """Pre-norm block: x += attn(norm1 x); [x += cross(norm_cross x, norm_kv memory)]; x += mlp(norm2 x).

    ``cross_layout``: "none"; "single", as above, one MLP a layer (CoCa's paper); "double", a whole block
    followed by a whole cross block with its own MLP (open_clip's CoCa), whose members are
    ``cross_norm1``, ``cross_norm_kv``, ``cross``, ``cross_norm2``, ``cross_mlp``.
    """
    width: int
    heads: int
    mlp_dim: int
    head_dim: int | None = None
    activation: str = "gelu"
    norm: str = "layernorm"
    eps: float = 1e-5
    use_bias: bool = True
    qk_norm: str = "none"
    causal: str = "none"
    cross_layout: str = "none"
    memory_width: int | None = None
    init_scheme: str = "torch"
    depth: int = 1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None = None, memory: jax.Array | None = None,
                 memory_mask: jax.Array | None = None, cache: dict | None = None, index: jax.Array | None = None
                 ) -> tuple[jax.Array, dict | None]:
        """x [b, l, width], memory [b, m, memory_width] -> (x, cache). Arguments as ``Stack``, for one layer."""
        if self.cross_layout not in CROSS:
            raise ValueError(f"cross_layout={self.cross_layout!r} is not known{nearest(self.cross_layout, CROSS)}")
        norm = functools.partial(Norm, self.norm, self.eps)
        mlp = functools.partial(Mlp, self.mlp_dim, self.activation, self.use_bias, self.init_scheme, self.depth, self.dtype)
        attention = functools.partial(Attention, self.width, self.heads, self.head_dim, use_bias=self.use_bias, qk_norm=self.qk_norm,
                                      init_scheme=self.init_scheme, depth=self.depth, dtype=self.dtype)
        cache = None if cache is None else dict(cache)

        def self_attention(x):
            own = None if cache is None else {"key": cache["key"], "value": cache["value"]}
            y, own = attention(causal=self.causal, name="attn")(norm(name="norm1")(x), mask=mask, cache=own, index=index)
            if cache is not None:
                cache.update(own)
            return x + checkpoint_name(y, "attn_out")

        def cross_attention(x, norm_x, norm_memory):
            attn = attention(kv_width=self.memory_width, name="cross")
            if memory is not None:
                keys, values = attn.project_memory(norm_memory(memory.astype(self.dtype)))
                if cache is not None:
                    cache.update(memory_key=keys.astype(cache["memory_key"].dtype),
                                 memory_value=values.astype(cache["memory_value"].dtype))
            elif cache is not None:
                keys, values = cache["memory_key"], cache["memory_value"]
            else:
                raise ValueError(f"cross_layout={self.cross_layout!r} needs memory, or a cache that holds its keys and values")
            return x + checkpoint_name(attn.attend_cached(norm_x(x), keys, values, memory_mask), "attn_out")

        def feed_forward(x, norm_x, mlp):
            return x + checkpoint_name(mlp(norm_x(x)), "mlp_out")

        x = self_attention(shard(x.astype(self.dtype), "batch", "length", "act_embed"))
        if self.cross_layout == "single":
            x = cross_attention(x, norm(name="norm_cross"), norm(name="norm_kv"))
        x = feed_forward(x, norm(name="norm2"), mlp(name="mlp"))
        if self.cross_layout == "double":
            x = cross_attention(x, norm(name="cross_norm1"), norm(name="cross_norm_kv"))
            x = feed_forward(x, norm(name="cross_norm2"), mlp(name="cross_mlp"))
        return x, cache


class Stack(nn.Module):
    """``layers`` equal blocks under ``lax.scan``; params at ``blocks/...`` with a leading "layers" axis.

    ``block`` holds the fields of ``Block`` (depth and dtype excepted), ``remat`` is a name in ``REMAT``.
    """
    layers: int
    block: Mapping[str, Any]
    remat: str = "none"
    dtype: Any = jnp.float32

    def setup(self):
        if self.remat not in REMAT:
            raise ValueError(f"remat={self.remat!r} is not a policy{nearest(self.remat, tuple(REMAT))}")
        block = Block if self.remat == "none" else nn.remat(Block, policy=REMAT[self.remat], prevent_cse=False)
        scanned = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=self.layers,
                          in_axes=(nn.broadcast, nn.broadcast, nn.broadcast, 0, nn.broadcast), out_axes=0,
                          metadata_params={nn.PARTITION_NAME: "layers"})
        self.blocks = scanned(depth=self.layers, dtype=self.dtype, **self.block)

    def __call__(self, x: jax.Array, mask: jax.Array | None = None, memory: jax.Array | None = None,
                 memory_mask: jax.Array | None = None, cache: dict | None = None, index: jax.Array | None = None
                 ) -> tuple[jax.Array, dict | None]:
        """x [b, l, width] -> (x, cache).

        Args:
          mask: self-attention's, True = may attend, to [b, h, l, l]; with a cache, to [b, h, l, length].
          memory, memory_mask: [b, m, memory_width] and [b, h, l, m] for cross-attention. With a
            cache, memory is needed once, at prefill.
          cache, index: from ``init_cache``, and the position (int32 scalar or [b]) of x's first token.
        """
        return self.blocks(x.astype(self.dtype), mask, memory, memory_mask, cache, index)


def init_cache(layers: int, batch: int, length: int, heads: int, head_dim: int, memory_length: int | None = None,
               dtype: Any = jnp.float32) -> dict[str, jax.Array]:
    """An empty cache for ``length`` tokens: key, value [layers, b, length, h, d]; with ``memory_length``,
    for stacks with cross-attention, also memory_key, memory_value [layers, b, memory_length, h, d]."""
    lengths = {"key": length, "value": length}
    if memory_length is not None:
        lengths |= {"memory_key": memory_length, "memory_value": memory_length}
    return {name: jnp.zeros((layers, batch, n, heads, head_dim), dtype) for name, n in lengths.items()}
