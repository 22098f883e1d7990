"""The first state of a stage: shapes and axes, fresh or taken-over weights, placed on the mesh."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from vlm_jax import partitioning, weight_rules
from vlm_jax.system import System
from vlm_jax.train.optim import state_axes
from vlm_jax.train.state import TrainState, merge, split, unbox

Axes = Mapping[str, tuple[str, ...]]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is known of a state before any array exists."""
    shapes: Mapping[str, jax.ShapeDtypeStruct]    # all parameters
    moving: Mapping[str, jax.ShapeDtypeStruct]
    axes: Axes                                    # logical axes of both
    trainable: frozenset[str]

    @property
    def trained(self) -> dict[str, jax.ShapeDtypeStruct]:
        return {p: x for p, x in self.shapes.items() if p in self.trainable}

    @property
    def frozen(self) -> dict[str, jax.ShapeDtypeStruct]:
        return {p: x for p, x in self.shapes.items() if p not in self.trainable}

    def count(self, prefix: str = "", trained: bool | None = None) -> int:
        return sum(math.prod(x.shape) for p, x in self.shapes.items() if p.startswith(prefix)
                   and (trained is None or (p in self.trainable) == trained))


def plan(system: System, batch_spec: Mapping[str, jax.ShapeDtypeStruct], trainable: Sequence[str] = (".*",)) -> Plan:
    """Shapes, axes and the trainable split of a system; allocates nothing."""
    found: dict[str, Any] = {}

    def shapes(key):
        params, moving, axes = unbox(system.init(key, batch_spec))
        found["axes"] = axes
        return params, moving

    params, moving = jax.eval_shape(shapes, jax.random.key(0))
    trained, _ = split(params, trainable)
    return Plan(params, moving, found["axes"], frozenset(trained))


def golden(plan: Plan, sizes: Mapping[str, int]) -> str:
    """One line per leaf (path, shape, dtype, axes, trained?, spec on a mesh of ``sizes``): a refactor's effect as a diff."""
    lines = []
    for path, x in sorted({**plan.shapes, **plan.moving}.items()):
        kind = "trained" if path in plan.trainable else "frozen" if path in plan.shapes else "moving"
        spec = ",".join("+".join(a) if isinstance(a, tuple) else a or "-" for a in partitioning.spec(plan.axes[path], x.shape, sizes))
        lines.append(f"{path} {'x'.join(map(str, x.shape)) or 'scalar'} {x.dtype} ({','.join(plan.axes[path])}) {kind} [{spec}]")
    return "\n".join(lines) + "\n"


def create(system: System, plan: Plan, tx: optax.GradientTransformation, mesh: Mesh, key: jax.Array,
           batch_spec: Mapping[str, jax.ShapeDtypeStruct], given: Mapping[str, np.ndarray],
           ema: float = 0.0) -> TrainState:
    """A state on the mesh: weights in ``given`` (path -> array) where there are some, fresh elsewhere. Paths that start with
    "carry/" are of the carry; those that it does not have, or has in another shape, are passed over."""
    def build(given):
        params, moving, _ = unbox(system.init(key, batch_spec))
        params, moving = {**params, **given["params"]}, {**moving, **given["moving"]}
        trained = {p: x for p, x in params.items() if p in plan.trainable}
        frozen = {p: x for p, x in params.items() if p not in plan.trainable}
        return TrainState(step=jnp.int32(0), params=trained, frozen=frozen, moving=moving, opt_state=tx.init(trained),
                          carry=taken(system.init_carry(merge(trained, frozen, moving)), given["carry"]),
                          ema=dict(trained) if ema else {}, bad_steps=jnp.int32(0))

    def taken(carry, given):
        def leaf(path, x):
            value = given.get(jax.tree_util.keystr(path, simple=True, separator="/"))
            return x if value is None or value.shape != x.shape else value.astype(x.dtype)
        return jax.tree_util.tree_map_with_path(leaf, carry)

    given = {"carry": {p.removeprefix("carry/"): np.asarray(x) for p, x in given.items() if p.startswith("carry/")},
             "params": {p: np.asarray(x, plan.shapes[p].dtype) for p, x in given.items() if p in plan.shapes},
             "moving": {p: np.asarray(x, plan.moving[p].dtype) for p, x in given.items() if p in plan.moving}}
    shardings = state_shardings(system, plan, tx, mesh, jax.eval_shape(build, given))
    return jax.jit(build, out_shardings=shardings)(given)


def abstract(system: System, plan: Plan, tx: optax.GradientTransformation, mesh: Mesh,
             ema: float = 0.0) -> TrainState:
    """The state as ShapeDtypeStructs with shardings: what a checkpoint is restored into."""
    def build(params, moving):
        trained = {p: x for p, x in params.items() if p in plan.trainable}
        frozen = {p: x for p, x in params.items() if p not in plan.trainable}
        return TrainState(step=jnp.int32(0), params=trained, frozen=frozen, moving=moving, opt_state=tx.init(trained),
                          carry=system.init_carry(merge(trained, frozen, moving)),
                          ema=dict(trained) if ema else {}, bad_steps=jnp.int32(0))

    shapes = jax.eval_shape(build, dict(plan.shapes), dict(plan.moving))
    shardings = state_shardings(system, plan, tx, mesh, shapes)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def state_shardings(system: System, plan: Plan, tx: optax.GradientTransformation, mesh: Mesh,
                    shapes: TrainState) -> TrainState:
    """Where every leaf of the state lives."""
    def place(axes, x):
        return partitioning.sharding(mesh, axes, x.shape)

    def flat(leaves):
        return {p: place(plan.axes[p], x) for p, x in leaves.items()}

    axes = state_axes(tx, plan.trained, plan.axes)
    opt = jax.tree.map(lambda x, a: place(a, x), shapes.opt_state, axes)
    return TrainState(step=partitioning.replicated(mesh), params=flat(shapes.params), frozen=flat(shapes.frozen),
                      moving=flat(shapes.moving), opt_state=opt, ema=flat(shapes.ema),
                      carry=jax.tree_util.tree_map_with_path(
                          lambda path, x: place(carry_axes(system, plan, path, x), x), shapes.carry),
                      bad_steps=partitioning.replicated(mesh))


def carry_axes(system: System, plan: Plan, path: tuple[Any, ...], x: Any) -> tuple[str, ...]:
    """A carry leaf's axes: by the system's table, or those of the parameter that it shadows."""
    name = "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)
    for pattern, axes in system.carry_axes.items():
        if re.fullmatch(pattern, name):
            return tuple(axes)
    for param, shape in plan.shapes.items():
        if name.endswith(param) and shape.shape == x.shape:
            return plan.axes[param]
    if x.ndim == 0:
        return ()
    raise ValueError(f"carry leaf {name} of shape {x.shape} has no axes: name it in System.carry_axes")


def split_source(source: str) -> tuple[str, str]:
    """"@stage:template", "DIR:template", or either without a template -> (origin, template)."""
    origin, _, template = source.rpartition(":")
    return (source, "") if origin in ("", "hf") else (origin, template)      # "hf:OWNER/NAME" alone has a colon of its own


def take_over(rules: Sequence[weight_rules.Rule], plan: Plan,
              open_origin: Callable[[str], Mapping[str, np.ndarray]], where: str) -> dict[str, np.ndarray]:
    """Weights that a stage's ``init`` rules take from elsewhere.

    A source is ``"@stage:template"``, ``"DIR:template"`` or ``"fresh"``; an empty template means
    the target's own path. ``open_origin`` reads the leaves of "@stage" or "DIR".
    """
    sources: dict[str, np.ndarray] = {}
    full: list[weight_rules.Rule] = []
    for target, source, how in rules:
        if source != weight_rules.FRESH:
            origin, template = split_source(source)
            key = origin.replace("\\", "/")
            if not any(name.startswith(f"{key}:") for name in sources):
                sources.update({f"{key}:{p}": x for p, x in open_origin(origin).items()})
            source = key + ":" + (template or r"\g<0>")
        full.append((target, source, how))
    return weight_rules.apply(full, {p: x.shape for p, x in {**plan.shapes, **plan.moving}.items()}, sources, where)
