"""Low-rank adapters: nothing changes at first, merging changes nothing, and only they move."""

import jax
import numpy as np
import pytest

from tests.tiny import tiny
from vlm_jax import partitioning
from vlm_jax import stage as stages
from vlm_jax.errors import ConfigError
from vlm_jax.nn import lora
from vlm_jax.train.state import merge, unbox

ONE = partitioning.make_mesh("dp", devices=jax.devices()[:1])


def stage_of(name, **section):
    config = tiny(name)
    config.stages.pretrain.lora = dict(rank=2, alpha=4.0, **section)
    config.stages.pretrain.trainable = (".*/lora_[ab]",)
    return stages.resolve(config.stages.pretrain, "pretrain")


@pytest.fixture(scope="module", params=["clip", "coca"])
def adapted(request):
    """(stage, its fresh leaves, predict function over leaves)."""
    stage = stage_of(request.param)
    leaves = jax.device_get(jax.jit(lambda key: unbox(stage.system.init(key, stage.spec))[0])(jax.random.key(0)))
    rng = np.random.default_rng(0)
    rows = {"image": rng.integers(0, 256, (2, 48, 48, 3)).astype(np.uint8), "text": rng.integers(4, 300, (2, 32)).astype(np.int32),
            "text_mask": np.ones((2, 32), bool)}
    name = "caption_logits" if request.param == "coca" else "embed"
    run = jax.jit(lambda leaves: stage.system.predict[name](merge(leaves, {}, {}), rows))
    return stage, leaves, lambda leaves: np.concatenate([np.ravel(x) for x in jax.tree.leaves(run(leaves))])


def test_fresh_adapters_change_nothing(adapted):
    stage, leaves, run = adapted
    plain = {p: x for p, x in leaves.items() if "/lora_" not in p}
    assert len(plain) < len(leaves)
    np.testing.assert_array_equal(run(leaves), run(plain))
    merged = lora.merge(leaves)
    assert merged.keys() == plain.keys() and all(np.array_equal(merged[p], plain[p]) for p in plain)


def test_merging_gives_the_same_function(adapted):
    stage, leaves, run = adapted
    rng = np.random.default_rng(1)
    trained = {p: rng.normal(0, 0.3, x.shape).astype(np.float32) if p.endswith("lora_b") else x for p, x in leaves.items()}
    found = run(trained)
    assert np.abs(found - run(leaves)).max() > 1e-3
    np.testing.assert_allclose(run(lora.merge(trained)), found, atol=2e-5 * np.abs(found).max())
    one = next(p for p in sorted(trained) if p.endswith("lora_b"))      # every adapter takes part
    assert np.abs(run({**trained, one: 0 * trained[one]}) - found).max() > 1e-6


def test_adapters_alone_train_and_have_axes(adapted):
    stage, leaves, _ = adapted
    assert stage.plan.trainable == {p for p in leaves if p.endswith(("lora_a", "lora_b"))}
    for path in stage.plan.trainable:
        kernel = path.rpartition("/")[0] + "/kernel"
        assert ("rank" in stage.plan.axes[path]) and set(stage.plan.axes[path]) - {"rank"} <= set(stage.plan.axes[kernel])
    kernels = [p for p in leaves if p.endswith("attn/query/kernel")]
    assert kernels and all(leaves[p.replace("kernel", "lora_a")].shape == (*leaves[p].shape[:-2], 2) for p in kernels)
    assert np.all(leaves[kernels[0].replace("kernel", "lora_scale")] == 2.0)
    assert stage.merged.plan.shapes.keys() == {p for p in leaves if "/lora_" not in p}


def test_what_cannot_be_adapted_is_refused():
    def plan(**section):
        return stage_of("clip", **section).plan
    with pytest.raises(ConfigError, match="'image/.*/qery/kernel' matches no kernel"):
        plan(targets=("image/.*/qery/kernel",))
    with pytest.raises(ConfigError, match="lora.rnk"):
        plan(rnk=3)
    config = tiny("clip")
    section = config.stages.pretrain
    section.model.image = dict(tower="resnet", variant="rn50", width=16, blocks=(1, 1, 1, 1))
    section.data.size, section.lora = 32, dict(targets=("image/.*/kernel",))
    with pytest.raises(ConfigError, match="is a convolution"):
        stages.resolve(section, "pretrain").plan
