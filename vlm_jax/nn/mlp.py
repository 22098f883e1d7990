"""The two-layer MLP of a transformer block, and its activations by name."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlm_jax.nn import initializers
from vlm_jax.nn.linear import Linear
from vlm_jax.partitioning import nearest, shard


def gelu(x: jax.Array) -> jax.Array:
    """Exact GELU, by erf: on CPU four times as fast as the erfc form of ``jax.nn.gelu``."""
    return 0.5 * x * (1 + jax.lax.erf(x * 0.5 ** 0.5))


def quick_gelu(x: jax.Array) -> jax.Array:
    """x sigmoid(1.702 x), in every CLIP weight OpenAI released. Not interchangeable with ``gelu``."""
    return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS = {"gelu": gelu, "quick_gelu": quick_gelu, "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
               "relu": jax.nn.relu, "silu": jax.nn.silu}


class Mlp(nn.Module):
    """x [b, l, d] -> [b, l, d] over ``hidden`` units; params up/{kernel,bias}, down/{kernel,bias}."""
    hidden: int
    activation: str = "gelu"
    use_bias: bool = True
    init_scheme: str = "torch"
    depth: int = 1
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation={self.activation!r} is not known{nearest(self.activation, tuple(ACTIVATIONS))}")
        width = x.shape[-1]
        up = Linear(self.hidden, ("embed", "mlp"), self.use_bias, initializers.kernel(self.init_scheme, "up", width, self.hidden, self.depth),
                    initializers.bias(self.init_scheme, "up", width), self.dtype, name="up")
        down = Linear(width, ("mlp", "embed"), self.use_bias, initializers.kernel(self.init_scheme, "down", self.hidden, width, self.depth),
                      initializers.bias(self.init_scheme, "down", self.hidden), self.dtype, name="down")
        hidden = shard(up(x), "batch", *["length"] * (x.ndim - 2), "act_mlp")
        return down(ACTIVATIONS[self.activation](hidden))
