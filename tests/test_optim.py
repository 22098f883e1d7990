"""Optimizers: the rules are read off axes and paths, and the arithmetic is the papers'."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vlm_jax.partitioning import AXES, make_mesh, sharding
from vlm_jax.train.optim import (
    BELOW,
    OPTIONS,
    ema_update,
    layer_factors,
    make_optimizer,
    make_schedule,
    project,
    sides,
    state_axes,
    steps,
)

LEAVES = {
    "image/patch_embed/kernel": (("patch", "embed"), (12, 8)),
    "image/position": (("position", "embed"), (5, 8)),
    "image/class_embed": (("embed",), (8,)),
    "image/blocks/norm1/scale": (("layers", "norm"), (3, 8)),
    "image/blocks/attn/query/kernel": (("layers", "embed", "heads", "head_dim"), (3, 8, 2, 4)),
    "image/blocks/attn/query/bias": (("layers", "heads", "head_dim"), (3, 2, 4)),
    "image/blocks/attn/out/kernel": (("layers", "heads", "head_dim", "embed"), (3, 2, 4, 8)),
    "image/blocks/mlp/up/kernel": (("layers", "embed", "mlp"), (3, 8, 16)),
    "image/norm_post/scale": (("norm",), (8,)),
    "image/proj/kernel": (("embed", "joint"), (8, 6)),
    "text/token_embed/table": (("vocab", "embed"), (11, 8)),
    "logit_scale": ((), ()),
}
AXES_OF = {path: axes for path, (axes, _) in LEAVES.items()}
SHAPES = {path: shape for path, (_, shape) in LEAVES.items()}
QUERY, OUT, UP = (f"image/blocks/{name}/kernel" for name in ("attn/query", "attn/out", "mlp/up"))


def arrays(seed: int, scale: float = 1.0):
    rng = np.random.default_rng(seed)
    return {path: jnp.asarray(scale * rng.standard_normal(shape), jnp.float32) for path, shape in SHAPES.items()}


def build(axes=AXES_OF, shapes=SHAPES, **options):
    return make_optimizer(axes, shapes, **{"lr": 1e-3, "total_steps": 100, "schedule": "constant", **options})


def first_update(optimizer, params, grads, count: int = 1):
    @jax.jit
    def run(params, grads):
        state = optimizer.tx.init(params)
        for _ in range(count):
            updates, state = optimizer.tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
        return updates, params
    return jax.tree.map(np.asarray, run(params, grads))


def decay_and_rate(**options):
    """Per leaf: what decays, and at which rate, read off updates from zero gradients and from decay zero."""
    ones = {path: jnp.ones(shape) for path, shape in SHAPES.items()}
    zeros = {path: jnp.zeros(shape) for path, shape in SHAPES.items()}
    decay = first_update(build(lr=1.0, **options), ones, zeros)[0]
    rate = first_update(build(lr=1.0, eps=1e-20, **{**options, "weight_decay": 0.0}), zeros, ones)[0]
    return {p: -u for p, u in decay.items()}, {p: -u for p, u in rate.items()}


# ---------------------------------------------------------------- durations, schedules

def test_durations():
    sizes = dict(batch=32, examples_per_epoch=3200, total=2000)
    got = {d: steps(d, **sizes) for d in (7, "7", "7steps", "5%", "3epochs", "3ep", "0.5epochs", "1000examples",
                                          "2e3steps", 0, "0%", "0.001epochs")}
    assert got == {7: 7, "7": 7, "7steps": 7, "5%": 100, "3epochs": 300, "3ep": 300, "0.5epochs": 50,
                   "1000examples": 31, "2e3steps": 2000, 0: 0, "0%": 0, "0.001epochs": 1}


@pytest.mark.parametrize("duration, words", [
    ("3epoch s", "number with a unit"), ("-1", "number with a unit"), (True, "number with a unit"),
    ("3epochz", "unit 'epochz' is unknown; nearest: 'epoch"), ("5%", "needs total"),
    ("3epochs", "needs batch and examples_per_epoch"), ("9examples", "needs batch")])
def test_bad_durations(duration, words):
    with pytest.raises(ValueError, match=words):
        steps(duration)


def test_cosine_is_open_clips():
    lr, warmup, total = 5e-4, 20, 100

    def open_clip(step):                                   # open_clip_train/scheduler.py, cosine_lr
        if step < warmup:
            return lr * (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) * lr

    schedule = make_schedule("cosine", lr=lr, total_steps=total, warmup=warmup)
    assert np.allclose(schedule(np.arange(total + 1)), [open_clip(t) for t in range(total + 1)], rtol=1e-4, atol=1e-9)


def test_schedule_shapes():
    def at(kind, *ts, **options):
        return np.asarray(make_schedule(kind, **{"lr": 8.0, "total_steps": 100, "warmup": 10, **options})(np.array(ts)))

    for kind in ("cosine", "linear", "constant", "rsqrt", "trapezoid"):
        assert np.allclose(at(kind, 0, 4, 9), [0.8, 4, 8]), kind
    assert np.allclose(at("linear", 10, 55, 100, 120, warmup="10%"), [8, 4, 0, 0])      # CoCa: 2% then linear
    assert np.allclose(at("constant", 10, 100), 8)
    assert np.allclose(at("rsqrt", 10, 40, 90), [8, 4, 8 / 3])
    assert np.allclose(at("trapezoid", 50, 80, 90, 100), [8, 8, 4, 0])
    assert np.allclose(at("trapezoid", 50, 75, 100, decay_from="50%", end_lr=2.0), [8, 5, 2])
    assert np.allclose(at("cosine", 10, 55, 100, end_lr=2.0), [8, 5, 2])
    assert np.allclose(at("constant", 0, warmup=0), 8)
    assert np.allclose(at("exponential", 0, 5, 10, 49, 50, 99, every=25, decay_factor=0.5, start_lr=2.0), [2, 5, 8, 4, 2, 1])
    assert np.allclose(at("cosine", 10, 24, 25, 74, 99, every="25%"), [8, 8, 4 + 8 ** 0.5, 4, 4 - 8 ** 0.5])     # moves from span to span
    assert np.allclose(at("exponential", 99, every=10, decay_factor=0.5, end_lr=3.0), 3)


@pytest.mark.parametrize("options, words", [
    (dict(kind="cosin"), "'cosin' is unknown; nearest: 'cosine'"), (dict(decay_from=50), "decay_from=50 has no use"),
    (dict(kind="constant", end_lr=1.0), "end_lr=1.0 has no use"), (dict(kind="rsqrt"), "needs warmup"),
    (dict(kind="exponential", every=10), "'exponential' needs both"), (dict(decay_factor=0.5), "others no decay_factor"),
    (dict(kind="rsqrt", warmup=5, every=10), "every=10 has no use"), (dict(warmup=200), "warmup=200"), (dict(kind="trapezoid", warmup=20, decay_from=10), "does not hold")])
def test_schedules_refuse(options, words):
    with pytest.raises(ValueError, match=words):
        make_schedule(**{"kind": "cosine", "lr": 1.0, "total_steps": 100, **options})


# ---------------------------------------------------------------- rank and rules

def test_rank_ignores_layers_and_merges_heads():
    assert sides(AXES_OF[QUERY]) == [(1,), (2, 3)]
    assert sides(AXES_OF[OUT]) == [(1, 2), (3,)]
    assert sides(("conv_h", "conv_w", "conv_in", "conv_out")) == [(0, 1, 2), (3,)]
    for path in ("image/blocks/norm1/scale", "image/blocks/attn/query/bias", "image/class_embed"):
        assert len(sides(AXES_OF[path])) == 1, path
    assert sides(()) == []


def test_decay_spares_gains_biases_and_scale():
    decay, rate = decay_and_rate(weight_decay=0.2)
    spared = {path for path, u in decay.items() if (u == 0).all()}
    assert spared == {"image/class_embed", "image/blocks/norm1/scale", "image/blocks/attn/query/bias",
                      "image/norm_post/scale", "logit_scale"}
    assert all(np.allclose(u, 0.2) for path, u in decay.items() if path not in spared)
    assert all(np.allclose(u, 1.0) for u in rate.values())
    more, _ = decay_and_rate(weight_decay=0.2, decay_exclude=("1d", ".*/position"))
    assert {path for path, u in more.items() if (u == 0).all()} == spared | {"image/position"}
    everything, _ = decay_and_rate(weight_decay=0.2, decay_exclude=())
    assert all(np.allclose(u, 0.2) for u in everything.values())


def test_groups_set_rate_decay_and_schedule():
    groups = ((".*/proj/.*", dict(lr=20.0, weight_decay=0.5)), ("image/class_embed", dict(weight_decay=0.1)),
              ("image/.*", dict(lr=0.1)), ("text/.*", dict(schedule="linear", warmup="4%")))
    decay, rate = decay_and_rate(weight_decay=0.2, groups=groups)
    assert np.allclose(decay["image/proj/kernel"], 10) and np.allclose(rate["image/proj/kernel"], 20)
    assert np.allclose(decay["image/class_embed"], 0.1) and np.allclose(rate["image/class_embed"], 1)
    assert np.allclose(decay[QUERY], 0.02) and np.allclose(rate[QUERY], 0.1)
    assert np.allclose(rate["text/token_embed/table"], 0.25) and np.allclose(rate["logit_scale"], 1)


def test_layer_decay():
    _, rate = decay_and_rate(layer_decay=0.5)
    for path in (QUERY, OUT, "image/blocks/norm1/scale"):
        assert all(np.allclose(rate[path][i], 0.5 ** (3 - i)) for i in range(3)), path
    for path in ("image/patch_embed/kernel", "image/position", "image/class_embed"):
        assert np.allclose(rate[path], 0.0625), path
    for path in ("image/norm_post/scale", "image/proj/kernel", "text/token_embed/table", "logit_scale"):
        assert np.allclose(rate[path], 1.0), path            # above the blocks, or in a tower without any


def test_layer_decay_counts_on_through_several_stacks():
    axes = {f"image/blocks_{i}/norm1/scale": ("layers", "norm") for i in (2, 10, 0)}
    shapes = {f"image/blocks_{i}/norm1/scale": (layers, 4) for i, layers in ((0, 1), (2, 2), (10, 1))}
    factors = layer_factors(axes, shapes, 0.5, BELOW)
    assert [factors[f"image/blocks_{i}/norm1/scale"].ravel().tolist() for i in (0, 2, 10)] == [
        [0.0625], [0.125, 0.25], [0.5]]


def test_clipping_is_global_or_by_group():
    grads = {path: jnp.full(shape, 3.0) for path, shape in SHAPES.items()}

    def clipped(**options):
        """Gradients as the direction sees them: with b2 = 0 that is Lion's momentum."""
        tx = build(name="lion", b2=0.0, **options).tx
        state = jax.jit(lambda: tx.update(grads, tx.init(grads), grads)[1])()
        return next(s.mu for s in state if hasattr(s, "mu"))

    def norm(tree, *parts):
        return math.sqrt(sum(float((np.asarray(x) ** 2).sum()) for p, x in tree.items() if p.startswith(parts)))

    assert norm(clipped(clip_norm=1.0), "") == pytest.approx(1, rel=1e-5)
    both = clipped(clip_norm=1.0, groups=(("text/.*", dict(clip=0.25)),))
    assert norm(both, "text") == pytest.approx(0.25, rel=1e-5)
    assert norm(both, "image", "logit") == pytest.approx(1, rel=1e-5)
    assert norm(clipped(), "") == pytest.approx(norm(grads, ""))


def test_clamp_never_lets_go():
    high = math.log(100)
    optimizer = build(lr=0.7, clamps=(("logit_scale", 0, high),))
    update = jax.jit(optimizer.tx.update)
    for sign, start in ((-1, 2.6592), (-1, 0.013), (1, 4.6), (1, 9.0), (-1, -3.0)):
        params = {**arrays(0), "logit_scale": jnp.float32(start)}
        grads, state = {p: jnp.full_like(x, sign) for p, x in params.items()}, optimizer.tx.init(params)
        for _ in range(8):
            updates, state = update(grads, state, params)
            params = optax.apply_updates(params, updates)
            assert 0 <= float(params["logit_scale"]) <= high
        assert float(params["logit_scale"]) == pytest.approx(high if sign < 0 else 0, abs=1e-6)
        assert not np.allclose(params["image/class_embed"], arrays(0)["image/class_embed"])


def test_clamp_holds_at_every_rounding():
    high, rng = 4.605, np.random.default_rng(0)
    x, u = (jnp.asarray(rng.uniform(-300, 300, 4000), jnp.float32) for _ in range(2))
    x = x / 40
    link = project({"x": (-high, high)})
    moved = np.asarray(x + link.update({"x": u}, link.init({"x": x}), {"x": x})[0]["x"], np.float64)
    assert moved.min() >= -high and moved.max() <= high and (np.abs(moved) > high - 1e-5).sum() > 1000


@pytest.mark.parametrize("options, words", [
    (dict(name="adam"), "'adam' is unknown; nearest: 'adamw'"),
    (dict(name="adafactor", b1=0.9), "'adafactor' has no option 'b1'"),
    (dict(name="lion", eps=1e-8), "'lion' has no option 'eps'"),
    (dict(momentum=0.9), "'adamw' has no option 'momentum'"),
    (dict(weigth_decay=0.1), "has no option 'weigth_decay'; nearest: 'weight_decay'"),
    (dict(groups=(("imag/.*", dict(lr=2.0)),)), r"groups: pattern 'imag/.\*' matches no parameter; nearest: image/"),
    (dict(groups=(("image", dict(lr=2.0)),)), "matches no parameter"),
    (dict(groups=((".*", dict(lr=2.0)), ("text/.*", dict(lr=3.0)))), "decides nothing"),
    (dict(groups=((".*", dict(rate=2.0)),)), "sets 'rate'; nearest: "),
    (dict(clamps=(("logit_scales", 0, 1),)), "clamps: pattern 'logit_scales' .* nearest: logit_scale"),
    (dict(clamps=(("logit_scale", 2, 1),)), "low=2 above high=1"),
    (dict(decay_exclude=("1d", "pos")), "decay_exclude: pattern 'pos'"),
    (dict(name="muon", muon_exclude=("pos",)), "muon_exclude: pattern 'pos'"),
    (dict(name="muon", muon_scale="rmss"), "muon_scale='rmss'; nearest: 'rms'"),
    (dict(warmup="3epochs"), "needs batch and examples_per_epoch"),
    (dict(groups=(("text/.*", dict(schedule="cosin")),)), "'cosin' is unknown"),
    (dict(axes={"w": ("embed", "joint")}, shapes={"w": (2, 2)}, layer_decay=0.9), "no parameter is stacked"),
    (dict(axes={"w": ("embed",)}, shapes={"w": (2,)}, name="muon"), "no matrix"),
    (dict(shapes={"w": (2,)}), "different parameters"),
])
def test_mistakes_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        build(**options)


def test_durations_reach_the_schedule():
    optimizer = build(schedule="cosine", warmup="1epochs", batch=10, examples_per_epoch=50)
    assert float(optimizer.schedule(0)) == pytest.approx(2e-4)


# ---------------------------------------------------------------- directions

def test_adamw_is_torchs():
    lr, b1, b2, eps, decay = 1e-2, 0.9, 0.98, 1e-6, 0.2       # CLIP's ViT recipe
    params, grads = arrays(0), arrays(1)
    got = first_update(build(lr=lr, b1=b1, b2=b2, eps=eps, weight_decay=decay), params, grads, count=3)[1]
    for path in (QUERY, "image/blocks/attn/query/bias", "logit_scale"):
        p, g = np.asarray(params[path], np.float64), np.asarray(grads[path], np.float64)
        m, v = 0.0, 0.0
        for t in range(1, 4):                                 # torch.optim.AdamW
            p = p * (1 - lr * (decay if path == QUERY else 0))
            m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
            p = p - lr / (1 - b1 ** t) * m / (np.sqrt(v) / np.sqrt(1 - b2 ** t) + eps)
        assert np.allclose(got[path], p, atol=1e-5), path


def test_moments_in_half_precision():
    for name, slots in (("adamw", 1), ("lion", 1), ("adafactor", 1), ("muon", 2)):
        state = jax.eval_shape(build(name=name, mu_dtype="bfloat16").tx.init, arrays(0))
        half = [x for x in jax.tree.leaves(state) if x.dtype == jnp.bfloat16]
        assert len(half) == len(SHAPES), name


def reference_adafactor(matrix, gradients, momentum=0.9, cap=0.999):
    """One matrix, float64: big_vision's scale_by_adafactor in a loop."""
    rows = columns = m = 0.0
    for t, g in enumerate(gradients):
        beta = min(cap, 1 - (t + 1.0) ** -0.8)
        square = g * g + 1e-30
        rows, columns = beta * rows + (1 - beta) * square.mean(1), beta * columns + (1 - beta) * square.mean(0)
        u = g / np.sqrt(np.outer(rows, columns) / rows.mean())
        m = momentum * m + (1 - momentum) * u
        matrix = matrix - 1e-3 * m
    return matrix


def test_adafactor_sees_each_layer_as_a_matrix():
    optimizer = build(name="adafactor", min_dim=4, mu_dtype="float32")
    params, gradients = arrays(0), [arrays(seed) for seed in (1, 2, 3)]
    state, update = optimizer.tx.init(params), jax.jit(optimizer.tx.update)
    current = params
    for grads in gradients:
        updates, state = update(grads, state, current)
        current = optax.apply_updates(current, updates)
    for path, rows in ((QUERY, 8), (OUT, 8), (UP, 8), ("image/position", 5)):
        layers = 3 if path != "image/position" else 1

        def matrices(tree):
            return np.asarray(tree[path], np.float64).reshape(layers, rows, -1)

        expected = [reference_adafactor(matrices(params)[i], [matrices(g)[i] for g in gradients])
                    for i in range(layers)]
        assert np.allclose(matrices(current), expected, atol=2e-6), path
    factored = next(s for s in state if hasattr(s, "row"))
    assert factored.row[QUERY].shape == (3, 8) and factored.column[QUERY].shape == (3, 2, 4)
    assert factored.row[OUT].shape == (3, 2, 4) and factored.column[OUT].shape == (3, 8)
    assert set(factored.full) == {"image/class_embed", "image/blocks/norm1/scale", "image/blocks/attn/query/bias",
                                  "image/norm_post/scale", "logit_scale"}


def test_adafactor_clips_each_layer_alone():
    params = grads = {p: jnp.ones(s) for p, s in SHAPES.items()}
    grads = {**grads, UP: grads[UP].at[0, 0, 0].set(1e3)}
    updates, _ = first_update(build(name="adafactor", lr=1.0, min_dim=4, momentum=0, update_clip=0.5), params, grads)
    rms = np.sqrt((updates[UP] ** 2).mean((1, 2)))
    assert np.allclose(rms, 0.5, rtol=1e-4)


def test_adafactor_keeps_small_sides_whole():
    state = jax.eval_shape(build(name="adafactor", min_dim=9).tx.init, arrays(0))
    assert not next(s for s in state if hasattr(s, "row")).row


@pytest.mark.parametrize("scale", ["rms", "width"])
def test_muon_orthogonalises_each_layer(scale):
    params, grads = arrays(0), arrays(1)
    optimizer = build(name="muon", lr=1.0, muon_scale=scale, muon_lr=0.5)
    updates, _ = first_update(optimizer, params, grads)
    for path, rows, columns in ((QUERY, 8, 8), (OUT, 8, 8), (UP, 8, 16), ("image/proj/kernel", 8, 6)):
        factor = 0.5 * (0.2 * max(rows, columns) ** 0.5 if scale == "rms" else max(1, columns / rows) ** 0.5)
        for u, g in zip(updates[path].reshape(-1, rows, columns), np.asarray(grads[path]).reshape(-1, rows, columns)):
            singular = np.linalg.svd(-u / factor, compute_uv=False)
            assert 0.3 < singular.min() and singular.max() < 1.3, path      # Newton-Schulz aims at about [0.7, 1.2]
            left, _, right = np.linalg.svd(g, full_matrices=False)
            assert np.sum((-u / factor) * (left @ right)) > 0.75 * min(rows, columns)
    # tables, positions, first layers and vectors go to Adam at lr, whose first step is the sign
    for path in ("image/patch_embed/kernel", "image/position", "image/class_embed", "text/token_embed/table",
                 "logit_scale"):
        assert np.allclose(updates[path], -np.sign(grads[path]), atol=1e-3), path


def test_muon_momentum_is_nesterov_and_exclusion_is_configurable():
    state = jax.eval_shape(build(name="muon", muon_exclude=("image/proj/.*",)).tx.init, arrays(0))
    muon, adam = state[0], state[1]
    assert set(muon.mu) == {QUERY, OUT, UP, "image/patch_embed/kernel", "image/position", "text/token_embed/table"}
    assert set(adam.mu) == set(SHAPES) - set(muon.mu)
    axes, shapes = {"w": ("embed", "mlp")}, {"w": (4, 4)}
    tx = build(axes=axes, shapes=shapes, name="muon", lr=1.0, momentum=0.5).tx
    rng = np.random.default_rng(0)
    g1, g2 = (jnp.asarray(rng.standard_normal((4, 4)), jnp.float32) for _ in range(2))
    w = {"w": jnp.zeros((4, 4))}
    _, state = tx.update({"w": g1}, tx.init(w), w)
    u, _ = tx.update({"w": g2}, state, w)
    ahead = 0.5 * (0.5 * 0.5 * g1 + 0.5 * g2) + 0.5 * g2     # plain momentum would be without the last term
    expected, _ = tx.update({"w": ahead}, tx.init(w), w)     # a first step goes along its own gradient
    assert np.allclose(u["w"], expected["w"], atol=1e-3)


def test_lion_moves_by_sign():
    params, grads = arrays(0), arrays(1)
    updates, _ = first_update(build(name="lion", lr=0.5), params, grads)
    assert all(np.allclose(u, -0.5 * np.sign(grads[p])) for p, u in updates.items())


# ---------------------------------------------------------------- state

@pytest.mark.parametrize("name", OPTIONS)
def test_state_axes_shadow_the_parameters(name):
    options = dict(min_dim=4) if name == "adafactor" else {}
    tx = build(name=name, clip_norm=1.0, clamps=(("logit_scale", 0, 1),), groups=(("text/.*", dict(clip=1.0)),),
               **options).tx
    state = jax.eval_shape(tx.init, arrays(0))
    axes = state_axes(tx, arrays(0), AXES_OF)
    shadows = 0

    def check(path, leaf, names):
        nonlocal shadows
        assert isinstance(names, tuple) and len(names) == leaf.ndim and set(names) <= set(AXES)
        owner = next((key.key for key in path if getattr(key, "key", None) in AXES_OF), None)
        if owner is None:
            assert leaf.ndim == 0 or set(names) == {"none"}
        elif leaf.shape == SHAPES[owner]:
            shadows += 1
            assert names == AXES_OF[owner]

    jax.tree_util.tree_map_with_path(check, state, axes)
    assert shadows >= len(SHAPES)
    if name == "adafactor":
        factored = next(s for s in axes if hasattr(s, "row"))
        assert factored.row[QUERY] == ("layers", "embed") and factored.column[QUERY] == ("layers", "heads", "head_dim")
        assert factored.row[UP] == ("layers", "embed") and factored.column[UP] == ("layers", "mlp")


@pytest.mark.parametrize("name", ["adafactor", "muon"])
def test_sharded_state_gives_the_same_update(name):
    paths = (QUERY, OUT, "image/blocks/norm1/scale")
    axes, shapes = {p: AXES_OF[p] for p in paths}, {p: SHAPES[p] for p in paths}
    params, grads = ({p: arrays(seed)[p] for p in paths} for seed in (0, 1))
    tx = build(axes, shapes, name=name, **(dict(min_dim=4) if name == "adafactor" else {})).tx
    expected, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    mesh = make_mesh("fsdp_tp", fsdp=4, tensor=2)

    def place(tree, axes):
        return jax.tree.map(lambda x, names: jax.device_put(x, sharding(mesh, names, x.shape)), tree, axes)

    state = place(tx.init(params), state_axes(tx, params, axes))
    split = [x for x in jax.tree.leaves(state) if not x.sharding.is_fully_replicated]
    assert len(split) >= 2
    got, after = jax.jit(tx.update)(place(grads, axes), state, place(params, axes))
    for path in paths:
        assert np.allclose(got[path], expected[path], atol=1e-6), path
    assert jax.tree.structure(after) == jax.tree.structure(state)


@pytest.mark.parametrize("name", OPTIONS)
def test_optimizer_descends(name):
    paths = (UP, "image/blocks/norm1/scale", "text/token_embed/table", "logit_scale")
    params, target = ({path: arrays(seed, 0.5)[path] for path in paths} for seed in (0, 3))
    tx = build({p: AXES_OF[p] for p in paths}, {p: SHAPES[p] for p in paths}, name=name, lr=0.03, schedule="cosine",
               warmup="5%", weight_decay=1e-4, clip_norm=1.0).tx

    def step(carry, _):
        params, state = carry
        loss, grads = jax.value_and_grad(lambda p: sum(jnp.mean((p[k] - target[k]) ** 2) for k in p))(params)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), loss

    losses = jax.jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), length=100)[1])(params)
    assert losses[-1] < 0.15 * losses[0]


def test_ema():
    ema, params = {"w": jnp.zeros(3)}, {"w": jnp.ones(3)}
    assert np.allclose(ema_update(ema, params, 0, 0.999)["w"], 0.9)          # (1 + 0) / (10 + 0): young
    assert np.allclose(ema_update(ema, params, 10 ** 6, 0.999)["w"], 1e-3, rtol=1e-3)
    assert ema_update({"w": jnp.zeros(3, jnp.bfloat16)}, params, 5, 0.9)["w"].dtype == jnp.bfloat16
