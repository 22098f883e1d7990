"""The one train step: split, micro-batches, meshes, skipped steps, averaged weights."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.tiny import tiny
from vlm_jax import partitioning
from vlm_jax import stage as stages
from vlm_jax.errors import ConfigError
from vlm_jax.system import Context
from vlm_jax.train import init
from vlm_jax.train.state import merge, split, unbox
from vlm_jax.train.step import make_train_step


def stage_of(name, edit=None, **data):
    config = tiny(name, **data)
    if edit:
        edit(config.stages.pretrain)
    return stages.resolve(config.stages.pretrain, "pretrain")


def batch_of(stage, seed=0):
    """Random images and captions of unequal lengths, with repeated captions."""
    rng = np.random.default_rng(seed)
    rows, length = stage.data.batch, stage.data.length
    text = rng.integers(4, stage.tokenizer.vocab_size, (rows, length)).astype(np.int32)
    lengths = rng.integers(3, length + 1, rows)
    mask = np.arange(length) < lengths[:, None]
    text[:, 0] = stage.tokenizer.bos_id
    text[np.arange(rows), lengths - 1] = stage.tokenizer.eos_id
    text = np.where(mask, text, stage.tokenizer.pad_id)
    return {"image": rng.integers(0, 256, (rows, stage.data.size, stage.data.size, 3)).astype(np.uint8), "text": text,
            "text_mask": mask, "caption_id": np.arange(rows, dtype=np.int32) // 2, "image_id": np.arange(rows, dtype=np.int32)}


def state_of(stage, mesh, ema=0.0, given=None):
    """A first state, and its optimizer. Where all parameters are ``given``, drawing them is not compiled."""
    tx, _ = stages.make_optimizer(stage)
    return init.create(stage.system, stage.plan, tx, mesh, jax.random.key(0), stage.spec, given or {}, ema), tx


@functools.cache
def weights(name):
    """Fresh parameters of a preset, drawn once."""
    stage = stage_of(name)
    return jax.device_get(jax.jit(lambda key: unbox(stage.system.init(key, stage.spec))[0])(jax.random.key(0)))


@functools.cache
def axes(name):
    return stage_of(name).plan.axes


def objective(stage):
    return lambda params, batch: stage.system.loss(merge(params, {}, {}), {}, batch, Context(jax.random.key(1), jnp.int32(0)))[0]


def loss_and_grads(stage, mesh, batch):
    name = stage.config.system
    params = {p: jax.device_put(x, partitioning.sharding(mesh, axes(name)[p], x.shape)) for p, x in weights(name).items()}
    with partitioning.use(mesh):
        loss, grads = jax.jit(jax.value_and_grad(objective(stage)))(params, partitioning.place(batch, mesh))
        return float(loss), jax.device_get(grads)


def norm(grads):
    return np.sqrt(sum(float(np.square(np.float64(g)).sum()) for g in grads.values()))


def compare(ours, reference):
    (loss, grads), (loss0, grads0) = ours, reference
    np.testing.assert_allclose(loss, loss0, rtol=1e-6)
    np.testing.assert_allclose(norm(grads), norm(grads0), rtol=5e-6)
    largest = max(np.abs(g).max() for g in grads0.values())
    for path in grads0:
        assert np.abs(grads[path] - grads0[path]).max() <= 1e-5 * largest, path


ONE = partitioning.make_mesh("dp", devices=jax.devices()[:1])


@functools.cache
def reference(name):
    """(batch, loss and gradients) of the whole batch on one device."""
    batch = batch_of(stage_of(name))
    return batch, loss_and_grads(stage_of(name), ONE, batch)


@pytest.mark.parametrize("name, rules, count", [
    ("coca", "dp", 2), ("coca", "dp", 4), ("coca", "dp", 8), ("coca", "fsdp", 4), ("coca", "fsdp_tp", 4), ("coca", "fsdp_tp", 8),
    ("clip", "dp", 8), ("clip", "fsdp_tp", 8)])
def test_loss_and_gradients_are_the_same_on_any_mesh(name, rules, count):
    batch, expected = reference(name)
    compare(loss_and_grads(stage_of(name), partitioning.make_mesh(rules, devices=jax.devices()[:count]), batch), expected)


@pytest.mark.parametrize("name, microbatch, rules, count", [("coca", 2, "dp", 1), ("coca", 4, "fsdp_tp", 4), ("clip", 4, "dp", 2)])
def test_microbatches_give_the_whole_batchs_result(name, microbatch, rules, count):
    batch, expected = reference(name)
    stage = stage_of(name, microbatch=microbatch)
    compare(loss_and_grads(stage, partitioning.make_mesh(rules, devices=jax.devices()[:count]), batch), expected)


def test_the_comparison_sees_a_mean_of_means():
    """Losses averaged per micro-batch, as accumulating trainers do, are another number."""
    batch, expected = reference("coca")
    loss = jax.jit(objective(stage_of("coca", batch=4)))
    halves = [loss(weights("coca"), {k: v[i::2] for k, v in batch.items()}) for i in (0, 1)]
    assert abs(np.mean(halves) - expected[0]) > 1e-4 * expected[0]


@pytest.mark.parametrize("duplicates", ["positives", "masked"])
def test_duplicates_are_exact_on_a_mesh(duplicates):
    stage = stage_of("clip", lambda s: s.loss.update(duplicates=duplicates))
    batch = batch_of(stage)
    one, four = (loss_and_grads(stage, partitioning.make_mesh("dp", devices=jax.devices()[:n]), batch) for n in (1, 4))
    compare(four, one)
    assert abs(reference("clip")[1][0] - one[0]) > 1e-3


def resnet(s):
    s.model.image = dict(tower="resnet", variant="rn50", width=16, blocks=(1, 1, 1, 1))
    s.data.size = 32


def test_microbatch_refuses_batch_norm():
    with pytest.raises(ConfigError, match="microbatch=4.*BatchNorm"):
        stage_of("clip", resnet, microbatch=4)


def test_batch_norm_moves_statistics_in_training_alone():
    stage, mesh = stage_of("clip", resnet), ONE
    with partitioning.use(mesh):
        state, tx = state_of(stage, mesh)
        before = jax.device_get(state.moving)
        batch = partitioning.place(batch_of(stage), mesh)
        jax.jit(stage.system.predict["embed"])(merge(state.params, {}, state.moving), batch)
        after, _ = jax.jit(make_train_step(stage.system, tx, jax.random.key(0)))(state, batch)
        assert set(after.moving) == set(before) and all(np.any(before[k] != np.asarray(after.moving[k])) for k in before)


def test_frozen_parameters_have_no_slot_and_do_not_move():
    def freeze(s):
        s.trainable = ("text.*", "logit_scale")
    stage, mesh = stage_of("clip", freeze), ONE
    with partitioning.use(mesh):
        state, tx = state_of(stage, mesh, given=weights("clip"))
        assert state.frozen and all(p.startswith("image") for p in state.frozen)
        assert not any("image" in jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(state.opt_state))
        before = jax.device_get(state.frozen)
        after, metrics = jax.jit(make_train_step(stage.system, tx, jax.random.key(0)))(state, partitioning.place(batch_of(stage), mesh))
        assert all(np.array_equal(before[p], after.frozen[p]) for p in before)
        assert any(np.any(np.asarray(state.params[p]) != np.asarray(after.params[p])) for p in state.params)


def test_a_trainable_pattern_must_match():
    with pytest.raises(ConfigError, match="'imge/.*'.*nearest"):
        split({"image/a": 1, "text/b": 2}, ("imge/.*",))


def test_a_step_that_is_not_finite_changes_only_the_counters():
    stage, mesh = stage_of("clip"), partitioning.make_mesh("dp", devices=jax.devices()[:2])
    with partitioning.use(mesh):
        state, tx = state_of(stage, mesh, ema=0.9, given=weights("clip"))
        step = jax.jit(make_train_step(stage.system, tx, jax.random.key(0), 0.9))
        good = batch_of(stage)
        good["image"] = (good["image"] / 127.5 - 1).astype(np.float32)      # normalised already: one type, one program
        bad = {**good, "image": np.where(np.arange(8)[:, None, None, None] == 3, np.float32(np.nan), good["image"])}
        after, metrics = step(state, partitioning.place(bad, mesh))
        assert not np.isfinite(float(metrics["loss"])) and int(after.bad_steps) == 1 and int(after.step) == 1
        for name in ("params", "opt_state", "moving", "ema", "carry"):
            for a, b in zip(jax.tree.leaves(getattr(state, name)), jax.tree.leaves(getattr(after, name))):
                assert np.array_equal(a, b), name
        after, _ = step(after, partitioning.place(good, mesh))
        assert int(after.bad_steps) == 0 and int(after.step) == 2
        moved = [p for p in state.params if np.any(np.asarray(state.params[p]) != np.asarray(after.params[p]))]
        assert moved and any(np.any(np.asarray(after.ema[p]) != np.asarray(after.params[p])) for p in moved)


def test_context_keys_differ_by_name_and_step():
    a = Context(jax.random.key(0), jnp.int32(0))
    assert not np.array_equal(jax.random.key_data(a.key("mask")), jax.random.key_data(a.key("dropout")))
    assert np.array_equal(jax.random.key_data(a.key("mask")), jax.random.key_data(a.key("mask")))
