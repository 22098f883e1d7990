"""From pixels and token ids to vectors, and where they stand."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vlm_jax.nn import initializers
from vlm_jax.nn.linear import Linear
from vlm_jax.nn.mlp import gelu
from vlm_jax.nn.norm import Norm


class PatchEmbed(nn.Module):
    """image [b, h, w, 3] -> tokens [b, (h/patch)(w/patch), width], row by row.

    A convolution with stride = patch, written as one matrix product (cheaper on CPU);
    kernel [patch * patch * 3, width] = the convolution's HWIO kernel, flattened.
    """
    patch: int
    width: int
    bias: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, image: jax.Array) -> jax.Array:
        b, h, w, c = image.shape
        p = self.patch
        if h % p or w % p:
            raise ValueError(f"image of {h}x{w} pixels does not divide into patches of {p}; nearest: "
                             f"{max(1, round(h / p)) * p}x{max(1, round(w / p)) * p}")
        x = image.reshape(b, h // p, p, w // p, p, c).transpose(0, 1, 3, 2, 4, 5).reshape(b, -1, p * p * c)
        bound = initializers.uniform((p * p * c) ** -0.5)  # torch's default for a convolution
        return Linear(self.width, ("patch", "embed"), self.bias, bound, bound, self.dtype, name="projection")(x)


class ImageEmbed(nn.Module):
    """image float [b, h, w, 3], normalised -> [b, 1 + n, width]: class token and patches, with learned positions.

    Fields:
      positions: whether there is a table of them. dead_rows: of the table, before the first that is read.
      with_mask: whether there is an embedding that stands for masked patches.
      tokens_init: what the class token and the mask's embedding are drawn from.
    """
    image_size: int
    patch: int
    width: int
    positions: bool = True
    dead_rows: int = 0
    with_mask: bool = True
    tokens_init: Any = nn.initializers.normal(0.02)
    dtype: Any = jnp.float32

    def setup(self):
        def token(name):
            return self.param(name, nn.with_logical_partitioning(self.tokens_init, ("norm",)), (self.width,), jnp.float32)

        self.patch_embed = PatchEmbed(self.patch, self.width, True, dtype=self.dtype)
        self.class_embed = token("class_embed")
        if self.with_mask:
            self.mask_embed = token("mask_embed")
        if self.positions:
            table = nn.with_logical_partitioning(nn.initializers.normal(0.02), ("position", "embed"))
            rows = (self.image_size // self.patch) ** 2 + 1 + self.dead_rows
            self.position_embed = self.param("position_embed", table, (rows, self.width), jnp.float32)

    def __call__(self, image: jax.Array, masked: jax.Array | None = None) -> jax.Array:
        """``masked`` bool [b, n]: patches whose place is seen and whose content is not."""
        if image.shape[1:3] != (self.image_size, self.image_size):
            raise ValueError(f"image of {image.shape[1]}x{image.shape[2]} pixels does not fit positions for image_size={self.image_size}; nearest: "
                             f"{self.image_size}x{self.image_size}")
        x = self.patch_embed(image.astype(self.dtype))
        if masked is not None:
            x = jnp.where(masked[..., None], self.mask_embed.astype(x.dtype), x)
        x = jnp.concatenate([jnp.broadcast_to(self.class_embed.astype(x.dtype), (len(x), 1, self.width)), x], 1)
        return x + self.position_embed[self.dead_rows:].astype(x.dtype) if self.positions else x


class ConvStem(nn.Module):
    """Overlapping 4x4 stride-2 convolutions: image [b, h, w, 3] -> tokens [b, (h/2^n)(w/2^n), width].

    n stages of width/2^(n-1), ..., width/2, width channels, norm and GELU between them. Each is
    written as space-to-depth, concatenation with the next cell to the right, below and across
    (zeros past the border), and a matrix product, which CPUs run far faster than a convolution.
    """
    width: int
    stages: int = 3
    norm: str = "layernorm"
    init_scheme: str = "fan_in"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, image: jax.Array) -> jax.Array:
        step = 2 ** self.stages
        if image.shape[1] % step or image.shape[2] % step:
            raise ValueError(f"image of {image.shape[1]}x{image.shape[2]} pixels does not divide by {step}; nearest: "
                             f"{max(1, round(image.shape[1] / step)) * step}x{max(1, round(image.shape[2] / step)) * step}")
        x = image.astype(self.dtype)
        for stage in range(self.stages):
            b, h, w, c = x.shape
            cells = x.reshape(b, h // 2, 2, w // 2, 2, c).transpose(0, 1, 3, 2, 4, 5).reshape(b, h // 2, w // 2, 4 * c)
            padded = jnp.pad(cells, ((0, 0), (0, 1), (0, 1), (0, 0)))
            x = jnp.concatenate([padded[:, i:h // 2 + i, j:w // 2 + j] for i in (0, 1) for j in (0, 1)], -1)
            features = self.width // 2 ** (self.stages - 1 - stage)
            x = Linear(features, ("patch", "embed"), True, initializers.kernel(self.init_scheme, "up", x.shape[-1], features),
                       dtype=self.dtype, name=f"conv{stage + 1}")(x)
            if stage + 1 < self.stages:
                x = gelu(Norm(self.norm, name=f"norm{stage + 1}")(x))
        return x.reshape(x.shape[0], -1, self.width)


class TokenEmbed(nn.Module):
    """ids int32 [b, l] -> [b, l, width]; param ``table`` [vocab, width] from N(0, std)."""
    vocab: int
    width: int
    std: float = 0.02
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        table = self.param("table", nn.with_logical_partitioning(nn.initializers.normal(self.std), ("vocab", "embed")),
                           (self.vocab, self.width), jnp.float32)
        return jnp.take(table, ids, axis=0, mode="clip").astype(self.dtype)


def sincos_1d(length: int, width: int) -> np.ndarray:
    """Fixed positions [length, width]: sines then cosines of width/2 frequencies from 1 to 1e-4."""
    if width % 2:
        raise ValueError(f"width={width} must be even for sincos positions; nearest: {width + 1}")
    return _waves(np.arange(length), width)


def sincos_2d(height: int, width_cells: int, width: int) -> np.ndarray:
    """Fixed positions [height * width_cells, width] of a grid, half for rows, half for columns (MoCo v3)."""
    if width % 4:
        raise ValueError(f"width={width} must be a multiple of 4 for two-dimensional sincos positions; "
                         f"nearest: {max(1, round(width / 4)) * 4}")
    rows, columns = np.mgrid[:height, :width_cells]
    return np.concatenate([_waves(rows.ravel(), width // 2), _waves(columns.ravel(), width // 2)], -1)


def _waves(positions: np.ndarray, width: int) -> np.ndarray:
    frequencies = 1e-4 ** (np.arange(width // 2) / max(1, width // 2 - 1))
    angles = positions[:, None] * frequencies
    return np.concatenate([np.sin(angles), np.cos(angles)], -1).astype(np.float32)
