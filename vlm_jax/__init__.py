"""vlm_jax: train vision-language models in JAX. ``vlm_jax.load(DIR)`` opens a trained or imported one."""

from __future__ import annotations

__version__ = "0.1.0"


def __getattr__(name: str):
    if name == "load":   # heavy: only when asked for, so that ``--help`` stays quick
        from vlm_jax.loading import load
        return load
    raise AttributeError(f"module 'vlm_jax' has no attribute {name!r}")
