"""From what the host sends to what a tower takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from vlm_jax.errors import nearest

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def normalise(image: jax.Array, mean: Sequence[float], std: Sequence[float]) -> jax.Array:
    """uint8 [b, h, w, 3] -> float32 (x / 255 - mean) / std; float images pass: they are normalised already."""
    if image.dtype != jnp.uint8:
        return image.astype(jnp.float32)
    return (image.astype(jnp.float32) / 255 - jnp.asarray(mean, jnp.float32)) / jnp.asarray(std, jnp.float32)


def compute_dtype(name: str) -> Any:
    """"float32", "bfloat16", or "auto": bfloat16 on accelerators (GPUs before Ampere excepted), float32 on CPUs."""
    if name != "auto":
        if name not in DTYPES:
            raise ValueError(f"dtype={name!r} is not known{nearest(name, ('auto', *DTYPES))}")
        return DTYPES[name]
    device = jax.devices()[0]
    if device.platform == "cpu":
        return jnp.float32
    capability = getattr(device, "compute_capability", None)
    return jnp.float32 if capability is not None and float(capability) < 8.0 else jnp.bfloat16
