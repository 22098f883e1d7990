"""What CLIP and CoCa promise as systems: one forward, what depends on what, decoding, counts of published sizes."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.test_step import batch_of, stage_of, weights
from tests.tiny import config, tiny
from vlm_jax import stage as stages
from vlm_jax.errors import ConfigError
from vlm_jax.losses.contrastive import contrastive
from vlm_jax.system import Context
from vlm_jax.train.state import merge

CONTEXT = Context(jax.random.key(0), jnp.int32(0))


@functools.cache
def preset(name):
    """(stage, variables, batch) of a preset, the same ones for every test: what is compiled for one serves the others."""
    stage = stage_of(name)
    return stage, merge(weights(name), {}, {}), batch_of(stage)


def coca():
    return preset("coca")


@functools.cache
def compiled(fn, **options):
    return jax.jit(functools.partial(fn, **options))


def loss_of(stage, variables, batch, context=CONTEXT):
    return compiled(stage.system.loss)(variables, {}, batch, context)


def predict(stage, name, variables, batch, **options):
    return compiled(stage.system.predict[name], **options)(variables, batch)


def test_at_the_start_the_loss_is_that_of_guessing():
    stage, variables, batch = preset("clip")
    value, out = loss_of(stage, variables, batch)
    # unit vectors at scale 10 are not all at one distance, so "near"
    assert abs(float(value) - math.log(stage.data.batch)) < 1.0 and set(out.metrics) >= {"con", "scale"}
    stage, variables, batch = coca()
    _, out = loss_of(stage, variables, batch)
    assert abs(float(out.metrics["cap"]) - math.log(stage.tokenizer.vocab_size)) < 1.0


def test_one_forward_gives_both_losses():
    stage, variables, batch = coca()
    calls = []
    watched = {("CoCa", "encode_image"), ("CoCa", "encode_text"), ("CoCa", "decode"),
               ("ViT", "__call__"), ("TextTransformer", "__call__"), ("MultimodalDecoder", "__call__")}

    def count(call, args, kwargs, context):
        name = (type(context.module).__name__, context.method_name)
        if name in watched:
            calls.append(name)
        return call(*args, **kwargs)

    with nn.intercept_methods(count):
        jax.eval_shape(lambda v, b: stage.system.loss(v, {}, b, CONTEXT)[0], variables, batch)
    assert sorted(calls) == sorted(watched)


def test_the_caption_loss_reaches_every_part_it_should():
    stage = stage_of("coca", lambda s: s.loss.weights.update(con=0.0))
    _, variables, batch = coca()
    grads = jax.jit(jax.grad(lambda v: stage.system.loss(v, {}, batch, CONTEXT)[0]))(variables)["params"]
    for part in ("image", "caption_pooler", "text", "decoder"):
        assert any(np.abs(g).max() > 0 for g in jax.tree.leaves(grads[part])), part
    assert all(np.abs(g).max() == 0 for g in jax.tree.leaves(grads["contrast_pooler"]))


def test_weights_of_zero_leave_a_pure_clip_or_a_pure_captioner():
    stage, variables, batch = coca()
    both, out = loss_of(stage, variables, batch)
    con, clip_out = loss_of(stage_of("coca", lambda s: s.loss.weights.update(cap=0.0)), variables, batch)
    cap, cap_out = loss_of(stage_of("coca", lambda s: s.loss.weights.update(con=0.0)), variables, batch)
    assert "cap" not in clip_out.metrics and "con" not in cap_out.metrics
    np.testing.assert_allclose(both, con + cap, rtol=1e-6)
    np.testing.assert_allclose(both, out.metrics["con"] + 2 * out.metrics["cap"], rtol=1e-6)
    found = predict(stage, "embed", variables, batch)
    plain, _ = contrastive(found["image_embed"], found["text_embed"], found["logit_scale"])
    np.testing.assert_allclose(con, plain, rtol=1e-5)


def test_text_features_know_no_image_and_captions_do():
    stage, variables, batch = coca()
    other = {**batch, "image": batch["image"][::-1].copy()}
    features, embed, logits = (lambda b, f=f: predict(stage, f, variables, b) for f in ("features", "embed", "caption_logits"))
    assert np.array_equal(features(batch)["text"], features(other)["text"])
    assert np.array_equal(embed(batch)["text_embed"], embed(other)["text_embed"])
    assert np.abs(logits(batch)["logits"] - logits(other)["logits"]).max() > 1e-3


def test_caption_logits_are_causal_and_pads_do_not_count():
    stage, variables, batch = coca()
    at = 5
    changed = {**batch, "text": batch["text"].copy()}
    changed["text"][:, at] = 7

    def logits(batch):
        return predict(stage, "caption_logits", variables, batch)["logits"]

    assert np.array_equal(logits(batch)[:, :at], logits(changed)[:, :at])
    assert np.any(logits(batch)[:, at:] != logits(changed)[:, at:])
    padded = {**batch, "text": np.where(batch["text_mask"], batch["text"], 9)}    # what stands in padding
    assert float(loss_of(stage, variables, padded)[1].metrics["cap"]) == float(loss_of(stage, variables, batch)[1].metrics["cap"])
    rows = jax.nn.log_softmax(logits(batch)[:, :-1])
    nll = -np.take_along_axis(np.asarray(rows), batch["text"][:, 1:, None], 2)[..., 0]
    mask = batch["text_mask"][:, 1:]
    np.testing.assert_allclose(loss_of(stage, variables, batch)[1].metrics["cap"], (nll * mask).sum() / mask.sum(), rtol=1e-5)


@pytest.mark.parametrize("method", ["greedy", "beam"])
def test_cached_decoding_equals_whole_forwards(method):
    stage, variables, batch = coca()
    options = dict(beams=1) if method == "beam" else {}
    found = predict(stage, "generate", variables, {"image": batch["image"]}, method=method, max_length=10, **options)["text"]
    text = np.full((8, stage.data.length), stage.tokenizer.pad_id, np.int32)
    text[:, 0] = stage.tokenizer.bos_id
    done = np.zeros(8, bool)
    for t in range(9):
        best = np.argmax(predict(stage, "caption_logits", variables, {"image": batch["image"], "text": text})["logits"][:, t], -1)
        text[:, t + 1] = np.where(done, stage.tokenizer.pad_id, best)
        done |= best == stage.tokenizer.eos_id
    assert np.array_equal(found, text[:, :10])


def test_extend_gives_the_logits_of_the_whole_text():
    stage, variables, batch = coca()
    model, text = stage.system.model, batch["text"]
    whole = predict(stage, "caption_logits", variables, {"image": batch["image"], "text": text})["logits"]

    @jax.jit
    def in_two_parts(variables, image, text):
        _, memory = model.apply(variables, image, method="encode_image")
        cache = model.apply(variables, 8, stage.data.length, memory, method="init_cache")
        first, cache = model.apply(variables, cache, text[:, :3], memory, method="extend")
        return first, model.apply(variables, cache, text[:, 3:], method="extend")[0]

    first, rest = in_two_parts(variables, batch["image"], text)
    real = batch["text_mask"]     # past the end the whole text hides padding, which decoding never writes
    np.testing.assert_allclose(np.concatenate([first, rest], 1)[real], np.asarray(whole)[real], atol=1e-4)


@pytest.mark.parametrize("name, arg, total", [
    ("clip", "b32", 151_277_313), ("clip", "b16", 149_620_737), ("clip", "l14", 427_616_513), ("clip", "l14_336", 427_944_193),
    ("clip", "rn50", 102_007_137), ("clip", "rn101", 119_688_033), ("clip", "rn50x4", 178_300_601),
    ("clip", "rn50x16", 290_979_217), ("clip", "rn50x64", 623_258_305), ("clip", "h14", 986_109_441),
    ("clip", "g14", 1_366_678_273), ("clip", "bigg14", 2_539_567_105),
    ("coca", "b32_open", 253_560_065), ("coca", "l14_open", 638_450_177)])
def test_configs_have_exactly_the_published_parameters(name, arg, total):
    section = config(name, arg).stages.pretrain
    section.data.tokenizer = ""
    assert stages.resolve(section, "pretrain").plan.count() == total


@pytest.mark.parametrize("arg, millions", [("base", 383), ("large", 787)])
def test_paper_sizes_without_poolers_and_projections(arg, millions):
    section = config("coca", arg).stages.pretrain
    section.model.tokens.update(bos=1, eos=2, pad=0)
    plan = stages.resolve(section, "pretrain").plan
    count = sum(plan.count(p) for p in ("image/", "text/", "decoder/"))
    assert abs(count / 1e6 - millions) / millions < 0.002


@pytest.mark.parametrize("arg", ["", "text=cbow", "small", "b32", "rn50"])
def test_every_clip_size_takes_the_cbow_text_tower_or_its_own(arg):
    section = config("clip", arg).stages.pretrain
    section.data.tokenizer = ""
    section.model.tokens.update({k: 500 if k == "vocab" else 1 for k, v in section.model.tokens.items() if v == -1})
    stage = stages.resolve(section, "pretrain")
    assert ("text/blocks/attn/query/kernel" in stage.plan.shapes) == (arg != "text=cbow")


def test_patch_dropout_is_for_training_alone():
    stage = stage_of("clip", lambda s: s.model.image.update({"patch_dropout": 0.5}))
    whole, variables, batch = preset("clip")
    a, b, c = (float(loss_of(stage, variables, batch, context)[0]) for context in (
        CONTEXT, Context(jax.random.key(1), jnp.int32(0)), Context(jax.random.key(1), jnp.int32(0), train=False)))
    full, _ = loss_of(whole, variables, batch)
    assert a != b and c == pytest.approx(float(full), rel=1e-6)


def test_a_text_tower_that_looks_at_padding_takes_no_buckets():
    for field in (dict(causal="none"), dict(pooling="last")):
        stage = tiny("clip", buckets=(16,)).stages.pretrain
        with stage.model.text.unlocked():
            stage.model.text.update(field)
        with pytest.raises(ConfigError, match="buckets"):
            stages.resolve(stage, "pretrain")
