"""Frozen kernels in eight bits: the same function as the rounded weights, from a directory into a run and back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vlm_jax
from tests.tiny import config as config_of
from tests.tiny import tiny
from vlm_jax import stage as stages
from vlm_jax.nn import narrow
from vlm_jax.train.state import merge, unbox

TRAINABLE = {"clip": "logit_scale", "coca": "logit_scale|text_head.*", "beit3": ".*norm.*"}


@pytest.fixture(scope="module", params=TRAINABLE)
def rounded(request):
    """(stage with int8, its leaves, the same widened, predict function over leaves)."""
    config = tiny(request.param).stages.pretrain if request.param != "beit3" else config_of("beit3", "targets=colours").stages.caption
    config.trainable, config.frozen_dtype = (TRAINABLE[request.param],), "int8"
    stage = stages.resolve(config, "pretrain")      # BEiT-3: its language head reads a kernel of its own
    leaves = jax.device_get(jax.jit(lambda key: unbox(stage.system.init(key, stage.spec))[0])(jax.random.key(0)))
    rng = np.random.default_rng(0)
    batch = {"image": rng.integers(0, 256, (2, *stage.spec["image"].shape[1:])).astype(np.uint8),
             "text": rng.integers(4, 300, (2, 32)).astype(np.int32), "text_mask": np.ones((2, 32), bool)}
    name = next(n for n in ("caption_logits", "features", "embed") if n in stage.system.predict)
    run = jax.jit(lambda leaves: stage.system.predict[name](merge(leaves, {}, {}), batch))
    return stage, leaves, narrow.restore(leaves), lambda leaves: np.concatenate([np.ravel(x) for x in jax.tree.leaves(run(leaves))])


def test_it_is_the_function_of_the_rounded_weights(rounded):
    stage, leaves, widened, run = rounded
    whole = {p for p, x in leaves.items() if x.dtype == np.int8}
    assert whole and whole <= set(stage.plan.frozen) and all(p.endswith("/kernel") for p in whole)
    assert {p.replace("kernel_scale", "kernel") for p in leaves if p.endswith("kernel_scale")} == whole
    assert widened.keys() == leaves.keys() - {p + "_scale" for p in whole} and all(widened[p].dtype == np.float32 for p in whole)
    found, wanted = run(leaves), run({**widened, **{p: x.astype(np.float32) for p, x in widened.items()}})
    np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max())
    off = {**leaves, **{p: x * 0 for p, x in leaves.items() if p.endswith("kernel_scale")}}
    assert np.abs(run(off) - found).max() > 1e-3


def test_the_error_is_half_a_level_of_each_output():
    rng = np.random.default_rng(0)
    x = rng.normal(0, 1, (3, 5, 2, 4)).astype(np.float32) * np.array([1e-3, 1, 100, 0], np.float32)      # an output without weights too
    whole, scale = narrow.rounded(x, narrow.inputs(("layers", "embed", "heads", "head_dim")), np)
    assert whole.dtype == np.int8 and scale.shape == (3, 1, 2, 4) and np.abs(whole.astype(int)).max() == 127
    assert np.all(np.abs(whole * scale - x) <= 0.5001 * scale) and np.array_equal(narrow.inputs(("layers", "heads", "head_dim", "embed")), (1, 2))
    in_graph, scales = narrow.rounded(jnp.asarray(x), (1,))
    assert np.array_equal(in_graph, whole) and np.allclose(scales, scale, rtol=1e-6)


def test_a_run_takes_weights_over_and_its_result_is_whole(tmp_path):
    first = tiny("clip")
    first.stages.pretrain.steps, first.stages.pretrain.evals = 1, {}
    start = vlm_jax.train(first, tmp_path / "first").folder
    second = tiny("clip")
    with second.stages.pretrain.ignore_type():
        second.stages.pretrain.update(steps=2, evals={}, init=str(start), frozen_dtype="int8", trainable=("text/.*", "logit_scale"))
    folder = vlm_jax.train(second, tmp_path / "second").folder
    before, after, stored = stages.read_weights(start), stages.read_weights(folder), stages.read_leaves(folder, "checkpoints")
    assert before.keys() == after.keys() and {p for p, x in stored.items() if x.dtype == np.int8} == {
        p for p in before if p.endswith("/kernel") and not p.startswith("text/")}
    for path, x in after.items():
        if path.startswith("image") and path.endswith("/kernel"):
            step = stored[path + "_scale"]
            assert np.all(np.abs(x - before[path]) <= 0.5001 * step) and np.abs(x - before[path]).max() > 0
    model = vlm_jax.load(folder)
    assert {x.dtype for x in jax.tree.leaves(model.variables)} == {jnp.dtype(jnp.float32)}
