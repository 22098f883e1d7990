"""Low-rank adapters (LoRA, arXiv 2106.09685): kernel + scale * a b, where training has put them.

An adapter is three leaves beside a kernel: ``lora_a`` [in, rank], ``lora_b`` [rank, out] and ``lora_scale``, the
paper's alpha / rank, which does not train. Layers use them where they are there, so that no module has an option
for it: ``adapt`` adds them to what a system initialises, ``merge`` puts them back into the kernels.
"""

from __future__ import annotations

import dataclasses
import re
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

KERNEL, A, B, SCALE = "kernel", "lora_a", "lora_b", "lora_scale"
TARGETS = (r".*/(query|key|value|out|gate|up|down)/kernel",)


class LowRank(NamedTuple):
    """a [in..., rank], b [rank, out...] and their scale."""
    a: jax.Array
    b: jax.Array
    scale: jax.Array

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [t, in...] -> [t, out...], in the dtype of ``x``."""
        inner = jnp.tensordot(x, (self.a * self.scale).astype(x.dtype), self.a.ndim - 1)
        return jnp.tensordot(inner, self.b.astype(x.dtype), 1)


def low_rank(module: nn.Module) -> LowRank | None:
    """The adapter of a module's ``kernel``, None without one."""
    if not module.has_variable("params", A):
        return None
    return LowRank(*(module.get_variable("params", name) for name in (A, B, SCALE)))


def _inputs(axes: Sequence[str]) -> int:
    """How many leading dimensions of a kernel, layers left out, are its input: [heads, head_dim, embed] has two."""
    return 2 if axes[0] == "heads" else 1


@dataclasses.dataclass(frozen=True)
class Adapters:
    """The ``lora`` section of a stage. targets: regexes over kernel paths, each of which must match."""
    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = TARGETS


def adapt(system: Any, adapters: Adapters) -> Any:
    """The system with adapters beside the kernels that ``targets`` match. ``lora_a`` is drawn uniformly from +-1/sqrt(in),
    ``lora_b`` is 0, so that nothing changes at first. Raises ValueError for a rank below 1 or a kernel that
    is no product with a matrix (a convolution)."""
    if adapters.rank < 1:
        raise ValueError(f"rank={adapters.rank} must be at least 1")

    def init(key: jax.Array, spec: Any) -> Any:
        variables = system.init(key, spec)
        params = traverse_util.flatten_dict(variables["params"], sep="/", is_leaf=lambda _, v: isinstance(v, nn.meta.AxisMetadata))
        for path in chosen(params, adapters.targets):
            params |= _fresh(path, params[path], adapters, jax.random.fold_in(key, zlib.crc32(path.encode()) & 0x7FFFFFFF))
        return {**variables, "params": traverse_util.unflatten_dict(params, sep="/")}

    return dataclasses.replace(system, init=init)


def chosen(paths: Sequence[str] | Mapping[str, Any], targets: Sequence[str]) -> list[str]:
    """The kernels that ``targets`` match. Raises ValueError for a target that matches none."""
    kernels = [p for p in paths if p.rpartition("/")[2] == KERNEL]
    for pattern in targets:
        if not any(re.fullmatch(pattern, p) for p in kernels):
            raise ValueError(f"lora.targets: {pattern!r} matches no kernel of the model, such as {', '.join(sorted(kernels)[:3])}")
    return sorted(p for p in kernels if any(re.fullmatch(pattern, p) for pattern in targets))


def _fresh(path: str, boxed: Any, adapters: Adapters, key: jax.Array) -> dict[str, Any]:
    kernel, axes = boxed.unbox(), tuple(boxed.names)
    stack = int(axes[0] == "layers")
    if "conv_h" in axes:
        raise ValueError(f"lora.targets: {path} is a convolution; only products with a matrix take an adapter")
    split = stack + _inputs(axes[stack:])
    layers, inputs, outputs = kernel.shape[:stack], kernel.shape[stack:split], kernel.shape[split:]
    bound = float(np.prod(inputs)) ** -0.5
    a = jax.random.uniform(key, (*layers, *inputs, adapters.rank), jnp.float32, -bound, bound)
    b = jnp.zeros((*layers, adapters.rank, *outputs), jnp.float32)
    scale = jnp.full(layers, adapters.alpha / adapters.rank, jnp.float32)
    where = path.removesuffix(KERNEL)
    return {where + name: nn.LogicallyPartitioned(x, names) for name, x, names in (
        (A, a, (*axes[:split], "rank")), (B, b, (*axes[:stack], "rank", *axes[split:])), (SCALE, scale, axes[:stack]))}


def merge(leaves: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Flat leaves with every adapter added to its kernel and left out: the same function without adapters."""
    out = {p: x for p, x in leaves.items() if p.rpartition("/")[2] not in (A, B, SCALE)}
    for path in leaves:
        where, _, name = path.rpartition("/")
        if name != A:
            continue
        a, b, scale = (np.asarray(leaves[f"{where}/{n}"], np.float32) for n in (A, B, SCALE))
        kernel = np.asarray(leaves[f"{where}/{KERNEL}"])
        if scale.ndim:
            delta = np.stack([s * np.tensordot(x, y, 1) for s, x, y in zip(scale, a, b)])
        else:
            delta = scale * np.tensordot(a, b, 1)
        out[f"{where}/{KERNEL}"] = (kernel + delta).astype(kernel.dtype)
    return out
