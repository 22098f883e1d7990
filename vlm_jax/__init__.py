"""vlm_jax: train vision-language models in JAX.

``vlm_jax.load(DIR)`` opens a trained or imported model, ``vlm_jax.train(config, workdir)`` runs a config.
"""

from __future__ import annotations

import types
from typing import Any

from vlm_jax import train

__version__ = "0.1.0"


class _Train(types.ModuleType):
    """The package ``vlm_jax.train`` is what trains, so it can be called to do so."""

    def __call__(self, config: Any, workdir: Any, **options: Any) -> Any:
        from vlm_jax.run import train
        return train(config, workdir, **options)


train.__class__ = _Train


def __getattr__(name: str):
    if name == "load":   # heavy: only when asked for, so that ``--help`` stays quick
        from vlm_jax.loading import load
        return load
    raise AttributeError(f"module 'vlm_jax' has no attribute {name!r}")
