"""Optimizers over flat parameter dicts: one chain, and per-leaf rules written as regexes.

The chain is always clip -> direction (AdamW, Adafactor, Lion, Muon) -> decoupled weight decay ->
learning rate -> clamp. Parameters are flat dicts keyed by path, 'image/blocks/attn/query/kernel'.
What a dimension means is read off its logical axis: a leading "layers" axis (scanned stacks) is a
batch of parameters and never counts towards rank; neighbouring axes of one meaning (heads with
head_dim, the three inputs of a convolution) count as one side of a matrix.

Patterns are matched against whole paths (``re.fullmatch``), first match wins, and a pattern that
decides nothing is an error.
"""

from __future__ import annotations

import difflib
import inspect
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vlm_jax.errors import nearest

Axes = Mapping[str, tuple[str, ...]]
Schedule = Callable[[Any], Any]

# Dimensions that lie side by side within one of these sets are one side of a matrix.
FUSED = ({"heads", "head_dim"}, {"conv_h", "conv_w", "conv_in"})
# A leaf with one of these axes is a table or a first layer, which Muon leaves to Adam.
NOT_MUON = {"vocab", "position", "query", "patch", "conv_h"}
# What lies below the first block of a tower, for layer_decay.
BELOW = (r"(.*/)?(\w*embed|\w*token|\w*positions?|\w*stem\d*|input_norm)(/.*)?",)


# ---------------------------------------------------------------- durations and schedules

DURATIONS = ("1000", "1000steps", "5%", "3epochs", "50000examples")


def steps(duration: int | str, *, batch: int | None = None, examples_per_epoch: int | None = None,
          total: int | None = None) -> int:
    """A duration in optimizer steps: an int, or one of "1000steps", "5%" (of ``total``), "0.5epochs"
    (of ``examples_per_epoch`` at ``batch`` examples a step), "50000examples". Rounded to the nearest
    step, and at least one where the duration is not zero.

    Raises ValueError for another spelling, a negative number, or a unit whose size was not given.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?(?:e\d+)?)\s*([a-z%]*)\s*", str(duration))
    if match is None or isinstance(duration, bool):
        raise ValueError(f"duration {duration!r} is not a number with a unit{nearest(str(duration), DURATIONS)}")
    number, unit = float(match[1]), match[2]
    sizes = {"": 1.0, "step": 1.0, "steps": 1.0,
             "%": total and total / 100,
             "epoch": batch and examples_per_epoch and examples_per_epoch / batch,
             "example": batch and 1 / batch}
    sizes |= {"ep": sizes["epoch"], "epochs": sizes["epoch"], "examples": sizes["example"]}
    if unit not in sizes:
        raise ValueError(f"duration {duration!r}: unit {unit!r} is unknown{nearest(unit, tuple(sizes)[1:])}")
    if sizes[unit] is None:
        needs = {"%": "total", "epoch": "batch and examples_per_epoch", "ep": "batch and examples_per_epoch",
                 "epochs": "batch and examples_per_epoch"}.get(unit, "batch")
        raise ValueError(f"duration {duration!r} needs {needs}, which was not given here")
    return max(round(number * sizes[unit]), 1 if number else 0)


SCHEDULES = ("cosine", "linear", "constant", "rsqrt", "trapezoid", "exponential")


def make_schedule(kind: str = "cosine", *, lr: float, total_steps: int, warmup: int | str = 0,
                  decay_from: int | str | None = None, end_lr: float = 0.0, start_lr: float | None = None,
                  every: int | str | None = None, decay_factor: float | None = None) -> Schedule:
    """Learning rate at 0-based step t: ``lr * (t + 1) / warmup`` (open_clip's warm-up, so that the
    first step moves and step ``warmup - 1`` has the peak), or with ``start_lr`` from there to lr in equal steps; then

    cosine, linear   from lr to end_lr, reached at total_steps
    constant         lr
    rsqrt            lr * sqrt(warmup / t)  (T5)
    trapezoid        lr until ``decay_from`` (default "80%"), then linear to end_lr at total_steps
    exponential      lr * decay_factor ** (t // every), not below end_lr

    ``every``: in cosine and linear, the rate stays for so many steps and moves by what they come to, counted from step 0
    (the epoch-wise rates of ALBEF and BLIP). Durations are ints or percents. Raises ValueError for an unknown kind, an option that the kind
    does not use, or durations out of order.
    """
    if kind not in SCHEDULES:
        raise ValueError(f"schedule {kind!r} is unknown{nearest(kind, SCHEDULES)}")
    if decay_from is not None and kind != "trapezoid":
        raise ValueError(f"decay_from={decay_from!r} has no use in schedule {kind!r}; nearest: 'trapezoid'")
    if every is not None and kind not in ("cosine", "linear", "exponential"):
        raise ValueError(f"every={every!r} has no use in schedule {kind!r}; nearest: 'cosine'")
    if (kind == "exponential") != (decay_factor is not None) or kind == "exponential" and every is None:
        raise ValueError(f"schedule {kind!r} with decay_factor={decay_factor}, every={every!r}: 'exponential' needs both, others no decay_factor")
    if end_lr and kind in ("constant", "rsqrt"):
        raise ValueError(f"end_lr={end_lr!r} has no use in schedule {kind!r}, which does not end anywhere")
    warm = steps(warmup, total=total_steps)
    if kind == "rsqrt" and not warm:
        raise ValueError("schedule 'rsqrt' needs warmup > 0: its rate is lr * sqrt(warmup / step)")
    span = max(steps(every, total=total_steps), 1) if every is not None else 0
    start = warm
    if kind == "trapezoid":
        start = steps("80%" if decay_from is None else decay_from, total=total_steps)
    if not warm <= start <= total_steps:
        raise ValueError(f"schedule {kind!r}: warmup={warm} <= start of decay={start} <= total_steps={total_steps} "
                         f"does not hold")

    def schedule(step):
        t = jnp.asarray(step, jnp.float32)
        part = jnp.clip(t // span * span / total_steps if span else (t - start) / max(total_steps - start, 1), 0, 1)
        peak = {"cosine": lambda: end_lr + (lr - end_lr) * 0.5 * (1 + jnp.cos(jnp.pi * part)),
                "linear": lambda: lr + (end_lr - lr) * part,
                "trapezoid": lambda: lr + (end_lr - lr) * part,
                "constant": lambda: jnp.full_like(t, lr),
                "exponential": lambda: jnp.maximum(lr * decay_factor ** (t // span), end_lr),
                "rsqrt": lambda: lr * jnp.sqrt(warm / jnp.maximum(t, warm))}[kind]()
        first = lr * (t + 1) / max(warm, 1) if start_lr is None else start_lr + (lr - start_lr) * t / max(warm, 1)
        return jnp.where(t < warm, first, peak)

    return schedule


# ---------------------------------------------------------------- reading axes and patterns

def _layered(axes: Sequence[str]) -> int:
    """1 where the leaf is stacked over layers, else 0: the number of leading axes to skip."""
    return int(bool(axes) and axes[0] == "layers")


def sides(axes: Sequence[str]) -> list[tuple[int, ...]]:
    """Dimensions grouped into the sides of a matrix, the layers axis left out: [layers, embed, heads,
    head_dim] -> [(1,), (2, 3)]. Its length is the leaf's rank in every rule of this file."""
    groups: list[tuple[int, ...]] = []
    for i in range(_layered(axes), len(axes)):
        if groups and any({axes[i], axes[groups[-1][-1]]} <= fused for fused in FUSED):
            groups[-1] += (i,)
        else:
            groups.append((i,))
    return groups


def _rows_and_columns(axes: Sequence[str]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The last side is the output; all before it are the input."""
    groups = sides(axes)
    return tuple(i for group in groups[:-1] for i in group), groups[-1]


def _nearest_paths(pattern: str, paths: Iterable[str]) -> str:
    return ", ".join(difflib.get_close_matches(pattern, list(paths), n=3, cutoff=0.0)) or "(there are none)"


def assign(patterns: Sequence[str], paths: Iterable[str], field: str) -> dict[str, int]:
    """path -> index of the first pattern that matches all of it; paths without one are left out.

    Raises ValueError naming the pattern, ``field`` and the nearest paths when a pattern decides nothing.
    """
    paths = list(paths)
    found: dict[str, int] = {}
    for index, pattern in enumerate(patterns):
        matched = [path for path in paths if re.fullmatch(pattern, path)]
        if not matched:
            raise ValueError(f"{field}: pattern {pattern!r} matches no parameter; nearest: "
                             f"{_nearest_paths(pattern, paths)}")
        if all(path in found for path in matched):
            raise ValueError(f"{field}: pattern {pattern!r} decides nothing, since {patterns[found[matched[0]]]!r} "
                             f"before it takes {matched[0]}")
        for path in matched:
            found.setdefault(path, index)
    return found


def layer_factors(axes: Axes, shapes: Mapping[str, Sequence[int]], decay: float,
                  below: Sequence[str] = BELOW) -> dict[str, Any]:
    """Learning-rate factors of layer decay (BEiT, arXiv 2106.08254, app. H) per path: 1 above the blocks,
    decay for the last block, and one more power per block down to what lies ``below`` the first. An array
    [layers, 1, ...] for stacked leaves. A tower is whatever owns a component "blocks..."; several such
    stacks in one tower are counted on in natural order. Towers without a stack keep 1.
    """
    depth: dict[str, dict[str, int]] = {}                  # tower -> stack -> layers
    for path, names in axes.items():
        if _layered(names):
            match = re.match(r"(.*?)/?(blocks\w*)/", path)
            if match is None:
                raise ValueError(f"layer_decay: stacked parameter {path} lies under no component named 'blocks...'")
            depth.setdefault(match[1], {})[match[2]] = shapes[path][0]
    if not depth:
        raise ValueError(f"layer_decay={decay} has no use here: no parameter is stacked over layers")

    def natural(name):
        return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]

    factors: dict[str, Any] = {}
    for path, names in axes.items():
        tower = max((t for t in depth if not t or path.startswith(t + "/")), key=len, default=None)
        if tower is None:
            continue
        stacks, total = depth[tower], sum(depth[tower].values())
        stack = path[len(tower):].lstrip("/").split("/")[0]
        if _layered(names):
            first = sum(stacks[s] for s in sorted(stacks, key=natural) if natural(s) < natural(stack))
            power = total - first - np.arange(stacks[stack])
            factors[path] = np.float32(decay) ** power.reshape(-1, *[1] * (len(names) - 1)).astype(np.float32)
        elif any(re.fullmatch(pattern, path) for pattern in below):
            factors[path] = decay ** (total + 1)
    return factors


# ---------------------------------------------------------------- links of the chain

def _on(paths: Sequence[str], tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """Runs ``tx`` on part of a flat dict, so that no other leaf has a slot in its state."""
    def pick(tree):
        return {path: tree[path] for path in paths}

    def update(updates, state, params=None):
        new, state = tx.update(pick(updates), state, None if params is None else pick(params))
        return {**updates, **new}, state

    return optax.GradientTransformation(lambda params: tx.init(pick(params)), update)


class FactoredState(NamedTuple):
    """Adafactor's second moments: ``row`` and ``column`` means of matrices, ``full`` for the rest."""
    count: jax.Array
    row: dict[str, jax.Array]
    column: dict[str, jax.Array]
    full: dict[str, jax.Array]


def scale_by_adafactor(axes: Axes, *, decay_rate: float, b2_cap: float, eps: float, min_dim: int,
                       update_clip: float | None) -> optax.GradientTransformation:
    """Adafactor's direction (arXiv 1804.04235) with the capped second moment of "Scaling Vision
    Transformers" (arXiv 2106.04560, sec. 3.4): decay min(b2_cap, 1 - t**-decay_rate).

    Each layer of a stack is its own matrix. A matrix is factored when both its sides have at least
    ``min_dim`` entries. ``update_clip`` bounds the root mean square of a layer's update.
    """
    def factored(path, shape):
        if len(sides(axes[path])) < 2:
            return False
        return all(math.prod(shape[i] for i in side) >= min_dim for side in _rows_and_columns(axes[path]))

    def init(params):
        row, column, full = {}, {}, {}
        for path, p in params.items():
            if factored(path, p.shape):
                rows, columns = _rows_and_columns(axes[path])
                row[path] = jnp.zeros([n for i, n in enumerate(p.shape) if i not in columns], jnp.float32)
                column[path] = jnp.zeros([n for i, n in enumerate(p.shape) if i not in rows], jnp.float32)
            else:
                full[path] = jnp.zeros(p.shape, jnp.float32)
        return FactoredState(jnp.zeros([], jnp.int32), row, column, full)

    def update(updates, state, params=None):
        del params
        decay = jnp.minimum(b2_cap, 1.0 - (state.count + 1.0) ** -decay_rate)
        row, column, full, new = {}, {}, {}, {}
        for path, g in updates.items():
            g = g.astype(jnp.float32)
            square = jnp.square(g) + eps
            if path in state.row:
                rows, columns = _rows_and_columns(axes[path])
                row[path] = decay * state.row[path] + (1 - decay) * jnp.mean(square, axis=columns)
                column[path] = decay * state.column[path] + (1 - decay) * jnp.mean(square, axis=rows)
                r = jnp.expand_dims(row[path], columns)
                u = g * jax.lax.rsqrt(r / jnp.mean(r, axis=rows, keepdims=True))
                u = u * jax.lax.rsqrt(jnp.expand_dims(column[path], rows))
            else:
                full[path] = decay * state.full[path] + (1 - decay) * square
                u = g * jax.lax.rsqrt(full[path])
            if update_clip is not None:
                own = tuple(range(_layered(axes[path]), g.ndim))
                u = u / jnp.maximum(1.0, jnp.sqrt(jnp.mean(jnp.square(u), axis=own, keepdims=True)) / update_clip)
            new[path] = u
        return new, FactoredState(optax.safe_increment(state.count), row, column, full)

    return optax.GradientTransformation(init, update)


class MuonState(NamedTuple):
    mu: dict[str, jax.Array]


def orthogonalise(x: jax.Array, ns_steps: int) -> jax.Array:
    """x [n, rows, columns], rows <= columns: about U V^T of each matrix's singular value decomposition, by
    the quintic Newton-Schulz iteration of Muon (Jordan 2024), which leaves singular values in [0.7, 1.2]."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = x / (jnp.sqrt(jnp.sum(jnp.square(x), axis=(1, 2), keepdims=True)) + 1e-7)

    def iterate(_, x):
        square = x @ x.swapaxes(1, 2)
        return a * x + (b * square + c * square @ square) @ x

    return jax.lax.fori_loop(0, ns_steps, iterate, x)


def scale_by_muon(axes: Axes, shapes: Mapping[str, Sequence[int]], *, momentum: float, ns_steps: int, scale: str,
                  mu_dtype: Any) -> optax.GradientTransformation:
    """Muon's direction for matrices, with Nesterov momentum; each layer of a stack is its own matrix.

    All matrices of one size, over layers and paths, are one batch: a program with an iteration per
    parameter takes many times as long to compile. ``scale``: "rms" makes the update's root mean square
    about 0.2, AdamW's, so that both take one learning rate (Moonlight, arXiv 2502.16982, eq. 4); "width"
    is sqrt(max(1, out/in)) of the original.
    """
    sizes: dict[str, tuple[int, int]] = {}
    factors: dict[str, float] = {}
    batches: dict[tuple[int, int], list[str]] = {}
    for path, names in axes.items():
        fan_in, fan_out = sizes[path] = tuple(math.prod(shapes[path][i] for i in side)
                                              for side in _rows_and_columns(names))
        factors[path] = {"rms": 0.2 * max(fan_in, fan_out) ** 0.5, "width": max(1.0, fan_out / fan_in) ** 0.5}[scale]
        batches.setdefault(tuple(sorted(sizes[path])), []).append(path)

    def wide(path, x):
        x = x.reshape(-1, *sizes[path])
        return x if sizes[path][0] <= sizes[path][1] else x.swapaxes(1, 2)

    def back(path, x):
        x = x if sizes[path][0] <= sizes[path][1] else x.swapaxes(1, 2)
        return factors[path] * x.reshape(shapes[path])

    def update(updates, state, params=None):
        del params
        mu = {path: momentum * state.mu[path] + (1 - momentum) * g for path, g in updates.items()}
        ahead = {path: momentum * mu[path] + (1 - momentum) * g for path, g in updates.items()}
        new = {}
        for paths in batches.values():
            matrices = [wide(path, ahead[path]) for path in paths]
            done = orthogonalise(jnp.concatenate(matrices), ns_steps)
            ends = np.cumsum([len(x) for x in matrices])[:-1]
            new |= {path: back(path, x) for path, x in zip(paths, jnp.split(done, ends))}
        return new, MuonState(optax.tree.cast(mu, mu_dtype))

    return optax.GradientTransformation(
        lambda params: MuonState(optax.tree.zeros_like(params, dtype=mu_dtype)), update)


class RateState(NamedTuple):
    count: jax.Array


def scale_by_rates(schedules: Mapping[str, Schedule], factors: Mapping[str, Any],
                   decays: Mapping[str, float]) -> optax.GradientTransformation:
    """u -> -schedule(t) * factor * (u + decay * p) per leaf: decoupled decay that scales with the rate."""
    def update(updates, state, params):
        rates = {schedule: schedule(state.count) for schedule in set(schedules.values())}
        new = {path: -rates[schedules[path]] * factors[path] * (u + decays[path] * params[path])
               for path, u in updates.items()}
        return new, RateState(optax.safe_increment(state.count))

    return optax.GradientTransformation(lambda params: RateState(jnp.zeros([], jnp.int32)), update)


def project(bounds: Mapping[str, tuple[float, float]]) -> optax.GradientTransformation:
    """Projection, as the chain's last link: after the update each leaf lies in its [low, high]."""
    def inside(value, towards):
        # the closest float32 not beyond the bound, so that the promise holds in exact arithmetic too
        near = np.float32(value)
        beyond = float(near) > value if towards < value else float(near) < value
        return np.nextafter(near, np.float32(towards)) if beyond else near

    def inwards(p, u, low, high):
        u = jnp.clip(p + u, low, high) - p
        # p + u rounds: one step back where it lands an ulp outside
        u = jnp.where(p + u > high, jnp.nextafter(u, -jnp.inf), u)
        return jnp.where(p + u < low, jnp.nextafter(u, jnp.inf), u)

    limits = {path: (inside(low, np.inf), inside(high, -np.inf)) for path, (low, high) in bounds.items()}
    return optax.stateless(lambda updates, params: {
        path: inwards(params[path], u, *limits[path]) if path in limits else u for path, u in updates.items()})


# ---------------------------------------------------------------- the optimizer

# Every option an optimizer reads, with its default.
OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "adamw": dict(b1=0.9, b2=0.999, eps=1e-8, mu_dtype=None),
    "lion": dict(b1=0.9, b2=0.99, mu_dtype=None),
    "adafactor": dict(momentum=0.9, mu_dtype="bfloat16", decay_rate=0.8, b2_cap=0.999, eps=1e-30, min_dim=32,
                      update_clip=None),
    "muon": dict(momentum=0.95, ns_steps=5, muon_lr=None, muon_scale="rms", muon_exclude=None, b1=0.9, b2=0.95,
                 eps=1e-8, mu_dtype=None),
}
GROUP_KEYS = ("lr", "weight_decay", "clip", "schedule", "warmup", "decay_from", "end_lr")


class Optimizer(NamedTuple):
    """``tx`` works on flat parameter dicts; ``schedule(step)`` is the learning rate before group factors."""
    tx: optax.GradientTransformation
    schedule: Schedule


def make_optimizer(
    axes: Axes, shapes: Mapping[str, Sequence[int]], *,
    name: str = "adamw", lr: float, total_steps: int,
    schedule: str = "cosine", warmup: int | str = 0, decay_from: int | str | None = None, end_lr: float = 0.0,
    start_lr: float | None = None, every: int | str | None = None, decay_factor: float | None = None,
    weight_decay: float = 0.0, decay_exclude: Sequence[str] = ("1d",),
    clip_norm: float | None = None,
    groups: Sequence[tuple[str, Mapping[str, Any]]] = (),
    layer_decay: float = 1.0, layer_decay_below: Sequence[str] = BELOW,
    clamps: Sequence[tuple[str, float, float]] = (),
    batch: int | None = None, examples_per_epoch: int | None = None,
    **options: Any,
) -> Optimizer:
    """Builds the optax chain for the trainable leaves whose logical ``axes`` and ``shapes`` are given.

    Args:
      name: "adamw", "adafactor", "lion" or "muon"; ``OPTIONS`` lists what each reads from ``options``.
        CoCa's Adafactor (arXiv 2205.01917, app. B: "b1 .9, b2 .999") is momentum=0.9, b2_cap=0.999.
        Muon takes matrices; tables, positions, patch embeddings and stems (``NOT_MUON``), or instead what
        the regexes of ``muon_exclude`` match, and all vectors go to Adam with lr, b1, b2, eps.
      lr: peak learning rate; ``schedule``, ``warmup``, ``decay_from``, ``end_lr``, ``start_lr``, ``every``, ``decay_factor``: see
        ``make_schedule``.
        Durations may be in any unit of ``steps`` where ``batch`` and ``examples_per_epoch`` are given.
      weight_decay: decoupled, multiplied by the learning rate (as AdamW in torch and optax).
      decay_exclude: what does not decay: "1d" is every leaf of rank 0 or 1 once layers are left out and heads
        merged (biases, gains, logit_scale, class vectors); any other entry is a regex over paths.
      clip_norm: bound on the global gradient norm, taken over all leaves whose group has no ``clip``.
      groups: (regex, rule) pairs; a rule may set ``lr`` (a factor), ``weight_decay`` (also where
        decay_exclude would forbid it), ``clip`` (norm over the group alone), ``schedule`` and its options.
      layer_decay: factor per layer downwards, see ``layer_factors``.
      clamps: (regex, low, high): projection after the update, e.g. ("logit_scale", 0, math.log(100)).

    Raises ValueError for an unknown or unused name, or a pattern that decides nothing, with the nearest.
    """
    if name not in OPTIONS:
        raise ValueError(f"optimizer {name!r} is unknown{nearest(name, tuple(OPTIONS))}")
    for option in options:
        if option not in OPTIONS[name]:
            common = [p.name for p in inspect.signature(make_optimizer).parameters.values() if p.kind is p.KEYWORD_ONLY]
            raise ValueError(f"optimizer {name!r} has no option {option!r}{nearest(option, [*OPTIONS[name], *common])}")
    if set(axes) != set(shapes):
        raise ValueError(f"axes and shapes name different parameters: {sorted(set(axes) ^ set(shapes))[:3]}")
    options = {**OPTIONS[name], **options}
    paths = sorted(axes)

    def in_steps(duration):
        return None if duration is None else steps(
            duration, batch=batch, examples_per_epoch=examples_per_epoch, total=total_steps)

    rules = [dict(rule) for _, rule in groups]
    for (pattern, _), rule in zip(groups, rules):
        for key in rule:
            if key not in GROUP_KEYS:
                raise ValueError(f"groups: {pattern!r} sets {key!r}{nearest(key, GROUP_KEYS)}")
    group = assign([pattern for pattern, _ in groups], paths, "groups")
    rule_of = {path: rules[group[path]] if path in group else {} for path in paths}

    # Rates. Leaves that share a rule share a schedule.
    whole = dict(kind=schedule, warmup=in_steps(warmup), decay_from=in_steps(decay_from), end_lr=end_lr, start_lr=start_lr,
                 every=in_steps(every), decay_factor=decay_factor)

    def schedule_for(rule):
        own = {"kind" if key == "schedule" else key: rule[key]
               for key in ("schedule", "warmup", "decay_from", "end_lr") if key in rule}
        own |= {key: in_steps(own[key]) for key in ("warmup", "decay_from") if key in own}
        if own.get("kind", schedule) != schedule:           # another shape: options of the common one do not carry over
            own = {"warmup": whole["warmup"], **own}
        else:
            own = {**whole, **own}
        return make_schedule(lr=lr, total_steps=total_steps, **own)

    common = make_schedule(lr=lr, total_steps=total_steps, **whole)
    by_rule = [schedule_for(rule) if {"schedule", "warmup", "decay_from", "end_lr"} & set(rule) else common
               for rule in rules]
    schedules = {path: by_rule[group[path]] if path in group else common for path in paths}
    factors: dict[str, Any] = {path: rule_of[path].get("lr", 1.0) for path in paths}
    if layer_decay != 1.0:
        for path, factor in layer_factors(axes, shapes, layer_decay, layer_decay_below).items():
            factors[path] = factors[path] * factor

    # Decay.
    patterns = [entry for entry in decay_exclude if entry != "1d"]
    spared = set(assign(patterns, paths, "decay_exclude"))
    if "1d" in decay_exclude:
        spared |= {path for path in paths if len(sides(axes[path])) < 2}
    decays = {path: rule_of[path].get("weight_decay", 0.0 if path in spared else weight_decay) for path in paths}

    # Direction.
    mu_dtype = options["mu_dtype"] and jnp.dtype(options["mu_dtype"])
    if name == "adamw":
        direction = [optax.scale_by_adam(options["b1"], options["b2"], options["eps"], mu_dtype=mu_dtype)]
    elif name == "lion":
        direction = [optax.scale_by_lion(options["b1"], options["b2"], mu_dtype=mu_dtype)]
    elif name == "adafactor":
        direction = [scale_by_adafactor(axes, **{k: options[k] for k in (
            "decay_rate", "b2_cap", "eps", "min_dim", "update_clip")})]
        if options["momentum"]:
            direction.append(optax.ema(options["momentum"], debias=False, accumulator_dtype=mu_dtype))
    else:
        direction, matrices = _muon(axes, shapes, options, mu_dtype)
        if options["muon_lr"] is not None:
            factors |= {path: factors[path] * (options["muon_lr"] / lr) for path in matrices}

    # Clipping: a group with its own norm leaves the common one.
    chain = []
    for index, rule in enumerate(rules):
        if "clip" in rule:
            members = [path for path in paths if group.get(path) == index]
            chain.append(_on(members, optax.clip_by_global_norm(rule["clip"])))
    rest = [path for path in paths if "clip" not in rule_of[path]]
    if clip_norm is not None and rest:
        chain.append(_on(rest, optax.clip_by_global_norm(clip_norm)))
    chain += [*direction, scale_by_rates(schedules, factors, decays)]
    if clamps:
        owner = assign([pattern for pattern, _, _ in clamps], paths, "clamps")
        for pattern, low, high in clamps:
            if low > high:
                raise ValueError(f"clamps: {pattern!r} has low={low} above high={high}")
        chain.append(project({path: tuple(clamps[index][1:]) for path, index in owner.items()}))
    return Optimizer(optax.chain(*chain), common)


def _muon(axes, shapes, options, mu_dtype):
    """Muon for matrices and Adam for the rest, as chain links; and the paths of the matrices."""
    if options["muon_scale"] not in ("rms", "width"):
        raise ValueError(f"muon_scale={options['muon_scale']!r}{nearest(options['muon_scale'], ('rms', 'width'))}")
    if options["muon_exclude"] is None:
        excluded = {path for path in axes if NOT_MUON & set(axes[path])}
    else:
        excluded = set(assign(tuple(options["muon_exclude"]), axes, "muon_exclude"))
    matrices = sorted(path for path in axes if len(sides(axes[path])) >= 2 and path not in excluded)
    if not matrices:
        raise ValueError("optimizer 'muon' has no matrix to work on here; nearest: 'adamw'")
    rest = sorted(set(axes) - set(matrices))
    links = [_on(matrices, scale_by_muon(
        {path: axes[path] for path in matrices}, shapes, momentum=options["momentum"], ns_steps=options["ns_steps"],
        scale=options["muon_scale"], mu_dtype=mu_dtype))]
    if rest:
        links.append(_on(rest, optax.scale_by_adam(options["b1"], options["b2"], options["eps"], mu_dtype=mu_dtype)))
    return links, matrices


# ---------------------------------------------------------------- state

def state_axes(tx: optax.GradientTransformation, params: Mapping[str, Any], axes: Axes) -> Any:
    """Logical axes of every leaf of ``tx.init(params)``, as a tree of its structure with a tuple per leaf.

    A leaf stored under a parameter's path has that parameter's axes, Adafactor's ``row`` and ``column``
    what the mean left of them; counters and constants are unsharded.
    """
    state = jax.eval_shape(tx.init, dict(params))

    def of(path, leaf):
        keys = [str(getattr(key, "key", getattr(key, "name", ""))) for key in path]
        owner = next((key for key in reversed(keys) if key in axes), None)
        if owner is not None:
            names = tuple(axes[owner])
            if "row" in keys or "column" in keys:
                rows, columns = _rows_and_columns(names)
                gone = columns if "row" in keys else rows
                names = tuple(a for i, a in enumerate(names) if i not in gone)
            if len(names) != leaf.ndim:
                raise ValueError(f"optimizer state {jax.tree_util.keystr(path)} of shape {leaf.shape} does not follow "
                                 f"the axes {names} of {owner}")
            return names
        return ("none",) * leaf.ndim

    return jax.tree_util.tree_map_with_path(of, state)


def ema_update(ema: Any, params: Any, step: Any, decay: float) -> Any:
    """Moving average of weights after 0-based ``step``: decay min(decay, (1 + step) / (10 + step)), so that
    a young average forgets its start (as in TensorFlow's ExponentialMovingAverage and timm)."""
    step = jnp.asarray(step, jnp.float32)
    rate = 1.0 - jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda e, p: e + (rate * (p.astype(e.dtype) - e)).astype(e.dtype), ema, params)
