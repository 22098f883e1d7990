"""The dense layer all others are made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlm_jax.nn import initializers
from vlm_jax.nn.lora import low_rank
from vlm_jax.nn.narrow import multiply, stored
from vlm_jax.nn.norm import Norm
from vlm_jax.partitioning import gather


class Linear(nn.Module):
    """x [..., in] -> [..., features]; params ``kernel`` [in, features] and, with ``use_bias``, ``bias`` [features].

    Leading axes are flattened first: XLA on CPU multiplies matrices much faster than stacks of them.
    """
    features: int
    axes: tuple[str, str]
    use_bias: bool = True
    kernel_init: Callable = nn.initializers.lecun_normal()
    bias_init: Callable = nn.initializers.zeros
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param("kernel", nn.with_logical_partitioning(self.kernel_init, self.axes),
                            (x.shape[-1], self.features), jnp.float32)
        rows = x.astype(self.dtype).reshape(-1, x.shape[-1])
        y = multiply(lambda rows, kernel: rows @ gather(kernel, *self.axes), rows, [stored(self, kernel)], self.dtype)
        if (adapter := low_rank(self)) is not None:
            y = y + adapter(rows)
        if self.use_bias:
            # Residual widths are whole on every device ("norm"); hidden units follow their kernel.
            axis = "mlp" if self.axes[1] == "mlp" else "norm"
            y = y + self.param("bias", nn.with_logical_partitioning(self.bias_init, (axis,)),
                               (self.features,), jnp.float32).astype(self.dtype)
        return y.reshape(*x.shape[:-1], self.features)


def projection(width: int, features: int, dtype: Any) -> Linear:
    """A head from ``width`` to ``features`` with torch's default initialisation: kernel and bias uniform within width^-.5."""
    init = initializers.uniform(width ** -0.5)
    return Linear(features, ("embed", "joint"), True, init, init, dtype)


class ProjectionHead(nn.Module):
    """The end of a CLIP tower: norm, then a bias-free map to the joint space.

    x [..., width] -> [..., features]; params ``norm/*`` and ``kernel`` [width, features], drawn
    from N(0, 1/width) (openai/CLIP ``model.py``). ``norm_kind`` "none" leaves the norm out.
    """
    features: int
    norm_kind: str = "layernorm"
    eps: float = 1e-5
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        if self.norm_kind != "none":
            x = Norm(self.norm_kind, self.eps, name="norm")(x)
        kernel = self.param("kernel", nn.with_logical_partitioning(nn.initializers.normal(width ** -0.5),
                                                                   ("embed", "joint")), (width, self.features), jnp.float32)
        x = x.astype(self.dtype)
        y = multiply(lambda x, kernel: x @ gather(kernel, "embed", "joint"), x, [stored(self, kernel)], self.dtype)
        return y if (adapter := low_rank(self)) is None else y + adapter(x.reshape(-1, width)).reshape(y.shape)
