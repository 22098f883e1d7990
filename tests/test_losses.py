"""Losses against formulas written down plainly in float64, on one device and on meshes of eight."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax import partitioning
from vlm_jax.losses import answers, mixing, tiles
from vlm_jax.losses.captioning import caption_nll, captioning
from vlm_jax.losses.contrastive import DUPLICATES, contrastive, sigmoid
from vlm_jax.losses.terms import wanted, weigh

ROWS, WIDTH, SCALE, BIAS = 24, 8, 14.3, -3.0
MESHES = {"one device": None, "data=8": ("dp", 8, 1, 1), "data=2,fsdp=4": ("fsdp", 2, 4, 1),
          "data=2,fsdp=2,tensor=2": ("fsdp_tp", 2, 2, 2)}
on_every_mesh = pytest.mark.parametrize("layout", MESHES)


@contextlib.contextmanager
def mesh_of(layout):
    if MESHES[layout] is None:
        yield
    else:
        with partitioning.use(partitioning.make_mesh(*MESHES[layout])):
            yield


def pairs(rows=ROWS, width=WIDTH, seed=0):
    draw = np.random.default_rng(seed)
    sides = draw.normal(size=(2, rows, width))
    image, text = sides / np.linalg.norm(sides, axis=-1, keepdims=True)
    return image.astype("float32"), text.astype("float32"), draw.integers(0, 18, rows), draw.integers(0, 18, rows)


def close(got, expected, tolerance=1e-5):
    for g, e in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(g, np.float64), np.asarray(e, np.float64), rtol=tolerance, atol=tolerance)


# ---- plain formulas: value and gradients in float64

def masks(duplicates, image_id, caption_id):
    own = np.eye(len(image_id), dtype=bool)
    same = own | (image_id[:, None] == image_id) | (caption_id[:, None] == caption_id)
    return {"negatives": (own | True, own), "positives": (own | True, same), "masked": (own | ~same, own)}[duplicates]


def log_softmax(x, axis):
    peak = x.max(axis, keepdims=True)
    return x - peak - np.log(np.exp(x - peak).sum(axis, keepdims=True))


def plain_softmax(image, text, scale, counted, positive, weight=0.5):
    image, text = image.astype("float64"), text.astype("float64")
    cosine, rows = image @ text.T, len(image)
    logits = np.where(counted, scale * cosine, -np.inf)
    loss, d_logits = 0, 0
    for axis in (1, 0):
        target = positive / positive.sum(axis, keepdims=True)
        log_p = log_softmax(logits, axis)
        loss -= weight / rows * (target * np.where(positive, log_p, 0)).sum()
        d_logits = d_logits + weight / rows * (np.exp(log_p) - target)
    return loss, (scale * d_logits @ text, scale * d_logits.T @ image, (d_logits * cosine).sum())


def plain_sigmoid(image, text, scale, bias, counted, positive):
    image, text = image.astype("float64"), text.astype("float64")
    cosine, rows = image @ text.T, len(image)
    sign = np.where(positive, 1, -1)
    z = sign * (scale * cosine + bias)
    loss = (counted * np.log1p(np.exp(-z))).sum() / rows
    d_logits = -sign * counted / (1 + np.exp(z)) / rows
    return loss, (scale * d_logits @ text, scale * d_logits.T @ image, (d_logits * cosine).sum(), d_logits.sum())


def plain_captions(states, vocab, targets, mask, smoothing):
    """Per-example sums and the derivative of each token's loss by its logits."""
    logits = states.astype("float64") @ vocab.astype("float64")
    log_p, hot = log_softmax(logits, -1), np.eye(vocab.shape[1])[np.where(mask, targets, 0)]
    target = (1 - smoothing) * hot + smoothing / vocab.shape[1]
    correct = (log_p.argmax(-1) == np.where(mask, targets, 0)) & mask
    return (mask * -(target * log_p).sum(-1)).sum(1), mask.sum(1), correct.sum(1), mask[..., None] * (np.exp(log_p) - target)


# ---- contrastive

@on_every_mesh
@pytest.mark.parametrize("duplicates", DUPLICATES)
def test_contrastive_equals_the_plain_formula(layout, duplicates):
    image, text, image_id, caption_id = pairs()
    loss = functools.partial(contrastive, duplicates=duplicates, image_id=image_id, caption_id=caption_id, chunk=2)
    with mesh_of(layout):
        step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))
        (value, metrics), gradients = step(image, text, jnp.float32(SCALE))
    counted, positive = masks(duplicates, image_id, caption_id)
    assert {"negatives": counted.all(), "positives": positive.sum() > ROWS + 10,
            "masked": counted.sum() < ROWS ** 2 - 10}[duplicates]
    close((value, gradients), plain_softmax(image, text, SCALE, counted, positive))
    logits = np.where(counted, image @ text.T, -np.inf)
    best = [np.where(positive, logits, -9).max(a) > np.where(positive, -9, logits).max(a) for a in (1, 0)]
    close((metrics["image_to_text"], metrics["text_to_image"]), (best[0].mean(), best[1].mean()))


@pytest.mark.parametrize("layout, duplicates", (
    *(("one device", d) for d in DUPLICATES), *zip(list(MESHES)[1:], DUPLICATES)))
def test_sigmoid_equals_the_plain_formula(layout, duplicates):
    image, text, image_id, caption_id = pairs()
    loss = functools.partial(sigmoid, duplicates=duplicates, image_id=image_id, caption_id=caption_id, chunk=2)
    with mesh_of(layout):
        step = jax.jit(jax.value_and_grad(lambda *a: 3 * loss(*a)[0], argnums=(0, 1, 2, 3)))
        value, gradients = step(image, text, jnp.float32(SCALE), jnp.float32(BIAS))
    counted, positive = masks(duplicates, image_id, caption_id)
    plain = plain_sigmoid(image, text, SCALE, BIAS, counted, positive)
    close((value, gradients), jax.tree.map(lambda x: 3 * x, plain))


def test_directions_sum_is_twice_their_mean_in_value_and_gradient():
    image, text = pairs()[:2]
    mean, total = (jax.jit(jax.value_and_grad(lambda x, d=d: contrastive(x, text, SCALE, directions=d)[0]))(image)
                   for d in ("mean", "sum"))
    close(total, jax.tree.map(lambda x: 2 * x, mean))


@pytest.mark.parametrize("chunk", (1, 5, 1000))
def test_no_chunk_size_changes_the_result(chunk):
    image, text, image_id, _ = pairs()

    def loss(x):
        return contrastive(x, text, SCALE, duplicates="positives", image_id=image_id, chunk=chunk)[0]

    value, (gradient, *_) = plain_softmax(image, text, SCALE, *masks("positives", image_id, image_id))
    close(jax.jit(jax.value_and_grad(loss))(image), (value, gradient))


def test_unrelated_features_start_near_the_logarithm_of_the_global_batch():
    image, text = pairs(rows=2048, width=512)[:2]
    with mesh_of("data=8"):
        loss, metrics = jax.jit(contrastive)(image, text, 1 / 0.07)
    assert abs(loss - np.log(2048)) < 0.3
    assert metrics["image_to_text"] < 0.01


def test_extreme_temperature_stays_finite_and_exact():
    image, text, image_id, caption_id = pairs()
    loss = functools.partial(contrastive, duplicates="masked", image_id=image_id, caption_id=caption_id, chunk=5)
    (value, _), gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(
        image, text, jnp.float32(1e3))
    expected = plain_softmax(image, text, 1e3, *masks("masked", image_id, caption_id))
    assert np.isfinite(value)
    np.testing.assert_allclose(value, expected[0], rtol=1e-5)
    close(gradients[0] / 1e3, expected[1][0] / 1e3)


def test_identical_features_are_no_matches():
    same = np.ones((ROWS, 1), "float32")
    loss, metrics = contrastive(same, same, 1)
    close(loss, np.log(ROWS))
    assert metrics["image_to_text"] == 0


def test_bfloat16_features_meet_in_float32():
    image, text = (x.astype(jnp.bfloat16) for x in pairs()[:2])
    value, gradient = jax.jit(jax.value_and_grad(lambda x: contrastive(x, text, SCALE)[0]))(image)
    own = np.eye(ROWS, dtype=bool)
    expected = plain_softmax(np.asarray(image), np.asarray(text), SCALE, own | True, own)
    assert value.dtype == jnp.float32 and gradient.dtype == jnp.bfloat16
    close(value, expected[0])
    close(gradient, expected[1][0], 1e-2)


def test_a_row_pulls_on_features_that_live_on_another_device():
    image, text = pairs()[:2]
    with mesh_of("data=8"):
        gradient = jax.jit(jax.grad(lambda i, t: contrastive(i, t, SCALE)[0], argnums=1))
        before, after = gradient(image, text), gradient(np.concatenate([-image[:1], image[1:]]), text)
    moved = np.abs(before - after).max(1)
    assert (moved[-3:] > 1e-4).all()  # rows of the last device; the change was on the first


def test_gradient_flows_on_to_the_logarithm_of_the_temperature():
    image, text = pairs()[:2]
    own = np.eye(ROWS, dtype=bool)
    with mesh_of("data=2,fsdp=4"):
        got = jax.jit(jax.grad(lambda s: contrastive(image, text, jnp.exp(s))[0]))(jnp.log(SCALE))
    close(got, SCALE * plain_softmax(image, text, SCALE, own | True, own)[1][2])


def compiled_for(layout, loss, wrt, *shapes):
    """value_and_grad(loss), compiled for arguments (shape, dtype) whose rows are split where [0] is "batch"."""
    def argument(first, shape, dtype=jnp.float32):
        axes = (first, *("none" for _ in shape[1:])) if shape else ()
        where = None if MESHES[layout] is None else partitioning.sharding(jax.sharding.get_mesh(), axes, shape)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

    with mesh_of(layout):
        return jax.jit(jax.value_and_grad(loss, argnums=wrt)).lower(*(argument(*s) for s in shapes)).compile()


@pytest.mark.parametrize("layout", ("one device", "data=8"))
def test_memory_grows_with_the_batch_and_not_with_its_square(layout):
    def temporaries(rows):
        features = ("batch", (rows, 32))
        compiled = compiled_for(layout, lambda *a: contrastive(*a, chunk=64)[0], (0, 1, 2), features, features, ("none", ()))
        assert "all-gather" not in compiled.as_text()
        return compiled.memory_analysis().temp_size_in_bytes

    small, large = temporaries(4096), temporaries(16384)
    assert large < 4.5 * small
    assert large < 16384 ** 2 / 8  # a thirty-second of the float32 logits


@pytest.mark.parametrize("options, message", (
    (dict(duplicates="mask"), "nearest: 'masked'"), (dict(directions="means"), "nearest: 'mean'"),
    (dict(duplicates="positives"), "needs image_id"), (dict(chunk=0), "chunk=0")))
def test_contrastive_names_what_is_wrong(options, message):
    image, text = pairs()[:2]
    with pytest.raises(ValueError, match=message):
        contrastive(image, text, SCALE, **options)
    with pytest.raises(ValueError, match="one shape"):
        contrastive(image, text[:3], SCALE)


# ---- captioning

def captions(rows=16, length=7, width=6, vocab=20):
    draw = np.random.default_rng(1)
    states, matrix = draw.normal(size=(rows, length, width)), draw.normal(size=(width, vocab))
    lengths = draw.integers(0, length + 1, rows)  # unequal over rows and devices, some empty
    mask = np.arange(length) < lengths[:, None]
    targets = np.where(mask, draw.integers(0, vocab, (rows, length)), 0)
    return states.astype("float32"), matrix.astype("float32"), targets.astype("int32"), mask


def place_captions(layout, states, vocab, targets, mask):
    if MESHES[layout] is None:
        return states, vocab, targets, mask
    mesh = jax.sharding.get_mesh()
    batch = partitioning.place({"states": states, "targets": targets, "mask": mask}, mesh)
    return (batch["states"], jax.device_put(vocab, partitioning.sharding(mesh, ("embed", "vocab"), vocab.shape)),
            batch["targets"], batch["mask"])


@pytest.mark.parametrize("layout, smoothing", (("one device", 0.1), *((name, 0.0) for name in MESHES)))
def test_captioning_equals_the_plain_formula(layout, smoothing):
    arrays = captions()
    states, vocab, targets, mask = arrays
    nll, tokens, correct, d_logits = plain_captions(*arrays, smoothing)

    def loss(states, vocab, targets, mask):
        nll, tokens, correct = captioning(states, vocab, targets, mask, chunk=5, label_smoothing=smoothing)
        return 2 * nll / tokens, (nll, tokens, correct)

    with mesh_of(layout):
        step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
        (_, sums), gradients = step(*place_captions(layout, *arrays))
    close(sums, (nll.sum(), tokens.sum(), correct.sum()))
    factor = 2 / tokens.sum()
    close(gradients, (factor * d_logits @ vocab.T, factor * np.einsum("bld,blv->dv", states, d_logits)))


@on_every_mesh
def test_caption_nll_is_exact_for_any_weights_of_the_examples(layout):
    arrays = captions()
    states, vocab, targets, mask = arrays
    nll, tokens, correct, d_logits = plain_captions(*arrays, 0.1)
    weights = np.random.default_rng(2).normal(size=len(nll))

    def loss(states, vocab, targets, mask):
        sums = caption_nll(states, vocab, targets, mask, chunk=5, label_smoothing=0.1)
        return (jnp.asarray(weights, jnp.float32) * sums[0]).sum(), sums

    with mesh_of(layout):
        step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
        (_, sums), gradients = step(*place_captions(layout, *arrays))
    close(sums, (nll, tokens, correct))
    d_logits = weights[:, None, None] * d_logits
    close(gradients, (d_logits @ vocab.T, np.einsum("bld,blv->dv", states, d_logits)))


def test_caption_nll_inside_rematerialised_microbatches():
    states, vocab, targets, mask = arrays = captions()
    *_, d_logits = plain_captions(*arrays, 0)

    def loss(states, vocab):
        piece = jax.checkpoint(lambda a: caption_nll(a[0], vocab, a[1], a[2], chunk=5)[0])
        strided = jax.tree.map(lambda x: x.reshape(8, 2, *x.shape[1:]).swapaxes(0, 1), (states, targets, mask))
        return jax.lax.map(piece, strided).sum()

    with mesh_of("data=2,fsdp=4"):
        gradients = jax.jit(jax.grad(loss, argnums=(0, 1)))(states, vocab)
    close(gradients, (d_logits @ vocab.T, np.einsum("bld,blv->dv", states, d_logits)))


@pytest.mark.parametrize("pad", (3, -100))
def test_targets_outside_the_mask_do_not_matter(pad):
    states, vocab, targets, mask = captions()
    grad = jax.jit(jax.value_and_grad(lambda s, t: captioning(s, vocab, t, mask)[0]))
    value, gradient = grad(states, targets)
    other_value, other_gradient = grad(states, np.where(mask, targets, pad))
    assert value == other_value
    np.testing.assert_array_equal(gradient, other_gradient)
    assert (np.asarray(gradient)[~mask] == 0).all()


def test_bfloat16_states_are_summed_in_float32():
    states, vocab, targets, mask = captions()
    states = states.astype(jnp.bfloat16)
    vocab = np.asarray(vocab.astype(jnp.bfloat16), np.float32)
    loss = jax.value_and_grad(lambda s, v: captioning(s, v, targets, mask)[0], argnums=(0, 1))
    value, gradients = jax.jit(loss)(states, vocab)
    nll, *_, d_logits = plain_captions(np.asarray(states), vocab, targets, mask, 0)
    close(value, nll.sum(), 1e-5)
    assert gradients[0].dtype == jnp.bfloat16 and gradients[1].dtype == jnp.float32
    close(gradients[0], d_logits @ vocab.T, 2e-2)


def test_all_logits_equal_is_not_a_correct_token():
    states, vocab, targets, mask = captions()
    nll, tokens, correct = captioning(states, 0 * vocab, targets, mask)
    assert correct == 0
    close(nll / tokens, np.log(vocab.shape[1]))


@pytest.mark.parametrize("layout", ("one device", "data=8"))
def test_logits_of_the_whole_batch_are_never_alive_and_states_stay_home(layout):
    rows, length, width, vocab = 64, 64, 16, 2048
    shapes = (("batch", (rows, length, width)), ("none", (width, vocab)), ("batch", (rows, length), jnp.int32),
              ("batch", (rows, length), bool))
    for loss in (lambda *a: captioning(*a, chunk=32)[0], lambda *a: caption_nll(*a, chunk=32)[0].sum()):
        compiled = compiled_for(layout, loss, (0, 1), *shapes)
        share = rows * length * vocab * 4 // (8 if layout == "data=8" else 1)
        assert compiled.memory_analysis().temp_size_in_bytes < share / 4
        assert "all-gather" not in compiled.as_text()


def test_captioning_names_the_array_that_does_not_fit():
    states, vocab, targets, mask = captions()
    with pytest.raises(ValueError, match="vocab .* nearest: \\(6,\\)"):
        captioning(states, vocab.T, targets, mask)
    with pytest.raises(ValueError, match="mask .* nearest: \\(16, 7\\)"):
        caption_nll(states, vocab, targets, mask[:, 1:])


# ---- pieces and terms

def test_cut_and_join_are_inverse_and_even():
    x = jnp.arange(1, 11)
    assert tiles.cut(x, 4).tolist() == [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 0, 0]]
    assert tiles.cut(x, 6).shape == (2, 5)
    assert tiles.join(tiles.cut(x, 4), 10).tolist() == x.tolist()


def test_terms_are_weighed_and_logged_raw():
    total, metrics = weigh({"itc": jnp.float32(3), "cap": jnp.float32(5)}, {"itc": 1, "cap": 2})
    assert total == 13 and metrics == {"itc": 3, "cap": 5}


def test_a_term_of_weight_zero_may_be_left_out():
    weights = {"itc": 1.0, "cap": 0.0}
    assert wanted(weights, "itc") and not wanted(weights, "cap") and not wanted(weights, "itm")
    assert weigh({"itc": jnp.float32(3)}, weights)[0] == 3


def test_weigh_names_the_side_that_is_missing():
    with pytest.raises(ValueError, match="term 'itm' has no weight; nearest: 'itc'"):
        weigh({"itm": 1.0}, {"itc": 1, "cap": 2})
    with pytest.raises(ValueError, match="weight capt=2 has no term; nearest: 'cap'"):
        weigh({"cap": 1.0}, {"cap": 1, "capt": 2})


# ---- lists of answers

def test_given_answers_are_told_by_their_ids_and_weighed():
    listed = answers.table(((1, 5, 2), (1, 6, 7, 2), (1, 8, 2)), 0)
    ids = jnp.array([[[1, 8, 2, 0, 0], [1, 9, 2, 0, 0], [0, 0, 0, 0, 0]], [[1, 6, 7, 2, 0], [1, 5, 2, 0, 0], [0, 0, 0, 0, 0]]])
    assert answers.equal(ids, ids != 0, listed, 0).astype(int).tolist() == [[[0, 0, 1], [0, 0, 0], [0, 0, 0]], [[0, 1, 0], [1, 0, 0], [0, 0, 0]]]
    batch = {"answer": ids, "answer_mask": ids != 0, "answer_weight": jnp.array([[0.3, 0.7, 0], [0.4, 0.1, 0]])}
    np.testing.assert_allclose(answers.soft_targets(batch, listed, 0), [[0, 0, 0.9], [0.3, 1, 0]], atol=1e-6)
    logits = jnp.array([[3.0, 2.0, 1.0]])
    ranked = answers.rank(logits, ids[:, 0], ids[:, 0] != 0, listed, 0)
    assert ranked.tolist() == [[1, 2]] and answers.rank(logits, ids[:1, 1], ids[:1, 1] != 0, listed, 0)[0, 0] < -1e38


def test_an_answer_costs_its_cross_entropy_and_is_worth_its_score():
    logits, target = jnp.array([[2.0, -1.0], [0.0, 1.0]]), jnp.array([[1.0, 0.3], [0.0, 0.0]])
    loss, metrics = answers.answer_loss(logits, target)
    p = jax.nn.sigmoid(logits)
    np.testing.assert_allclose(loss, -(target * jnp.log(p) + (1 - target) * jnp.log(1 - p)).sum(1).mean(), rtol=1e-5)
    assert metrics == {"vqa_score": 0.5, "listed": 0.5}


# ---- mixtures of images

def test_mixtures_have_the_targets_of_their_pixels():
    image, targets = jnp.arange(4.0)[:, None, None, None] * jnp.ones((4, 12, 8, 3)), mixing.soft_labels(jnp.arange(4), 4, 0.1)
    np.testing.assert_allclose(targets[1], [0.025, 0.925, 0.025, 0.025], rtol=1e-6)
    assert mixing.mix(jax.random.key(0), image, targets)[0] is image
    shares = []
    for seed in range(24):
        for kind in (dict(mixup=0.8), dict(cutmix=1.0), dict(mixup=0.8, cutmix=1.0)):
            mixed, told = mixing.mix(jax.random.key(seed), image, targets, **kind)
            share = float((mixed[0].mean() - 3) / -3)      # of row 0, whose partner is row 3
            np.testing.assert_allclose(told[0], share * targets[0] + (1 - share) * targets[3], atol=1e-5)
            np.testing.assert_allclose(told.sum(1), 1, rtol=1e-5)
            kinds = len(np.unique(np.round(mixed[0], 5)))
            assert kinds <= 2 if "cutmix" in kind else kinds == 1
            shares.append((list(kind), share))
    for name in ("mixup", "cutmix"):
        found = [share for kinds, share in shares if kinds == [name]]
        assert min(found) < 0.5 and max(found) > 0.65


def test_a_box_has_its_share_and_stays_inside():
    for seed in range(8):
        found = np.asarray(mixing.box(jax.random.key(seed), 20, 30, jnp.float32(0.25)))
        rows, columns = found.any(1), found.any(0)
        assert found.sum() == rows.sum() * columns.sum() and rows.sum() <= 10 and columns.sum() <= 15      # cut at an edge, or whole
    assert mixing.box(jax.random.key(0), 20, 30, jnp.float32(0.0)).sum() == 0


def test_soft_cross_entropy_of_one_class_is_the_plain_one():
    logits = jax.random.normal(jax.random.key(0), (5, 7))
    np.testing.assert_allclose(mixing.soft_cross_entropy(logits, mixing.soft_labels(jnp.arange(5), 7)),
                               -jax.nn.log_softmax(logits)[jnp.arange(5), jnp.arange(5)].mean(), rtol=1e-6)
