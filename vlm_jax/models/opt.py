"""OPT (arXiv 2205.01068): a pre-norm decoder with ReLU and learned positions."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlm_jax.models.decoder import Decoder
from vlm_jax.nn.attention import Rotary


def _sizes(width, layers, heads):
    return dict(width=width, layers=layers, heads=heads, mlp_dim=4 * width)


# arXiv 2205.01068, Table 1; without 350M, which is post-norm
VARIANTS = {
    "125m": _sizes(768, 12, 12), "1.3b": _sizes(2048, 24, 32), "2.7b": _sizes(2560, 32, 32), "6.7b": _sizes(4096, 32, 32),
    "13b": _sizes(5120, 40, 40), "30b": _sizes(7168, 48, 56), "66b": _sizes(9216, 64, 72),
    "mini": dict(width=96, layers=2, heads=3, mlp_dim=288),
}
VOCAB = 50272      # rows of the released tables, of which 50,265 are tokens
OFFSET = 2         # of the table of positions: its first row is nobody's, the second is read for padding


class Opt(Decoder):
    """``Decoder`` with a table ``position_embed`` of ``positions`` + 2 rows: the first real token reads row 2, padding row 1."""
    vocab: int = VOCAB
    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp_dim: int = 3072
    activation: str = "relu"
    positions: int = 2048

    def setup(self):
        super().setup()
        self.position_embed = self.param("position_embed", nn.with_logical_partitioning(nn.initializers.normal(0.02), ("position", "embed")),
                                         (self.positions + OFFSET, self.width), jnp.float32)

    def place(self, x: jax.Array, positions: jax.Array) -> tuple[jax.Array, Rotary | None]:
        if x.shape[1] > self.positions:
            raise ValueError(f"text of {x.shape[1]} tokens exceeds positions={self.positions}; nearest: {self.positions}")
        return x + jnp.take(self.position_embed, positions + OFFSET, axis=0, mode="clip").astype(x.dtype), None
