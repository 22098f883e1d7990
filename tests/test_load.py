"""vlm_jax.load and the predict command, on a small trained CoCa."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

import vlm_jax
from tests.tiny import get_config
from vlm_jax import predict, run
from vlm_jax.data import scenes
from vlm_jax.errors import ConfigError


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("coca")
    config = get_config("coca")
    stage = config.stages.pretrain
    stage.steps, stage.optim.ema = 4, 0.5
    stage.mesh.data = 8
    stage.evals = dict(caption=dict(kind="caption", examples=12, batch=8, options=dict(shown=2)),
                       zeroshot=dict(kind="zeroshot", data="scenes:objects", examples=12, batch=8, options=dict(templates="scene")))
    assert run.run(config, workdir) == 0
    return workdir


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    source = scenes.open_scenes("test", size=64)
    for i in range(3):
        Image.fromarray(source[i]["image"]).save(folder / f"{i}.png")
    return sorted(folder.glob("*.png"))


def test_one_call_gives_everything(trained, pictures):
    model = vlm_jax.load(trained)
    from_paths = model.embed_image([str(p) for p in pictures])
    assert from_paths.shape == (3, 16) and from_paths.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(from_paths, axis=1), 1, rtol=1e-5)
    images = [Image.open(p) for p in pictures]
    np.testing.assert_allclose(model.embed_image(images), from_paths, atol=1e-6)
    np.testing.assert_allclose(model.embed_image([np.asarray(i.convert("RGB")) for i in images]), from_paths, atol=1e-6)
    np.testing.assert_allclose(model.embed_image(images[0]), from_paths[:1], atol=1e-5)
    assert model.embed_text("a red circle").shape == (1, 16)
    texts = ["a red circle", "a blue square left of a star", "x"]
    np.testing.assert_allclose(model.embed_text(texts, batch=2), model.embed_text(texts), atol=1e-5)   # the last batch is padded
    captions = model.caption(images, max_length=8)
    assert len(captions) == 3 and all(isinstance(c, str) for c in captions)
    assert model.caption(images, max_length=8, method="beam", beams=2) is not None


def test_predict_functions_take_pixels_or_normalised_floats(trained, pictures):
    model = vlm_jax.load(trained)
    pixels = model.images([str(p) for p in pictures])
    assert pixels.dtype == np.uint8 and pixels.shape == (3, 48, 48, 3)
    floats = (pixels.astype(np.float32) / 255 - 0.5) / 0.5
    a, b = (model.predict["embed"]({"image": x}) for x in (pixels, floats))
    np.testing.assert_allclose(a["image_embed"], b["image_embed"], atol=1e-6)
    assert set(a) == {"image_embed", "logit_scale"} and a["logit_scale"] == pytest.approx(10, rel=0.2)
    ids, _ = model.ids("a red circle")
    logits = model.predict["caption_logits"]({"image": pixels[:1], "text": ids})["logits"]
    assert logits.shape == (1, model.stage.data.length, model.tokenizer.vocab_size)


def test_averaged_weights_are_what_is_loaded(trained):
    model = vlm_jax.load(trained)
    folder = trained / "1_pretrain"
    from vlm_jax.train import checkpoint
    ema = checkpoint.load_params(folder / "checkpoints", collections=("ema",))
    raw = checkpoint.load_params(folder / "checkpoints")
    path = "image_head/kernel"
    assert np.array_equal(model.variables["params"]["image_head"]["kernel"], ema[path]) and not np.array_equal(ema[path], raw[path])


def test_a_model_without_a_tokenizer_embeds_images_and_says_what_strings_lack(trained, pictures, tmp_path):
    shutil.copytree(trained, tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / "1_pretrain" / "tokenizer")
    model = vlm_jax.load(tmp_path / "copy")
    assert model.embed_image(str(pictures[0])).shape == (1, 16)
    with pytest.raises(ConfigError, match="without a tokenizer"):
        model.embed_text("a red circle")
    with pytest.raises(ConfigError, match="without a tokenizer"):
        model.caption(str(pictures[0]))


def test_a_directory_without_a_model_is_named(tmp_path):
    with pytest.raises(ConfigError, match=str(tmp_path)):
        vlm_jax.load(tmp_path)


def test_the_predict_command(trained, pictures, tmp_path, capsys):
    files = [str(p) for p in pictures]
    assert predict.main([str(trained), "caption", *files]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3
    assert predict.main([str(trained), "zeroshot", files[0], "--labels=red circle,blue square", "--templates=scene"]) == 0
    assert "red circle" in capsys.readouterr().out
    assert predict.main([str(trained), "retrieve", str(pictures[0].parent), "--query=a red circle", "--top=2"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert predict.main([str(trained), "embed", *files, f"--out={tmp_path / 'x.npy'}"]) == 0
    assert np.load(tmp_path / "x.npy").shape == (3, 16)
    assert predict.main([str(trained), "caption", "nowhere.png"]) == 43
    assert predict.main([str(trained), "zeroshot", files[0], "--labels=one"]) == 43
    assert "at least two" in capsys.readouterr().err


def test_scores_stand_with_chance_beside_them(trained):
    scores = json.loads((trained / "1_pretrain" / "DONE").read_text())["scores"]
    for name in ("caption/exact", "caption/facts/exact", "caption/BLEU-4", "caption/CIDEr-D", "caption/ROUGE-L", "zeroshot/top1"):
        assert name in scores and any(k.startswith(name + "/") and k.endswith(("chance", "most_frequent")) for k in scores), name
    rows = [json.loads(line) for line in (trained / "1_pretrain" / "predictions" / "caption.jsonl").read_text().splitlines()]
    assert len(rows) == 12 and {"key", "generated", "references"} <= set(rows[0])
