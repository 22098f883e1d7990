"""Weights that do not train, in fewer bits: bfloat16, or int8 with a scale for each output.

An int8 kernel is two leaves: ``kernel``, whole numbers of -127..127, and ``kernel_scale``, of size 1 along its inputs, which the numbers of
each output are multiplied by: the greatest of its absolute values / 127. Layers widen a kernel where they multiply with it (``widen``), one layer of a
stack at a time; no module has an option for it.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from vlm_jax.errors import ConfigError, nearest
from vlm_jax.partitioning import current_sizes

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "int8": jnp.int8}
KERNEL, SCALE = "kernel", "kernel_scale"
WIDE = (KERNEL, "table")      # leaves that hold nearly all of a model
LEVELS = 127


class Stored(NamedTuple):
    """A kernel as it is stored, and its scale where it is int8."""
    kernel: jax.Array
    scale: jax.Array | None

    def widen(self, dtype: Any) -> jax.Array:
        return self.kernel.astype(dtype) if self.scale is None else (self.kernel.astype(jnp.float32) * self.scale).astype(dtype)


def stored(module: nn.Module, kernel: jax.Array) -> Stored:
    """The ``kernel`` of a module with what widens it."""
    return Stored(kernel, module.get_variable("params", SCALE) if kernel.dtype == jnp.int8 else None)


def widen(module: nn.Module, kernel: jax.Array, dtype: Any) -> jax.Array:
    """The ``kernel`` of a module in ``dtype``, whatever it is stored in."""
    return stored(module, kernel).widen(dtype)


def multiply(product: Callable[..., jax.Array], x: jax.Array, kernels: Sequence[Stored], dtype: Any) -> jax.Array:
    """product(x, *kernels in ``dtype``). The backward pass widens them again: of a frozen stack no second copy is kept for it. Kernels in pieces are
    gathered by ``product``, and ``block.REMAT`` says what is kept of them."""
    def widened(x, kernels):
        return product(x, *(kernel.widen(dtype) for kernel in kernels))

    once = widened if current_sizes().get("fsdp", 1) > 1 else jax.checkpoint(widened, prevent_cse=False)
    return once(x, tuple(kernels))


def inputs(axes: Sequence[str]) -> tuple[int, ...]:
    """Which dimensions of a kernel are its input: of [layers, heads, head_dim, embed], 1 and 2."""
    stack = int(axes[0] == "layers")
    return (stack, stack + 1) if axes[stack] == "heads" else (stack,)


def narrow(system: Any, trainable: Sequence[str], dtype: str) -> Any:
    """The system whose kernels and tables that do not train are of ``dtype``, a name in ``DTYPES``: of a large frozen tower half the memory and half of
    its checkpoint, or a quarter. Norms and biases stay float32; with "int8", tables and convolutions are bfloat16. Raises ConfigError for another name."""
    if dtype not in DTYPES:
        raise ConfigError(f"frozen_dtype={dtype!r} is not known{nearest(dtype, DTYPES)}")
    if dtype == "float32":
        return system

    def init(key: jax.Array, spec: Any) -> Any:
        variables = system.init(key, spec)
        params = traverse_util.flatten_dict(variables["params"], sep="/", is_leaf=lambda _, v: isinstance(v, nn.meta.AxisMetadata))
        for path, boxed in list(params.items()):
            if path.rpartition("/")[2] in WIDE and not any(re.fullmatch(pattern, path) for pattern in trainable):
                params |= _narrowed(path, boxed, dtype)
        return {**variables, "params": traverse_util.unflatten_dict(params, sep="/")}

    return dataclasses.replace(system, init=init)


def _narrowed(path: str, boxed: Any, dtype: str) -> dict[str, Any]:
    x, axes = boxed.unbox(), tuple(boxed.names)
    if dtype != "int8" or not path.endswith(KERNEL) or "conv_h" in axes:
        return {path: boxed.replace_boxed(x.astype(jnp.bfloat16))}
    reduced = inputs(axes)
    whole, scale = rounded(x, reduced)
    return {path: boxed.replace_boxed(whole), path.removesuffix(KERNEL) + SCALE: nn.LogicallyPartitioned(
        scale, tuple("none" if i in reduced else axis for i, axis in enumerate(axes)))}


def rounded(x: Any, reduced: tuple[int, ...], xp: Any = jnp) -> tuple[Any, Any]:
    """x -> (int8 of its shape, float32 scales, of size 1 along ``reduced``)."""
    scale = xp.maximum(xp.abs(x).max(reduced, keepdims=True), 1e-30).astype(xp.float32) / LEVELS
    return xp.rint(x / scale).astype(xp.int8), scale


def unscaled(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The leaves but the scales: those that weights may be given for."""
    return {p: x for p, x in leaves.items() if p.rpartition("/")[2] != SCALE}


def fit(given: Mapping[str, np.ndarray], shapes: Mapping[str, Any], axes: Mapping[str, Sequence[str]]) -> dict[str, np.ndarray]:
    """Given weights, rounded where a model's leaves (``shapes``, ``axes``) are int8."""
    out = dict(given)
    for path, x in given.items():
        if path in shapes and shapes[path].dtype == jnp.int8:
            out[path], out[path.removesuffix(KERNEL) + SCALE] = rounded(np.asarray(x, np.float32), inputs(axes[path]), np)
    return out


def restore(leaves: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Flat leaves with int8 kernels as float32 again, and without scales."""
    out = unscaled(leaves)
    for path, scale in leaves.items():
        if path.rpartition("/")[2] == SCALE:
            where = path.removesuffix(SCALE) + KERNEL
            out[where] = np.asarray(leaves[where], np.float32) * scale
    return out
