"""Text towers: a causal transformer (CLIP; CoCa's lower half) and a bag of words."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlm_jax.errors import nearest
from vlm_jax.nn.attention import CAUSAL
from vlm_jax.nn.block import Stack, init_cache
from vlm_jax.nn.embed import TokenEmbed, sincos_1d
from vlm_jax.partitioning import shard

POOLINGS = ("eot", "class", "mean", "first", "last")
CLASS_MASKS = ("shifted", "exact")
POSITIONS = ("learned", "sincos")


def _sizes(width, layers, heads):
    return dict(width=width, layers=layers, heads=heads, mlp_dim=4 * width)


# width x layers, as in CLIP (arXiv 2103.00020, Tables 19 and 20), open_clip's model configs (24 and
# 32 layers) and CoCa (arXiv 2205.01917, Table 1: 768x12, 1024x12, 1408x18)
VARIANTS = {
    "512x12": _sizes(512, 12, 8), "640x12": _sizes(640, 12, 10), "768x12": _sizes(768, 12, 12),
    "1024x12": _sizes(1024, 12, 16), "1024x24": _sizes(1024, 24, 16), "1280x32": _sizes(1280, 32, 20),
    "1408x18": _sizes(1408, 18, 16),
    "mini": dict(width=96, layers=1, heads=3, mlp_dim=288),
}


class TextTransformer(nn.Module):
    """text int32 [b, l] -> (token states [b, l, width], pooled vector [b, width]), neither normed.

    The final norm and the map to the joint space belong to ``nn.linear.ProjectionHead`` (a norm
    acts on each row by itself, so that pooling first changes nothing). Right-padded texts may be
    cropped below ``context_length``: by causality, and with the class token keeping the last
    position of the table, the result is the same.

    Fields:
      pooling: "eot", the state at the first ``eos_id``, or at the largest id if ``eos_id`` is None
        (OpenAI's weights: EOT is the largest); "class", an embedding appended after the
        last token (CoCa); "mean" over real tokens; "first" or "last" position, padding or not (CLIPA).
      causal: "causal", or "none", where every token sees every other, padding included (open_clip's
        ``no_causal_mask``): then a cropped text gives another result.
      class_mask: what the class token sees. "exact": the real tokens and itself. "shifted":
        open_clip's CoCa weights were trained with that mask shifted right by one place: a
        caption shorter than the context sees one pad and not the class token itself.
      pad_id: defines the real tokens where no mask is given.
    """
    vocab: int
    context_length: int
    width: int
    layers: int
    heads: int
    mlp_dim: int
    activation: str = "gelu"
    pooling: str = "eot"
    eos_id: int | None = None
    pad_id: int = 0
    class_mask: str = "shifted"
    norm: str = "layernorm"
    eps: float = 1e-5
    positions: str = "learned"
    causal: str = "causal"
    qk_norm: str = "none"
    init_scheme: str = "openai_text"
    remat: str = "none"
    dtype: Any = jnp.float32

    def setup(self):
        for name, value, valid in (("pooling", self.pooling, POOLINGS), ("causal", self.causal, CAUSAL), ("class_mask", self.class_mask, CLASS_MASKS),
                                   ("positions", self.positions, POSITIONS)):
            if value not in valid:
                raise ValueError(f"{name}={value!r} is not known{nearest(value, valid)}")
        self.token_embed = TokenEmbed(self.vocab, self.width, dtype=self.dtype)
        normal = nn.initializers.normal(0.01)
        if self.pooling == "class":
            self.class_embed = self.param("class_embed", nn.with_logical_partitioning(normal, ("norm",)), (self.width,), jnp.float32)
        count = self.context_length + (self.pooling == "class")
        self.position_embed = (jnp.asarray(sincos_1d(count, self.width)) if self.positions == "sincos" else
                               self.param("position_embed", nn.with_logical_partitioning(normal, ("position", "embed")),
                                          (count, self.width), jnp.float32))
        self.stack = Stack(self.layers, dict(
            width=self.width, heads=self.heads, mlp_dim=self.mlp_dim, activation=self.activation, norm=self.norm, eps=self.eps,
            qk_norm=self.qk_norm, causal=self.causal, init_scheme=self.init_scheme), self.remat, self.dtype)
        nn.share_scope(self, self.stack)  # parameters at blocks/..., not stack/blocks/...

    def __call__(self, text: jax.Array, text_mask: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        """``text_mask`` bool [b, l], True where real; by default ``text != pad_id``.

        Raises ValueError when text is longer than ``context_length``.
        """
        length = text.shape[1]
        if length > self.context_length:
            raise ValueError(f"text of {length} ids exceeds context_length={self.context_length}; nearest: {self.context_length}")
        real = text != self.pad_id if text_mask is None else text_mask.astype(bool)
        if self.pooling != "class":
            x = self.token_embed(text) + self.position_embed[:length].astype(self.dtype)
            x, _ = self.stack(x)
            x = shard(x, "batch", "length", "act_embed")
            return x, self.pool(x, text, real)

        if self.class_mask == "shifted" and length < self.context_length:
            # The class token of a short caption sees the pad after it: cropping must leave one.
            text, real = jnp.pad(text, ((0, 0), (0, 1)), constant_values=self.pad_id), jnp.pad(real, ((0, 0), (0, 1)))
        x = self.token_embed(text) + self.position_embed[:text.shape[1]].astype(self.dtype)
        last = (self.class_embed + self.position_embed[self.context_length]).astype(self.dtype)
        x = jnp.concatenate([x, jnp.broadcast_to(last, (x.shape[0], 1, self.width))], 1)
        x, _ = self.stack(x, mask=self.visible_keys(real))
        x = shard(x, "batch", "length", "act_embed")
        return x[:, :length], x[:, -1]

    def visible_keys(self, real: jax.Array) -> jax.Array:
        """[b, 1, 1, l+1] for real [b, l], for the rows of all tokens, as in open_clip 3.

        It matters to the class token only: causality hides padding from real tokens anyway, and
        the states of padding are of no use.
        """
        keys = jnp.pad(real, ((0, 0), (1, 0) if self.class_mask == "shifted" else (0, 1)), constant_values=True)
        return keys[:, None, None]

    def pool(self, x: jax.Array, text: jax.Array, real: jax.Array) -> jax.Array:
        if self.pooling == "mean":
            return mean_over(x, real)
        if self.pooling in ("first", "last"):
            return x[:, 0 if self.pooling == "first" else -1]
        at = jnp.argmax(text if self.eos_id is None else text == self.eos_id, axis=-1)
        return jnp.take_along_axis(x, at[:, None, None], axis=1)[:, 0]

    def init_cache(self, batch: int, length: int) -> dict[str, jax.Array]:
        """An empty cache for ``length`` tokens, see ``nn.block.init_cache``. Needs no parameters."""
        return init_cache(self.layers, batch, length, self.heads, self.width // self.heads, dtype=self.dtype)

    def extend(self, text: jax.Array, cache: dict[str, jax.Array], index: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """States of new ids [b, k] that stand at positions index, index + 1, ... -> ([b, k, width], cache).

        ``index`` is an int32 scalar or [b]; prefill is ``extend`` at 0. Token states never see the
        class token, so that they equal those of the whole text (whose real tokens are not
        ``pad_id``). Positions beyond the context repeat the last one: the caller stops before.
        """
        at = jnp.reshape(jnp.asarray(index, jnp.int32), (-1, 1)) + jnp.arange(text.shape[1])
        positions = jnp.take(self.position_embed, jnp.minimum(at, self.context_length - 1), axis=0)
        return self.stack(self.token_embed(text) + positions.astype(self.dtype), cache=cache, index=index)


class Cbow(nn.Module):
    """Continuous bag of words, CLIP's text option: text [b, l] -> (embeddings [b, l, width], their mean [b, width]).

    The mean is over real tokens without start and end; an empty text gives zeros. Norm and map
    follow in ``nn.linear.ProjectionHead``. No positions: the order of words does not matter.
    (The pseudo-code of arXiv 2103.00020, Figure 3, names the option; the details are ours.)
    """
    vocab: int
    width: int
    bos_id: int
    eos_id: int
    pad_id: int = 0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, text: jax.Array, text_mask: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        """``text_mask`` bool [b, l], True where real; by default ``text != pad_id``."""
        real = text != self.pad_id if text_mask is None else text_mask.astype(bool)
        x = TokenEmbed(self.vocab, self.width, dtype=self.dtype, name="token_embed")(text)
        return x, mean_over(x, real & (text != self.bos_id) & (text != self.eos_id))


def mean_over(x: jax.Array, keep: jax.Array) -> jax.Array:
    """Mean of x [b, l, d] over positions kept [b, l]; zeros where none is. fp32 inside."""
    weight = keep.astype(jnp.float32)[..., None]
    return ((x.astype(jnp.float32) * weight).sum(1) / jnp.maximum(weight.sum(1), 1)).astype(x.dtype)
