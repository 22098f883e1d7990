"""Towers: published parameter counts, causality, cropping, caches, sharding."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax import partitioning
from vlm_jax.models import multimodal, resnet, text, vit
from vlm_jax.models.multimodal import MultimodalDecoder
from vlm_jax.models.resnet import ModifiedResNet
from vlm_jax.models.text import Cbow, TextTransformer
from vlm_jax.models.vit import ViT
from vlm_jax.nn.linear import ProjectionHead
from vlm_jax.nn.pool import AttentionPooler

close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5)
PAD, BOS, EOS = 0, 30, 31
TEXT = dict(vocab=32, context_length=8, width=16, layers=2, heads=2, mlp_dim=24)
DECODER = dict(vocab=32, width=16, layers=2, heads=2, mlp_dim=24)
IDS = jnp.array([[BOS, 3, EOS, 0, 0, 0, 0, 0], [BOS, 5, 7, 9, EOS, 0, 0, 0], [BOS, 1, 2, 3, 4, 5, 6, EOS]], jnp.int32)


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def weights(model, *args):
    shapes = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), *args))
    random = np.random.default_rng(0)
    return jax.tree.map(lambda p: jnp.asarray(0.3 * random.normal(size=p.shape), p.dtype), shapes)


@functools.cache
def count(model, *shapes, dtype=jnp.float32):
    variables = jax.eval_shape(model.init, jax.random.key(0), *(jax.ShapeDtypeStruct(s, dtype) for s in shapes))
    return sum(math.prod(x.shape) for x in jax.tree.leaves(nn.unbox(variables)["params"]))


def count_text(variant, embed, vocab=49408, length=77, **fields):
    sizes = text.VARIANTS[variant]
    tower = count(TextTransformer(vocab, length, **sizes, **fields), (1, length), dtype=jnp.int32)
    return tower + count(ProjectionHead(embed), (1, sizes["width"]))


def count_vit(variant, **fields):
    side = vit.VARIANTS[variant]["image_size"]
    return count(ViT(**vit.VARIANTS[variant], **fields), (1, side, side, 3))


@pytest.mark.parametrize("size, total", [(224, 985_894_528), (364, 986_485_888)])
def test_eva_counts(size, total):
    assert count(ViT(**{**vit.VARIANTS["eva_g14"], "image_size": size}), (1, size, size, 3)) == total


@pytest.mark.parametrize("variant, embed, words, total, image", [
    ("b32", 512, "512x12", 151_277_313, 87_849_216), ("b16", 512, "512x12", 149_620_737, 86_192_640),
    ("l14", 768, "768x12", 427_616_513, 303_966_208), ("l14_336", 768, "768x12", 427_944_193, 304_293_888),
    ("h14", 1024, "1024x24", 986_109_441, None), ("g14", 1024, "1024x24", 1_366_678_273, None),
    ("bigg14", 1280, "1280x32", 2_539_567_105, None)])
def test_clip_vit_counts(variant, embed, words, total, image):
    tower = count_vit(variant) + count(ProjectionHead(embed), (1, vit.VARIANTS[variant]["width"]))
    assert image in (None, tower)
    assert tower + count_text(words, embed) + 1 == total    # 1: the temperature


@pytest.mark.parametrize("variant, words, total, image", [
    ("rn50", "512x12", 102_007_137, 38_316_896), ("rn101", "512x12", 119_688_033, 56_259_936),
    ("rn50x4", "640x12", 178_300_601, 87_137_080), ("rn50x16", "768x12", 290_979_217, 167_328_912),
    ("rn50x64", "1024x12", 623_258_305, 420_380_352)])
def test_clip_resnet_counts(variant, words, total, image):
    sizes = resnet.VARIANTS[variant]
    tower = count(ModifiedResNet(**sizes), (1, sizes["image_size"], sizes["image_size"], 3))
    assert tower == image and tower + count_text(words, sizes["features"]) + 1 == total


@pytest.mark.parametrize("variant, embed, words, parts, total", [
    ("b32", 512, "512x12", (89_164_032, 63_428_608, 100_967_424), 253_560_065),
    ("l14", 768, "768x12", (306_724_864, 123_651_072, 208_074_240), 638_450_177)])
def test_open_clip_coca_counts(variant, embed, words, parts, total):
    width = vit.VARIANTS[variant]["width"]
    visual = count_vit(variant) + count(AttentionPooler(256, embed, 8), (1, 257, width)) + count(ProjectionHead(embed), (1, embed))
    decoder = MultimodalDecoder(49408, layout="double", **multimodal.VARIANTS[words])
    counts = visual, count_text(words, embed, length=76, pooling="class"), count(decoder, (1, 76, embed), (1, 255, embed))
    assert counts == parts and sum(counts) + 1 == total


@pytest.mark.parametrize("variant, words, encoder, decoder", [  # millions (arXiv 2205.01917, Table 1), poolers excluded
    ("coca_base", "768x12", 86, 297), ("coca_large", "1024x12", 303, 484)])
def test_coca_paper_counts(variant, words, encoder, decoder):
    width = text.VARIANTS[words]["width"]
    image = count_vit(variant, class_token=False, norms_at=("output",))
    lower = count(TextTransformer(64_000, 64, **text.VARIANTS[words], pooling="class"), (1, 64), dtype=jnp.int32)
    upper = count(MultimodalDecoder(64_000, **multimodal.VARIANTS[words]), (1, 64, width), (1, 256, width))
    assert (image + lower + upper) / 1e6 == pytest.approx(encoder + decoder, rel=0.002)
    assert image / 1e6 == pytest.approx(encoder, abs=0.7) and (lower + upper) / 1e6 == pytest.approx(decoder, abs=0.5)


def test_parameter_paths_read_alike_in_every_tower():
    """Also for towers that a system holds as members."""
    class Pair(nn.Module):
        image: nn.Module
        words: nn.Module

        def __call__(self, image, ids):
            return self.image(image), self.words(ids)

    pair = Pair(ViT(16, 8, 16, 2, 2, 24), TextTransformer(**TEXT))
    params = nn.unbox(jax.eval_shape(pair.init, jax.random.key(0), draw(1, 16, 16, 3), IDS))["params"]
    for tower in ("image", "words"):
        assert params[tower]["blocks"]["attn"]["query"]["kernel"].shape == (2, 16, 2, 8)
        assert "stack" not in params[tower]
    assert params["image"]["patch_embed"]["projection"]["kernel"].shape == (192, 16)


@pytest.mark.parametrize("fields", [
    dict(), dict(class_token=False, norms_at=("output",), norm="rmsnorm", qk_norm="rms", positions="sincos", stem="conv",
                 positions_at=("input", "output"), init_scheme="fan_in")])
def test_vit_tells_places_apart_only_by_position(fields):
    """Swapping two patches of the image swaps their tokens, once the position table is flat."""
    model, image = ViT(16, 8, 16, 2, 2, 24, **fields), draw(2, 16, 16, 3)
    params = weights(model, image)
    tokens = jax.jit(model.apply)(params, image)
    assert tokens.shape == (2, 5 - ("class_token" in fields), 16)
    if not fields:
        swapped = jnp.concatenate([image[:, :, 8:], image[:, :, :8]], 2)
        order = jnp.array([0, 2, 1, 4, 3])
        assert np.abs(jax.jit(model.apply)(params, swapped) - tokens[:, order]).max() > 1e-2
        params["params"]["position_embed"] = jnp.zeros((5, 16))
        close(jax.jit(model.apply)(params, swapped), jax.jit(model.apply)(params, image)[:, order])
    else:
        again = model.apply(params, 2, 2, method="position_table")
        plain = jax.jit(ViT(16, 8, 16, 2, 2, 24, **{**fields, "positions_at": ("input",)}).apply)(params, image)
        close(tokens, plain + again)


def test_vit_refuses_another_size_unless_positions_are_computed():
    image = draw(1, 24, 16, 3)
    model = ViT(16, 8, 16, 1, 2, 24)
    with pytest.raises(ValueError, match="24x16 pixels .*image_size=16; nearest: 16x16"):
        jax.eval_shape(model.apply, weights(model, image[:, :16]), image)
    model = ViT(16, 8, 16, 1, 2, 24, positions="sincos")
    assert jax.eval_shape(model.apply, weights(model, image), image).shape == (1, 7, 16)


def test_resnet_statistics_move_only_in_training():
    model, image = ModifiedResNet(32, 8, (1, 1, 1, 1), 12), draw(2, 32, 32, 3)
    variables = weights(model, image)

    @jax.jit
    def run(variables):
        return (*model.apply(variables, image, True, mutable=["batch_stats"]), model.apply(variables, image, mutable=["batch_stats"])[1])

    (tokens, pooled), moved, still = run(variables)
    assert tokens.shape == (2, 1, 256) and pooled.shape == (2, 12)
    kernel = variables["params"]["stem1"]["conv"]["kernel"]
    conv = jax.lax.conv_general_dilated(image, kernel, (2, 2), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC"))
    before, after = (v["batch_stats"]["stem1"]["norm"]["mean"] for v in (variables, moved))
    close(after, 0.9 * before + 0.1 * conv.mean((0, 1, 2)))   # symmetric padding; momentum .9 in flax's sense
    jax.tree.map(np.testing.assert_array_equal, still["batch_stats"], variables["batch_stats"])
    with pytest.raises(ValueError, match="16x32 pixels .*image_size=32"):
        model.apply(variables, image[:, :16])


def test_resnet_residuals_start_closed():
    x = jnp.abs(draw(1, 4, 4, 16))
    model = resnet.Bottleneck(4)
    np.testing.assert_array_equal(jax.jit(lambda: model.init_with_output(jax.random.key(0, impl="unsafe_rbg"), x)[0])(), x)


def test_text_is_causal():
    model = TextTransformer(**TEXT, pooling="class")
    params, run = weights(model, IDS), jax.jit(model.apply)
    states, _ = run(params, IDS)
    other, _ = run(params, IDS.at[2, 5].set(20))
    np.testing.assert_array_equal(states[:, :5], other[:, :5])
    assert np.abs(states[2, 5:] - other[2, 5:]).max(-1).min() > 1e-3


def test_ids_after_the_end_do_not_matter_to_the_pooled_vector():
    model = TextTransformer(**TEXT)
    params, run = weights(model, IDS), jax.jit(model.apply)
    np.testing.assert_array_equal(run(params, IDS)[1], run(params, jnp.where(IDS == PAD, 17, IDS))[1])
    first = TextTransformer(**TEXT, eos_id=9)               # any id may be the end; the first one counts
    at = jax.jit(first.apply)(params, IDS.at[1, 6].set(9))
    np.testing.assert_array_equal(at[1][1], at[0][1, 3])


@pytest.mark.parametrize("pooling, class_mask", [("eot", "exact"), ("class", "shifted"), ("class", "exact")])
def test_cropping_padding_changes_nothing(pooling, class_mask):
    """Length 5 leaves the longer caption without any padding."""
    model, ids = TextTransformer(**TEXT, pooling=pooling, class_mask=class_mask), IDS[:2]
    real = (ids != PAD)[..., None]
    params = weights(model, ids)

    @jax.jit
    def run(params):
        outs = [model.apply(params, ids[:, :length]) for length in (8, 6, 5)]
        return [(jnp.where(real[:, :5], states[:, :5], 0), pooled) for states, pooled in outs]

    whole, *cropped = run(params)
    for some in cropped:
        jax.tree.map(close, some, whole)


def test_cropping_padding_changes_no_gradient():
    model, ids = TextTransformer(**TEXT, pooling="class"), IDS[:2]
    params = weights(model, ids)
    grads = [jax.jit(jax.grad(lambda p: jnp.sin(model.apply(p, ids[:, :length])[1]).sum()))(params) for length in (8, 5)]
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), *grads)


def test_class_mask_is_off_by_one_unless_exact():
    """The shifted class token sees one pad of a short caption; the exact one sees none; full captions agree."""
    ids = jnp.concatenate([IDS, IDS[2:]])
    def pooled(class_mask, ids):
        model = TextTransformer(**TEXT, pooling="class", class_mask=class_mask)
        params = weights(model, ids)
        return np.asarray(jax.jit(model.apply)(params, ids, ids_mask)[1]), params, jax.jit(model.apply)
    ids_mask = ids != PAD
    shifted, params, run_shifted = pooled("shifted", ids)
    exact, _, run_exact = pooled("exact", ids)
    assert np.abs(shifted - exact)[:2].max(-1).min() > 1e-3
    np.testing.assert_array_equal(shifted[2], exact[2])
    moved = ids.at[0, 3].set(17)                            # the first pad of caption 0; its mask still says pad
    np.testing.assert_array_equal(run_exact(params, moved, ids_mask)[1][0], exact[0])
    assert np.abs(run_shifted(params, moved, ids_mask)[1][0] - shifted[0]).max() > 1e-3
    np.testing.assert_array_equal(run_shifted(params, ids.at[0, 4].set(17), ids_mask)[1][0], shifted[0])


def test_cbow_ignores_order_and_specials():
    model = Cbow(vocab=32, width=6, bos_id=BOS, eos_id=EOS)
    params = weights(model, IDS)
    run = jax.jit(model.apply)
    _, pooled = run(params, IDS)
    close(run(params, jnp.array([[BOS, 9, 7, 5, EOS, 0, 0, 0]]))[1][0], pooled[1])
    close(pooled[1], params["params"]["token_embed"]["table"][jnp.array([5, 7, 9])].mean(0))
    close(run(params, jnp.array([[9, 5, 7]]))[1][0], pooled[1])
    assert not np.asarray(run(params, jnp.array([[BOS, EOS, 0]]))[1]).any()
    close(run(params, jnp.array([[BOS, 0, EOS]]), jnp.array([[True, True, True]]))[1][0], params["params"]["token_embed"]["table"][0])


@pytest.fixture(scope="module", params=["single", "double"])
def coca(request):
    """Lower half, upper half, their weights; memory of another width."""
    lower = TextTransformer(**TEXT, pooling="class")
    upper = MultimodalDecoder(**DECODER, layout=request.param, memory_width=12)
    params = {"lower": weights(lower, IDS), "upper": weights(upper, draw(3, 8, 16), draw(3, 5, 12))}

    @jax.jit
    def logits(params, ids, memory, memory_mask=None):
        states, _ = lower.apply(params["lower"], ids)
        return states, upper.apply(params["upper"], upper.apply(params["upper"], states, memory, memory_mask), method="logits")
    return lower, upper, params, logits


def test_text_states_know_no_image_but_logits_do(coca):
    *_, params, logits = coca
    states, out = logits(params, IDS, draw(3, 5, 12))
    states2, out2 = logits(params, IDS, draw(3, 5, 12, seed=9))
    np.testing.assert_array_equal(states, states2)
    assert np.abs(out - out2).max(-1).min() > 1e-4


def test_caption_logits_are_causal(coca):
    *_, params, logits = coca
    memory = draw(3, 5, 12)
    _, out = logits(params, IDS, memory)
    _, other = logits(params, IDS.at[2, 4].set(20), memory)
    np.testing.assert_array_equal(out[:, :4], other[:, :4])
    assert np.abs(out[2, 4:] - other[2, 4:]).max(-1).min() > 1e-3


def test_memory_mask_hides_memory(coca):
    *_, params, logits = coca
    memory, mask = draw(3, 5, 12), jnp.broadcast_to(jnp.arange(5) < 3, (3, 5))
    _, out = logits(params, IDS, memory, mask)
    np.testing.assert_array_equal(logits(params, IDS, memory.at[:, 3:].set(7.0), mask)[1], out)
    assert np.abs(logits(params, IDS, memory.at[:, :3].set(7.0), mask)[1] - out).max() > 1e-3


def test_vocab_matrix_gives_the_logits(coca):
    _, upper, params, logits = coca
    states = draw(2, 3, 16)
    matrix = upper.apply(params["upper"], method="vocab_matrix")
    assert matrix.shape == (16, 32)
    close(states @ matrix, upper.apply(params["upper"], states, method="logits"))


def test_cached_decoding_equals_uncached(coca):
    lower, upper, params, logits = coca
    ids, memory, prompt = jnp.asarray(np.random.default_rng(1).integers(1, 32, (3, 8)), jnp.int32), draw(3, 5, 12), 3
    _, whole = logits(params, ids, memory)

    @jax.jit
    def extend(ids, caches, index, memory=None):
        states, low = lower.apply(params["lower"], ids, caches[0], index, method="extend")
        states, up = upper.apply(params["upper"], states, caches[1], index, memory, method="extend")
        return upper.apply(params["upper"], states, method="logits"), (low, up)

    caches = lower.init_cache(3, 8), upper.init_cache(3, 8, 5)
    out, caches = extend(ids[:, :prompt], caches, 0, memory)
    steps = [out]
    for t in range(prompt, 8):
        out, caches = extend(ids[:, t:t + 1], caches, t)
        steps.append(out)
    np.testing.assert_allclose(jnp.concatenate(steps, 1), whole, atol=1e-4)


def test_gradients_are_the_same_on_a_mesh():
    """Weights and activations split over fsdp and tensor axes: the numbers of one device."""
    model = MultimodalDecoder(**{**DECODER, "mlp_dim": 32})
    states, memory = draw(8, 8, 16), draw(8, 5, 16, seed=1)
    params = weights(model, states, memory)

    def loss(params, states, memory):
        return jnp.sin(model.apply(params, model.apply(params, states, memory), method="logits")).mean()

    expected = jax.jit(jax.value_and_grad(loss))(params, states, memory)
    mesh = partitioning.make_mesh("fsdp_tp", data=2, fsdp=2, tensor=2)
    boxed = jax.eval_shape(model.init, jax.random.key(0), states, memory)
    with partitioning.use(mesh):
        placed = jax.tree.map(lambda box, p: jax.device_put(p, partitioning.sharding(mesh, box.names, p.shape)), boxed, params,
                              is_leaf=lambda x: isinstance(x, nn.Partitioned))
        kernel = placed["params"]["blocks"]["mlp"]["up"]["kernel"]
        assert {s.data.shape for s in kernel.addressable_shards} == {(2, 8, 16)}
        got = jax.jit(jax.value_and_grad(loss))(placed, *partitioning.place({"a": states, "b": memory}, mesh).values())
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), got, expected)


def test_bfloat16_computes_in_bfloat16_from_float32_parameters():
    image = draw(2, 16, 16, 3)
    model = ViT(16, 8, 16, 2, 2, 24, dtype=jnp.bfloat16)
    params = weights(model, image)
    out = jax.jit(model.apply)(params, image)
    assert out.dtype == jnp.bfloat16 and all(p.dtype == jnp.float32 for p in jax.tree.leaves(params))
    exact = jax.jit(ViT(16, 8, 16, 2, 2, 24).apply)(params, image)
    assert np.abs(out.astype(jnp.float32) - exact).max() < 0.05 * np.abs(exact).max()


def test_small_recipe_has_its_size():
    """The towers of the small CoCa, put together: well under a million parameters, and they fit each other."""
    options = dict(norm="rmsnorm", qk_norm="rms", positions="sincos", init_scheme="fan_in")
    image = ViT(**vit.VARIANTS["mini"], stem="conv", class_token=False, norms_at=("output",), positions_at=("input", "output"), **options)
    lower = TextTransformer(vocab=64, context_length=28, pooling="class", class_mask="exact", **text.VARIANTS["mini"], **options)
    del options["positions"]
    upper = MultimodalDecoder(vocab=64, **multimodal.VARIANTS["mini"], **options)
    queries = AttentionPooler(32, 96, 3, norm="rmsnorm", qk_norm="rms"), AttentionPooler(1, 96, 3, norm="rmsnorm", qk_norm="rms")
    pixels, ids = draw(2, 48, 48, 3), jnp.ones((2, 26), jnp.int32).at[:, 20:].set(0)
    args = {"image": (image, pixels), "lower": (lower, ids), "upper": (upper, draw(2, 26, 96), draw(2, 32, 96)),
            "caption": (queries[0], draw(2, 36, 96)), "contrast": (queries[1], draw(2, 36, 96))}
    params = {name: weights(model, *rest) for name, (model, *rest) in args.items()}
    assert 0.6e6 < sum(p.size for p in jax.tree.leaves(params)) < 0.9e6

    def loss(params):
        tokens = image.apply(params["image"], pixels)
        memory, single = (q.apply(params[n], tokens) for q, n in zip(queries, ("caption", "contrast")))
        states, pooled = lower.apply(params["lower"], ids)
        logits = upper.apply(params["upper"], upper.apply(params["upper"], states, memory), method="logits")
        return jax.nn.logsumexp(logits, -1).mean() + (single[:, 0] * pooled * jnp.arange(96)).mean()

    assert jax.eval_shape(loss, params).shape == ()


def test_errors_name_field_value_and_nearest():
    for model, args, words in (
            (TextTransformer(**TEXT, pooling="eos"), (IDS,), ("pooling='eos'", "'eot'")),
            (TextTransformer(**TEXT, class_mask="exactly"), (IDS,), ("class_mask='exactly'", "'exact'")),
            (TextTransformer(**TEXT), (jnp.zeros((1, 9), jnp.int32),), ("9 ids", "context_length=8")),
            (ViT(16, 8, 16, 1, 2, 24, stem="convs"), (draw(1, 16, 16, 3),), ("stem='convs'", "'conv'")),
            (ViT(16, 8, 16, 1, 2, 24, norms_at=("inputs",)), (draw(1, 16, 16, 3),), ("norms_at='inputs'", "'input'")),
            (ViT(12, 6, 16, 1, 2, 24, stem="conv"), (draw(1, 12, 12, 3),), ("patch=6", "nearest: 4"))):
        with pytest.raises(ValueError) as error:
            jax.eval_shape(model.init, jax.random.key(0), *args)
        assert all(word in str(error.value) for word in words), error.value
