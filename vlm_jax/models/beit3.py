"""BEiT-3 (arXiv 2208.10442): one transformer for images, texts and pairs, with experts by modality; its heads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlm_jax.errors import nearest
from vlm_jax.nn import initializers
from vlm_jax.nn.block import grown
from vlm_jax.nn.embed import ImageEmbed, TokenEmbed
from vlm_jax.nn.linear import Linear
from vlm_jax.nn.mlp import TwoLayerHead
from vlm_jax.nn.multiway import Layout, Multiway, multiway_stack, one
from vlm_jax.nn.narrow import widen
from vlm_jax.nn.norm import Norm
from vlm_jax.partitioning import shard

DEAD_ROWS = 2      # positions are looked up from row 2 on, as fairseq does; the rows before are never read
EXPERTS = ("image", "text")
JOINT = "joint"
UNIDIRECTIONAL = ("none", "text")
INIT = "beit"

VARIANTS = {
    # microsoft/unilm beit3/modeling_utils.py: all that is split by modality
    "base": dict(patch=16, width=768, layers=12, heads=12, mlp_dim=3072),
    "large": dict(patch=16, width=1024, layers=24, heads=16, mlp_dim=4096),
    # section 2.1 of the paper: attention is shared, and the top three layers have an expert for pairs
    "giant": dict(patch=14, width=1408, layers=40, heads=16, mlp_dim=6144, attention="shared", joint_layers=3),
    # 36 patches of a 48-pixel image: trains on a CPU in minutes
    "mini": dict(patch=8, width=96, layers=4, heads=3, mlp_dim=288, positions=52),
}


def _table(rows: int, width: int):
    return nn.with_logical_partitioning(nn.initializers.normal(0.02), ("position", "embed")), (rows, width), jnp.float32


class TextEmbed(nn.Module):
    """ids [b, l] that stand at ``start``, start + 1, ... -> [b, l, width], with positions."""
    vocab: int
    width: int
    positions: int
    dtype: Any = jnp.float32

    def setup(self):
        self.token_embed = TokenEmbed(self.vocab, self.width, self.width ** -0.5, self.dtype)
        self.position_embed = self.param("position_embed", *_table(self.positions, self.width))

    @property
    def longest(self) -> int:
        return self.positions - DEAD_ROWS

    def __call__(self, ids: jax.Array, start: jax.Array | int = 0) -> jax.Array:
        if ids.shape[1] > self.longest:
            raise ValueError(f"text of {ids.shape[1]} ids exceeds the {self.longest} places of positions={self.positions}; nearest: {self.longest}")
        at = jnp.minimum(start + jnp.arange(ids.shape[1]), self.longest - 1)
        table = self.position_embed[DEAD_ROWS:]
        return self.token_embed(ids) + jnp.take(table, at, axis=0).astype(self.dtype)


class Tower(nn.Module):
    """An image, a text or both, image first, -> states [b, 1 + n + l, width].

    Params: ``image/*`` and ``text/*``, the embeddings; ``blocks/*``; ``blocks_joint/*``, the top layers, where they have an expert for pairs;
    ``output_norm/*``.

    Fields:
      positions: rows of the text's table of positions, two of which are never read.
      attention: "split", the maps and norms of attention by modality too (the released models), or "shared" (the paper).
      joint_layers: top layers with one more feed-forward expert, for all tokens of pairs (the paper: 3).
      final_norm: the norm after the last layer; models of answers and of classes have none.
      drop_path: of the last layer; it rises from 0 in the first.
    """
    image_size: int
    patch: int
    width: int
    layers: int
    heads: int
    mlp_dim: int
    vocab: int
    positions: int = 1024
    attention: str = "split"
    joint_layers: int = 0
    sub_norm: bool = True
    final_norm: bool = True
    eps: float = 1e-5
    drop_path: float = 0.0
    init_scheme: str = INIT
    remat: str = "none"
    dtype: Any = jnp.float32

    def setup(self):
        if not 0 <= self.joint_layers < self.layers:
            raise ValueError(f"joint_layers={self.joint_layers} must lie between 0 and layers={self.layers} - 1; nearest: "
                             f"{min(max(self.joint_layers, 0), self.layers - 1)}")
        if self.image_size % self.patch:
            raise ValueError(f"image of {self.image_size} pixels does not divide into patches of {self.patch}; nearest: "
                             f"{max(1, round(self.image_size / self.patch)) * self.patch}")
        self.image = ImageEmbed(self.image_size, self.patch, self.width, dead_rows=DEAD_ROWS, tokens_init=nn.initializers.zeros, dtype=self.dtype)
        self.text = TextEmbed(self.vocab, self.width, self.positions, self.dtype)
        fields = dict(width=self.width, heads=self.heads, mlp_dim=self.mlp_dim, attention=self.attention, eps=self.eps, sub_norm=self.sub_norm,
                      init_scheme=self.init_scheme, depth=self.layers, dtype=self.dtype)
        self.blocks = multiway_stack(self.layers - self.joint_layers, self.remat, experts=EXPERTS, **fields)
        if self.joint_layers:
            self.blocks_joint = multiway_stack(self.joint_layers, self.remat, experts=(*EXPERTS, JOINT), **fields)
        if self.final_norm:
            self.output_norm = Multiway(lambda: Norm("layernorm", self.eps), EXPERTS)

    @property
    def image_tokens(self) -> int:
        return (self.image_size // self.patch) ** 2 + 1

    def __call__(self, image: jax.Array | None, ids: jax.Array | None, real: jax.Array | None = None, masked: jax.Array | None = None,
                 unidirectional: str = "none") -> jax.Array:
        """image [b, h, w, 3], normalised; ids [b, l]; None for what there is not. real bool [b, l]: which ids are no padding. masked bool
        [b, n]: see ``nn.embed.ImageEmbed``. unidirectional "text": the image sees itself, a token the image and what stands before it (UniLM)."""
        if unidirectional not in UNIDIRECTIONAL:
            raise ValueError(f"unidirectional={unidirectional!r} is not known{nearest(unidirectional, UNIDIRECTIONAL)}")
        parts, segments, seen = [], [], []
        if image is not None:
            parts.append(self.image(image, masked))
            segments.append(("image", self.image_tokens))
            seen.append(jnp.ones(parts[0].shape[:2], bool))
        if ids is not None:
            real = jnp.ones(ids.shape, bool) if real is None else real.astype(bool)
            parts.append(jnp.where(real[..., None], self.text(ids), 0))
            segments.append(("text", ids.shape[1]))
            seen.append(real)
        mask = None if ids is None else jnp.concatenate(seen, 1)[:, None, None]
        layout = Layout(tuple(segments))
        if unidirectional == "text":
            mask = mask & self.visible(layout.length, jnp.arange(layout.length))
        if self.is_initializing() and self.joint_layers:      # the top layers' experts of what stands alone, too
            for part, segment in zip(parts, segments, strict=True):
                self.through(part, Layout((segment,)), None)
        return self.finish(self.through(jnp.concatenate(parts, 1), layout, mask)[0], layout)

    def visible(self, keys: int, queries: jax.Array) -> jax.Array:
        """UniLM's mask, bool [1, 1, queries, keys]: which of ``keys`` places each of the ``queries`` (places) sees."""
        order = jnp.arange(keys)
        return ((order < self.image_tokens) | (order <= queries[:, None]))[None, None]

    def through(self, x: jax.Array, layout: Layout, mask: jax.Array | None, cache: dict | None = None,
                index: jax.Array | None = None) -> tuple[jax.Array, dict | None]:
        """All layers. cache: as ``multiway_stack``, for all layers together."""
        rates = jnp.linspace(0, self.drop_path, self.layers) if self.drop_path else None
        below = self.layers - self.joint_layers

        def part(tree, first, last):
            return None if tree is None else jax.tree.map(lambda a: a[first:last], tree)

        x, new = self.blocks(x, layout, mask, None, part(cache, 0, below), index, part(rates, 0, below))
        if self.joint_layers:
            top = one(JOINT, layout.length) if len(layout.segments) > 1 else layout
            x, upper = self.blocks_joint(x, top, mask, None, part(cache, below, None), index, part(rates, below, None))
            new = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), new, upper)
        return shard(x, "batch", "length", "act_embed"), None if cache is None else grown(cache, new, index)

    def finish(self, x: jax.Array, layout: Layout) -> jax.Array:
        return self.output_norm(x, layout) if self.final_norm else x

    # ---- decoding

    def init_cache(self, batch: int, length: int) -> dict[str, jax.Array]:
        """An empty cache for an image and ``length`` ids."""
        shape = (self.layers, batch, self.image_tokens + length, self.heads, self.width // self.heads)
        return {"key": jnp.zeros(shape, self.dtype), "value": jnp.zeros(shape, self.dtype)}

    def prefill(self, image: jax.Array, ids: jax.Array, cache: dict[str, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
        """States of an image and of the first ids [b, k] behind it, under UniLM's mask -> ([b, k, width], cache)."""
        x = jnp.concatenate([self.image(image), self.text(ids)], 1)
        layout = Layout((("image", self.image_tokens), ("text", ids.shape[1])))
        x, cache = self.through(x, layout, self.visible(cache["key"].shape[2], jnp.arange(layout.length)), cache, jnp.int32(0))
        return self.finish(x, layout)[:, self.image_tokens:], cache

    def extend(self, ids: jax.Array, cache: dict[str, jax.Array], start: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """States of ids [b, k], the caption's from ``start`` on, which replace what the cache has there -> ([b, k, width], cache)."""
        layout = one("text", ids.shape[1])
        if self.joint_layers:
            raise ValueError(f"joint_layers={self.joint_layers}: a pair's expert computes captions, which are not decoded step by step; nearest: 0")
        index = self.image_tokens + start
        mask = self.visible(cache["key"].shape[2], index + jnp.arange(ids.shape[1]))
        x, cache = self.through(self.text(ids, start), layout, mask, cache, index)
        return self.finish(x, layout), cache


def by_depth(params: Mapping[str, Any]) -> dict[str, Any]:
    """A tower's fresh (boxed) parameters with the maps into the residual stream of layer l = 1, 2, ... divided by sqrt(2 l), as BEiT does. (The official
    code of BEiT-3 means to, and does not.)"""
    params = dict(params)
    blocks = dict(params["blocks"])
    for part in ("attn", "mlp"):
        blocks[part] = {expert: initializers.by_depth({part: maps})[part] for expert, maps in blocks[part].items()}
    return {**params, "blocks": blocks}


# ---- heads -------------------------------------------------------------------------------------

def linear(width: int, features: int, dtype: Any, axis: str = "joint", use_bias: bool = True, scale: float = 1.0) -> Linear:
    """A map of a head. ``scale``: of its first weights (the official code draws classifiers a thousand times smaller)."""
    return Linear(features, ("embed", axis), use_bias, scaled(scale), dtype=dtype)


def scaled(scale: float):
    draw = initializers.kernel(INIT, "out", 0, 0)      # whatever the widths
    return lambda *args: scale * draw(*args)


def two_layer_head(width: int, classes: int, eps: float, dtype: Any, scale: float = 1.0, input_norm: bool = False) -> TwoLayerHead:
    """Of answers, or of two images beside a text (with a norm before)."""
    names = ("dense1", "norm2", "dense2", *(("norm1",) if input_norm else ()))
    return TwoLayerHead(2 * width, classes, names, (("embed", "joint"),) * 2, scaled(scale), eps, dtype)


class TokenHead(nn.Module):
    """states [..., width] -> [..., width + 1], whose product with ``vocabulary()`` [width + 1, ids] are the logits: the last column is 1 and
    carries the bias. Params kernel [width, ids], bias [ids]."""
    ids: int
    width: int
    dtype: Any = jnp.float32

    def setup(self):
        self.kernel = self.param("kernel", nn.with_logical_partitioning(initializers.kernel(INIT, "out", self.width, self.ids), ("embed", "vocab")),
                                 (self.width, self.ids), jnp.float32)
        self.bias = self.param("bias", nn.with_logical_partitioning(nn.initializers.zeros, ("vocab",)), (self.ids,), jnp.float32)

    def __call__(self, states: jax.Array) -> jax.Array:
        return jnp.concatenate([states, jnp.ones((*states.shape[:-1], 1), states.dtype)], -1)

    def vocabulary(self) -> jax.Array:
        return jnp.concatenate([widen(self, self.kernel, jnp.float32), self.bias[None]], 0)

    def logits(self, states: jax.Array) -> jax.Array:
        """States -> fp32 [..., ids]."""
        return jnp.einsum("...d,dv->...v", self(states), self.vocabulary().astype(states.dtype), preferred_element_type=jnp.float32)


class Pooler(nn.Module):
    """The first token [b, width] through a norm, a map and tanh."""
    width: int
    eps: float
    dtype: Any = jnp.float32

    def setup(self):
        self.norm, self.dense = Norm("layernorm", self.eps), linear(self.width, self.width, self.dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        return jnp.tanh(self.dense(self.norm(x)))


class ClassHead(nn.Module):
    """The mean of an image's patches [b, width] -> [b, classes]: norm, map."""
    width: int
    classes: int
    eps: float
    scale: float = 1e-3
    dtype: Any = jnp.float32

    def setup(self):
        self.norm, self.out = Norm("layernorm", self.eps), linear(self.width, self.classes, self.dtype, scale=self.scale)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.out(self.norm(x))
