"""Features of a frozen tower, computed once: equal to computing them in each step, found again, and refused where they would not be equal."""

import pickle

import ml_dtypes
import numpy as np
import pytest

import vlm_jax
from tests.tiny import config as config_of
from vlm_jax import stage as stages
from vlm_jax.data import features, ops
from vlm_jax.data.bad import BadSample
from vlm_jax.data.features import FeatureStore
from vlm_jax.errors import ConfigError

KEPT = {"image_states": ((2, 3), "bfloat16"), "norm": ((), "float32")}
KEYS = {4: "cat", 7: "dog", 9: "cat", 12: "emu"}      # two samples are about one image


def test_a_store_has_a_row_for_each_image(tmp_path):
    store = FeatureStore(tmp_path / "s", KEYS, KEPT, {})
    assert store.count == 3 and store.missing() == {0: 4, 1: 7, 2: 12}
    values = {"image_states": np.random.default_rng(0).normal(size=(2, 2, 3)).astype(ml_dtypes.bfloat16), "norm": np.float32([0.1, 0.2])}
    store.put([0, 2], values)
    assert len(store.missing()) == 3      # it does not count before it is on the disk
    store.leave_out([1])
    store.commit()
    for opened in (store, pickle.loads(pickle.dumps(store)), FeatureStore(tmp_path / "s", KEYS, KEPT, {})):
        found = opened.take([9, 12, 4])
        assert found["image_states"].dtype == ml_dtypes.bfloat16 and not opened.missing()
        np.testing.assert_array_equal(found["image_states"], values["image_states"][[0, 1, 0]])
        np.testing.assert_array_equal(found["norm"], np.float32([0.1, 0.2, 0.1]))
        opened.check(12)
        for index, why in ((7, "could not be read"), (5, "not among")):
            with pytest.raises(BadSample, match=why):
                opened.check(index)


def test_a_store_is_told_by_all_that_it_follows_from(tmp_path, monkeypatch):
    assert FeatureStore.folder_of(tmp_path, {"size": 48}) != FeatureStore.folder_of(tmp_path, {"size": 64})
    monkeypatch.setattr(features, "RESERVE", 1 << 62)
    with pytest.raises(ValueError, match="features of 3 images take 0.0 GB, the disk of .* has 0.0 GB to give"):
        FeatureStore(tmp_path / "s", KEYS, KEPT, {})


def test_operations_that_draw_are_told():
    assert ops.Chain("resize|center_crop", 16).drawn == [] and ops.Chain("pad|squash", 16).drawn == []
    assert ops.Chain("random_resized_crop|flip", 16).drawn == ["random_resized_crop", "flip"]
    picture = np.random.default_rng(0).integers(0, 256, (20, 30, 3)).astype(np.uint8)
    for name in ops.FIXED:      # each gives the same with any numbers
        chain = ops.Chain(f"{name}|squash", 16)
        assert all(np.array_equal(chain(picture, np.random.default_rng(0)), chain(picture, np.random.default_rng(seed))) for seed in (1, 2, 3))


def stage_of(**data):
    """BLIP-2's first stage with contrast alone, on a few scenes: sixteen rows a step, more than there are scenes in an epoch."""
    whole = config_of("blip2")
    section = whole.stages.pretrain
    with section.ignore_type():
        section.steps, section.evals, section.init, section.loss = 3, {}, (), dict(weights=dict(itc=1.0))
        section.model.qformer.update(layers=2, width=32, heads=2, mlp_dim=32)
        section.model.image.update(width=32, heads=2, layers=1, mlp_dim=32)
        section.data.update(train="jsonl:" + str(data.pop("file", "")), batch=16, size=16, **data)
        section.optim = dict(name="adamw", lr=1e-3, schedule="constant")
        section.log.every = 1
    return whole


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A JSONL of ten rows about six images, one of which cannot be read."""
    import json

    from PIL import Image
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for i in range(6):
        Image.fromarray(rng.integers(0, 256, (20, 24, 3)).astype(np.uint8)).save(folder / f"{i}.png")
    (folder / "5.png").write_bytes(b"no picture")
    rows = [json.dumps({"image": f"{i % 6}.png", "text": f"a small red circle and {i} stars"}) for i in range(10)]
    (folder / "rows.jsonl").write_text("\n".join(rows))
    return folder / "rows.jsonl"


def train(pictures, workdir, **data):
    done = vlm_jax.train(stage_of(file=pictures, bad_budget=1.0, **data), workdir, stage="pretrain")
    return [row["loss"] for row in done.rows if "loss" in row], done.folder


def test_training_is_the_same_to_the_last_bit_and_another_run_finds_them(pictures, tmp_path, capsys):
    wanted, _ = train(pictures, tmp_path / "plain")
    found, folder = train(pictures, tmp_path / "kept", cache_features=str(tmp_path / "features"))
    assert len(wanted) == 3 and found == wanted
    told = capsys.readouterr().out
    assert "features: 5 images computed" in told and "1 could not be read" in told and "each is read 8.0 times" in told
    (store,) = (tmp_path / "features").iterdir()
    again, _ = train(pictures, tmp_path / "again", cache_features=str(tmp_path / "features"), workers=1)      # by a reader process
    assert again == wanted and "features: 6 images" in capsys.readouterr().out and [store] == list((tmp_path / "features").iterdir())
    planted = np.lib.format.open_memmap(store / "image_states.npy", "r+")
    planted[...] = 0
    planted.flush()
    assert train(pictures, tmp_path / "planted", cache_features=str(tmp_path / "features"))[0] != wanted


@pytest.mark.parametrize("change,message", [
    (dict(augment="random_resized_crop|flip"), r"data.augment='random_resized_crop\|flip' draws \(random_resized_crop, flip\).*nearest: data.augment='squash'"),
    (dict(trainable=(".*",)), "leaves of the tower train"),
])
def test_what_would_not_be_equal_is_refused(pictures, tmp_path, change, message):
    whole = stage_of(file=pictures, cache_features="features", **{k: v for k, v in change.items() if k == "augment"})
    with whole.stages.pretrain.ignore_type():
        whole.stages.pretrain.trainable = change.get("trainable", whole.stages.pretrain.trainable)
    with pytest.raises(ConfigError, match=message):
        vlm_jax.train(whole, tmp_path, stage="pretrain")


def test_a_system_without_a_frozen_tower_says_so(tmp_path):
    whole = config_of("clip")
    with whole.stages.pretrain.data.unlocked():
        whole.stages.pretrain.data.cache_features = "features"
    with pytest.raises(ConfigError, match="a 'clip' has no frozen tower whose outputs may be kept"):
        vlm_jax.train(whole, tmp_path, stage="pretrain")
    assert stages.resolve(config_of("clip").stages.pretrain, "pretrain").kept == {}
