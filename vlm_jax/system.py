"""The contract between a system (a paper's model, loss and predictions) and everything else.

A system is a record, never a subclass: a linen module with named methods, and pure functions
beside it. The trainer, the evaluators and the loader know this file and no family.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
from flax import struct

Params = dict[str, jax.Array]      # flat: "image/blocks/attn/query/kernel" -> array
Moving = dict[str, jax.Array]      # flat, collection first: "batch_stats/image/norm1/mean" -> array
Variables = Mapping[str, Any]      # nested, as linen's apply wants them: {"params": {...}, "batch_stats": {...}}
Batch = Mapping[str, jax.Array]    # the glossary is vlm_jax/data/batch.py
Carry = Mapping[str, Any]


@struct.dataclass
class Context:
    """What a loss may know beside variables and batch."""
    rng: jax.Array
    step: jax.Array
    train: bool = struct.field(pytree_node=False, default=True)

    def key(self, name: str) -> jax.Array:
        """A random key of its own for ``name``: two names never share one."""
        return jax.random.fold_in(self.rng, zlib.crc32(name.encode()) & 0x7FFFFFFF)

    def drop(self, name: str) -> jax.Array | None:
        """The key of dropped units in a pass called ``name``; None outside training: nothing is dropped."""
        return self.key(name) if self.train else None


def drop_key(context: Context, chunk: jax.Array | int) -> jax.Array | None:
    """The key of dropped patches and units for one micro-batch; None outside training: nothing is dropped."""
    return jax.random.fold_in(context.key("drop"), chunk) if context.train else None


def run(model: nn.Module, variables: Variables, method: Any, *args: Any, key: jax.Array | None = None) -> Any:
    """``model.apply`` of a named method; with ``key`` units are dropped."""
    return model.apply(variables, *args, method=method, rngs=None if key is None else {"dropout": key})


@struct.dataclass
class Output:
    """What a loss returns beside its scalar."""
    metrics: dict[str, jax.Array]                       # scalars; the raw loss terms under the paper's names
    moving: Moving = struct.field(default_factory=dict)  # new values of leaves without gradient
    update: Any = ()                                    # what next_carry consumes


def no_carry(variables: Variables) -> Carry:
    return {}


def keep_carry(carry: Carry, update: Any) -> Carry:
    return carry


class Cacheable(NamedTuple):
    """parameters: a regex over the paths of all parameters that ``compute`` reads; where none of them trains, its results may be kept.
    compute: (variables, batch with images) -> arrays [b, ...] by the name that the loss looks for."""
    parameters: str
    compute: Callable[[Variables, Batch], dict[str, jax.Array]]


@dataclasses.dataclass(frozen=True)
class System:
    """model: linen module with named methods and no loss in them.

    init(key, batch_spec) -> variables with boxed leaves that carry logical axis names.
    loss(variables, carry, batch, context) -> (scalar, Output): pure, over the global batch.
    predict: name -> (variables, batch, *, key=None, **static) -> dict of arrays.
    init_carry, next_carry, carry_axes: momentum copies and queues; ``carry_axes`` maps a regex
    over carry paths to logical axes (a leaf under ``teacher/`` inherits the axes it shadows).
    papers: arXiv ids of what to cite.
    cacheable: what the loss takes from its batch instead of images where it is there.
    adopt: name of another system -> rules (``weight_rules``; sources are that system's paths, "" the target's own) by which a stage whose
    ``init`` names weights of it starts from them: a head's stage from a pre-trained model. What no rule fills is fresh.
    """
    model: nn.Module
    init: Callable[[jax.Array, Mapping[str, jax.ShapeDtypeStruct]], Variables]
    loss: Callable[[Variables, Carry, Batch, Context], tuple[jax.Array, Output]]
    predict: Mapping[str, Callable[..., dict[str, jax.Array]]]
    init_carry: Callable[[Variables], Carry] = no_carry
    next_carry: Callable[[Carry, Any], Carry] = keep_carry
    carry_axes: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    papers: tuple[str, ...] = ()
    cacheable: Cacheable | None = None
    adopt: Mapping[str, tuple[tuple[str, str, str], ...]] = dataclasses.field(default_factory=dict)
