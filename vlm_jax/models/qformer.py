"""The Q-Former (BLIP-2, arXiv 2301.12597, section 3.1; salesforce/LAVIS ``Qformer.py``): learned queries that read an image, and a text beside
them, through one BERT whose self-attention they share."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from vlm_jax.models.bert import keys
from vlm_jax.nn.attention import Attention, attend, write
from vlm_jax.nn.block import recomputed
from vlm_jax.nn.embed import TokenEmbed
from vlm_jax.nn.mlp import Mlp
from vlm_jax.nn.multiway import Layout, Multiway
from vlm_jax.nn.norm import Norm
from vlm_jax.nn.rows import select
from vlm_jax.partitioning import shard

VARIANTS = {
    # arXiv 2301.12597, section 3.1: BERT's base size, 32 queries
    "base": dict(width=768, layers=12, heads=12, mlp_dim=3072, queries=32),
    # trains on a CPU in minutes
    "mini": dict(width=96, layers=4, heads=3, mlp_dim=288, queries=8),
}
QUERY, TEXT = "query", "text"


class QBlock(nn.Module):
    """Post-norm block: x = norm1(x + attn(x)); queries: [x = norm_cross(x + cross(x, image))]; x = norm2(x + mlp(x)), where queries and words
    have an ``mlp`` and a ``norm2`` of their own. ``memory_width`` None: no cross-attention. ``dropout``: of attention weights and of what
    enters the residual stream, where a stream of random keys "dropout" is given."""
    width: int
    heads: int
    mlp_dim: int
    memory_width: int | None
    experts: tuple[str, ...]
    eps: float = 1e-12
    dropout: float = 0.0
    dtype: Any = jnp.float32

    def setup(self):
        attention = functools.partial(Attention, self.width, self.heads, init_scheme="bert", dropout=self.dropout, dtype=self.dtype)
        norm = functools.partial(Norm, "layernorm", self.eps)
        self.attn, self.norm1 = attention(), norm()
        if self.memory_width is not None:
            self.cross, self.norm_cross = attention(kv_width=self.memory_width), norm()
        self.mlp = Multiway(functools.partial(Mlp, self.mlp_dim, "gelu", True, "bert", dtype=self.dtype), self.experts)
        self.norm2 = Multiway(norm, self.experts)
        self.drop = nn.Dropout(self.dropout)

    def __call__(self, x: jax.Array, layout: Layout, mask: jax.Array | None, image: jax.Array | None, seen: dict | None, rows: jax.Array | None,
                 cache: dict | None, index: jax.Array | None) -> tuple[jax.Array, dict, dict | None]:
        """x [b, l, width] -> (x, own keys and values, those of the image). Arguments as ``QFormer.run``, for one layer."""
        q, k, v = self.attn.project_self(x)
        own = {"key": k, "value": v}
        if cache is not None:
            k, v = (write(cache[name], new, index) for name, new in own.items())
        x = self.norm1(self.added(x, self.attn.merge(attend(q, k, v, mask, drop=self.attn.drop())), "attn_out"))
        if self.memory_width is not None and image is not None:
            seen = dict(zip(("key", "value"), self.cross.project_memory(image), strict=True))

        def part(expert: str, x: jax.Array) -> jax.Array:
            if expert == QUERY and self.memory_width is not None:
                keys, values = (seen[name] if rows is None else select(seen[name], rows) for name in ("key", "value"))
                x = self.norm_cross(self.added(x, self.cross.attend_cached(x, keys, values), "attn_out"))
            return self.norm2.of(expert)(self.added(x, self.mlp.of(expert)(x), "mlp_out"))

        return layout.route(part, x), own, seen

    def added(self, x: jax.Array, y: jax.Array, name: str) -> jax.Array:
        return x + checkpoint_name(self.drop(y, deterministic=not self.has_rng("dropout")), name)


class QGroup(nn.Module):
    """A block with cross-attention and the ``plain`` ones that follow it."""
    block: Any
    memory_width: int
    plain: int

    def setup(self):
        self.cross = QBlock(memory_width=self.memory_width, **self.block)
        self.plain_blocks = [QBlock(memory_width=None, **self.block, name=f"plain{i + 1}") for i in range(self.plain)]

    def __call__(self, x, layout, mask, image, seen, rows, cache, index):
        """-> (x, (own keys and values by block, those of the image))."""
        own = {}
        x, own["cross"], seen = self.cross(x, layout, mask, image, seen, rows, None if cache is None else cache["cross"], index)
        for i, block in enumerate(self.plain_blocks):
            name = f"plain{i + 1}"
            x, own[name], _ = block(x, layout, mask, None, None, None, None if cache is None else cache[name], index)
        return x, (own, seen)


class QFormer(nn.Module):
    """``queries`` learned vectors [n, width], and words where there is a ``vocab``, through ``layers`` of which each ``cross_every``-th, from the
    first on, lets the queries look at an image of ``memory_width`` channels.

    Params queries [n, width]; with a vocabulary token_embed and position_embed; embed_norm; blocks/cross/* and blocks/plain1/*, ...: the layers of
    whole groups, stacked; tail/*: those of a last group that is not whole. In each of them mlp and norm2 are mlp/query/*, and with a vocabulary
    mlp/text/* beside it. Queries have no position; words stand at 0, 1, ... whether or not there are queries in front of them.

    Four ways of looking: ``see`` (queries alone), ``read`` (words alone), ``fuse`` (both, each at all), ``go_on`` (words at the queries, whose keys
    were kept, and at the words before them). What is computed of the image, its keys and values in each layer, is made once, by ``see``.
    """
    width: int
    layers: int
    heads: int
    mlp_dim: int
    queries: int
    memory_width: int
    vocab: int = 0
    positions: int = 512
    cross_every: int = 2
    eps: float = 1e-12
    dropout: float = 0.0
    remat: str = "none"
    dtype: Any = jnp.float32

    # Where the rows of a cache are, for ``decode``'s batch_axis.
    CACHE_AXES = {"blocks": 1, "tail": 0, "index": -1}

    def setup(self):
        if self.cross_every < 1:
            raise ValueError(f"cross_every={self.cross_every} is no number of layers; nearest: 1")

        def table(rows):
            return nn.with_logical_partitioning(nn.initializers.normal(0.02), ("position", "embed")), (rows, self.width), jnp.float32

        self.query_table = self.param("queries", *table(self.queries))
        if self.vocab:
            self.token_embed = TokenEmbed(self.vocab, self.width, dtype=self.dtype)
            self.position_embed = self.param("position_embed", *table(self.positions))
        self.embed_norm, self.drop = Norm("layernorm", self.eps), nn.Dropout(self.dropout)
        block = dict(width=self.width, heads=self.heads, mlp_dim=self.mlp_dim, experts=(QUERY, TEXT) if self.vocab else (QUERY,), eps=self.eps,
                     dropout=self.dropout, dtype=self.dtype)
        groups, rest = divmod(self.layers, self.cross_every)
        group = recomputed(QGroup, self.remat)
        if groups:
            self.blocks = nn.scan(group, variable_axes={"params": 0}, split_rngs={"params": True, "dropout": True}, length=groups,
                                  in_axes=(nn.broadcast, nn.broadcast, nn.broadcast, 0, nn.broadcast, 0, nn.broadcast), out_axes=0,
                                  metadata_params={nn.PARTITION_NAME: "layers"})(block, self.memory_width, self.cross_every - 1)
        if rest:
            self.tail = group(block, self.memory_width, rest - 1)

    def embed(self, ids: jax.Array | None, rows: int = 0, start: jax.Array | int = 0) -> jax.Array:
        """The queries for ``rows`` rows (0: none), followed by ids [b, l] at places start, start + 1, ..., normed -> [b, l, width]."""
        parts = [jnp.broadcast_to(self.query_table.astype(self.dtype), (rows, *self.query_table.shape))] if rows else []
        if ids is not None:
            if not self.vocab:
                raise ValueError("this Q-Former has no words; nearest: vocab")
            if ids.shape[1] > self.positions:
                raise ValueError(f"text of {ids.shape[1]} ids exceeds positions={self.positions}; nearest: {self.positions}")
            at = jnp.minimum(start + jnp.arange(ids.shape[1]), self.positions - 1)
            parts.append(self.token_embed(ids) + jnp.take(self.position_embed, at, axis=0).astype(self.dtype))
        x = jnp.concatenate(parts, 1) if len(parts) > 1 else parts[0]
        return self.drop(self.embed_norm(x), deterministic=not self.has_rng("dropout"))

    def run(self, x: jax.Array, layout: Layout, mask: jax.Array | None = None, image: jax.Array | None = None, seen: dict | None = None,
            rows: jax.Array | None = None, cache: dict | None = None, index: jax.Array | None = None) -> tuple[jax.Array, dict, dict]:
        """x [b, l, width] through all layers -> (states, own keys and values, those of the image), the last two as trees of all layers.

        layout: which of x are queries and which words. mask: True = may attend, to [b, h, l, l or the cache's length]. image [n, m, memory_width], or
        ``seen``, what an earlier pass returned for it; rows (for ``nn.rows.select``): which image each row looks at, None where they go together. cache, index:
        keys and values of all places, in which x's stand from index on (``write`` puts them there).
        """
        own, looked = {}, {}
        for name, there in (("blocks", self.layers >= self.cross_every), ("tail", self.layers % self.cross_every > 0)):
            if there:
                x, (own[name], looked[name]) = getattr(self, name)(x, layout, mask, image, seen and seen[name], rows, cache and cache[name], index)
        return shard(x, "batch", "length", "act_embed"), own, looked

    def see(self, image: jax.Array) -> tuple[jax.Array, dict, dict]:
        """Image tokens [b, m, memory_width] -> (states [b, queries, width] of the queries alone, what ``go_on`` goes on from, what ``fuse`` looks at)."""
        return self.run(self.embed(None, image.shape[0]), Layout(((QUERY, self.queries),)), image=image)

    def read(self, ids: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """ids [b, l] -> states [b, l, width] of the words alone. mask: bool [b, l], True where real."""
        return self.run(self.embed(ids), Layout(((TEXT, ids.shape[1]),)), keys(mask))[0]

    def fuse(self, ids: jax.Array, mask: jax.Array, image: jax.Array | None = None, seen: dict | None = None, rows: jax.Array | None = None) -> jax.Array:
        """ids [b, l] beside the queries -> states [b, queries + l, width]. The image as in ``run``; mask: bool [b, l], True where real."""
        mask = jnp.pad(mask.astype(bool), ((0, 0), (self.queries, 0)), constant_values=True)
        return self.run(self.embed(ids, ids.shape[0]), Layout(((QUERY, self.queries), (TEXT, ids.shape[1]))), keys(mask), image, seen, rows)[0]

    def begin(self, own: dict, length: int) -> dict[str, Any]:
        """A cache for ``length`` words behind the queries, from what ``see`` kept of them."""
        def grow(x):
            return jnp.pad(x, [(0, length if axis == x.ndim - 3 else 0) for axis in range(x.ndim)])
        return {**jax.tree.map(grow, own), "index": jnp.int32(0)}

    def go_on(self, ids: jax.Array, cache: dict[str, Any]) -> tuple[jax.Array, dict[str, Any]]:
        """ids [b, k] that follow what the cache (``begin``) holds -> (states [b, k, width], cache). Each looks at all queries and at the words up to
        itself; padding on the right needs no mask."""
        index = self.queries + cache["index"]
        length = jax.tree.leaves(cache["blocks" if "blocks" in cache else "tail"])[0].shape[-3]
        mask = (jnp.arange(length) <= index + jnp.arange(ids.shape[1])[:, None])[None, None]
        layers = {name: cache[name] for name in ("blocks", "tail") if name in cache}
        x, own, _ = self.run(self.embed(ids, start=cache["index"]), Layout(((TEXT, ids.shape[1]),)), mask, cache=layers, index=index)
        return x, {**jax.tree.map(lambda kept, new: write(kept, new, index), layers, own), "index": cache["index"] + ids.shape[1]}

    def table(self) -> jax.Array:
        """The token table [vocab, width], which language-model heads share."""
        return self.token_embed.variables["params"]["table"]
