"""Initialisation schemes, chosen by name.

=============== =============================================================================
"openai_text"   CLIP's text tower (openai/CLIP ``initialize_parameters``): q/k/v d^-.5, first
                MLP matrix (2d)^-.5, both residual outputs d^-.5 (2L)^-.5; attention biases 0,
                MLP biases uniform. CoCa's towers use the same.
"torch"         torch defaults, which CLIP's image blocks and poolers keep: Xavier-uniform q/k/v,
                other matrices and MLP biases uniform within fan_in^-.5; attention biases 0.
"fan_in"        normal, fan_in^-.5; biases 0.
"bert"          normal, .02; biases 0 (BERT, and timm's ViT but for its truncation).
"beit"          normal, .02, cut at one sigma; biases 0. Which layer of a stack a matrix is in, only
                ``by_depth`` knows, afterwards (microsoft/unilm ``beit2/modeling_finetune.py``).
=============== =============================================================================
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlm_jax.errors import nearest

SCHEMES = ("openai_text", "torch", "fan_in", "bert", "beit")
ROLES = ("qkv", "out", "up", "down")


def uniform(bound: float):
    """Uniform in [-bound, bound]."""
    return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)


def normal(std: float):
    return nn.initializers.normal(std)


def kernel(scheme: str, role: str, fan_in: int, fan_out: int, depth: int = 1):
    """Initialiser of a matrix [fan_in, fan_out] that plays ``role`` in a stack of ``depth`` blocks."""
    check(scheme)
    if scheme == "openai_text":
        return normal({"qkv": fan_in ** -0.5, "up": (2 * fan_in) ** -0.5,
                       "out": fan_out ** -0.5 * (2 * depth) ** -0.5,
                       "down": fan_out ** -0.5 * (2 * depth) ** -0.5}[role])
    if scheme == "torch":
        if role == "qkv":  # torch stores q, k and v of one width as a single [3 fan_out, fan_in] matrix
            stored_out = 3 * fan_out if fan_in == fan_out else fan_out
            return uniform((6 / (fan_in + stored_out)) ** 0.5)
        return uniform(fan_in ** -0.5)
    if scheme == "beit":
        return nn.initializers.truncated_normal(0.02, lower=-1.0, upper=1.0)
    return normal(0.02 if scheme == "bert" else fan_in ** -0.5)


def bias(scheme: str, role: str, fan_in: int):
    """Initialiser of the bias beside ``kernel``."""
    check(scheme)
    if scheme not in ("fan_in", "bert", "beit") and role in ("up", "down"):
        return uniform(fan_in ** -0.5)
    return nn.initializers.zeros


def by_depth(blocks: Any) -> Any:
    """The (boxed) parameters of a stack of blocks with the two matrices that end in the residual stream of layer l = 1, 2, ... divided by sqrt(2 l)."""
    def divided(path, x):
        ends = any(step in jax.tree_util.keystr(path, simple=True, separator="/") for step in ("attn/out/kernel", "mlp/down/kernel"))
        return x / jnp.sqrt(2 * jnp.arange(1, len(x) + 1).reshape(-1, *(1,) * (x.ndim - 1))) if ends else x
    return jax.tree_util.tree_map_with_path(divided, blocks)


def check(scheme: str) -> None:
    if scheme not in SCHEMES:
        raise ValueError(f"init_scheme={scheme!r} is not an initialisation scheme{nearest(scheme, SCHEMES)}")
