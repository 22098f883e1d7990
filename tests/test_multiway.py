"""Layers with experts by modality: who computes what, what it costs, and that a sharded stack is the same."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from vlm_jax import partitioning
from vlm_jax.nn.block import grown
from vlm_jax.nn.multiway import Layout, multiway_stack, one
from vlm_jax.train.state import unbox

WIDTH, BOTH = 16, Layout((("text", 3), ("image", 5)))
FIELDS = dict(width=WIDTH, heads=2, mlp_dim=32, experts=("image", "text"))


def made(layout, layers=2, **fields):
    """(stack, parameters by path)."""
    stack = multiway_stack(layers, **{**FIELDS, **fields})
    params, _, _ = unbox(stack.init(jax.random.key(0), jnp.zeros((1, layout.length, WIDTH)), layout, None, None, None, None, None))
    keys = iter(jax.random.split(jax.random.key(1), len(params)))
    return stack, {p: x + 0.1 * jax.random.normal(next(keys), x.shape) for p, x in params.items()}


def run(stack, params, x, layout, mask=None, bias=None):
    return stack.apply({"params": traverse_util.unflatten_dict(params, sep="/")}, x, layout, mask, bias, None, None, None)[0]


X = jax.random.normal(jax.random.key(2), (4, 8, WIDTH))


@pytest.mark.parametrize("attention", ["shared", "split"])
def test_only_the_experts_of_a_layout_compute_and_learn(attention):
    stack, params = made(BOTH, attention=attention)
    grads = jax.jit(jax.grad(lambda p: jnp.square(run(stack, p, X[:, 3:], one("image", 5))).sum()))(params)
    idle = {p for p, g in grads.items() if not np.abs(g).max()}
    assert idle == {p for p in params if "/text/" in f"/{p}"} and idle
    if attention == "split":
        assert {"attn/text/query/kernel", "norm1/text/scale", "mlp/text/up/kernel", "norm2/text/bias"} <= idle
    joint = jax.jit(jax.grad(lambda p: jnp.square(run(stack, p, X, BOTH)).sum()))(params)
    assert all(np.abs(g).max() > 0 for g in joint.values())


def test_segments_go_through_their_own_expert_and_back_to_their_places():
    stack, params = made(BOTH)
    same = params | {p: params[p.replace("/text/", "/image/")] for p in params if "/text/" in p}
    apart = Layout((("text", 2), ("image", 3), ("text", 1), ("image", 2)))
    with pytest.raises(AssertionError):      # with different experts it does matter
        np.testing.assert_allclose(run(stack, params, X, BOTH), run(stack, params, X, apart), atol=1e-3)
    for layout in (BOTH, apart, one("image", 8)):
        np.testing.assert_allclose(run(stack, same, X, layout), run(stack, same, X, one("text", 8)), atol=1e-5)


def test_a_token_mask_chooses_experts():
    """CogVLM's mask, [F, T, T..T, F..F]: each token is what its own expert makes of it, in one layer, where nothing before differs."""
    mask = np.array([False, True, True, True, True, False, False, False])
    layout = Layout.of(mask)
    assert layout.segments == (("text", 1), ("image", 4), ("text", 3)) and layout.length == 8
    stack, params = made(layout, layers=1)
    text, image = (run(stack, params, X, one(name, 8)) for name in ("text", "image"))
    np.testing.assert_allclose(run(stack, params, X, layout), np.where(mask[:, None], image, text), atol=1e-5)
    assert np.abs(text - image).max() > 1e-2


def test_where_nothing_is_split_layouts_say_nothing():
    stack, params = made(BOTH, feed_forward="shared")
    assert not [p for p in params if "/text/" in p or "/image/" in p] and {"mlp/all/up/kernel", "norm2/all/scale", "attn/all/query/kernel"} <= set(params)
    np.testing.assert_array_equal(run(stack, params, X, BOTH), run(stack, params, X, one("image", 8)))


def test_each_token_costs_one_expert():
    def flops(layout, experts, length=64, **fields):
        stack = multiway_stack(1, width=WIDTH, heads=2, mlp_dim=64, experts=experts, **fields)
        x = jnp.zeros((2, length, WIDTH))
        variables = jax.eval_shape(lambda k: stack.init(k, x, layout, None, None, None, None, None), jax.random.key(0))
        fn = jax.jit(lambda v: stack.apply(v, x, layout, None, None, None, None, None)[0])
        return fn.lower(variables).compile().cost_analysis()["flops"]

    plain = flops(one("image", 64), ("image",))
    both = Layout((("text", 24), ("image", 40)))
    for fields in ({}, dict(attention="split"), dict(feed_forward="shared")):
        assert 0.97 * plain < flops(both, ("image", "text", "joint"), **fields) < 1.03 * plain


def test_bias_and_mask_reach_the_attention():
    stack, params = made(BOTH)
    bias = jax.random.normal(jax.random.key(3), (2, 2, 8, 8))
    assert np.abs(run(stack, params, X, BOTH, bias=bias) - run(stack, params, X, BOTH)).max() > 1e-2
    np.testing.assert_allclose(run(stack, params, X, BOTH, bias=0 * bias), run(stack, params, X, BOTH), atol=1e-5)
    mask = jnp.ones((4, 1, 1, 8), bool).at[:, :, :, 2].set(False)
    changed = X.at[:, 2].set(9.0)      # a masked key says nothing to the others
    others = np.array([0, 1, 3, 4, 5, 6, 7])
    np.testing.assert_allclose(run(stack, params, X, BOTH, mask)[:, others], run(stack, params, changed, BOTH, mask)[:, others], atol=1e-5)
    assert np.abs(run(stack, params, X, BOTH)[:, others] - run(stack, params, changed, BOTH)[:, others]).max() > 1e-2


def test_a_cache_gives_what_the_whole_causal_sequence_gives():
    stack, params = made(BOTH, attention="split", sub_norm=True)
    variables = {"params": traverse_util.unflatten_dict(params, sep="/")}
    whole = run(stack, params, X, BOTH, mask=jnp.tril(jnp.ones((8, 8), bool))[None, None])
    cache = {name: jnp.zeros((2, 4, 8, 2, WIDTH // 2)) for name in ("key", "value")}
    first, new = stack.apply(variables, X[:, :5], Layout((("text", 3), ("image", 2))), None, None, cache, jnp.int32(0), None)
    cache = grown(cache, new, 0)
    second, _ = stack.apply(variables, X[:, 5:], one("image", 3), None, None, cache, jnp.int32(5), None)
    np.testing.assert_allclose(jnp.concatenate([first, second], 1), whole, atol=1e-5)


def test_key_bias_layer_scale_and_norms_are_where_they_are_asked_for():
    _, plain = made(BOTH)
    _, beit = made(BOTH, key_bias=False, layer_scale=0.1)
    assert set(plain) - set(beit) == {"attn/all/key/bias"} and set(beit) - set(plain) == {"gamma1", "gamma2"}
    _, released = made(BOTH, attention="split", sub_norm=True)
    assert {"attn/image/norm/scale", "mlp/text/sub_norm/bias"} <= set(released)


def test_a_wrong_layout_says_what_is_wrong():
    stack, params = made(BOTH)
    with pytest.raises(ValueError, match=r"a layout of 8 tokens .* does not fit a sequence of 5"):
        run(stack, params, X[:, :5], BOTH)
    with pytest.raises(ValueError, match="expert 'txt' is not one of this layer; nearest: 'text'"):
        run(stack, params, X, one("txt", 8))
    for field, wrong, right in (("attention", "splt", "split"), ("feed_forward", "shard", "shared"), ("drop_path_by", "experts", "expert"), ("remat", "ful", "full")):
        with pytest.raises(ValueError, match=f"{wrong!r} is not .*nearest: '{right}'"):
            made(BOTH, **{field: wrong})


@pytest.mark.parametrize("rules, devices", [("dp", 2), ("fsdp", 4), ("fsdp_tp", 8)])
def test_the_stack_is_the_same_on_any_mesh(rules, devices):
    stack = multiway_stack(2, **FIELDS)
    boxed = stack.init(jax.random.key(0), X, BOTH, None, None, None, None, None)
    params, _, axes = unbox(boxed)
    loss = lambda p, x: jnp.square(run(stack, p, x, BOTH)).mean()      # noqa: E731
    wanted, grads = jax.jit(jax.value_and_grad(loss))(params, X)
    mesh = partitioning.make_mesh(rules, devices=jax.devices()[:devices])
    with partitioning.use(mesh):
        placed = {p: jax.device_put(x, partitioning.sharding(mesh, axes[p], x.shape)) for p, x in params.items()}
        rows = partitioning.place({"x": X}, mesh)["x"]
        found, found_grads = jax.jit(jax.value_and_grad(loss))(placed, rows)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    for path, g in grads.items():
        np.testing.assert_allclose(found_grads[path], g, atol=1e-5 * max(1.0, float(np.abs(g).max())), err_msg=path)


def test_paths_are_dropped_by_the_sequence_or_by_the_expert():
    def different(by):
        stack, params = made(BOTH, layers=1, drop_path_by=by)
        apply = functools.partial(stack.apply, {"params": traverse_util.unflatten_dict(params, sep="/")}, jnp.tile(X[:1], (64, 1, 1)), BOTH, None, None, None, None,
                                  jnp.array([0.5]))
        out = apply(rngs={"dropout": jax.random.key(4)})[0]
        return len(np.unique(np.round(np.asarray(out).reshape(64, -1)[:, [0, -1]], 4), axis=0))

    assert different("sequence") == 4 and different("expert") > 4      # attention kept or not, times text's and image's parts
