"""The one place that knows the mesh, and which of several processes this one is.

Modules name their axes by meaning ("embed", "heads", "batch"); the table below maps each
meaning to mesh axes. The mesh always has the three axes of ``MESH_AXES``; a rule set says
which of them may be longer than one, so one table serves all rule sets:

========= ======================= ===========================================
rules     mesh axes in use        what is split
========= ======================= ===========================================
dp        data                    the batch
fsdp      data, fsdp              the batch, and weights along their width
fsdp_tp   data, fsdp, tensor      also heads, hidden units and vocabulary
========= ======================= ===========================================

Losses and modules speak of global arrays; ``ring`` is the one way into per-device code. Several processes run the same
program over one mesh; each reads the rows of a batch that its devices hold (``rows_here``).
"""

from __future__ import annotations

import contextvars
import dataclasses
import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from vlm_jax.errors import nearest

MESH_AXES = ("data", "fsdp", "tensor")
RULES = {"dp": ("data",), "fsdp": ("data", "fsdp"), "fsdp_tp": ("data", "fsdp", "tensor")}

# Weight and activation names differ, so that "embed" on fsdp never meets a batch on fsdp.
AXES: Mapping[str, tuple[str, ...]] = {
    # weights
    "embed": ("fsdp",), "heads": ("tensor",), "head_dim": (), "mlp": ("tensor",), "vocab": ("tensor",),
    "layers": (), "joint": (), "position": (), "patch": (), "norm": (), "query": (), "rank": (),
    "conv_h": (), "conv_w": (), "conv_in": (), "conv_out": ("fsdp",),
    # activations
    "batch": ("data", "fsdp"), "length": (), "act_embed": (), "act_heads": ("tensor",),
    "act_mlp": ("tensor",), "act_vocab": ("tensor",), "none": (),
}
BATCH_AXES = AXES["batch"]
COPY = 128      # devices that share one copy of the weights, at most: most widths are multiples of it, and what does not divide lies whole on each


def mesh_sizes(rules: str, count: int, slices: int = 1, data: int = 0, fsdp: int = 0, tensor: int = 0) -> dict[str, int]:
    """The sizes of the mesh axes over ``count`` devices in so many slices. A size of 0 is chosen: tensor 2 where it divides, fsdp at most ``COPY``.

    Raises ValueError when an axis is asked for that the rules do not use, or sizes do not multiply to the number of devices.
    """
    if rules not in RULES:
        raise ValueError(f"rules={rules!r} is not a rule set{nearest(rules, tuple(RULES))}")
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    for axis in MESH_AXES:
        if axis not in RULES[rules]:
            if sizes[axis] > 1:
                raise ValueError(f"mesh.{axis}={sizes[axis]} has no use under rules={rules!r}, which splits over "
                                 f"{RULES[rules]} only")
            sizes[axis] = 1
    if rules == "fsdp_tp" and not sizes["tensor"]:
        fixed = max(1, sizes["data"]) * max(1, sizes["fsdp"])
        if sizes["data"] and sizes["fsdp"]:
            sizes["tensor"] = max(1, count // fixed)
        else:
            sizes["tensor"] = 2 if (count // fixed) % 2 == 0 and count >= 2 * fixed else 1
    if rules != "dp" and not sizes["data"] and not sizes["fsdp"]:
        each = max(1, count // (slices * sizes["tensor"]))
        sizes["fsdp"] = max(n for n in range(1, min(COPY, each) + 1) if each % n == 0)
    last = "fsdp" if sizes["data"] else "data"
    if not sizes[last]:
        sizes[last] = max(1, count // math.prod(max(1, s) for a, s in sizes.items() if a != last))
    if math.prod(sizes.values()) != count:
        raise ValueError(f"mesh data={sizes['data']} x fsdp={sizes['fsdp']} x tensor={sizes['tensor']} = "
                         f"{math.prod(sizes.values())} does not cover the {count} devices present")
    if sizes["data"] % slices:
        raise ValueError(f"mesh.data={sizes['data']} does not divide over {slices} slices; nearest: {max(1, sizes['data'] // slices) * slices}")
    return sizes


def make_mesh(rules: str = "dp", data: int = 0, fsdp: int = 0, tensor: int = 0,
              devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Builds the mesh of a rule set, with sizes as ``mesh_sizes`` has them. Raises ValueError."""
    devices = list(jax.devices() if devices is None else devices)
    slices = len({getattr(d, "slice_index", 0) for d in devices}) if devices[0].platform == "tpu" else 1
    sizes = mesh_sizes(rules, len(devices), slices, data, fsdp, tensor)
    shape, types = tuple(sizes[a] for a in MESH_AXES), (AxisType.Auto,) * 3
    split = dict(allow_split_physical_axes=True)      # 128 x 4 on a v5p of 8 x 8 x 8 divides one of its axes
    if slices > 1:      # what crosses from slice to slice is the slowest: sums over "data" alone
        inner = (sizes["data"] // slices, sizes["fsdp"], sizes["tensor"])
        return Mesh(mesh_utils.create_hybrid_device_mesh(inner, (slices, 1, 1), devices, **split), MESH_AXES, axis_types=types)
    return Mesh(mesh_utils.create_device_mesh(shape, devices, **split), MESH_AXES, axis_types=types)


def use(mesh: Mesh):
    """Context in which ``shard`` and ``ring`` speak of ``mesh``; part of jit's cache key."""
    return jax.set_mesh(mesh)


def current_sizes() -> dict[str, int]:
    """Mesh axis sizes in force while tracing; empty outside any mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return {} if mesh is None or mesh.empty else dict(mesh.shape)


def spec(axes: Sequence[str], shape: Sequence[int], sizes: Mapping[str, int]) -> PartitionSpec:
    """Mesh axes for logical ``axes``. A dimension that its mesh axes do not divide stays whole;
    a mesh axis serves one dimension of a tensor, the first that can have it."""
    if len(axes) != len(shape):
        raise ValueError(f"axes {tuple(axes)} name {len(axes)} dimensions of an array of shape {tuple(shape)}")
    taken: set[str] = set()
    out: list[Any] = []
    for name, length in zip(axes, shape):
        if name not in AXES:
            raise ValueError(f"{name!r} is not a logical axis{nearest(name, tuple(AXES))}")
        mesh_axes = tuple(a for a in AXES[name] if sizes.get(a, 1) > 1 and a not in taken)
        if mesh_axes and length % math.prod(sizes[a] for a in mesh_axes) == 0:
            taken.update(mesh_axes)
            out.append(mesh_axes if len(mesh_axes) > 1 else mesh_axes[0])
        else:
            out.append(None)
    return PartitionSpec(*out)


def shard(x: jax.Array, *axes: str) -> jax.Array:
    """States how an activation lies on the mesh; the identity without one, or inside ``ring``."""
    sizes = current_sizes()
    if not sizes or math.prod(sizes.values()) == 1 or jax.sharding.get_abstract_mesh().manual_axes:
        return x
    return jax.lax.with_sharding_constraint(x, spec(axes, x.shape, sizes))


def gather(weight: jax.Array, *axes: str) -> jax.Array:
    """A weight, already in the dtype of the product, as the product reads it: whole along what "fsdp" splits, and its gradient split again.

    Left to itself, XLA may keep the pieces and send activations or float32 sums instead, several times as much. The identity where "fsdp" is 1.
    """
    sizes = current_sizes()
    if sizes.get("fsdp", 1) == 1 or jax.sharding.get_abstract_mesh().manual_axes:
        return weight
    held, read = spec(axes, weight.shape, sizes), spec(axes, weight.shape, {**sizes, "fsdp": 1})
    return weight if held == read else _gather(weight, held, read)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(weight: jax.Array, held: PartitionSpec, read: PartitionSpec) -> jax.Array:
    pieces = jax.lax.with_sharding_constraint(weight, held)      # said too, or what is kept for the backward pass may be whole
    return jax.lax.with_sharding_constraint(pieces, read)


_gather.defvjp(lambda weight, held, read: (_gather.__wrapped__(weight, held, read), None),
               lambda held, read, _, gradient: (jax.lax.with_sharding_constraint(gradient, held),))


def sharding(mesh: Mesh, axes: Sequence[str], shape: Sequence[int]) -> NamedSharding:
    """Where a leaf with these logical axes lives."""
    return NamedSharding(mesh, spec(axes, shape, dict(mesh.shape)))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def divisible(rows: int, mesh: Mesh) -> int:
    """The least number of rows from ``rows`` on that divides over the mesh."""
    shards = math.prod(mesh.shape[a] for a in BATCH_AXES)
    return -(-rows // shards) * shards


def check_rows(rows: int, mesh: Mesh) -> None:
    """Raises ValueError when a batch of ``rows`` does not divide over the mesh."""
    shards = math.prod(mesh.shape[a] for a in BATCH_AXES)
    if rows % shards:
        raise ValueError(f"batch={rows} does not divide over {shards} devices; nearest: "
                         f"{max(shards, round(rows / shards) * shards)}")


def place(batch: Mapping[str, Any], mesh: Mesh, total: int | None = None) -> dict[str, jax.Array]:
    """Host batch -> devices, rows over the batch axes: the one way onto devices.

    Rows that do not divide over the mesh lie whole on every device (see ``check_rows``). ``total``: rows of the global batch,
    where ``batch`` holds only those of this process (``rows_here``); without it, all processes bring the same whole batch.
    """
    def put(x):
        x = np.asarray(x)
        shape = x.shape if total is None or not x.ndim else (total, *x.shape[1:])
        where = sharding(mesh, ("batch",) + ("none",) * (len(shape) - 1) if shape else (), shape)
        if where.is_fully_addressable:
            return jax.device_put(x, where)

        def piece(index):
            if total is None or not shape:
                return x[index]
            first, last, _ = index[0].indices(total)
            return x[slice(*np.searchsorted(rows_here(total, mesh), (first, last)))]
        return jax.make_array_from_callback(shape, where, piece)

    return {name: put(x) for name, x in batch.items()}


@functools.lru_cache(maxsize=64)
def rows_here(total: int, mesh: Mesh) -> np.ndarray:
    """The rows of a batch of ``total`` that devices of this process hold, in order: all of them in a single process."""
    pieces = sharding(mesh, ("batch",), (total,)).addressable_devices_indices_map((total,)).values()
    return np.unique(np.concatenate([np.arange(total)[index] for index in pieces]))


def whole_batch(batch: Mapping[str, Any], mesh: Mesh, total: int) -> dict[str, np.ndarray]:
    """The whole batch of ``total`` rows in every process, each of which brings its own (``rows_here``)."""
    if jax.process_count() == 1:
        return dict(batch)
    return jax.device_get(_everywhere(mesh)(place(batch, mesh, total)))


@functools.lru_cache(maxsize=8)
def _everywhere(mesh: Mesh) -> Callable[[Any], Any]:
    return jax.jit(lambda x: x, out_shardings=replicated(mesh))


# ---- processes

_alone: contextvars.ContextVar[bool] = contextvars.ContextVar("alone", default=False)


def process_count() -> int:
    """How many processes there are; 1 in what ``from_first`` computes, which the others know nothing of."""
    return 1 if _alone.get() else jax.process_count()


def process_number() -> int:
    """Which process this is, from 0."""
    return jax.process_index()


def is_first() -> bool:
    """Whether this process writes what is written once, and speaks."""
    return jax.process_index() == 0


def exchange(value: Any) -> list[Any]:
    """A JSON value of each process, in all of them: every process calls it at the same place."""
    if process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value, default=lambda x: x.item()).encode(), np.uint8)
    lengths = np.ravel(multihost_utils.process_allgather(np.int32(text.size)))
    size = 1 << max(10, int(lengths.max() - 1).bit_length())      # a program is compiled for every size
    rows = multihost_utils.process_allgather(np.pad(text, (0, size - text.size))).astype(np.uint8)
    return [json.loads(row[:length].tobytes()) for row, length in zip(rows, lengths)]


def from_first(compute: Callable[[], Any]) -> Any:
    """A JSON value that the first process computes and all return: every process calls it at the same place."""
    if process_count() == 1:
        return compute()
    value = None
    if is_first():
        token = _alone.set(True)
        try:
            value = compute()
        finally:
            _alone.reset(token)
    return exchange(value)[0]


def abstract(batch: Mapping[str, Any], mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of a batch as ``place`` would lay them: what a program is compiled for."""
    return {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding(mesh, ("batch",) + ("none",) * (len(x.shape) - 1), x.shape))
            for name, x in batch.items()}


@dataclasses.dataclass(frozen=True)
class Ring:
    """What a function inside ``ring`` knows: how many peers, which am I, and how to pass on."""
    size: int
    axes: tuple[str, ...]

    def index(self) -> jax.Array:
        return jax.lax.axis_index(self.axes) if self.axes else jax.numpy.int32(0)

    def shift(self, tree: Any) -> Any:
        """Hands ``tree`` to the next peer and returns the previous one's."""
        if not self.axes:
            return tree
        steps = [(i, (i + 1) % self.size) for i in range(self.size)]
        return jax.tree.map(lambda x: jax.lax.ppermute(x, self.axes, steps), tree)

    def sum(self, tree: Any) -> Any:
        return jax.tree.map(lambda x: jax.lax.psum(x, self.axes), tree) if self.axes else tree

    def varying(self, tree: Any) -> Any:
        """Marks fresh scan carries, equal on all peers, as free to differ (shard_map's checker wants it said)."""
        return jax.lax.pcast(tree, self.axes, to="varying")


def ring(fn: Callable[..., Any], in_axes: Sequence[str], out_axes: Any) -> Callable[..., Any]:
    """Runs ``fn(ring, *args)`` per device over the batch axes of the mesh.

    ``in_axes``: per argument "batch" (rows split) or "none" (whole everywhere); ``out_axes``
    the same, as a pytree prefix of the result; "none" results must be equal on all peers
    (``Ring.sum`` makes them so). Without a mesh, or on one device, ``fn`` runs once with size 1.
    """
    sizes = current_sizes()
    axes = tuple(a for a in BATCH_AXES if sizes.get(a, 1) > 1)
    size = math.prod(sizes[a] for a in axes) if axes else 1
    if size == 1:
        return lambda *args: fn(Ring(1, ()), *args)

    def to_spec(name):
        return PartitionSpec(axes) if name == "batch" else PartitionSpec()

    return jax.shard_map(lambda *args: fn(Ring(size, axes), *args),
                         in_specs=tuple(to_spec(a) for a in in_axes),
                         out_specs=jax.tree.map(to_spec, out_axes), axis_names=set(axes))
