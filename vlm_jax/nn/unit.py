"""Unit vectors."""

import jax
import jax.numpy as jnp


def unit(x: jax.Array) -> jax.Array:
    """x / ||x|| along the last axis, in fp32; a zero vector stays zero."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), 1e-24))
