"""The attention dispatcher, its kernels against each other, and the layer's cache."""

import functools
import logging

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax import partitioning
from vlm_jax.nn import attention
from vlm_jax.nn.attention import (
    Attention,
    attend,
    attend_padded,
    attend_xla,
    choose,
    per_device,
    write,
)

BF16, F32 = jnp.bfloat16, jnp.float32


def qkv(b=2, q=5, k=7, h=2, d=8):
    draw = np.random.default_rng(0)
    return tuple(jnp.asarray(draw.normal(size=(b, n, h, d)), F32) for n in (q, k, k))


def by_hand(q, k, v, allowed):
    """The definition, in float64, a query at a time."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros(q.shape)
    for b, i, h in np.ndindex(q.shape[:3]):
        see = np.flatnonzero(allowed[b, i])
        if see.size:
            w = np.exp(k[b, see, h] @ q[b, i, h] / np.sqrt(q.shape[-1]))
            out[b, i, h] = (w / w.sum()) @ v[b, see, h]
    return out


@pytest.mark.parametrize("backend, dtype, head_dim, q_len, kv_len, masked, capability, name, word", [
    ("cpu", F32, 64, 50, 50, False, None, "xla", "cpu"),
    ("gpu", BF16, 64, 257, 257, False, 9.0, "cudnn", "flash"),
    ("gpu", jnp.float16, 104, 77, 77, False, 8.0, "cudnn", "flash"),
    ("gpu", BF16, 64, 257, 257, False, 7.5, "xla", "capability"),
    ("gpu", BF16, 64, 257, 257, False, None, "xla", "capability"),
    ("gpu", F32, 64, 257, 257, False, 9.0, "xla", "float32"),
    ("gpu", BF16, 84, 257, 257, False, 9.0, "xla", "multiple of 8"),
    ("gpu", BF16, 256, 257, 257, False, 9.0, "xla", "128"),
    ("gpu", BF16, 64, 257, 257, True, 9.0, "xla", "mask"),
    ("tpu", BF16, 64, 257, 257, False, None, "pallas", "padded"),
    ("tpu", F32, 128, 1024, 256, False, None, "pallas", "padded"),
    ("tpu", BF16, 64, 50, 50, False, None, "xla", "below"),
    ("tpu", BF16, 64, 1, 2048, False, None, "xla", "below"),
    ("tpu", BF16, 192, 257, 257, False, None, "xla", "head_dim"),
    ("tpu", BF16, 64, 257, 257, True, None, "xla", "mask"),
])
def test_choice(backend, dtype, head_dim, q_len, kv_len, masked, capability, name, word):
    chosen, reason = choose(backend, dtype, head_dim, q_len, kv_len, masked, capability)
    assert chosen == name and word in reason


def test_choice_is_logged_once(caplog):
    attention._log_once.cache_clear()
    with caplog.at_level(logging.INFO, "vlm_jax.attention"):
        jax.eval_shape(attend, *qkv())
        jax.eval_shape(attend, *qkv(q=3))
    assert [r.message for r in caplog.records] == ["attention: xla (no fused kernel on cpu)"]


@pytest.mark.parametrize("causal", attention.CAUSAL)
@pytest.mark.parametrize("rows, keys", [(6, 6), (7, 7), (1, 5), (4, 7), (7, 4), (5, 3)])
def test_cudnn_is_given_even_lengths_and_told_the_keys(monkeypatch, rows, keys, causal):
    seen, attention_of = {}, jax.nn.dot_product_attention

    def by_xla(q, k, v, *, implementation, **options):
        seen.update(kernel=implementation, lengths=(q.shape[1] % 2, k.shape[1] % 2, v.shape[1] % 2))
        return attention_of(q, k, v, implementation="xla", **options)

    monkeypatch.setattr(attention, "target", lambda: "gpu")
    monkeypatch.setattr(attention, "cuda_capability", lambda: 9.0)
    monkeypatch.setattr(jax.nn, "dot_product_attention", by_xla)
    given = [x.astype(BF16) for x in qkv(q=rows, k=keys)]
    found = attend(*given, causal=causal)
    assert seen == {"kernel": "cudnn", "lengths": (0, 0, 0)}
    np.testing.assert_allclose(*(np.asarray(x, np.float32) for x in (found, attend_xla(*given, None, causal))), atol=0.02)


def test_kernel_follows_the_mesh_not_the_host():
    tpu = jax.sharding.AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu")
    mesh = jax.sharding.AbstractMesh((8, 1, 1), partitioning.MESH_AXES, axis_types=(jax.sharding.AxisType.Auto,) * 3, abstract_device=tpu)
    assert attention.target() == "cpu"
    with jax.sharding.use_abstract_mesh(mesh):
        assert attention.target() == "tpu"


@pytest.mark.parametrize("causal", ["none", "causal"])
@pytest.mark.parametrize("masked", [False, True])
def test_xla_path_is_attention(causal, masked):
    q, k, v = qkv()
    allowed = np.ones((2, 5, 7), bool)
    mask = None
    if masked:
        allowed = np.random.default_rng(0).random((2, 5, 7)) < 0.5
        allowed[0, 2] = False                               # a query that may see nothing
        mask = jnp.asarray(allowed)[:, None]
    if causal == "causal":
        allowed = allowed & (np.arange(7) <= np.arange(5)[:, None])
    np.testing.assert_allclose(jax.jit(attend, static_argnums=4)(q, k, v, mask, causal), by_hand(q, k, v, allowed), atol=2e-6)


def test_fully_masked_rows_give_zeros_and_finite_gradients():
    q, k, v = qkv()
    mask = jnp.zeros((2, 1, 5, 7), bool).at[1].set(True)
    out, grads = jax.jit(jax.value_and_grad(lambda *x: attend(*x, mask).sum(), (0, 1, 2)))(q, k, v)
    assert np.isfinite(out) and all(np.isfinite(g).all() for g in grads)
    assert not np.asarray(attend(q, k, v, mask)[0]).any() and np.asarray(attend(q, k, v, mask)[1]).all()


def test_bfloat16_keeps_its_dtype_and_softmax_precision():
    q, k, v = (x.astype(BF16) for x in qkv(k=64))
    out = attend(q, k, v)
    assert out.dtype == BF16
    np.testing.assert_allclose(out.astype(F32), attend(*(x.astype(F32) for x in (q, k, v))), atol=0.03)


def reference_kernel(q, k, v, segments, causal):
    """What ``pallas_kernel`` computes, for any backend."""
    same = segments[0][:, None, :, None] == segments[1][:, None, None, :]
    back = (x.transpose(0, 2, 1, 3) for x in (q, k, v))
    return attend_xla(*back, same, causal).transpose(0, 2, 1, 3)


@pytest.mark.parametrize("q_len, kv_len, causal", [(5, 7, "none"), (7, 7, "causal"), (9, 4, "none")])
def test_padding_to_the_block_changes_nothing(q_len, kv_len, causal):
    args = qkv(q=q_len, k=kv_len)
    def run(fn):
        return jax.jit(jax.value_and_grad(lambda *x: jnp.square(fn(*x)).sum(), (0, 1, 2)))(*args)
    padded = run(functools.partial(attend_padded, causal=causal, block=4, kernel=reference_kernel))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), padded,
                 run(functools.partial(attend_xla, causal=causal)))


def test_kernel_sees_whole_blocks():
    seen = []
    def kernel(q, k, v, segments, causal):
        seen.append((q.shape, k.shape, [np.asarray(s).sum(-1).tolist() for s in segments]))
        return q
    attend_padded(*qkv(q=5, k=7), block=4, kernel=kernel)
    assert seen == [((2, 2, 8, 8), (2, 2, 8, 8), [[5, 5], [7, 7]])]


def test_pallas_kernel_in_interpret_mode():
    from jax.experimental.pallas import tpu
    q, k, v = qkv(b=1, q=130, k=130, h=1, d=16)
    with tpu.force_tpu_interpret_mode():
        out = attend_padded(q, k, v, "causal")
    np.testing.assert_allclose(out, attend_xla(q, k, v, causal="causal"), atol=1e-5)


@pytest.mark.parametrize("rules", ["dp", "fsdp_tp"])
def test_kernel_runs_on_each_devices_own_rows_and_heads(rules):
    shapes = []
    def kernel(q, k, v, segments, causal):
        shapes.append(q.shape)
        return reference_kernel(q, k, v, segments, causal)
    fn = functools.partial(attend_padded, block=4, kernel=kernel)
    args = qkv(b=8, h=2)
    expected = jax.jit(jax.grad(lambda *x: jnp.square(attend_xla(*x)).sum(), (0, 1, 2)))(*args)
    with partitioning.use(partitioning.make_mesh(rules)):
        got = jax.jit(jax.grad(lambda *x: jnp.square(per_device(fn)(*x)).sum(), (0, 1, 2)))(*args)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), got, expected)
    assert set(shapes) == {(1, 2, 8, 8) if rules == "dp" else (2, 1, 8, 8)}


def layer(**fields):
    model = Attention(16, 4, **fields)
    draw = np.random.default_rng(0)
    x = jnp.asarray(draw.normal(size=(2, 6, 16)), F32)
    shapes = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), x))
    return model, jax.tree.map(lambda p: jnp.asarray(0.3 * draw.normal(size=p.shape), F32), shapes), x


@pytest.mark.parametrize("index, qk_norm", [("scalar", "rms"), ("vector", "none")])
def test_cache_equals_the_whole_sequence(index, qk_norm):
    model, params, x = layer(causal="causal", qk_norm=qk_norm)
    whole, _ = jax.jit(model.apply)(params, x)
    cache = {"key": jnp.ones((2, 9, 4, 4)), "value": jnp.full((2, 9, 4, 4), 1e9)}   # what is not written must not be seen
    at = (lambda n: n) if index == "scalar" else (lambda n: jnp.array([n, n]))
    step = jax.jit(lambda x, cache, at: model.apply(params, x, cache=cache, index=at))
    first, new = step(x[:, :3], cache, at(0))
    rest = []
    for t in range(3, 6):
        cache = jax.tree.map(lambda kept, part: write(kept, part, at(t - part.shape[1])), cache, new)
        y, new = step(x[:, t:t + 1], cache, at(t))
        rest.append(y)
    np.testing.assert_allclose(jnp.concatenate([first, *rest], 1), whole, atol=1e-5)


def test_rows_of_a_batch_may_stand_at_different_positions():
    model, params, x = layer(causal="causal")
    run = jax.jit(model.apply)
    whole, _ = run(params, x)
    empty = {n: jnp.zeros((2, 6, 4, 4)) for n in ("key", "value")}
    _, four = run(params, x[:, :4], cache=empty, index=0)   # row 0 has 2 real tokens, row 1 has 4
    cache = {name: write(empty[name], four[name], 0) for name in empty}
    new = jnp.stack([x[0, 2:4], x[1, 4:6]])
    y, _ = run(params, new, cache=cache, index=jnp.array([2, 4]))
    np.testing.assert_allclose(y, jnp.stack([whole[0, 2:4], whole[1, 4:6]]), atol=1e-5)


@pytest.mark.parametrize("qk_norm", ["rms", "none"])
def test_rows_beside_each_other_look_at_what_lies_once(qk_norm):
    """Beams of an example: what came before them, and a memory."""
    model, params, x = layer(causal="causal", qk_norm=qk_norm)
    run = jax.jit(model.apply)
    empty = {n: jnp.full((2, 6, 4, 4), 1e9) for n in ("key", "value")}
    _, new = run(params, x[:, :4], cache=empty, index=0)
    beams, padding = jnp.repeat(x[:, 4:], 3, 0) * jnp.linspace(0.5, 1, 6)[:, None, None], jnp.ones((6, 1, 1, 6), bool).at[3:, :, :, 0].set(False)
    full = {name: jnp.repeat(write(empty[name], new[name], 0), 3, 0) for name in empty}
    wanted, _ = run(params, beams, cache=full, index=4, mask=padding)
    apart = {"before_key": new["key"], "before_value": new["value"], **{n: jnp.full((6, 2, 4, 4), 1e9) for n in ("key", "value")}}
    found, last = run(params, beams, cache=apart, index=4, mask=padding)
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    assert {name: part.shape for name, part in last.items()} == {"key": (6, 2, 4, 4), "value": (6, 2, 4, 4)}
    swapped, _ = run(params, beams, cache={**apart, "before_key": new["key"][::-1]}, index=4, mask=padding)
    assert np.abs(swapped - wanted).max() > 1e-3
    keys, values = new["key"], new["value"]
    look = functools.partial(model.apply, params, method="attend_cached")
    np.testing.assert_allclose(look(beams, keys, values, shared=True), look(beams, jnp.repeat(keys, 3, 0), jnp.repeat(values, 3, 0)), atol=1e-6)
    with pytest.raises(ValueError, match="6 rows look at 2 memories"):      # forgotten rows of a memory that is not a cache's
        look(beams, keys, values)


def test_cached_memory_equals_memory():
    model, params, x = layer()
    memory = x[:, :5] + 1
    direct, _ = model.apply(params, x, memory=memory)
    keys, values = model.apply(params, memory, method="project_memory")
    np.testing.assert_array_equal(model.apply(params, x, keys, values, method="attend_cached"), direct)


def test_one_product_for_self_attention():
    model, params, x = layer()
    def products(jaxpr):
        for e in jaxpr.eqns:
            if e.primitive.name == "dot_general":
                yield e
            for inner in e.params.values():      # of what is computed again in the backward pass
                if hasattr(inner := getattr(inner, "jaxpr", inner), "eqns"):
                    yield from products(inner)

    dots = list(products(jax.make_jaxpr(lambda x: model.apply(params, x))(x).jaxpr))
    assert len(dots) == 4                                   # q, k and v at once; scores; weighted values; out
    run = jax.jit(model.apply)
    np.testing.assert_allclose(run(params, x)[0], run(params, x, memory=x)[0], atol=1e-6)


def test_qk_norm_has_a_gain_for_each_head_and_ignores_scale():
    model, params, x = layer(qk_norm="rms", use_bias=False)
    assert params["params"]["gain"].shape == (4,)
    fresh = nn.unbox(jax.jit(model.init)(jax.random.key(0, impl="unsafe_rbg"), x))["params"]
    np.testing.assert_array_equal(fresh["gain"], 1.5)
    louder = jax.tree.map(lambda p: p, params)
    louder["params"]["query"] = {"kernel": 50 * params["params"]["query"]["kernel"]}
    run = jax.jit(model.apply)
    np.testing.assert_allclose(run(louder, x)[0], run(params, x)[0], atol=1e-3)
    q = jnp.ones((1, 1, 4, 4)) * jnp.arange(1, 5)[:, None]
    np.testing.assert_allclose(model.apply(params, q, method="normalise_query")[0, 0, :, 0], params["params"]["gain"], rtol=1e-5)


@pytest.mark.parametrize("fields, words", [
    (dict(heads=5), ["heads=5", "width=16", "nearest: 4"]),
    (dict(heads=4, qk_norm="rmsnorm"), ["qk_norm='rmsnorm'", "nearest: 'rms'"]),
    (dict(heads=4, causal="casual"), ["causal='casual'", "nearest: 'causal'"]),
    (dict(heads=4, init_scheme="pytorch"), ["init_scheme='pytorch'", "nearest: 'torch'"]),
])
def test_errors_name_field_value_and_nearest(fields, words):
    with pytest.raises(ValueError) as error:
        jax.eval_shape(Attention(16, **fields).init, jax.random.key(0), jnp.zeros((1, 3, 16)))
    assert all(word in str(error.value) for word in words)
