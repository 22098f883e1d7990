"""What decoder-only language models have in common: embeddings go in, a causal stack, a norm, logits over the vocabulary.

All language towers, T5 too, are used in one way: ``embed`` ids, put a prefix of embeddings in front where there is one, run them,
and read ``logits``; or ``init_cache`` and ``extend`` it (see ``models.language.continuation``).
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlm_jax.errors import nearest
from vlm_jax.models.bert import keys
from vlm_jax.nn.attention import Rotary
from vlm_jax.nn.block import BEFORE_AXES, Stack, init_cache
from vlm_jax.nn.embed import TokenEmbed
from vlm_jax.nn.lora import low_rank
from vlm_jax.nn.narrow import widen
from vlm_jax.nn.norm import Norm
from vlm_jax.partitioning import shard

HEADS = ("tied", "own")


class VocabularyHead(nn.Module):
    """The matrix [width, vocab] of a language model whose logits do not come from its token table: param ``kernel``."""
    vocab: int
    width: int

    @nn.compact
    def __call__(self) -> jax.Array:
        kernel = self.param("kernel", nn.with_logical_partitioning(nn.initializers.normal(0.02), ("embed", "vocab")), (self.width, self.vocab), jnp.float32)
        kernel, adapter = widen(self, kernel, jnp.float32 if kernel.dtype == jnp.int8 else kernel.dtype), low_rank(self)
        return kernel if adapter is None else kernel + (adapter.a * adapter.scale) @ adapter.b


def vocabulary_logits(states: jax.Array, vocabulary: jax.Array) -> jax.Array:
    """states [b, l, width], vocabulary [width, vocab] -> fp32 [b, l, vocab]; the product runs in the dtype of the states."""
    logits = jnp.einsum("bld,dv->blv", states, vocabulary.astype(states.dtype), preferred_element_type=jnp.float32)
    return shard(logits, "batch", "length", "act_vocab")


def positions_of(mask: jax.Array, before: jax.Array | int = 0) -> jax.Array:
    """bool [b, l], True where real -> int32 [b, l]: how many real tokens stand in front of each, those ``before`` [b, 1] included; -1 for padding."""
    return jnp.where(mask, before + jnp.cumsum(mask, 1, dtype=jnp.int32) - 1, -1)


class Decoder(nn.Module):
    """embeddings [b, l, width] -> states [b, l, width], normed. Families derive from it and say in ``place`` where tokens stand.

    Params token_embed, blocks/* (``nn.block.Block``), output_norm and, with ``head`` "own", lm_head/kernel; "tied" logits come
    from the token table. dropout: of what enters the residual stream, where a stream of random keys "dropout" is given (OPT was trained with 0.1).
    """
    vocab: int
    width: int
    layers: int
    heads: int
    mlp_dim: int
    activation: str = "gelu"
    gated: bool = False
    use_bias: bool = True
    norm: str = "layernorm"
    eps: float = 1e-5
    head: str = "tied"
    dropout: float = 0.0
    remat: str = "none"
    dtype: Any = jnp.float32

    # Where the rows of a cache that ``behind`` made are, for ``decode``'s batch_axis.
    CACHE_AXES = {"layers": BEFORE_AXES, "mask": 0, "index": -1}

    def setup(self):
        if self.head not in HEADS:
            raise ValueError(f"head={self.head!r} is not known{nearest(self.head, HEADS)}")
        self.token_embed = TokenEmbed(self.vocab, self.width, dtype=self.dtype)
        self.stack = Stack(self.layers, dict(
            width=self.width, heads=self.heads, mlp_dim=self.mlp_dim, activation=self.activation, gated=self.gated, use_bias=self.use_bias,
            norm=self.norm, eps=self.eps, causal="causal", init_scheme="bert", dropout=self.dropout), self.remat, self.dtype)
        nn.share_scope(self, self.stack)  # parameters at blocks/..., not stack/blocks/...
        self.output_norm = Norm(self.norm, self.eps)
        if self.head == "own":
            self.lm_head = VocabularyHead(self.vocab, self.width)

    def place(self, x: jax.Array, positions: jax.Array) -> tuple[jax.Array, Rotary | None]:
        """Embeddings [b, l, width] that stand at ``positions`` [b, l], -1 for padding -> (embeddings, turns of queries and keys)."""
        raise NotImplementedError

    def embed(self, ids: jax.Array) -> jax.Array:
        """ids int32 [b, l] -> [b, l, width], without positions."""
        return self.token_embed(ids)

    def __call__(self, x: jax.Array, mask: jax.Array | None = None, positions: jax.Array | None = None) -> jax.Array:
        """States of embeddings [b, l, width], of tokens or of anything put in front of them.

        mask: bool [b, l], True where real; padding may stand anywhere. positions: int [b, l]; by default real tokens are counted.
        """
        if positions is None:
            positions = positions_of(jnp.ones(x.shape[:2], bool) if mask is None else mask.astype(bool))
        x, rotary = self.place(x.astype(self.dtype), positions)
        x, _ = self.stack(x, keys(mask), rotary=rotary)
        return shard(self.output_norm(x), "batch", "length", "act_embed")

    def vocabulary(self) -> jax.Array:
        """[width, vocab], which states are multiplied with for logits."""
        return self.lm_head() if self.head == "own" else nn.unbox(self.token_embed.variables["params"]["table"]).T

    def logits(self, states: jax.Array) -> jax.Array:
        """[b, l, width] -> fp32 [b, l, vocab]; row t predicts token t + 1."""
        return vocabulary_logits(states, self.vocabulary())

    def init_cache(self, batch: int, length: int) -> dict[str, Any]:
        """An empty cache of ``length`` tokens: keys and values of the layers, the mask of what was given, and the index of what comes."""
        return {"layers": init_cache(self.layers, batch, length, self.heads, self.width // self.heads, dtype=self.dtype),
                "mask": jnp.zeros((batch, length), bool), "index": jnp.int32(0)}

    def behind(self, cache: dict[str, Any], length: int) -> dict[str, Any]:
        """A cache for ``length`` tokens behind a full one, which lies in it once, however many beams or candidates will go on from a row."""
        full, mask = cache["layers"], cache["mask"]
        return {"layers": {"before_key": full["key"], "before_value": full["value"], **self.init_cache(len(mask), length)["layers"]},
                "mask": jnp.pad(mask, ((0, 0), (0, length))), "index": cache["index"]}

    def extend(self, x: jax.Array, cache: dict[str, Any], mask: jax.Array | None = None, positions: jax.Array | None = None
               ) -> tuple[jax.Array, dict[str, Any]]:
        """States of embeddings [b, k, width] that follow what the cache holds -> ([b, k, width], cache). Arguments as ``__call__``.

        Writing beyond the cache's length is the caller's error.
        """
        mask = jnp.ones(x.shape[:2], bool) if mask is None else mask.astype(bool)
        if positions is None:
            positions = positions_of(mask, cache["mask"].sum(1, keepdims=True, dtype=jnp.int32))
        x, rotary = self.place(x.astype(self.dtype), positions)
        seen = jax.lax.dynamic_update_slice_in_dim(cache["mask"], mask, cache["index"], axis=1)
        x, layers = self.stack(x, keys(seen), cache=cache["layers"], index=cache["index"], rotary=rotary)
        return self.output_norm(x), {"layers": layers, "mask": seen, "index": cache["index"] + x.shape[1]}
