"""Vision transformers: CLIP's, CoCa's and small ones."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlm_jax.errors import nearest
from vlm_jax.nn.block import Stack
from vlm_jax.nn.embed import ConvStem, PatchEmbed, sincos_2d
from vlm_jax.nn.norm import Norm
from vlm_jax.partitioning import shard

STEMS = ("patch", "conv")
POSITIONS = ("learned", "sincos")
PLACES = ("input", "output")


def _sizes(image_size, patch, width, layers, heads, mlp_dim):
    return dict(image_size=image_size, patch=patch, width=width, layers=layers, heads=heads, mlp_dim=mlp_dim)


VARIANTS = {
    # CLIP (arXiv 2103.00020, Table 20); h14, g14 and bigg14 from open_clip's model configs
    "b32": _sizes(224, 32, 768, 12, 12, 3072),
    "b16": _sizes(224, 16, 768, 12, 12, 3072),
    "l14": _sizes(224, 14, 1024, 24, 16, 4096),
    "l14_336": _sizes(336, 14, 1024, 24, 16, 4096),
    "h14": _sizes(224, 14, 1280, 32, 16, 5120),
    "g14": _sizes(224, 14, 1408, 40, 16, 6144),
    "bigg14": _sizes(224, 14, 1664, 48, 16, 8192),
    # CoCa (arXiv 2205.01917, Table 1)
    "coca_base": _sizes(288, 18, 768, 12, 12, 3072),
    "coca_large": _sizes(288, 18, 1024, 24, 16, 4096),
    "coca_giant": _sizes(288, 18, 1408, 40, 16, 6144),
    # ALBEF, BLIP (arXiv 2107.07651, 2201.12086): DeiT's and timm's layout, with biased patches and a norm at the end
    "timm_b16": dict(_sizes(224, 16, 768, 12, 12, 3072), patch_bias=True, norms_at=("output",), eps=1e-6, init_scheme="bert"),
    "timm_l16": dict(_sizes(224, 16, 1024, 24, 16, 4096), patch_bias=True, norms_at=("output",), eps=1e-6, init_scheme="bert"),
    # BEiT v2's tokenizer (arXiv 2208.06366): BEiT's layout with absolute positions and without layer scale
    "beit_b16": dict(_sizes(224, 16, 768, 12, 12, 3072), patch_bias=True, key_bias=False, norms_at=("output",), eps=1e-6, init_scheme="beit"),
    # EVA-CLIP ViT-g/14 (arXiv 2211.07636, Table 2) as BLIP-2 uses it: block 39 of 40 is the last, nothing is normed after it
    "eva_g14": dict(_sizes(224, 14, 1408, 39, 16, 6144), patch_bias=True, key_bias=False, norms_at=(), eps=1e-6, init_scheme="bert"),
    # 36 tokens of a 48-pixel image: trains on a CPU in minutes (with stem "conv")
    "mini": _sizes(48, 8, 96, 3, 3, 288),
}


class ViT(nn.Module):
    """image float [b, h, w, 3], already normalised -> tokens [b, n (+1), width], a class token first.

    The defaults are CLIP's: bias-free patches, class token, learned positions, a norm before the
    blocks, none after them (CLIP norms the pooled token only: ``nn.linear.ProjectionHead``).
    With init_scheme "torch" class token and positions are drawn from N(0, 1/width).

    Fields:
      stem: "patch", or "conv" (overlapping convolutions; ``patch`` must then be a power of two).
      patch_bias: whether the patches' projection has a bias. key_bias: whether the keys' has one (``nn.attention.Attention``).
      norms_at: "input" (``input_norm`` before the blocks) and / or "output" (``output_norm`` after).
      positions: "learned" (for ``image_size`` only) or "sincos" (any size; zero for a class token).
      positions_at: "input", and "output" where they are to be added to the result again, so
        that poolers above can tell places apart.
      patch_dropout: share of the patches left out of each image when ``key`` is given (FLIP, arXiv
        2212.00794): less work in training, and less to memorise.
      drop_path: see ``nn.block.Stack``.
      remat: a policy's name, see ``nn.block.REMAT``.
    """
    image_size: int
    patch: int
    width: int
    layers: int
    heads: int
    mlp_dim: int
    activation: str = "gelu"
    stem: str = "patch"
    patch_bias: bool = False
    key_bias: bool = True
    class_token: bool = True
    norm: str = "layernorm"
    eps: float = 1e-5
    norms_at: tuple[str, ...] = ("input",)
    positions: str = "learned"
    positions_at: tuple[str, ...] = ("input",)
    qk_norm: str = "none"
    init_scheme: str = "torch"
    patch_dropout: float = 0.0
    drop_path: float = 0.0
    remat: str = "none"
    dtype: Any = jnp.float32

    def setup(self):
        if not 0 <= self.patch_dropout < 1:
            raise ValueError(f"patch_dropout={self.patch_dropout} must be in [0, 1); nearest: "
                             f"{min(max(self.patch_dropout, 0.0), 0.9)}")
        for name, value, valid in (("stem", self.stem, STEMS), ("positions", self.positions, POSITIONS),
                                   *(("norms_at", place, PLACES) for place in self.norms_at),
                                   *(("positions_at", place, PLACES) for place in self.positions_at)):
            if value not in valid:
                raise ValueError(f"{name}={value!r} is not known{nearest(value, valid)}")
        if self.stem == "conv":
            stages = self.patch.bit_length() - 1
            if self.patch != 2 ** stages:
                raise ValueError(f"patch={self.patch} must be a power of two with stem='conv'; nearest: {2 ** stages}")
            self.patch_embed = ConvStem(self.width, stages, self.norm, self.init_scheme, self.dtype)
        else:
            self.patch_embed = PatchEmbed(self.patch, self.width, self.patch_bias, dtype=self.dtype)
        normal = nn.initializers.normal(0.02 if self.init_scheme in ("bert", "beit") else self.width ** -0.5)
        if self.class_token:
            self.class_embed = self.param("class_embed", nn.with_logical_partitioning(normal, ("norm",)), (self.width,), jnp.float32)
        if self.positions == "learned":
            count = (self.image_size // self.patch) ** 2 + self.class_token
            self.position_embed = self.param("position_embed", nn.with_logical_partitioning(normal, ("position", "embed")),
                                             (count, self.width), jnp.float32)
        self.input_norm, self.output_norm = Norm(self.norm, self.eps), Norm(self.norm, self.eps)
        self.stack = Stack(self.layers, dict(
            width=self.width, heads=self.heads, mlp_dim=self.mlp_dim, activation=self.activation, norm=self.norm, eps=self.eps, key_bias=self.key_bias,
            qk_norm=self.qk_norm, init_scheme=self.init_scheme), self.remat, self.dtype, self.drop_path)
        nn.share_scope(self, self.stack)  # parameters at blocks/..., not stack/blocks/...

    def __call__(self, image: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """``key``: of the patches to drop; None keeps all."""
        x = self.patch_embed(image.astype(self.dtype))
        if self.class_token:
            first = jnp.broadcast_to(self.class_embed.astype(self.dtype), (x.shape[0], 1, self.width))
            x = jnp.concatenate([first, x], 1)
        positions = jnp.broadcast_to(self.position_table(image.shape[1] // self.patch, image.shape[2] // self.patch), x.shape)
        if self.patch_dropout and key is not None:
            kept = self.kept_tokens(key, x.shape[0], x.shape[1])
            x, positions = (jnp.take_along_axis(a, kept[..., None], axis=1) for a in (x, positions))
        if "input" in self.positions_at:
            x = x + positions
        if "input" in self.norms_at:
            x = self.input_norm(x)
        x, _ = self.stack(x)
        if "output" in self.norms_at:
            x = self.output_norm(x)
        if "output" in self.positions_at:
            x = x + positions
        return shard(x, "batch", "length", "act_embed")

    def kept_tokens(self, key: jax.Array, batch: int, count: int) -> jax.Array:
        """int32 [b, kept], in order: a random choice of each image's patches, and the class token."""
        patches = count - self.class_token
        kept = max(1, round(patches * (1 - self.patch_dropout)))
        order = jnp.argsort(jax.random.uniform(key, (batch, patches)), axis=1)[:, :kept]
        order = jnp.sort(order, axis=1) + int(self.class_token)
        return jnp.concatenate([jnp.zeros((batch, 1), order.dtype), order], 1) if self.class_token else order

    def position_table(self, rows: int, columns: int) -> jax.Array:
        """[n (+1), width] for a grid of rows x columns tokens."""
        if self.positions == "learned":
            side = self.image_size // self.patch
            if (rows, columns) != (side, side):
                raise ValueError(f"image of {rows * self.patch}x{columns * self.patch} pixels does not fit learned positions for "
                                 f"image_size={self.image_size}; nearest: {self.image_size}x{self.image_size}")
            return self.position_embed.astype(self.dtype)
        table = jnp.asarray(sincos_2d(rows, columns, self.width), self.dtype)
        return jnp.pad(table, ((int(self.class_token), 0), (0, 0)))
