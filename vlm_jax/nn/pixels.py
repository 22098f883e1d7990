"""From what the host sends to what a tower takes."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from vlm_jax.errors import nearest
from vlm_jax.nn import attention

log = logging.getLogger("vlm_jax.dtype")

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def normalise(image: jax.Array, mean: Sequence[float], std: Sequence[float]) -> jax.Array:
    """uint8 [b, h, w, 3] -> float32 (x / 255 - mean) / std; float images pass: they are normalised already."""
    if image.dtype != jnp.uint8:
        return image.astype(jnp.float32)
    return (image.astype(jnp.float32) / 255 - jnp.asarray(mean, jnp.float32)) / jnp.asarray(std, jnp.float32)


def unnormalise(image: jax.Array, mean: Sequence[float], std: Sequence[float]) -> jax.Array:
    """uint8 [b, h, w, 3], or float as ``normalise`` gives it -> float32 in [0, 1]."""
    if image.dtype == jnp.uint8:
        return image.astype(jnp.float32) / 255
    return image * jnp.asarray(std, jnp.float32) + jnp.asarray(mean, jnp.float32)


def choose_dtype(name: str, backend: str, capability: float | None = None) -> tuple[str, str]:
    """The dtype of a model's ``dtype`` field, and why: ("float32" | "bfloat16", reason).

    ``backend`` and ``capability`` as for ``attention.choose``. Float16 is never chosen: its range needs loss scaling.
    Raises ValueError for an unknown name.
    """
    if name != "auto":
        if name not in DTYPES:
            raise ValueError(f"dtype={name!r} is not known{nearest(name, ('auto', *DTYPES))}")
        return name, "as configured"
    if backend == "cpu":
        return "float32", "bfloat16 is slow on CPUs"
    if backend == "gpu" and capability is not None and capability < attention.AMPERE:
        return "float32", (f"this GPU has compute capability {capability}; bfloat16 needs {attention.AMPERE} (Ampere), "
                           "and float16 would need loss scaling")
    return "bfloat16", f"bfloat16 is native on this {backend.upper()}"


@functools.cache
def _log_once(level: int, dtype: str, reason: str) -> None:
    log.log(level, "dtype auto: %s (%s)", dtype, reason)


def compute_dtype(name: str) -> Any:
    """The dtype of ``choose_dtype`` for the backend that is compiled for; "auto"'s choice is logged once, as a
    warning where an accelerator gets float32."""
    backend = attention.target()
    dtype, reason = choose_dtype(name, backend, attention.cuda_capability() if backend == "gpu" else None)
    if name == "auto":
        _log_once(logging.WARNING if (backend, dtype) == ("gpu", "float32") else logging.INFO, dtype, reason)
    return DTYPES[dtype]


def colour_bins(image: jax.Array, patch: int, bins: int) -> jax.Array:
    """image [b, h, w, 3] in [0, 1] -> int32 [b, patches], in raster order: which of bins^3 boxes the mean colour of each patch lies in."""
    b, h, w, c = image.shape
    mean = image.reshape(b, h // patch, patch, w // patch, patch, c).mean((2, 4)).reshape(b, -1, c)
    level = jnp.clip(jnp.floor(mean * bins), 0, bins - 1).astype(jnp.int32)
    return level @ jnp.array([bins * bins, bins, 1])
