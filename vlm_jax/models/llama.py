"""LLaMA (arXiv 2302.13971) and what was tuned from it, such as Vicuna: RMSNorm, SwiGLU, rotary positions."""

from __future__ import annotations

import jax

from vlm_jax.models.decoder import Decoder
from vlm_jax.nn.attention import Rotary, rotary_angles


def _sizes(width, layers, heads, mlp_dim, **fields):
    return dict(width=width, layers=layers, heads=heads, mlp_dim=mlp_dim, **fields)


VARIANTS = {
    # arXiv 2302.13971, Table 2; Vicuna v0 to v1.3 have these sizes
    "7b": _sizes(4096, 32, 32, 11008), "13b": _sizes(5120, 40, 40, 13824),
    # arXiv 2307.09288; Vicuna v1.5
    "llama2_7b": _sizes(4096, 32, 32, 11008, eps=1e-5), "llama2_13b": _sizes(5120, 40, 40, 13824, eps=1e-5),
    "mini": _sizes(96, 2, 3, 256),
}
VOCAB = 32000


class Llama(Decoder):
    """``Decoder`` whose queries and keys are turned by rotary positions of base ``theta``; nothing has a bias, the head is its own."""
    vocab: int = VOCAB
    width: int = 4096
    layers: int = 32
    heads: int = 32
    mlp_dim: int = 11008
    activation: str = "silu"
    gated: bool = True
    use_bias: bool = False
    norm: str = "rmsnorm"
    eps: float = 1e-6
    head: str = "own"
    theta: float = 1e4

    def place(self, x: jax.Array, positions: jax.Array) -> tuple[jax.Array, Rotary | None]:
        return x, rotary_angles(positions, self.width // self.heads, self.theta)
