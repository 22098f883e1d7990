"""VLMo's transformer: attention that all modalities share, feed-forward experts by modality (arXiv 2111.02358; microsoft/unilm ``vlmo/``)."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vlm_jax.errors import nearest
from vlm_jax.models.bert import keys
from vlm_jax.nn.embed import ImageEmbed, TokenEmbed
from vlm_jax.nn.multiway import Layout, multiway_stack, one
from vlm_jax.nn.norm import Norm
from vlm_jax.partitioning import shard

VARIANTS = {
    # vlmo/modules/multiway_transformer.py
    "base": dict(patch=16, width=768, layers=12, heads=12, mlp_dim=3072, fused=2),
    "base_plus": dict(patch=16, width=544, layers=24, heads=16, mlp_dim=2176, fused=3, positions="absolute", layer_scale=0.0),
    "large": dict(patch=16, width=1024, layers=24, heads=16, mlp_dim=4096, fused=3),
    # 36 tokens of a 48-pixel image: trains on a CPU in minutes
    "mini": dict(patch=8, width=96, layers=3, heads=3, mlp_dim=288, fused=1, reach=48, layer_scale=0.0),
}
EXPERTS = (("image",), ("text", "image"), ("text", "image", "vl"))     # of the stages: vision, language, both
POSITIONS = ("relative", "absolute")
TEXT_TYPE, IMAGE_TYPE, OTHER_IMAGE_TYPE = 0, 1, 2     # rows of the table of token types


def relative_index(side: int, length: int, reach: int) -> np.ndarray:
    """int32 [length + n, length + n], n = side^2 + 1: the row of the bias table for query i and key j of the sequence text, image.

    Text and image alone have its two diagonal blocks. Each begins with a class token. Rows, with N = (2 side - 1)^2:

      0 .. N-1       two patches, (dy + side - 1)(2 side - 1) + dx + side - 1, with (dy, dx) = query - key
      N, N+1, N+2    the image's class token as query, as key, with itself
      N+3, N+4       a text query with an image key; an image query with a text key
      N+5 ..         two words, N + 3 + reach + (key - query): the opposite sign; then the three of the text's class token

    ``reach``: the longest text that the table was made for (196), whatever ``length`` is now. Raises ValueError where it is longer.
    """
    if length > reach:
        raise ValueError(f"text of {length} ids exceeds reach={reach} of the relative positions; nearest: {reach}")
    count, span = side * side + 1, 2 * side - 1
    grid = span * span
    index = np.empty((length + count, length + count), np.int32)
    index[:length, length:], index[length:, :length] = grid + 3, grid + 4
    image, text = index[length:, length:], index[:length, :length]
    at = np.stack(np.divmod(np.arange(side * side), side))
    dy, dx = at[:, :, None] - at[:, None, :] + side - 1
    image[1:, 1:] = dy * span + dx
    image[0], image[:, 0], image[0, 0] = grid, grid + 1, grid + 2
    if length:
        words = np.arange(length - 1)
        text[1:, 1:] = grid + 3 + reach + words[None, :] - words[:, None]
        last = grid + 5 + 2 * reach
        text[0], text[:, 0], text[0, 0] = last - 3, last - 2, last - 1
    return index


class PositionBias(nn.Module):
    """What attention logits get by relative position: fp32 [layers, heads, q, k] for an index of ``relative_index``.

    The table's rows are in parts: ``image`` [layers, (2 side - 1)^2, heads], which alone depends on the resolution, ``class`` (3 rows) and,
    with texts, ``text`` (2 reach + 2 rows). Official files hold one table [rows, layers * heads].
    """
    layers: int
    heads: int
    side: int
    reach: int
    with_text: bool

    @nn.compact
    def __call__(self, index: np.ndarray) -> jax.Array:
        def part(name, rows):
            start = nn.with_logical_partitioning(nn.initializers.zeros, ("layers", "position", "heads"))
            return self.param(name, start, (self.layers, rows, self.heads), jnp.float32)

        parts = [part("image", (2 * self.side - 1) ** 2), part("class", 3), *([part("text", 2 * self.reach + 2)] if self.with_text else [])]
        return jnp.take(jnp.concatenate(parts, 1), index, axis=1).transpose(0, 3, 1, 2)


class TextEmbed(nn.Module):
    """ids [b, l] -> [b, l, width]: BERT's embedding. Without ``absolute`` its table of positions is held and not added, as in official files."""
    vocab: int
    width: int
    positions: int
    absolute: bool
    dropout: float
    eps: float
    dtype: Any

    def setup(self):
        def table(rows):
            return nn.with_logical_partitioning(nn.initializers.normal(0.02), ("position", "embed")), (rows, self.width), jnp.float32

        self.token_embed = TokenEmbed(self.vocab, self.width, dtype=self.dtype)
        self.position_embed, self.type_embed = self.param("position_embed", *table(self.positions)), self.param("type_embed", *table(2))
        self.embed_norm = Norm("layernorm", self.eps)
        self.drop = nn.Dropout(self.dropout)

    def __call__(self, ids: jax.Array) -> jax.Array:
        x = self.token_embed(ids) + self.type_embed[0].astype(self.dtype)
        if self.absolute:
            if ids.shape[1] > self.positions:
                raise ValueError(f"text of {ids.shape[1]} ids exceeds positions={self.positions}; nearest: {self.positions}")
            x = x + self.position_embed[:ids.shape[1]].astype(self.dtype)
        return self.drop(self.embed_norm(x), deterministic=not self.has_rng("dropout"))


class Mome(nn.Module):
    """A pre-norm transformer over texts, images, or a text and then an image.

    A token goes through the expert of its modality; beside the other modality, in the top ``fused`` layers, through a third one, "vl". The
    top layers have the first two as well, for what comes alone.

    Fields:
      experts: ("image",) alone, ("text", "image"), or with "vl": what a stage has by then.
      types: rows of the table of token types: text, image, and a second image. A model of images alone has none.
      attention, feed_forward: "shared" by the experts, or "split", each with its own (``nn.multiway``). VLMo shares attention alone.
      positions: "relative", by a bias of attention; "absolute", added to the embeddings.
      text_positions: rows of the table of BERT's positions. reach: see ``relative_index``.
      drop_path: rate of the last layer; lower ones have proportionally less. Texts' embeddings have dropout of that rate, as officially.
      with_mask: with an embedding that stands for masked patches.
    """
    image_size: int
    patch: int
    width: int
    layers: int
    heads: int
    mlp_dim: int
    fused: int
    vocab: int = 0
    text_positions: int = 40
    experts: tuple[str, ...] = EXPERTS[-1]
    types: int = 2
    attention: str = "shared"
    feed_forward: str = "split"
    positions: str = "relative"
    reach: int = 196
    layer_scale: float = 0.1
    eps: float = 1e-6
    text_eps: float = 1e-12
    drop_path: float = 0.0
    with_mask: bool = False
    remat: str = "none"
    dtype: Any = jnp.float32

    def setup(self):
        if tuple(self.experts) not in EXPERTS:
            raise ValueError(f"experts={self.experts!r} is not one of {EXPERTS}; nearest: {EXPERTS[-1]}")
        if self.positions not in POSITIONS:
            raise ValueError(f"positions={self.positions!r} is not known{nearest(self.positions, POSITIONS)}")
        if not 0 < self.fused < self.layers:
            raise ValueError(f"fused={self.fused} must lie between 1 and {self.layers - 1}, one less than layers={self.layers}")
        if self.image_size % self.patch:
            raise ValueError(f"image_size={self.image_size} does not divide into patches of {self.patch}; nearest: "
                             f"{max(1, round(self.image_size / self.patch)) * self.patch}")
        absolute = self.positions == "absolute"
        self.image = ImageEmbed(self.image_size, self.patch, self.width, absolute, with_mask=self.with_mask, dtype=self.dtype)
        if self.with_text:
            self.text = TextEmbed(self.vocab, self.width, self.text_positions, absolute, self.drop_path, self.text_eps, self.dtype)
            table = nn.with_logical_partitioning(nn.initializers.normal(0.02), ("position", "embed"))
            self.type_embed = self.param("type_embed", table, (self.types, self.width), jnp.float32)
        if not absolute:
            self.position_bias = PositionBias(self.layers, self.heads, self.side, self.reach, self.with_text)
        fields = dict(width=self.width, heads=self.heads, mlp_dim=self.mlp_dim, eps=self.eps, layer_scale=self.layer_scale, key_bias=False,
                      attention=self.attention, feed_forward=self.feed_forward, drop_path_by="expert", dtype=self.dtype)
        alone = tuple(e for e in self.experts if e != "vl")
        self.blocks = multiway_stack(self.layers - self.fused, self.remat, experts=alone, **fields)
        self.blocks_vl = multiway_stack(self.fused, self.remat, experts=tuple(self.experts), **fields)
        self.norm = Norm("layernorm", self.eps)

    @property
    def side(self) -> int:
        return self.image_size // self.patch

    @property
    def with_text(self) -> bool:
        return "text" in self.experts

    def embed_image(self, image: jax.Array, row: int = IMAGE_TYPE, masked: jax.Array | None = None) -> jax.Array:
        """image [b, h, w, 3], normalised -> [b, n, width], with token type ``row``."""
        x = self.image(image, masked)
        return x + self.type_embed[row].astype(self.dtype) if self.with_text else x

    def embed_text(self, ids: jax.Array) -> jax.Array:
        """ids [b, l] -> [b, l, width]."""
        return self.text(ids) + self.type_embed[TEXT_TYPE].astype(self.dtype)

    def bias(self, length: int, with_image: bool) -> jax.Array | None:
        """The bias of a text of ``length`` (0: none), an image, or both."""
        if self.positions == "absolute":
            return None
        index = relative_index(self.side, length, self.reach)
        return self.position_bias(index if with_image else index[:length, :length])

    def rates(self) -> jax.Array | None:
        return jnp.asarray(np.linspace(0, self.drop_path, self.layers), jnp.float32) if self.drop_path else None

    def lower(self, x: jax.Array, layout: Layout, mask: jax.Array | None, bias: jax.Array | None) -> jax.Array:
        rates, n = self.rates(), self.layers - self.fused
        return self.blocks(x, layout, keys(mask), None if bias is None else bias[:n], None, None, None if rates is None else rates[:n])[0]

    def upper(self, x: jax.Array, layout: Layout, mask: jax.Array | None, bias: jax.Array | None) -> jax.Array:
        rates, n = self.rates(), self.layers - self.fused
        x, _ = self.blocks_vl(x, layout, keys(mask), None if bias is None else bias[n:], None, None, None if rates is None else rates[n:])
        return shard(self.norm(x), "batch", "length", "act_embed")

    def alone(self, x: jax.Array, expert: str, mask: jax.Array | None = None, experts: tuple[str, ...] = ()) -> tuple[jax.Array, ...]:
        """Embeddings [b, l, width] of one modality, through its expert in the lower layers -> normed states, one for each of ``experts``: the
        expert of the top layers (its own, by default)."""
        length = x.shape[1]
        bias = self.bias(0, True) if expert == "image" else self.bias(length, False)
        x = self.lower(x, one(expert, length), mask, bias)
        return tuple(self.upper(x, one(e, length), mask, bias) for e in experts or (expert,))

    def joint(self, text: jax.Array, mask: jax.Array, image: jax.Array) -> jax.Array:
        """Embeddings of a text [b, l, width] and an image [b, n, width] -> normed states [b, l + n, width]. mask bool [b, l]."""
        length, count = text.shape[1], image.shape[1]
        bias = self.bias(length, True)
        mask = jnp.concatenate([mask.astype(bool), jnp.ones(image.shape[:2], bool)], 1)
        x = self.lower(jnp.concatenate([text, image], 1), Layout((("text", length), ("image", count))), mask, bias)
        top = one("vl", length + count) if "vl" in self.experts else Layout((("text", length), ("image", count)))
        return self.upper(x, top, mask, bias)
