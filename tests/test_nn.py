"""Layers against their definitions; scan, remat and chunking against the plain computation."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax import partitioning, roofline
from vlm_jax.nn import initializers
from vlm_jax.nn.attention import Attention
from vlm_jax.nn.block import REMAT, Block, Stack
from vlm_jax.nn.chunk import chunked
from vlm_jax.nn.embed import ConvStem, PatchEmbed, TokenEmbed, sincos_1d, sincos_2d
from vlm_jax.nn.linear import Linear, ProjectionHead
from vlm_jax.nn.mlp import ACTIVATIONS, Mlp
from vlm_jax.nn.norm import Norm
from vlm_jax.nn.pool import AttentionPooler
from vlm_jax.train.state import merge, unbox

close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5)
SIZES = dict(width=16, heads=2, mlp_dim=24)


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def shapes(model, *args, **kwargs):
    return jax.eval_shape(model.init, jax.random.key(0), *args, **kwargs)


def weights(model, *args, **kwargs):
    """Random values for every parameter, so that zeros and ones hide nothing."""
    random = np.random.default_rng(0)
    return jax.tree.map(lambda p: jnp.asarray(0.3 * random.normal(size=p.shape), p.dtype), nn.unbox(shapes(model, *args, **kwargs)))


@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
def test_norm(kind):
    x, model = draw(3, 5) * 4 + 1, Norm(kind, eps=1e-5)
    params = weights(model, x)
    y = np.asarray(x, np.float64)
    y = y - y.mean(-1, keepdims=True) if kind == "layernorm" else y
    y = y / np.sqrt((y ** 2).mean(-1, keepdims=True) + 1e-5) * params["params"]["scale"] + params["params"].get("bias", 0)
    close(model.apply(params, x), y)
    assert ("bias" in params["params"]) == (kind == "layernorm")
    half = model.apply(params, (x + 100).astype(jnp.bfloat16))   # bf16 statistics would be off by far
    assert half.dtype == jnp.bfloat16
    close(half.astype(jnp.float32), model.apply(params, (x + 100).astype(jnp.bfloat16).astype(jnp.float32)), atol=0.02)


def test_activations():
    from math import erf
    x = np.linspace(-4, 4, 9)
    exact = 0.5 * x * (1 + np.vectorize(erf)(x / 2 ** 0.5))
    close(ACTIVATIONS["gelu"](jnp.asarray(x, jnp.float32)), exact)
    close(ACTIVATIONS["quick_gelu"](jnp.asarray(x, jnp.float32)), x / (1 + np.exp(-1.702 * x)))
    assert np.abs(np.asarray(ACTIVATIONS["gelu_tanh"](jnp.asarray(x))) - exact).max() > 1e-4


def test_patch_embed_is_the_convolution():
    image, model = draw(2, 8, 12, 3), PatchEmbed(4, 5)
    params = weights(model, image)
    kernel = params["params"]["projection"]["kernel"].reshape(4, 4, 3, 5)
    conv = jax.lax.conv_general_dilated(image, kernel, (4, 4), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    close(jax.jit(model.apply)(params, image), conv.reshape(2, 6, 5))


def test_conv_stem_is_overlapping_convolutions():
    image, model = draw(2, 16, 16, 3), ConvStem(8, stages=2)
    params = weights(model, image)["params"]

    def conv(x, p):                                         # kernel rows: cell (i, j), place (a, b) in it, channel
        c = x.shape[-1]
        kernel = p["kernel"].reshape(2, 2, 2, 2, c, -1).transpose(0, 2, 1, 3, 4, 5).reshape(4, 4, c, -1)
        return p["bias"] + jax.lax.conv_general_dilated(x, kernel, (2, 2), ((0, 2), (0, 2)), dimension_numbers=("NHWC", "HWIO", "NHWC"))

    x = ACTIVATIONS["gelu"](Norm().apply({"params": params["norm1"]}, conv(image, params["conv1"])))
    close(jax.jit(model.apply)({"params": params}, image), conv(x, params["conv2"]).reshape(2, 16, 8))
    pixels = draw(1, 48, 48, 3)
    assert jax.eval_shape(ConvStem(96).apply, weights(ConvStem(96), pixels), pixels).shape == (1, 36, 96)


def test_sincos_positions_are_distinct_and_two_dimensional():
    table = sincos_2d(3, 4, 16)
    assert table.shape == (12, 16) and len(np.unique(table.round(5), axis=0)) == 12
    np.testing.assert_array_equal(table.reshape(3, 4, 16)[:, 0, :8], table.reshape(3, 4, 16)[:, 3, :8])   # rows first
    np.testing.assert_array_equal(table.reshape(3, 4, 16)[0, :, 8:], table.reshape(3, 4, 16)[2, :, 8:])
    close(sincos_1d(5, 4)[:, 0], np.sin(np.arange(5)))


@pytest.mark.parametrize("scheme, expected", [
    ("openai_text", {"qkv": 16 ** -.5, "out": 16 ** -.5 * 6 ** -.5, "up": 32 ** -.5, "down": 16 ** -.5 * 6 ** -.5}),
    ("torch", {"qkv": (6 / 64) ** .5 / 3 ** .5, "out": 16 ** -.5 / 3 ** .5, "up": 16 ** -.5 / 3 ** .5, "down": 64 ** -.5 / 3 ** .5}),
    ("fan_in", {"qkv": 16 ** -.5, "out": 16 ** -.5, "up": 16 ** -.5, "down": 64 ** -.5}),
])
def test_initial_spread(scheme, expected):
    fans = {"qkv": (16, 16), "out": (16, 16), "up": (16, 64), "down": (64, 16)}
    for role, (fan_in, fan_out) in fans.items():
        x = initializers.kernel(scheme, role, fan_in, fan_out, depth=3)(jax.random.key(0), (100_000,), jnp.float32)
        assert x.std() == pytest.approx(expected[role], rel=0.02), role


def test_scanned_layers_draw_their_own_weights():
    params = nn.unbox(jax.jit(Stack(3, SIZES).init)(jax.random.key(0, impl="unsafe_rbg"), draw(1, 2, 16)))["params"]["blocks"]
    kernel = params["attn"]["query"]["kernel"]
    assert kernel.shape == (3, 16, 2, 8) and np.abs(kernel[0] - kernel[1]).max() > 0.1


def test_every_parameter_has_axes_in_the_table():
    models = [(Stack(2, {**SIZES, "cross_layout": layout, "qk_norm": "rms"}), (draw(1, 3, 16), None, draw(1, 2, 16)))
              for layout in ("single", "double")]
    models += [(AttentionPooler(2, 16, 2), (draw(1, 3, 8),)), (ConvStem(8), (draw(1, 8, 8, 3),)),
               (PatchEmbed(4, 8), (draw(1, 8, 8, 3),)), (TokenEmbed(5, 8), (jnp.zeros((1, 2), jnp.int32),)),
               (ProjectionHead(4), (draw(1, 8),)), (Linear(4, ("embed", "mlp")), (draw(1, 8),))]
    for model, args in models:
        leaves = jax.tree.leaves(shapes(model, *args), is_leaf=lambda x: isinstance(x, nn.Partitioned))
        for leaf in leaves:
            assert len(leaf.names) == leaf.value.ndim and set(leaf.names) <= set(partitioning.AXES), leaf.names
            assert leaf.value.dtype == jnp.float32


@pytest.mark.parametrize("layout", ["none", "double"])
def test_stack_is_its_blocks_in_turn(layout):
    fields = {**SIZES, "causal": "causal", "cross_layout": layout}
    x, memory = draw(2, 3, 16), None if layout == "none" else draw(2, 4, 16, seed=1)
    model = Stack(3, fields)
    params = weights(model, x, memory=memory)
    y, block = x, jax.jit(Block(**fields, depth=3).apply)
    for i in range(3):
        y, _ = block({"params": jax.tree.map(lambda p: p[i], params["params"]["blocks"])}, y, memory=memory)
    close(jax.jit(model.apply)(params, x, memory=memory)[0], y)


@pytest.mark.parametrize("layout, mlps", [("single", 1), ("double", 2)])
def test_order_within_a_cross_layer(layout, mlps):
    """Each layout against its formula."""
    x, memory = draw(1, 3, 16), draw(1, 4, 16, seed=1)
    model = Block(**SIZES, cross_layout=layout)
    params = weights(model, x, memory=memory)["params"]
    assert sum("mlp" in name for name in params) == mlps

    def part(module, name, *args, **kwargs):
        return module.apply({"params": params[name]}, *args, **kwargs)
    attention, mlp = Attention(16, 2), Mlp(24)
    def norm(name, y):
        return part(Norm(), name, y)

    @jax.jit
    def by_hand():
        y = x + part(attention, "attn", norm("norm1", x))[0]
        if layout == "double":
            y = y + part(mlp, "mlp", norm("norm2", y))
            y = y + part(attention, "cross", norm("cross_norm1", y), memory=norm("cross_norm_kv", memory))[0]
            return y + part(mlp, "cross_mlp", norm("cross_norm2", y))
        y = y + part(attention, "cross", norm("norm_cross", y), memory=norm("norm_kv", memory))[0]
        return y + part(mlp, "mlp", norm("norm2", y))

    close(jax.jit(model.apply)({"params": params}, x, memory=memory)[0], by_hand())


def test_cross_attention_without_memory_is_an_error():
    with pytest.raises(ValueError, match="cross_layout='single' needs memory"):
        jax.eval_shape(Block(**SIZES, cross_layout="single").init, jax.random.key(0), draw(1, 2, 16))


def test_remat_policies_give_equal_gradients_and_less_memory():
    x, fields = draw(4, 32, 16), {**SIZES, "causal": "causal"}
    params = weights(Stack(4, fields), x)
    results, memory = {}, {}
    for name in REMAT:
        def loss(params):
            return jnp.square(Stack(4, fields, remat=name).apply(params, x)[0]).mean()
        kept = jax.eval_shape(lambda p: jax.vjp(loss, p)[1], params)   # what waits for the backward pass
        results[name], memory[name] = jax.jit(jax.value_and_grad(loss))(params), sum(r.size for r in jax.tree.leaves(kept))
    for name in REMAT:
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), results[name], results["none"])
    assert memory["full"] < memory["outputs"] < memory["none"] and memory["dots"] < memory["none"], memory


def test_pooler_sees_sets_and_obeys_its_mask():
    x, model = draw(2, 6, 8), AttentionPooler(3, 16, 4)
    params = weights(model, x)
    run = jax.jit(model.apply)
    y = run(params, x)
    assert y.shape == (2, 3, 16)
    close(run(params, x[:, ::-1]), y)
    assert np.abs(y[:, 0] - y[:, 1]).max() > 1e-3           # queries differ
    mask = jnp.arange(6) < jnp.array([[4], [6]])
    close(run(params, x, mask)[0], run(params, x[:, :4])[0])
    assert "bias" not in weights(AttentionPooler(3, 16, 4, use_bias=False), x)["params"]["attn"]["out"]


def embed(params, chunk):
    return {"a": jnp.tanh(chunk["x"] @ params), "index": chunk["i"]}


def objective(params, batch, microbatch):
    out = chunked(lambda chunk, _: embed(params, chunk), microbatch)(batch)
    return (out["a"] @ out["a"].T * jnp.cos(jnp.arange(16.))).sum(), out


@pytest.mark.parametrize("devices, microbatch", [(1, 0), (1, 4), (8, 8), (8, 32)])
def test_chunked_equals_unchunked(devices, microbatch):
    params, batch = draw(6, 4), {"x": draw(16, 6, seed=1), "i": jnp.arange(16)}
    (value, out), grad = jax.jit(jax.value_and_grad(lambda p: objective(p, batch, 0), has_aux=True))(params)
    np.testing.assert_array_equal(out["index"], np.arange(16))
    mesh = partitioning.make_mesh("fsdp", data=2 if devices == 8 else 1, devices=jax.devices()[:devices])
    with partitioning.use(mesh):
        step = jax.jit(jax.value_and_grad(lambda p, b: objective(p, b, microbatch), has_aux=True))
        (value2, out2), grad2 = step(params, partitioning.place(batch, mesh))
    close(value2, value)
    close(grad2, grad)
    jax.tree.map(close, out2, out)


def test_every_device_owns_a_part_of_every_chunk():
    """Cutting and joining move no rows between devices, and each computes an eighth of each chunk."""
    mesh = partitioning.make_mesh("dp")
    with partitioning.use(mesh):
        batch = partitioning.place({"x": np.ones((32, 6), np.float32)}, mesh)
        fn = chunked(lambda chunk, i: {"y": jnp.tanh(chunk["x"] @ jnp.ones((6, 4))) * (1 + i)}, 16)
        compiled = jax.jit(fn).lower(batch).compile()
    text = compiled.as_text()
    assert not any(word in text for word in ("all-gather", "all-to-all", "collective-permute", "all-reduce"))
    assert "f32[2,4]" in text                               # 16 rows of a chunk over 8 devices


def test_chunks_know_their_index():
    out = chunked(lambda chunk, i: jnp.full(chunk.shape, i), 2)(jnp.zeros(6))
    np.testing.assert_array_equal(out, [0, 1, 2, 0, 1, 2])


def test_chunking_saves_memory():
    params, batch = draw(64, 64), draw(512, 64, seed=1)

    def temporary(microbatch):
        def loss(p):
            def deep(x, _):
                for _ in range(6):
                    x = jnp.sin(x @ p)
                return x
            return chunked(deep, microbatch)(batch).sum()
        return jax.jit(jax.grad(loss)).lower(params).compile().memory_analysis().temp_size_in_bytes
    assert temporary(32) < 0.5 * temporary(0)


def test_chunk_errors_name_the_nearest_size():
    with pytest.raises(ValueError, match="microbatch=5 .* batch of 16 .*nearest: 4"):
        chunked(lambda x, i: x, 5)(jnp.zeros(16))
    with partitioning.use(partitioning.make_mesh("dp")), pytest.raises(ValueError, match="microbatch=4 .* 8 devices .*nearest: 8"):
        chunked(lambda x, i: x, 4)(jnp.zeros(16))


@pytest.mark.parametrize("build, words", [
    (lambda: shapes(Norm("layer_norm"), draw(1, 4)), ["norm='layer_norm'", "'layernorm'"]),
    (lambda: shapes(Mlp(4, "swish"), draw(1, 2, 4)), ["activation='swish'", "'silu'"]),
    (lambda: shapes(Stack(1, SIZES, remat="fully"), draw(1, 2, 16)), ["remat='fully'", "'full'"]),
    (lambda: shapes(Stack(1, {**SIZES, "cross_layout": "doubled"}), draw(1, 2, 16)), ["cross_layout='doubled'", "'double'"]),
    (lambda: shapes(Stack(1, {**SIZES, "head": 2}), draw(1, 2, 16)), ["head"]),
    (lambda: shapes(PatchEmbed(5, 4), draw(1, 12, 12, 3)), ["12x12", "patches of 5", "10x10"]),
    (lambda: shapes(ConvStem(8), draw(1, 12, 20, 3)), ["12x20", "by 8", "16x16"]),
    (lambda: sincos_2d(2, 2, 6), ["width=6", "nearest: 8"]),
])
def test_errors_name_field_value_and_nearest(build, words):
    with pytest.raises((ValueError, TypeError)) as error:
        build()
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_fsdp_sends_weights_once_a_pass_and_gradients_in_pieces(remat):
    """Of a stack: every weight is gathered for the forward and again for the backward pass, nothing as large as a weight is summed on all devices,
    and values and gradients are those of one device."""
    layers, width = 3, 64
    stack = Stack(layers, dict(width=width, heads=2, mlp_dim=4 * width), remat)
    x = draw(16, 4, width)
    params, _, axes = unbox(jax.jit(stack.init)(jax.random.key(0), x))

    def value(params, x):
        return (stack.apply(merge(params, {}, {}), x)[0] ** 2).mean()

    want = jax.jit(jax.value_and_grad(value))(params, x)
    mesh = partitioning.make_mesh("fsdp")
    with partitioning.use(mesh):
        placed = {p: jax.device_put(v, partitioning.sharding(mesh, axes[p], v.shape)) for p, v in params.items()}
        out = (None, {p: v.sharding for p, v in placed.items()})
        program = jax.jit(jax.value_and_grad(value), out_shardings=out).lower(placed, partitioning.place({"x": x}, mesh)["x"]).compile()
        found = program(placed, partitioning.place({"x": x}, mesh)["x"])
    close(found[0], want[0])
    jax.tree.map(close, dict(found[1]), dict(want[1]))
    split = sum(v.nbytes for p, v in params.items() if "embed" in axes[p])
    _, sent = roofline.read_program(program.as_text(), 8)
    assert 2 * 7 / 8 * split <= sent["all-gather"].sent <= 2.3 * 7 / 8 * split
    total = sum(c.sent for name, c in sent.items() if name != "all-gather")
    assert total <= 2.3 * 7 / 8 * split      # the CPU sums whole gradients before it cuts them; nothing else moves
