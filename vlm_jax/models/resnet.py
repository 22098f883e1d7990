"""CLIP's modified ResNets (openai/CLIP ``model.py``; arXiv 2103.00020, section 2.4 and Table 19)."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlm_jax.nn import initializers
from vlm_jax.nn.attention import Attention

VARIANTS = {
    "rn50": dict(image_size=224, width=64, blocks=(3, 4, 6, 3), features=1024),
    "rn101": dict(image_size=224, width=64, blocks=(3, 4, 23, 3), features=512),
    "rn50x4": dict(image_size=288, width=80, blocks=(4, 6, 10, 6), features=640),
    "rn50x16": dict(image_size=384, width=96, blocks=(6, 8, 18, 8), features=768),
    "rn50x64": dict(image_size=448, width=128, blocks=(3, 15, 36, 10), features=1024),
}


class ConvNorm(nn.Module):
    """Bias-free convolution, then BatchNorm; x [b, h, w, c] -> [b, h/stride, w/stride, features].

    Padding is explicit: XLA's "SAME" differs from torch on even sizes with stride 2. Statistics
    run in collection ``batch_stats`` (over the global batch) and move only with ``train``.
    """
    features: int
    kernel: int
    stride: int = 1
    scale_init: Any = nn.initializers.ones
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        bound = (x.shape[-1] * self.kernel ** 2) ** -0.5  # torch's default
        pad = (self.kernel // 2,) * 2
        axes = ("conv_h", "conv_w", "conv_in", "conv_out")
        x = nn.Conv(self.features, (self.kernel, self.kernel), self.stride, (pad, pad), use_bias=False, dtype=self.dtype,
                    kernel_init=nn.with_logical_partitioning(initializers.uniform(bound), axes), name="conv")(x)
        return nn.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=1e-5, dtype=self.dtype,
                            scale_init=nn.with_logical_partitioning(self.scale_init, ("norm",)),
                            bias_init=nn.with_logical_partitioning(nn.initializers.zeros, ("norm",)), name="norm")(x)


class Bottleneck(nn.Module):
    """1x1, 3x3, average pool by ``stride``, 1x1 to 4 x ``width`` channels, beside a shortcut.

    All convolutions have stride 1; where the shape changes the shortcut is pooled alike and
    mapped (``shortcut``).
    """
    width: int
    stride: int = 1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        out = 4 * self.width
        y = nn.relu(ConvNorm(self.width, 1, dtype=self.dtype, name="conv1")(x, train))
        y = nn.relu(ConvNorm(self.width, 3, dtype=self.dtype, name="conv2")(y, train))
        y = ConvNorm(out, 1, scale_init=nn.initializers.zeros, dtype=self.dtype, name="conv3")(average_pool(y, self.stride), train)
        if self.stride > 1 or x.shape[-1] != out:
            x = ConvNorm(out, 1, dtype=self.dtype, name="shortcut")(average_pool(x, self.stride), train)
        return nn.relu(x + y)


class AttentionPool(nn.Module):
    """x [b, h, w, c] -> [b, features]: the mean token asks all tokens and itself, once.

    Learned positions [h * w + 1, c], the mean's first; heads of 64 channels.
    """
    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        b, h, w, c = x.shape
        x = x.reshape(b, h * w, c)
        x = jnp.concatenate([x.mean(1, keepdims=True), x], 1)
        positions = self.param("position_embed", nn.with_logical_partitioning(nn.initializers.normal(c ** -0.5), ("position", "embed")),
                               (h * w + 1, c), jnp.float32)
        x = x + positions.astype(x.dtype)
        attn = Attention(c, c // 64, out_width=self.features, init_scheme="fan_in", dtype=self.dtype, name="attn")
        return attn(x[:, :1], memory=x)[0][:, 0]


class ModifiedResNet(nn.Module):
    """image float [b, h, w, 3], already normalised -> (tokens [b, n, 32 width], vector [b, features] in the joint space).

    A stem of three 3x3 convolutions (``stem1``..``stem3``) and a 2x2 average pool, four stages of
    bottlenecks (``stage<s>_block<b>``) of widths w, 2w, 4w, 8w, whose last map, row by row, are the
    tokens, and an attention pool (``pool``).
    There is no projection after it. The side must be a multiple of 32 and equal ``image_size``,
    for which the pool's positions are made.
    """
    image_size: int
    width: int
    blocks: tuple[int, ...]
    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, image: jax.Array, train: bool = False) -> tuple[jax.Array, jax.Array]:
        if image.shape[1:3] != (self.image_size, self.image_size):
            raise ValueError(f"image of {image.shape[1]}x{image.shape[2]} pixels does not fit image_size={self.image_size}; "
                             f"nearest: {self.image_size}x{self.image_size}")
        x = image.astype(self.dtype)
        for i, (features, stride) in enumerate(((self.width // 2, 2), (self.width // 2, 1), (self.width, 1)), 1):
            x = nn.relu(ConvNorm(features, 3, stride, dtype=self.dtype, name=f"stem{i}")(x, train))
        x = average_pool(x, 2)
        for stage, count in enumerate(self.blocks):
            for block in range(count):
                stride = 2 if stage > 0 and block == 0 else 1
                x = Bottleneck(self.width * 2 ** stage, stride, self.dtype, name=f"stage{stage + 1}_block{block}")(x, train)
        return x.reshape(x.shape[0], -1, x.shape[-1]), AttentionPool(self.features, self.dtype, name="pool")(x)


def average_pool(x: jax.Array, stride: int) -> jax.Array:
    return x if stride == 1 else nn.avg_pool(x, (stride, stride), (stride, stride))
