"""LayerNorm and RMSNorm, in fp32 whatever the compute dtype."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlm_jax.errors import nearest

KINDS = ("layernorm", "rmsnorm")


class Norm(nn.Module):
    """Normalises the last axis; x [..., d] -> [..., d] in x's dtype.

    ``layernorm`` has ``scale`` and ``bias``, ``rmsnorm`` has ``scale`` only. ``eps`` is added to
    the (biased) variance; 1e-5 is torch's default and CLIP's value, flax's own is 1e-6.
    """
    kind: str = "layernorm"
    eps: float = 1e-5

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if self.kind not in KINDS:
            raise ValueError(f"norm={self.kind!r} is not a norm{nearest(self.kind, KINDS)}")
        width = x.shape[-1]
        scale = self.param("scale", nn.with_logical_partitioning(nn.initializers.ones, ("norm",)), (width,), jnp.float32)
        y = x.astype(jnp.float32)
        if self.kind == "layernorm":
            y = y - y.mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.eps) * scale
        if self.kind == "layernorm":
            y = y + self.param("bias", nn.with_logical_partitioning(nn.initializers.zeros, ("norm",)), (width,), jnp.float32)
        return y.astype(x.dtype)
