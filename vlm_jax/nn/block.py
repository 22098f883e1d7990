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
from vlm_jax.nn.attention import Attention, Rotary, before_of, write
from vlm_jax.nn.linear import Linear
from vlm_jax.nn.mlp import Mlp
from vlm_jax.nn.norm import Norm
from vlm_jax.nn.rows import select
from vlm_jax.partitioning import current_sizes, shard

CROSS = ("none", "single", "plain", "double")


def _all_but_weights(primitive: Any, *_: Any, **__: Any) -> bool:
    """Whether a value is kept: all but weights that ``partitioning.gather`` made whole, whose pieces are kept."""
    return primitive.name != "sharding_constraint"


# What a block keeps for its backward pass; the rest is computed again.
REMAT = {
    "none": _all_but_weights,                                                        # keep everything
    "full": jax.checkpoint_policies.nothing_saveable,                                # keep the block's input only
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,                # keep dense products, not attention scores
    "outputs": jax.checkpoint_policies.save_only_these_names("attn_out", "mlp_out"), # keep what enters the residual stream
}


def recomputed(block: Any, remat: str, **options: Any) -> Any:
    """``block``, a module class, under a policy of ``REMAT``. Raises ValueError for another name."""
    if remat not in REMAT:
        raise ValueError(f"remat={remat!r} is not a policy{nearest(remat, tuple(REMAT))}")
    if remat == "none" and current_sizes().get("fsdp", 1) == 1:
        return block
    return nn.remat(block, policy=REMAT[remat], prevent_cse=False, **options)


class Block(nn.Module):
    """Pre-norm block: x += attn(norm1 x); [x += cross(norm_cross x, norm_kv memory)]; x += mlp(norm2 x).

    ``cross_layout``: "none"; "single", as above, one MLP a layer (CoCa's paper); "plain", the same without ``norm_kv`` (T5);
    "double", a whole block followed by a whole cross block with its own MLP (open_clip's CoCa), whose members are
    ``cross_norm1``, ``cross_norm_kv``, ``cross``, ``cross_norm2``, ``cross_mlp``. ``gated``: see ``Mlp``; ``key_bias``, ``scale``: see
    ``Attention``. ``dropout``: of what enters the residual stream, ``inner_dropout``: of attention weights and hidden units, both where a
    stream of random keys "dropout" is given.
    """
    width: int
    heads: int
    mlp_dim: int
    head_dim: int | None = None
    activation: str = "gelu"
    norm: str = "layernorm"
    eps: float = 1e-5
    use_bias: bool = True
    key_bias: bool = True
    gated: bool = False
    scale: float | None = None
    dropout: float = 0.0
    inner_dropout: float = 0.0
    qk_norm: str = "none"
    causal: str = "none"
    cross_layout: str = "none"
    memory_width: int | None = None
    init_scheme: str = "torch"
    depth: int = 1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None = None, memory: jax.Array | None = None,
                 memory_mask: jax.Array | None = None, cache: dict | None = None, index: jax.Array | None = None,
                 drop_path: jax.Array | None = None, rotary: Rotary | None = None, bias: jax.Array | None = None
                 ) -> tuple[jax.Array, dict | None]:
        """x [b, l, width], memory [b, m, memory_width] -> (x, what is new of a cache, for ``grown``). Arguments as ``Stack``, for one layer."""
        if self.cross_layout not in CROSS:
            raise ValueError(f"cross_layout={self.cross_layout!r} is not known{nearest(self.cross_layout, CROSS)}")
        norm = functools.partial(Norm, self.norm, self.eps)
        mlp = functools.partial(Mlp, self.mlp_dim, self.activation, self.use_bias, self.init_scheme, self.depth, self.dtype,
                                gated=self.gated, dropout=self.inner_dropout)
        attention = functools.partial(Attention, self.width, self.heads, self.head_dim, use_bias=self.use_bias, key_bias=self.key_bias,
                                      scale=self.scale, qk_norm=self.qk_norm,
                                      init_scheme=self.init_scheme, depth=self.depth, dropout=self.inner_dropout, dtype=self.dtype)
        new: dict[str, jax.Array] = {}

        def added(x, y, name):
            y = nn.Dropout(self.dropout)(y, deterministic=not self.has_rng("dropout"))
            if drop_path is not None and self.has_rng("dropout"):
                kept = jax.random.bernoulli(self.make_rng("dropout"), 1 - drop_path, (x.shape[0], 1, 1))
                y = jnp.where(kept, y / (1 - drop_path).astype(y.dtype), 0)
            return x + checkpoint_name(y, name)

        def self_attention(x):
            y, own = attention(causal=self.causal, name="attn")(norm(name="norm1")(x), mask=mask, cache=cache, index=index, rotary=rotary, bias=bias)
            new.update(own or {})
            return added(x, y, "attn_out")

        def cross_attention(x, norm_x, norm_memory):
            attn = attention(kv_width=self.memory_width, name="cross")
            if memory is not None:
                keys, values = attn.project_memory(norm_memory(memory.astype(self.dtype)))
                if cache is not None:
                    new.update(memory_key=keys, memory_value=values)
            elif cache is not None:
                keys, values = cache["memory_key"], cache["memory_value"]
            else:
                raise ValueError(f"cross_layout={self.cross_layout!r} needs memory, or a cache that holds its keys and values")
            return added(x, attn.attend_cached(norm_x(x), keys, values, memory_mask, shared=memory is None), "attn_out")

        def feed_forward(x, norm_x, mlp):
            return added(x, mlp(norm_x(x)), "mlp_out")

        x = self_attention(shard(x.astype(self.dtype), "batch", "length", "act_embed"))
        if self.cross_layout in ("single", "plain"):
            x = cross_attention(x, norm(name="norm_cross"), norm(name="norm_kv") if self.cross_layout == "single" else lambda memory: memory)
        x = feed_forward(x, norm(name="norm2"), mlp(name="mlp"))
        if self.cross_layout == "double":
            x = cross_attention(x, norm(name="cross_norm1"), norm(name="cross_norm_kv"))
            x = feed_forward(x, norm(name="cross_norm2"), mlp(name="cross_mlp"))
        return x, None if cache is None else new


class Stack(nn.Module):
    """``layers`` equal blocks under ``lax.scan``; params at ``blocks/...`` with a leading "layers" axis.

    ``block`` holds the fields of ``Block`` (depth and dtype excepted), ``remat`` is a name in ``REMAT``. ``drop_path``: the
    probability with which an example skips an update of the last layer (linearly less below), where a stream of random keys
    "dropout" is given (stochastic depth, arXiv 1603.09382).
    """
    layers: int
    block: Mapping[str, Any]
    remat: str = "none"
    dtype: Any = jnp.float32
    drop_path: float = 0.0

    def setup(self):
        scanned = nn.scan(recomputed(Block, self.remat), variable_axes={"params": 0}, split_rngs={"params": True, "dropout": True}, length=self.layers,
                          in_axes=(nn.broadcast, nn.broadcast, nn.broadcast, 0, nn.broadcast, 0, nn.broadcast, nn.broadcast), out_axes=0,
                          metadata_params={nn.PARTITION_NAME: "layers"})
        self.blocks = scanned(depth=self.layers, dtype=self.dtype, **self.block)

    def __call__(self, x: jax.Array, mask: jax.Array | None = None, memory: jax.Array | None = None,
                 memory_mask: jax.Array | None = None, cache: dict | None = None, index: jax.Array | None = None,
                 rotary: Rotary | None = None, bias: jax.Array | None = None) -> tuple[jax.Array, dict | None]:
        """x [b, l, width] -> (x, cache).

        Args:
          mask: self-attention's, True = may attend, to [b, h, l, l]; with a cache, to [b, h, l, length].
          memory, memory_mask: [b, m, memory_width] and [b, h, l, m] for cross-attention. With a
            cache, memory is needed once, at prefill.
          cache, index: from ``init_cache``, and the position (int32 scalar or [b]) of x's first token.
          rotary, bias: of self-attention, the same in all layers; see ``Attention``.
        """
        rates = jnp.linspace(0, self.drop_path, self.layers) if self.drop_path else None
        x, new = self.blocks(x.astype(self.dtype), mask, memory, memory_mask, cache, index, rates, rotary, bias)
        return x, None if cache is None else grown(cache, new, index)


ROLES = ("encoder", "decoder")
MEMORIES = ("one", "average", "merge")


class PostBlock(nn.Module):
    """Post-norm block of BERT: x = norm1(x + attn(x)); [x = norm_cross(x + cross(x, memory))]; x = norm2(x + mlp(x)).

    Without ``memory`` the cross-attention is passed over. ``roles``: "encoder" owns ``attn`` and ``norm1``, "decoder" the
    causal ``decoder_attn`` and ``decoder_norm1``; all else is shared between them (BLIP's MED). ``memory_width`` None:
    no cross-attention. ``dropout``: of attention weights and of what enters the residual stream, where a stream of
    random keys "dropout" is given.

    ``memories``: "one"; "average" and "merge" look at two of them, [n, 2, m, memory_width], each with a cross-attention of its own
    (``cross``, ``cross_other``), whose results are averaged, or joined by the linear map ``merge`` (BLIP for NLVR2).
    """
    width: int
    heads: int
    mlp_dim: int
    memory_width: int | None = None
    memories: str = "one"
    roles: tuple[str, ...] = ("encoder",)
    activation: str = "gelu"
    eps: float = 1e-12
    dropout: float = 0.0
    dtype: Any = jnp.float32

    def setup(self):
        for role in self.roles:
            if role not in ROLES:
                raise ValueError(f"roles: {role!r} is not known{nearest(role, ROLES)}")
        attention = functools.partial(Attention, self.width, self.heads, init_scheme="bert", dropout=self.dropout, dtype=self.dtype)
        norm = functools.partial(Norm, "layernorm", self.eps)
        if "encoder" in self.roles:
            self.attn, self.norm1 = attention(), norm()
        if "decoder" in self.roles:
            self.decoder_attn, self.decoder_norm1 = attention(causal="causal"), norm()
        if self.memories not in MEMORIES:
            raise ValueError(f"memories={self.memories!r} is not known{nearest(self.memories, MEMORIES)}")
        if self.memory_width is not None:
            self.cross, self.norm_cross = attention(kv_width=self.memory_width), norm()
            if self.memories != "one":
                self.cross_other = attention(kv_width=self.memory_width)
            if self.memories == "merge":
                self.merge = Linear(self.width, ("embed", "embed"), True, nn.initializers.normal(0.02), dtype=self.dtype)
        self.mlp, self.norm2 = Mlp(self.mlp_dim, self.activation, True, "bert", dtype=self.dtype), norm()
        self.drop = nn.Dropout(self.dropout)

    def __call__(self, x: jax.Array, mask: jax.Array | None, memory: jax.Array | None, memory_mask: jax.Array | None,
                 cache: dict | None, index: jax.Array | None, memory_rows: jax.Array | None) -> tuple[jax.Array, dict | None]:
        """x [b, l, width], memory [n, m, memory_width] -> (x, what is new of a cache, for ``grown``). Arguments as ``Stack``, for one layer.

        ``memory_rows``: which memory each row of x attends to, as ``nn.rows.select`` takes them; None where n is b. Keys and values are
        made once for each memory, however many rows look at it.
        """
        return self.run(self.attn, self.norm1, x, mask, memory, memory_mask, cache, index, memory_rows)

    def decode(self, x: jax.Array, mask: jax.Array | None, memory: jax.Array | None, memory_mask: jax.Array | None,
               cache: dict | None, index: jax.Array | None, memory_rows: jax.Array | None) -> tuple[jax.Array, dict | None]:
        """The same in the decoder's role."""
        return self.run(self.decoder_attn, self.decoder_norm1, x, mask, memory, memory_mask, cache, index, memory_rows)

    def run(self, attn, norm1, x, mask, memory, memory_mask, cache, index, memory_rows):
        y, new = attn(x, mask=mask, cache=cache, index=index)
        x = norm1(self.added(x, y, "attn_out"))
        if self.memory_width is not None and (memory is not None or (cache is not None and "memory_key" in cache)):
            if self.memories != "one":
                y = self.look_at_two(x, memory)
            else:
                if memory is not None:
                    keys, values = self.project_memory(memory)
                    if memory_rows is not None:
                        keys, values = select(keys, memory_rows), select(values, memory_rows)
                    if cache is not None:
                        new.update(memory_key=keys, memory_value=values)
                else:
                    keys, values = cache["memory_key"], cache["memory_value"]
                y = self.cross.attend_cached(x, keys, values, memory_mask, shared=memory is None)
            x = self.norm_cross(self.added(x, y, "attn_out"))
        return self.norm2(self.added(x, self.mlp(x), "mlp_out")), new

    def beside(self, x: jax.Array, mask: jax.Array | None, keys: jax.Array, values: jax.Array) -> jax.Array:
        """The encoder's role beside the keys and values that another block made of its memory."""
        x = self.norm1(self.added(x, self.attn(x, mask=mask)[0], "attn_out"))
        x = self.norm_cross(self.added(x, self.cross.attend_cached(x, keys, values), "attn_out"))
        return self.norm2(self.added(x, self.mlp(x), "mlp_out"))

    def project_memory(self, memory: jax.Array) -> tuple[jax.Array, jax.Array]:
        """[n, m, memory_width] -> keys and values [n, m, h, d] of the cross-attention."""
        return self.cross.project_memory(memory.astype(self.dtype))

    def look_at_two(self, x: jax.Array, memory: jax.Array) -> jax.Array:
        first, second = (attention.attend_cached(x, *attention.project_memory(memory[:, i].astype(self.dtype)))
                         for i, attention in enumerate((self.cross, self.cross_other)))
        return self.merge(jnp.concatenate([first, second], -1)) if self.memories == "merge" else (first + second) / 2

    def added(self, x: jax.Array, y: jax.Array, name: str) -> jax.Array:
        return x + checkpoint_name(self.drop(y, deterministic=not self.has_rng("dropout")), name)


class PairBlock(nn.Module):
    """Two post-norm blocks, one beside each of two memories; they share the projections to keys and values, which are those of the first
    (ALBEF for NLVR2, arXiv 2107.07651, section 4)."""
    block: Mapping[str, Any]

    def setup(self):
        self.first, self.second = PostBlock(**self.block), PostBlock(**self.block)

    def __call__(self, x: jax.Array, mask: jax.Array | None, memory: jax.Array) -> tuple[jax.Array, None]:
        """x [b, l, width], memory [b, 2, m, memory_width] -> (x, None)."""
        x = self.first.beside(x, mask, *self.first.project_memory(memory[:, 0]))
        return self.second.beside(x, mask, *self.first.project_memory(memory[:, 1])), None


def pair_stack(layers: int, remat: str = "none", **fields: Any) -> nn.Module:
    """``layers`` equal pairs of blocks under ``lax.scan``."""
    return nn.scan(recomputed(PairBlock, remat), variable_axes={"params": 0}, split_rngs={"params": True, "dropout": True}, length=layers,
                   in_axes=(nn.broadcast, nn.broadcast), out_axes=0, metadata_params={nn.PARTITION_NAME: "layers"})(block=fields)


def post_stack(layers: int, remat: str = "none", **fields: Any) -> nn.Module:
    """``layers`` equal post-norm blocks under ``lax.scan``, with the methods of ``PostBlock``."""
    methods = ["__call__", "decode"]
    return nn.scan(recomputed(PostBlock, remat, methods=methods), variable_axes={"params": 0}, split_rngs={"params": True, "dropout": True}, length=layers,
                   in_axes=(nn.broadcast, nn.broadcast, nn.broadcast, 0, nn.broadcast, nn.broadcast), out_axes=0,
                   metadata_params={nn.PARTITION_NAME: "layers"}, methods=methods)(**fields)


# Where the rows of a cache of ``init_cache`` are, for ``decode``'s batch_axis. What beams, or the candidates of an example, all look at is not theirs (-1).
OWN_AXES = {"key": 1, "value": 1}
BEFORE_AXES, MEMORY_AXES = {**OWN_AXES, "before_key": -1, "before_value": -1}, {**OWN_AXES, "memory_key": -1, "memory_value": -1}


def init_cache(layers: int, batch: int, length: int, heads: int, head_dim: int, memory_length: int | None = None,
               dtype: Any = jnp.float32) -> dict[str, jax.Array]:
    """An empty cache for ``length`` tokens: key, value [layers, b, length, h, d]; with ``memory_length``,
    for stacks with cross-attention, also memory_key, memory_value [layers, b, memory_length, h, d]."""
    lengths = {"key": length, "value": length}
    if memory_length is not None:
        lengths |= {"memory_key": memory_length, "memory_value": memory_length}
    return {name: jnp.zeros((layers, batch, n, heads, head_dim), dtype) for name, n in lengths.items()}


def grown(cache: dict[str, jax.Array], new: dict[str, jax.Array], index: jax.Array) -> dict[str, jax.Array]:
    """``cache`` of all layers (``init_cache``) with what they made of new tokens, at positions index, index + 1, ... A memory is kept whole.

    Layers give back what is new alone, and it is written here at once: a scan over them that carried their caches would copy every one of them.
    """
    index = index - before_of(cache)
    return {**cache, **{name: x.astype(cache[name].dtype) if name.startswith("memory") else write(cache[name], x, index) for name, x in new.items()}}
