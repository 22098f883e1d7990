"""The two-layer MLP of a transformer block, its activations by name, and the two-layer head of classes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlm_jax.errors import nearest
from vlm_jax.nn import initializers
from vlm_jax.nn.linear import Linear
from vlm_jax.nn.norm import Norm
from vlm_jax.partitioning import shard


def gelu(x: jax.Array) -> jax.Array:
    """Exact GELU, by erf: on CPU four times as fast as the erfc form of ``jax.nn.gelu``."""
    return 0.5 * x * (1 + jax.lax.erf(x * 0.5 ** 0.5))


def quick_gelu(x: jax.Array) -> jax.Array:
    """x sigmoid(1.702 x), in every CLIP weight OpenAI released. Not interchangeable with ``gelu``."""
    return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS = {"gelu": gelu, "quick_gelu": quick_gelu, "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
               "relu": jax.nn.relu, "silu": jax.nn.silu}


class Mlp(nn.Module):
    """x [b, l, d] -> [b, l, d] over ``hidden`` units; params up/{kernel,bias}, down/{kernel,bias}. ``sub_norm``: the eps of a LayerNorm
    over the hidden units (Magneto, arXiv 2210.06423), 0 for none. ``dropout``: of the hidden units, where a stream of random keys
    "dropout" is given. ``gated``: down(activation(gate x) * up x), with params
    gate/{kernel,bias} beside (GLU, arXiv 2002.05202)."""
    hidden: int
    activation: str = "gelu"
    use_bias: bool = True
    init_scheme: str = "torch"
    depth: int = 1
    dtype: Any = jnp.float32
    sub_norm: float = 0.0
    gated: bool = False
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation={self.activation!r} is not known{nearest(self.activation, tuple(ACTIVATIONS))}")
        width = x.shape[-1]
        def linear(role, features, axes, fan_in, name=None):
            return Linear(features, axes, self.use_bias, initializers.kernel(self.init_scheme, role, fan_in, features, self.depth),
                          initializers.bias(self.init_scheme, role, fan_in), self.dtype, name=name or role)

        up, down = linear("up", self.hidden, ("embed", "mlp"), width), linear("down", width, ("mlp", "embed"), self.hidden)
        hidden = shard(up(x), "batch", *["length"] * (x.ndim - 2), "act_mlp")
        if self.gated:
            gate = shard(linear("up", self.hidden, ("embed", "mlp"), width, "gate")(x), "batch", *["length"] * (x.ndim - 2), "act_mlp")
            hidden = ACTIVATIONS[self.activation](gate) * hidden
        else:
            hidden = ACTIVATIONS[self.activation](hidden)
        hidden = nn.Dropout(self.dropout)(hidden, deterministic=not self.has_rng("dropout"))
        return down(Norm("layernorm", self.sub_norm, name="sub_norm")(hidden) if self.sub_norm else hidden)


class TwoLayerHead(nn.Module):
    """x [b, in] -> [b, classes] over ``hidden`` units: a map, LayerNorm, exact GELU, a map; a norm before them where ``names`` has four.

    names: of the first map, the norm, the second map, and the norm before. axes: the logical axes of the maps' kernels.
    """
    hidden: int
    classes: int
    names: tuple[str, ...] = ("up", "norm", "down")
    axes: tuple[tuple[str, str], tuple[str, str]] = (("embed", "mlp"), ("mlp", "joint"))
    kernel_init: Callable = nn.initializers.normal(0.02)
    eps: float = 1e-5
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        up, norm, down, *before = self.names
        for name in before:
            x = Norm("layernorm", self.eps, name=name)(x)
        x = Linear(self.hidden, self.axes[0], True, self.kernel_init, dtype=self.dtype, name=up)(x)
        x = gelu(Norm("layernorm", self.eps, name=norm)(x))
        return Linear(self.classes, self.axes[1], True, self.kernel_init, dtype=self.dtype, name=down)(x)
