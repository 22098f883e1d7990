"""The one train step: split, micro-batches, meshes, skipped steps, averaged weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.tiny import tiny
from vlm_jax import partitioning, run
from vlm_jax.errors import ConfigError
from vlm_jax.system import Context
from vlm_jax.train import init
from vlm_jax.train.state import merge, split
from vlm_jax.train.step import make_train_step


def stage_of(name, edit=None, **data):
    config = tiny(name, **data)
    if edit:
        edit(config.stages.pretrain)
    return run.resolve(config.stages.pretrain, "pretrain")


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
    tx, _ = run.make_optimizer(stage)
    return init.create(stage.system, stage.plan, tx, mesh, jax.random.key(0), stage.spec, given or {}, ema), tx


def loss_and_grads(stage, mesh, batch):
    with partitioning.use(mesh):
        state, _ = state_of(stage, mesh)

        def objective(params, batch):
            context = Context(jax.random.key(1), jnp.int32(0))
            return stage.system.loss(merge(params, state.frozen, state.moving), state.carry, batch, context)[0]
        loss, grads = jax.jit(jax.value_and_grad(objective))(state.params, partitioning.place(batch, mesh))
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


@pytest.fixture(scope="module", params=["clip", "coca"])
def reference(request):
    stage = stage_of(request.param)
    batch = batch_of(stage)
    return request.param, batch, loss_and_grads(stage, partitioning.make_mesh("dp", devices=jax.devices()[:1]), batch)


@pytest.mark.parametrize("rules, count", [("dp", 2), ("dp", 4), ("dp", 8), ("fsdp", 8), ("fsdp_tp", 4), ("fsdp_tp", 8)])
def test_loss_and_gradients_are_the_same_on_any_mesh(reference, rules, count):
    name, batch, expected = reference
    compare(loss_and_grads(stage_of(name), partitioning.make_mesh(rules, devices=jax.devices()[:count]), batch), expected)


@pytest.mark.parametrize("microbatch, rules, count", [(2, "dp", 1), (4, "fsdp_tp", 4)])
def test_microbatches_give_the_whole_batchs_result(reference, microbatch, rules, count):
    name, batch, expected = reference
    stage = stage_of(name, microbatch=microbatch)
    compare(loss_and_grads(stage, partitioning.make_mesh(rules, devices=jax.devices()[:count]), batch), expected)


def test_the_comparison_sees_a_mean_of_means(reference):
    """A caption loss averaged per micro-batch, as accumulating trainers do, is another number."""
    name, batch, expected = reference
    if name == "coca":
        stage, mesh = stage_of(name), partitioning.make_mesh("dp", devices=jax.devices()[:1])
        halves = [loss_and_grads(stage_of(name, batch=4), mesh, {k: v[i::2] for k, v in batch.items()})[0] for i in (0, 1)]
        assert abs(np.mean(halves) - expected[0]) > 1e-4 * expected[0]


@pytest.mark.parametrize("duplicates", ["positives", "masked"])
def test_duplicates_are_exact_on_a_mesh(duplicates):
    stage = stage_of("clip", lambda s: s.loss.update(duplicates=duplicates))
    batch = batch_of(stage)
    one, eight = (loss_and_grads(stage, partitioning.make_mesh("dp", devices=jax.devices()[:n]), batch) for n in (1, 8))
    compare(eight, one)
    plain = loss_and_grads(stage_of("clip"), partitioning.make_mesh("dp", devices=jax.devices()[:1]), batch)
    assert abs(plain[0] - one[0]) > 1e-3


def test_microbatch_refuses_batch_norm():
    def resnet(s):
        s.model.image = dict(tower="resnet", variant="rn50", width=16, blocks=(1, 1, 1, 1))
        s.data.size = 32
    with pytest.raises(ConfigError, match="microbatch=4.*BatchNorm"):
        stage_of("clip", resnet, microbatch=4)


def test_batch_norm_moves_statistics_in_training_alone():
    def resnet(s):
        s.model.image = dict(tower="resnet", variant="rn50", width=16, blocks=(1, 1, 1, 1))
        s.data.size = 32
    stage, mesh = stage_of("clip", resnet), partitioning.make_mesh("dp", devices=jax.devices()[:1])
    with partitioning.use(mesh):
        state, tx = state_of(stage, mesh)
        before = jax.device_get(state.moving)
        batch = partitioning.place(batch_of(stage), mesh)
        stage.system.predict["embed"](merge(state.params, {}, state.moving), batch)
        after, _ = jax.jit(make_train_step(stage.system, tx, jax.random.key(0)))(state, batch)
        assert set(after.moving) == set(before) and all(np.any(before[k] != np.asarray(after.moving[k])) for k in before)


def test_frozen_parameters_have_no_slot_and_do_not_move():
    def freeze(s):
        s.trainable = ("text.*", "logit_scale")
    stage, mesh = stage_of("clip", freeze), partitioning.make_mesh("dp", devices=jax.devices()[:1])
    with partitioning.use(mesh):
        state, tx = state_of(stage, mesh)
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
    stage, mesh = stage_of("coca"), partitioning.make_mesh("dp")
    with partitioning.use(mesh):
        state, tx = state_of(stage, mesh, ema=0.9)
        step = jax.jit(make_train_step(stage.system, tx, jax.random.key(0), 0.9))
        good = batch_of(stage)
        bad = {**good, "image": np.where(np.arange(8)[:, None, None, None] == 3, np.nan, np.zeros(good["image"].shape)).astype(np.float32)}
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
