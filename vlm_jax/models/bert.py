"""BERT (arXiv 1810.04805), as an encoder, with cross-attention to an image, and as a decoder."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlm_jax.errors import nearest
from vlm_jax.nn.block import grown, init_cache, pair_stack, post_stack
from vlm_jax.nn.embed import TokenEmbed
from vlm_jax.nn.linear import Linear
from vlm_jax.nn.mlp import gelu
from vlm_jax.nn.norm import Norm
from vlm_jax.partitioning import shard

VARIANTS = {
    # arXiv 1810.04805, section 3: bert-base-uncased
    "base": dict(width=768, layers=12, heads=12, mlp_dim=3072),
    # two layers below the fusion and two above: trains on a CPU in minutes
    "mini": dict(width=96, layers=4, heads=3, mlp_dim=288),
}


PAIRINGS = ("none", "alternate", "twin")
AVERAGED = 6      # BLIP's twins: so many layers average what they see in two images, those above merge it (models/nlvr_encoder.py)


class Bert(nn.Module):
    """ids [b, l] -> states [b, l, width].

    The top ``cross_layers`` have cross-attention to a memory of ``memory_width`` (0: none has); they pass it over where
    no memory is given. Params ``blocks/*`` are the layers below, ``blocks_cross/*`` those above.

    Fields:
      token_types: rows of the table of token types, whose row 0 is added everywhere; 0 for no table (BLIP).
      roles: ("encoder",), or with "decoder" (``nn.block.PostBlock``), which needs cross-attention in all layers.
      pairing: how the layers with cross-attention look at two memories [b, 2, m, memory_width]: "none" looks at one [b, m, memory_width];
        "alternate", each is a pair of layers, one beside each memory (``nn.block.PairBlock``, params ``blocks_pair/*``; ALBEF for NLVR2);
        "twin", each has two cross-attentions, averaged in the lowest ``AVERAGED`` layers, merged above (``blocks_merge/*``; BLIP for NLVR2).
    """
    vocab: int
    width: int
    layers: int
    heads: int
    mlp_dim: int
    positions: int = 512
    token_types: int = 2
    cross_layers: int = 0
    memory_width: int | None = None
    roles: tuple[str, ...] = ("encoder",)
    pairing: str = "none"
    eps: float = 1e-12
    dropout: float = 0.0
    remat: str = "none"
    dtype: Any = jnp.float32

    def setup(self):
        if not 0 <= self.cross_layers <= self.layers:
            raise ValueError(f"cross_layers={self.cross_layers} must lie between 0 and layers={self.layers}")
        if "decoder" in self.roles and self.cross_layers != self.layers:
            raise ValueError(f"a decoder has cross-attention in all layers: cross_layers={self.cross_layers}; nearest: {self.layers}")

        def table(rows, axis):
            return nn.with_logical_partitioning(nn.initializers.normal(0.02), (axis, "embed")), (rows, self.width), jnp.float32

        self.token_embed = TokenEmbed(self.vocab, self.width, dtype=self.dtype)
        self.position_embed = self.param("position_embed", *table(self.positions, "position"))
        if self.token_types:
            self.type_embed = self.param("type_embed", *table(self.token_types, "position"))
        self.embed_norm = Norm("layernorm", self.eps)
        self.drop = nn.Dropout(self.dropout)
        fields = self.block_fields()
        if self.layers > self.cross_layers:
            self.blocks = post_stack(self.layers - self.cross_layers, self.remat, **fields)
        if self.pairing not in PAIRINGS:
            raise ValueError(f"pairing={self.pairing!r} is not known{nearest(self.pairing, PAIRINGS)}")
        fields |= dict(memory_width=self.memory_width or self.width, roles=self.roles)
        if self.pairing == "alternate":
            self.blocks_pair = pair_stack(self.cross_layers, self.remat, **fields)
        elif self.pairing == "twin":
            self.blocks_cross = post_stack(min(AVERAGED, self.cross_layers), self.remat, memories="average", **fields)
            if self.cross_layers > AVERAGED:
                self.blocks_merge = post_stack(self.cross_layers - AVERAGED, self.remat, memories="merge", **fields)
        elif self.cross_layers:
            self.blocks_cross = post_stack(self.cross_layers, self.remat, **fields)

    def block_fields(self) -> dict[str, Any]:
        """What all layers have in common."""
        return dict(width=self.width, heads=self.heads, mlp_dim=self.mlp_dim, eps=self.eps, dropout=self.dropout, dtype=self.dtype)

    def embed(self, ids: jax.Array, start: jax.Array | int = 0) -> jax.Array:
        """[b, l] ids that stand at ``start``, start + 1, ... -> [b, l, width]."""
        if ids.shape[1] > self.positions:
            raise ValueError(f"text of {ids.shape[1]} ids exceeds positions={self.positions}; nearest: {self.positions}")
        at = jnp.minimum(start + jnp.arange(ids.shape[1]), self.positions - 1)
        x = self.token_embed(ids) + jnp.take(self.position_embed, at, axis=0).astype(self.dtype)
        if self.token_types:
            x = x + self.type_embed[0].astype(self.dtype)
        return self.drop(self.embed_norm(x), deterministic=not self.has_rng("dropout"))

    def lower(self, ids: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """The layers without cross-attention. ``mask`` bool [b, l], True where real."""
        x = self.embed(ids)
        return self.blocks(x, keys(mask), None, None, None, None, None)[0] if self.layers > self.cross_layers else x

    def upper(self, x: jax.Array, mask: jax.Array | None = None, memory: jax.Array | None = None,
              memory_mask: jax.Array | None = None, memory_rows: jax.Array | None = None) -> jax.Array:
        """The layers with cross-attention, on states of ``lower``. memory [n, m, memory_width], memory_mask bool [b, m];
        memory_rows (for ``nn.rows.select``): which memory each row looks at, None where they go together. With a ``pairing``: memory [b, 2, m, memory_width] alone."""
        if self.pairing == "alternate":
            x = self.blocks_pair(x, keys(mask), memory)[0]
        elif self.cross_layers:
            x = self.blocks_cross(x, keys(mask), memory, keys(memory_mask), None, None, memory_rows)[0]
        if self.pairing == "twin" and self.cross_layers > AVERAGED:
            x = self.blocks_merge(x, keys(mask), memory, None, None, None, None)[0]
        return shard(x, "batch", "length", "act_embed")

    def __call__(self, ids: jax.Array, mask: jax.Array | None = None, memory: jax.Array | None = None,
                 memory_mask: jax.Array | None = None, memory_rows: jax.Array | None = None) -> jax.Array:
        """All layers."""
        return self.upper(self.lower(ids, mask), mask, memory, memory_mask, memory_rows)

    def decode(self, ids: jax.Array, mask: jax.Array | None, memory: jax.Array, memory_mask: jax.Array | None = None,
               memory_rows: jax.Array | None = None) -> jax.Array:
        """All layers in the decoder's role: causal, and padding is not looked at."""
        x, _ = self.blocks_cross.decode(self.embed(ids), keys(mask), memory, keys(memory_mask), None, None, memory_rows)
        return shard(x, "batch", "length", "act_embed")

    def init_cache(self, batch: int, length: int, memory_length: int) -> dict[str, jax.Array]:
        """An empty cache of the decoder for ``length`` tokens, see ``nn.block.init_cache``."""
        return init_cache(self.layers, batch, length, self.heads, self.width // self.heads, memory_length, self.dtype)

    def extend(self, ids: jax.Array, cache: dict[str, jax.Array], index: jax.Array, memory: jax.Array | None = None,
               memory_mask: jax.Array | None = None) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The decoder's states of ids [b, k] at positions index, index + 1, ... -> ([b, k, width], cache). ``memory`` at prefill alone,
        ``memory_mask`` always."""
        x, new = self.blocks_cross.decode(self.embed(ids, index), None, memory, keys(memory_mask), cache, index, None)
        return x, grown(cache, new, index)

    def table(self) -> jax.Array:
        """The token table [vocab, width], which language-model heads share."""
        return self.token_embed.variables["params"]["table"]


def keys(mask: jax.Array | None) -> jax.Array | None:
    """bool [b, k] -> [b, 1, 1, k]: which keys may be attended to."""
    return None if mask is None else mask.astype(bool)[:, None, None]


class LanguageHead(nn.Module):
    """BERT's prediction head: dense, GELU, norm, then logits over a vocabulary by the (tied) token table, with a bias.

    states [b, l, width] -> [b, l, width + 1], whose product with ``vocabulary(table)`` [width + 1, vocab] are the logits:
    the last column is 1 and carries the bias.
    """
    vocab: int
    width: int
    eps: float = 1e-12
    dtype: Any = jnp.float32

    def setup(self):
        self.dense = Linear(self.width, ("embed", "embed"), True, nn.initializers.normal(0.02), dtype=self.dtype)
        self.norm = Norm("layernorm", self.eps)
        self.bias = self.param("bias", nn.with_logical_partitioning(nn.initializers.zeros, ("vocab",)), (self.vocab,), jnp.float32)

    def __call__(self, states: jax.Array) -> jax.Array:
        x = self.norm(gelu(self.dense(states)))
        return jnp.concatenate([x, jnp.ones((*x.shape[:-1], 1), x.dtype)], -1)

    def vocabulary(self, table: jax.Array) -> jax.Array:
        """table [vocab, width] -> [width + 1, vocab], fp32."""
        return jnp.concatenate([table.T, self.bias[None]], 0)
