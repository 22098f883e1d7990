"""What a compiled train step asks of a chip, and the time that the chip's speeds allow for it at best.

Matrix products are counted in the traced program, loops included, and shared out evenly over the devices. Bytes, of memory and between
devices, are read from the optimised program of one device, each loop as often as it turns. XLA's own ``cost_analysis`` counts the body of a
loop once, and a stack of layers is a loop.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peaks of one device, as its maker publishes them. flops: bfloat16 operations a second; memory: bytes of it, of a TPU those that a program may use; bandwidth:
    bytes of memory a second; network: bytes that it may send to its neighbours a second, all links together, one way."""
    name: str
    flops: float
    memory: float
    bandwidth: float
    network: float


GIB = 2**30
# By JAX's device_kind. TPUs: docs.cloud.google.com/tpu/docs/system-architecture-tpu-vm; their memory is what their compiler takes.
CHIPS: Mapping[str, Chip] = {
    "TPU v4": Chip("v4", 275e12, 32 * GIB, 1.2e12, 300e9),
    "TPU v5 lite": Chip("v5e", 197e12, 15.75 * GIB, 0.82e12, 200e9),
    "TPU v5": Chip("v5p", 459e12, 95.74 * GIB, 2.765e12, 600e9),
    "TPU v6 lite": Chip("v6e", 918e12, 31.25 * GIB, 1.64e12, 400e9),
    "TPU7x": Chip("tpu7x", 1153e12, 94.75 * GIB, 3.69e12, 300e9),      # a device is half a chip
    "NVIDIA A100-SXM4-40GB": Chip("A100", 312e12, 40e9, 1.555e12, 300e9),
    "NVIDIA A100-SXM4-80GB": Chip("A100", 312e12, 80e9, 2.039e12, 300e9),
    "NVIDIA H100 80GB HBM3": Chip("H100", 989e12, 80e9, 3.35e12, 450e9),
    "NVIDIA H200": Chip("H200", 989e12, 141e9, 4.8e12, 450e9),
    "NVIDIA GeForce RTX 4090": Chip("RTX 4090", 165e12, 24e9, 1.008e12, 32e9),      # products that are summed in float32
    "NVIDIA GeForce RTX 4080": Chip("RTX 4080", 97.5e12, 16e9, 0.717e12, 32e9),
}


def chip_of(mesh: Any) -> Chip | None:
    """The chip that ``mesh`` is made of; None where its speeds are not known here."""
    return CHIPS.get(mesh.devices.flat[0].device_kind)


@dataclasses.dataclass(frozen=True)
class Collective:
    """One kind of exchange in a step: how often, and the bytes that a device sends in all of them."""
    count: int
    sent: float


@dataclasses.dataclass(frozen=True)
class Demand:
    """Of one device in one step. flops: of matrix products and convolutions; traffic: bytes of memory read and written as the compiler arranged
    them (what stays in a cache is counted all the same on GPUs and CPUs); collectives: by name."""
    flops: float
    traffic: float
    collectives: Mapping[str, Collective]

    @property
    def sent(self) -> float:
        return sum(c.sent for c in self.collectives.values())

    def seconds(self, chip: Chip) -> dict[str, float]:
        """What each of the chip's units needs at least; they may work side by side, so that a step takes at least the longest."""
        return {"compute": self.flops / chip.flops, "memory": self.traffic / chip.bandwidth, "network": self.sent / chip.network}


def demand(traced: Any, program: Any, devices: int) -> Demand:
    """Of ``program``, compiled from ``traced`` (``jax.stages.Traced``) for so many devices."""
    traffic, collectives = read_program(program.as_text(), devices)
    return Demand(flops(traced.jaxpr.jaxpr) / devices, traffic, collectives)


# ---- products in a traced program -----------------------------------------------------------------

def flops(jaxpr: Any, times: float = 1.0) -> float:
    """Floating-point operations of the products and convolutions of a jaxpr on all devices, 2 for a multiplication with its addition. Of the
    branches of a condition the dearest; a ``while`` whose turns are not known counts once."""
    total = 0.0
    for eqn in jaxpr.eqns:
        name, params = eqn.primitive.name, eqn.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            total += times * 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(eqn.invars[0].aval.shape[i] for i in contracted)
        elif name == "conv_general_dilated":
            kernel, out_features = eqn.invars[1].aval.shape, params["dimension_numbers"].rhs_spec[0]
            total += times * 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(kernel) / kernel[out_features]
        elif name == "cond":
            total += max(flops(branch.jaxpr, times) for branch in params["branches"])
        else:
            inner = times * {"scan": params.get("length", 1), "shard_map": _shards(eqn), "pallas_call": _grid(params)}.get(name, 1)
            total += sum(flops(sub, inner) for sub in _inner(params))
    return total


def _inner(params: Mapping[str, Any]) -> Iterator[Any]:
    """The jaxprs among the parameters of an equation."""
    for value in params.values():
        for one in value if isinstance(value, (tuple, list)) else (value,):
            one = getattr(one, "jaxpr", one)
            if hasattr(one, "eqns"):
                yield one


def _shards(eqn: Any) -> int:
    """How many devices run the body of a ``shard_map``, each on its own part."""
    mesh, axes = eqn.params.get("mesh"), eqn.params.get("newly_manual_axes", eqn.params.get("manual_axes", ()))
    return math.prod(mesh.shape[a] for a in axes) if mesh is not None else 1


def _grid(params: Mapping[str, Any]) -> int:
    """How often the body of a Pallas kernel runs."""
    mapping = params.get("grid_mapping")
    return math.prod(n for n in mapping.grid if isinstance(n, int)) if mapping is not None else 1


# ---- bytes in an optimised program ----------------------------------------------------------------

class Op(NamedTuple):
    """An instruction of an HLO text: ``shape`` as it is written, names of operands, and what follows them."""
    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    root: bool


BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "f8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4,
         "s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16}
_ARRAY = re.compile(r"\b([a-z]+\d+(?:e\d\w*)?|pred)\[([\d,]*)\](?:\{([^}]*)\})?")
_OP = re.compile(r"\s*(ROOT )?%?([\w.\-]+) = (.*)")
_CALLED = re.compile(r"\b(calls|to_apply|body|condition|branch_computations|called_computations|(?:true|false)_computation)=(?:\{([^}]*)\}|%?([\w.\-]+))")
_COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all", "collective-broadcast")
_FREE = ("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "while", "conditional", "call", "partition-id", "after-all", "iota",
         "opt-barrier", "copy-done", "async-done", "async-update", "domain")


def size(shape: str, memory_alone: bool = False) -> float:
    """Bytes of an array or tuple as HLO writes it; with ``memory_alone`` without what lies in a TPU's own fast memory (``S(1)`` ...)."""
    total = 0.0
    for kind, dims, layout in _ARRAY.findall(shape):
        if not (memory_alone and re.search(r"S\([1-9]", layout)):
            total += BYTES.get(kind, BYTES.get(kind[:2], 1)) * math.prod(int(n) for n in dims.split(",") if n)
    return total


def read_computations(text: str) -> tuple[dict[str, list[Op]], str]:
    """(instructions by computation, name of the entry) of an HLO module's text."""
    out: dict[str, list[Op]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if line.startswith(("%", "ENTRY")) and line.endswith("{"):
            name = line.removeprefix("ENTRY").strip().split(" ")[0].lstrip("%")
            current = out[name] = []
            entry = name if line.startswith("ENTRY") else entry
        elif line.startswith("}"):
            current = None
        elif current is not None and (match := _OP.match(line)):
            shape, rest = _cut(match.group(3))
            opcode, _, rest = rest.partition("(")
            inside, attributes = _balanced(rest)
            current.append(Op(match.group(2), shape, opcode.strip(), tuple(re.findall(r"%([\w.\-]+)", inside)) or (inside,), attributes,
                              bool(match.group(1))))
    return out, entry


def _cut(text: str) -> tuple[str, str]:
    """(shape, the rest) of what follows "name = "."""
    if text.startswith("("):
        inside, rest = _balanced(text[1:])
        return f"({inside})", rest.strip()
    shape, _, rest = text.partition(" ")
    return shape, rest


def _balanced(text: str) -> tuple[str, str]:
    """Up to the parenthesis that closes one opened before ``text``, and what follows."""
    depth = 1
    for match in re.finditer(r"[()]", text):
        depth += 1 if match.group() == "(" else -1
        if not depth:
            return text[:match.start()], text[match.end():]
    return text, ""


def turns(op: Op, computations: Mapping[str, list[Op]]) -> int:
    """How often the body of a ``while`` runs: as XLA notes it, or from a counter from 0 that is compared with a constant; 1 where neither tells."""
    noted = re.search(r'known_trip_count[^\d]*(\d+)', op.attributes)
    if noted:
        return int(noted.group(1))
    called = {kind: name for kind, _, name in _CALLED.findall(op.attributes)}
    condition = {o.name: o for o in computations.get(called.get("condition", ""), ())}
    body = {o.name: o for o in computations.get(called.get("body", ""), ())}
    compare = next((o for o in condition.values() if o.root), None)
    if compare is not None and compare.opcode == "fusion":      # the comparison of a fused condition has the operands of the fusion
        fused = next((o for o in computations.get(next(called_by(compare), ""), ()) if o.root), None)
        compare = compare._replace(attributes=fused.attributes) if fused is not None and fused.opcode == "compare" else None
    if compare is None or "direction=LT" not in compare.attributes:
        return 1
    limit = next((_constant(condition[o]) for o in compare.operands if o in condition and condition[o].opcode == "constant"), None)
    counter = next((condition[o] for o in compare.operands if o in condition and condition[o].opcode == "get-tuple-element"), None)
    if limit is None or counter is None:
        return 1
    index = int(re.search(r"index=(\d+)", counter.attributes).group(1))
    root, stride = next((o for o in body.values() if o.root), None), 1
    if root is not None and root.opcode == "tuple" and index < len(root.operands):
        new = body.get(root.operands[index])
        added = [_constant(body[o]) for o in new.operands if o in body and body[o].opcode == "constant"] if new is not None and new.opcode == "add" else []
        stride = added[0] if added and added[0] else 1
    return max(1, -(-limit // stride))


def _constant(op: Op) -> int | None:
    return int(op.operands[0]) if re.fullmatch(r"-?\d+", op.operands[0]) else None


def called_by(op: Op) -> Iterator[str]:
    for _, several, one in _CALLED.findall(op.attributes):
        yield from (name.strip().lstrip("%") for name in (several or one).split(","))


def read_program(text: str, devices: int) -> tuple[float, dict[str, Collective]]:
    """(bytes of memory that a device moves, its collectives) in one run of an optimised HLO module."""
    computations, entry = read_computations(text)
    times: dict[str, float] = collections.defaultdict(float)
    inside: set[str] = set()        # computations of fusions: their values never reach memory

    def walk(name: str, count: float, fused: bool) -> None:
        times[name] += count
        if fused:
            inside.add(name)
        for op in computations.get(name, ()):
            inner = count * (turns(op, computations) if op.opcode == "while" else 1)
            for called in called_by(op):
                if called in computations and not (op.opcode.startswith("all-reduce") or op.opcode.startswith("reduce")):
                    walk(called, inner, fused or op.opcode == "fusion")

    walk(entry, 1.0, False)
    traffic, found = 0.0, {}
    for name, count in times.items():
        ops = {op.name: op for op in computations[name]}
        for op in ops.values():
            kind = op.opcode.removesuffix("-start")
            if kind in _COLLECTIVES:
                channel = re.search(r"channel_id=(\d+)", op.attributes)
                key = (kind, channel.group(1) if channel else f"{name}/{op.name}")       # one that runs beside products is written in parts
                sent = egress(op, kind, devices, ops)
                if key not in found or found[key][0] * found[key][1] < count * sent:
                    found[key] = (count, sent)
            if name not in inside and op.opcode not in _FREE and not op.opcode.endswith("-done"):
                traffic += count * moved(op, ops, computations)
    kinds: dict[str, list[tuple[float, float]]] = collections.defaultdict(list)
    for (kind, _), value in found.items():
        if value[1]:
            kinds[kind].append(value)
    return traffic, {kind: Collective(int(sum(n for n, _ in values)), sum(n * b for n, b in values)) for kind, values in sorted(kinds.items())}


def moved(op: Op, ops: Mapping[str, Op], computations: Mapping[str, list[Op]]) -> float:
    """Bytes that an instruction reads from memory and writes to it. Of what is sliced, or updated in place, the slice alone."""
    def held(name: str) -> float:
        return size(ops[name].shape, True) if name in ops else 0.0

    if op.opcode in ("dynamic-slice", "slice", "gather"):
        return 2 * size(op.shape, True)
    if op.opcode in ("dynamic-update-slice", "scatter"):
        return 2 * held(op.operands[1 if op.opcode == "dynamic-update-slice" else -1])
    if op.opcode.endswith("-start"):        # its shape holds what is read too, whole
        whole = sum(size(ops[name].shape) for name in op.operands if name in ops)
        read = sum(map(held, op.operands))
        return min(read, size(op.shape) - whole) + max(0.0, size(op.shape, True) - read)
    if op.opcode != "fusion":
        return sum(map(held, op.operands)) + size(op.shape, True)
    body = computations.get(next(called_by(op), ""), [])
    inner = {o.name: o for o in body}
    total = 0.0
    for o in body:
        if o.opcode == "parameter" and o.operands[0].isdigit() and int(o.operands[0]) < len(op.operands):
            whole = held(op.operands[int(o.operands[0])])
            users = [u for u in body if o.name in u.operands]
            if users and all(u.opcode in ("dynamic-slice", "slice", "gather") or (u.opcode == "dynamic-update-slice" and u.operands[0] == o.name)
                             for u in users):
                whole = min(whole, sum(size(u.shape) for u in users if u.opcode != "dynamic-update-slice"))
            total += whole
    written = size(op.shape, True)
    root = next((o for o in body if o.root), None)
    while root is not None and root.opcode == "bitcast":
        root = inner.get(root.operands[0])
    if root is not None and root.opcode == "dynamic-update-slice" and root.operands[1] in inner:
        written = min(written, size(inner[root.operands[1]].shape))
    return total + written


def group_size(attributes: str, devices: int) -> int:
    """How many devices take part in one exchange together."""
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*?\{('[^}]*)\}", attributes)     # the devices' order may stand between them
    if mesh:
        sizes = {name: int(n) for name, n in re.findall(r"'([^']+)'=(\d+)", mesh.group(1))}
        return math.prod(int(part or sizes[name]) for name, part in re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", mesh.group(2)))
    grid = re.search(r"replica_groups=\[(\d+),(\d+)\]", attributes)
    if grid:
        return int(grid.group(2))
    first = re.search(r"replica_groups=\{\{([\d,]*)\}", attributes)
    return len(first.group(1).split(",")) if first else devices


def egress(op: Op, kind: str, devices: int, ops: Mapping[str, Op]) -> float:
    """Bytes that a device sends at least in one collective."""
    given = sum(size(ops[name].shape) for name in op.operands if name in ops)
    if kind == "collective-permute":
        return given
    n = group_size(op.attributes, devices)
    share = (n - 1) / n
    return {"all-reduce": 2 * share * given, "all-gather": given * (n - 1), "collective-broadcast": given}.get(kind, share * given)
