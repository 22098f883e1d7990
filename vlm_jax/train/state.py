"""The state of training, and the split of parameters into those trained and those frozen."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
from flax import struct, traverse_util

from vlm_jax.errors import ConfigError, nearest
from vlm_jax.system import Moving, Params, Variables


@struct.dataclass
class TrainState:
    """params, frozen, moving and ema are flat dicts by path; step and bad_steps are int32 scalars."""
    step: jax.Array
    params: Params
    frozen: Params
    moving: Moving
    opt_state: Any
    carry: Any
    ema: Params
    bad_steps: jax.Array   # consecutive steps whose loss or gradient was not finite


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    return traverse_util.flatten_dict(tree, sep="/")


def unbox(variables: Variables) -> tuple[Params, Moving, dict[str, tuple[str, ...]]]:
    """Boxed linen variables -> flat params, flat moving leaves, logical axes by path.

    Raises ValueError for a parameter without named axes.
    """
    def boxed(x):
        return isinstance(x, nn.meta.AxisMetadata)

    axes: dict[str, tuple[str, ...]] = {}

    def flat(tree, prefix="", default=None):
        out = {}
        for path, leaf in traverse_util.flatten_dict(tree, sep="/", is_leaf=lambda _, v: boxed(v)).items():
            path = prefix + path
            if boxed(leaf):
                names = leaf.names
                leaf = leaf.unbox()
            else:
                names = (default,) * leaf.ndim
            if names is None or len(names) != leaf.ndim or any(n is None for n in names):
                raise ValueError(f"parameter {path} of shape {leaf.shape} has axes {names}: every dimension needs a name")
            out[path], axes[path] = leaf, tuple(names)
        return out

    params = flat(variables["params"])
    moving = {}
    for collection in sorted(set(variables) - {"params"}):
        moving.update(flat(variables[collection], f"{collection}/", "none"))  # statistics: small, whole
    return params, moving, axes


def split(params: Params, trainable: Sequence[str]) -> tuple[Params, Params]:
    """Parameters whose whole path matches one of the regexes ``trainable``, and the rest.

    Raises ConfigError for a pattern that matches nothing: a typo would otherwise freeze in silence.
    """
    for pattern in trainable:
        if not any(re.fullmatch(pattern, path) for path in params):
            raise ConfigError(f"trainable pattern {pattern!r} matches no parameter{nearest(pattern, params)}")
    chosen = {p for p in params if any(re.fullmatch(pattern, p) for pattern in trainable)}
    return {p: x for p, x in params.items() if p in chosen}, {p: x for p, x in params.items() if p not in chosen}


def merge(params: Params, frozen: Params, moving: Moving) -> Variables:
    """Flat trained, frozen and moving leaves -> nested variables as linen's apply wants them."""
    return {"params": traverse_util.unflatten_dict({**params, **frozen}, sep="/"),
            **traverse_util.unflatten_dict(moving, sep="/")}
