"""A folder of one's own photographs in one command: held-out part, tokenizer of its own, and going on from there."""

import json
import shutil

import pytest

import vlm_jax
from tests.tiny import tiny
from vlm_jax.data import scenes
from vlm_jax.errors import ConfigError


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    from PIL import Image
    folder = tmp_path_factory.mktemp("photos")
    source = scenes.open_scenes("train", size=48)
    for i in range(24):
        Image.fromarray(source[i]["image"]).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(source[i]["text"][0])
    return folder


def config_of(photos, **data):
    whole = tiny("clip")
    stage = whole.stages.pretrain
    stage.data.update(train=f"folder:{photos}", eval="", tokenizer="train:120", **data)
    stage.steps, stage.mesh.data, stage.checkpoint.every = 2, 8, 1
    stage.evals = dict(retrieval=dict(kind="retrieval", batch=8))
    return whole


@pytest.fixture(scope="module")
def done(photos, tmp_path_factory):
    return vlm_jax.train(config_of(photos), tmp_path_factory.mktemp("own"))


def test_a_part_is_held_out_and_the_tokenizer_is_of_the_captions(photos, done):
    data = json.loads((done.folder / "config.json").read_text())["data"]
    assert data["train"] == f"folder:{photos}#train" and data["eval"] == f"folder:{photos}#val"
    rows = [json.loads(line) for line in (done.folder / "predictions" / "retrieval.jsonl").read_text().splitlines()]
    assert 0 < len({r["key"] for r in rows}) < 12
    assert 50 < done.model.tokenizer.vocab_size <= 120 and done.model.ids("a red circle")[1].sum() > 3
    assert done.model.config.model.tokens.vocab == done.model.tokenizer.vocab_size


def test_it_resumes_with_the_tokenizer_that_it_has(photos, done, tmp_path):
    shutil.copytree(done.folder.parent, tmp_path / "run")
    folder = tmp_path / "run" / done.folder.name
    (folder / "DONE").unlink()
    shutil.rmtree(folder / "checkpoints" / "2")
    before = (folder / "tokenizer" / "sentencepiece.model").stat().st_mtime_ns, (folder / "tokenizer" / "sentencepiece.model").read_bytes()
    again = vlm_jax.train(config_of(photos), tmp_path / "run")
    assert again.scores == done.scores and (folder / "tokenizer" / "sentencepiece.model").read_bytes() == before[1]


@pytest.mark.parametrize("data, message", [
    (dict(tokenizer="train:many"), "data.tokenizer='train:many' has no number of pieces; nearest: train:2000"),
    (dict(tokenizer="train:3"), "data.tokenizer: SentencePiece cannot be trained with vocab=3"),
    (dict(train="folder:nowhere"), "nowhere"),
])
def test_what_cannot_be_is_named(photos, tmp_path, data, message):
    config = config_of(photos)
    config.stages.pretrain.data.update(data)
    with pytest.raises(ConfigError, match=message):
        vlm_jax.train(config, tmp_path)
