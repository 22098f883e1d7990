"""T5 v1.1 (arXiv 1910.10683, 2002.05202) and Flan-T5 (arXiv 2210.11416): an encoder and a decoder."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vlm_jax.models.bert import keys
from vlm_jax.models.decoder import VocabularyHead, vocabulary_logits
from vlm_jax.nn.block import MEMORY_AXES, Stack, init_cache
from vlm_jax.nn.embed import TokenEmbed
from vlm_jax.nn.norm import Norm
from vlm_jax.partitioning import shard


def _sizes(width, layers, heads, mlp_dim):
    return dict(width=width, layers=layers, heads=heads, head_dim=64, mlp_dim=mlp_dim)


VARIANTS = {
    # google-research/t5, released_checkpoints.md ("T5 1.1"); Flan-T5 has the same sizes
    "small": _sizes(512, 8, 6, 1024), "base": _sizes(768, 12, 12, 2048), "large": _sizes(1024, 24, 16, 2816),
    "xl": _sizes(2048, 24, 32, 5120), "xxl": _sizes(4096, 24, 64, 10240),
    "mini": dict(width=96, layers=2, heads=3, head_dim=32, mlp_dim=256),
}
VOCAB = 32128      # rows of the released tables; the tokenizer has 32,100 pieces


def distance_buckets(buckets: int, max_distance: int) -> np.ndarray:
    """int32 [max_distance + 1]: the bucket of each distance 0, 1, ...; the first half of the buckets hold one distance each, the others
    grow with its logarithm. Greater distances are in the last one."""
    exact = buckets // 2
    distance = np.arange(max_distance + 1)
    share = np.log(np.maximum(distance, 1).astype(np.float32) / exact) / np.float32(np.log(max_distance / exact))
    grown = exact + (share * (buckets - exact)).astype(np.int32)
    return np.where(distance < exact, distance, np.minimum(grown, buckets - 1)).astype(np.int32)


def relative_buckets(offset: jax.Array, direction: str, buckets: int = 32, max_distance: int = 128) -> jax.Array:
    """offset int (key's place minus query's) -> int32, rows of a table of relative positions. ``direction`` "both": half of the buckets
    are for keys behind the query; "causal": those share the bucket of distance 0."""
    if direction == "both":
        half = buckets // 2
        return jnp.where(offset > 0, half, 0) + jnp.asarray(distance_buckets(half, max_distance))[jnp.minimum(jnp.abs(offset), max_distance)]
    return jnp.asarray(distance_buckets(buckets, max_distance))[jnp.clip(-offset, 0, max_distance)]


class T5(nn.Module):
    """``encode`` embeddings to a memory, ``decode`` beside it. RMSNorm before each part, gated MLPs, no biases, logits of attention unscaled.

    Params token_embed (of both), encoder/blocks/*, decoder/blocks/*, encoder_positions and decoder_positions [buckets, heads] (of
    relative positions, for all layers of a stack; cross-attention has none), encoder_norm, decoder_norm, lm_head/kernel.
    activation: "gelu_tanh" as published; BLIP-2 and InstructBLIP run the same weights with "gelu". dropout: of embeddings, attention weights,
    hidden units, what enters the residual stream and the result, where a stream of random keys "dropout" is given (T5 was tuned with 0.1).
    decoder_layers: 0 for as many as the encoder has.
    """
    vocab: int = VOCAB
    width: int = 2048
    layers: int = 24
    heads: int = 32
    head_dim: int = 64
    mlp_dim: int = 5120
    activation: str = "gelu_tanh"
    eps: float = 1e-6
    buckets: int = 32
    max_distance: int = 128
    decoder_layers: int = 0
    dropout: float = 0.0
    remat: str = "none"
    dtype: Any = jnp.float32

    # Where the rows of a cache are, for ``decode``'s batch_axis.
    CACHE_AXES = {"layers": MEMORY_AXES, "memory_mask": -1, "index": -1}

    def setup(self):
        block = dict(width=self.width, heads=self.heads, head_dim=self.head_dim, mlp_dim=self.mlp_dim, activation=self.activation, gated=True,
                     use_bias=False, norm="rmsnorm", eps=self.eps, scale=1.0, init_scheme="fan_in",
                     dropout=self.dropout, inner_dropout=self.dropout)
        table = nn.with_logical_partitioning(nn.initializers.normal(self.width ** -0.5), ("position", "heads")), (self.buckets, self.heads), jnp.float32
        self.token_embed = TokenEmbed(self.vocab, self.width, 1.0, self.dtype)
        self.encoder_positions, self.decoder_positions = self.param("encoder_positions", *table), self.param("decoder_positions", *table)
        self.encoder = Stack(self.layers, block, self.remat, self.dtype)
        self.decoder = Stack(self.decoder_layers or self.layers, dict(block, causal="causal", cross_layout="plain", memory_width=self.width), self.remat, self.dtype)
        self.encoder_norm, self.decoder_norm = Norm("rmsnorm", self.eps), Norm("rmsnorm", self.eps)
        self.lm_head = VocabularyHead(self.vocab, self.width)
        self.drop = nn.Dropout(self.dropout)

    def dropped(self, x: jax.Array) -> jax.Array:
        return self.drop(x, deterministic=not self.has_rng("dropout"))

    def position_bias(self, direction: str, queries: jax.Array, length: int) -> jax.Array:
        """fp32 [heads, q, length]: what logits get for queries at places ``queries`` [q] and keys at 0, 1, ..."""
        table = self.encoder_positions if direction == "both" else self.decoder_positions
        rows = relative_buckets(jnp.arange(length) - queries[:, None], direction, self.buckets, self.max_distance)
        return table[rows].transpose(2, 0, 1)

    def embed(self, ids: jax.Array) -> jax.Array:
        """ids int32 [b, l] -> [b, l, width]."""
        return self.token_embed(ids)

    def encode(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Embeddings [b, n, width], of tokens or of anything put in front of them -> memory [b, n, width]. mask: bool [b, n], True where real."""
        bias = self.position_bias("both", jnp.arange(x.shape[1]), x.shape[1])
        x, _ = self.encoder(self.dropped(x), keys(mask), bias=bias)
        return shard(self.dropped(self.encoder_norm(x)), "batch", "length", "act_embed")

    def decode(self, x: jax.Array, memory: jax.Array, memory_mask: jax.Array | None = None, mask: jax.Array | None = None) -> jax.Array:
        """States [b, l, width] of embeddings [b, l, width], the first that of the pad id, beside a memory [b, n, width].

        mask: bool [b, l], True where real; padding at the end needs none, as no token looks at what follows it.
        """
        bias = self.position_bias("causal", jnp.arange(x.shape[1]), x.shape[1])
        x, _ = self.decoder(self.dropped(x), keys(mask), memory, keys(memory_mask), bias=bias)
        return shard(self.dropped(self.decoder_norm(x)), "batch", "length", "act_embed")

    def __call__(self, x: jax.Array, mask: jax.Array | None, target: jax.Array) -> jax.Array:
        """Encoder and decoder: states of ``target``, embeddings [b, l, width]."""
        return self.decode(target, self.encode(x, mask), mask)

    def vocabulary(self) -> jax.Array:
        """[width, vocab], which states are multiplied with for logits."""
        return self.lm_head()

    def logits(self, states: jax.Array) -> jax.Array:
        """[b, l, width] -> fp32 [b, l, vocab]; row t predicts token t + 1."""
        return vocabulary_logits(states, self.vocabulary())

    def init_cache(self, batch: int, length: int, memory_length: int) -> dict[str, Any]:
        """An empty cache of the decoder for ``length`` tokens beside a memory of ``memory_length``."""
        return {"layers": init_cache(self.decoder_layers or self.layers, batch, length, self.heads, self.head_dim, memory_length, self.dtype),
                "memory_mask": jnp.ones((batch, memory_length), bool), "index": jnp.int32(0)}

    def extend(self, x: jax.Array, cache: dict[str, Any], memory: jax.Array | None = None, memory_mask: jax.Array | None = None
               ) -> tuple[jax.Array, dict[str, Any]]:
        """The decoder's states of embeddings [b, k, width] that follow what the cache holds -> ([b, k, width], cache). ``memory`` and its
        mask are given once, at first."""
        index, seen = cache["index"], cache["memory_mask"] if memory_mask is None else memory_mask.astype(bool)
        bias = self.position_bias("causal", index + jnp.arange(x.shape[1]), cache["layers"]["key"].shape[2])
        x, layers = self.decoder(x, None, memory, keys(seen), cache["layers"], index, bias=bias)
        return self.decoder_norm(x), {"layers": layers, "memory_mask": seen, "index": index + x.shape[1]}
