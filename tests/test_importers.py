"""The import and export commands: what they refuse, what comes along, what training makes of an import."""

import gzip
import json
import shutil

import numpy as np
import pytest
from PIL import Image

import vlm_jax
from tests.tiny import ROOT, get_config
from vlm_jax import config as configs
from vlm_jax import stage as stages
from vlm_jax import weight_rules
from vlm_jax.errors import ConfigError
from vlm_jax.importers import cli, read, write
from vlm_jax.importers.release import Hints
from vlm_jax.train import checkpoint, init

STORED = ROOT / "tests" / "parity" / "stored"


def quiet(line):
    pass


def copy_with(name, folder, **changes):
    """A stored case's folder with tensors changed: name -> array, or None to leave it out."""
    shutil.copytree(STORED / name, folder)
    arrays = {k: t.read() for k, t in read.open_weights(folder).items()}
    for f in [f for f in folder.iterdir() if f.suffix in (".bin", ".pt", ".safetensors")]:
        f.unlink()
    arrays.update({k: v for k, v in changes.items() if v is not None})
    for k in [k for k, v in changes.items() if v is None]:
        del arrays[k]
    write.write_safetensors(folder / "model.safetensors", arrays)
    return folder


def tiny_bpe(path):
    """CLIP's vocabulary file with three merges: 512 bytes, 3 merges, begin and end."""
    path.write_bytes(gzip.compress(b"#version\na b\nab c</w>\nr e\n", mtime=0))
    return path


# ---- what is refused ---------------------------------------------------------------------------

@pytest.mark.parametrize("argv, says", [
    (["--release=openai_clap"], "openai_clip"),
    (["--release=open_clip", "--activation=quick_gelu"], "--activation=quick_gelu, but the release has gelu"),
    (["--release=open_clip", "--image_heads=2"], "--image_heads=2, but the release has 3"),
    (["--release=openai_clip"], "says GELU"),
    (["--release=open_clip_coca"], "nearest: --release=open_clip"),
    (["--release=hf_clip"], "no config.json"),
    ([], "--release or --export is missing"),
    (["--release=open_clip", "--size=25"], "patch"),
    (["--release=open_clip", "--tokenizer=nowhere"], "--tokenizer"),
    (["--release=open_clip", "--push=hf:a/b"], "--export"),
])
def test_bad_arguments_exit_43_and_write_nothing(argv, says, tmp_path, capsys):
    assert cli.main([f"--src={STORED / 'open_clip_odd'}", f"--out={tmp_path / 'out'}", *argv]) == 43
    assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_openai_weights_are_quick_gelu(tmp_path, capsys):
    src = STORED / "openai_vit_script" / "model.pt"
    assert cli.main(["--release=openai_clip", f"--src={src}", f"--out={tmp_path / 'out'}", "--activation=gelu"]) == 43
    assert "nearest: quick_gelu" in capsys.readouterr().err


def test_heads_that_no_file_tells_are_asked_for(tmp_path, capsys):
    src = STORED / "openai_vit" / "model.pt"     # width 24: no heads of 64 channels
    assert cli.main(["--release=openai_clip", f"--src={src}", f"--out={tmp_path / 'out'}"]) == 43
    assert "--image_heads" in capsys.readouterr().err


@pytest.mark.parametrize("change, says", [
    (dict(extra=np.zeros(3, np.float32)), "extra"),
    ({"visual.proj": None}, "visual.proj"),
    ({"visual.transformer.resblocks.1.ln_1.weight": None}, "layers=2, but the tensors have 1"),
    ({"ln_final.bias": np.zeros(7, np.float32)}, "ln_final.bias"),
    ({"visual.positional_embedding": np.zeros((12, 24), np.float32)}, "12 positions"),
])
def test_totals_are_checked(change, says, tmp_path):
    folder = copy_with("open_clip_quickgelu", tmp_path / "src", **change)
    with pytest.raises(ConfigError, match=says):
        cli.import_release("open_clip", str(folder), tmp_path / "out", say=quiet)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("section, key, value, says", [
    ("vision_cfg", "layers", 3, "layers=3, but the tensors have 2"), ("text_cfg", "vocab_size", 61, "vocab_size=61"),
    ("vision_cfg", "ls_init_value", 0.1, "ls_init_value=0.1 is not supported"), ("text_cfg", "pool_type", "max", "nearest: 'argmax'"),
    ("vision_cfg", "qk_norm", True, "qk_norm"), ("vision_cfg", "timm_model_name", "vit_base", "timm_model_name")])
def test_a_config_file_that_contradicts_or_asks_too_much(section, key, value, says, tmp_path):
    shutil.copytree(STORED / "open_clip_quickgelu", tmp_path / "src")
    config = json.loads((tmp_path / "src" / "open_clip_config.json").read_text())
    config["model_cfg"][section][key] = value
    (tmp_path / "src" / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=says):
        cli.import_release("open_clip", str(tmp_path / "src"), tmp_path / "out", say=quiet)


def test_an_export_refuses_what_the_layout_cannot_hold(tmp_path, capsys):
    stage = stages.resolve(get_config("clip").stages.pretrain, "pretrain")       # a convolutional stem, RMSNorm
    with checkpoint.Checkpointer(tmp_path / "ours" / "checkpoints", keep=1) as keeper:
        keeper.save(0, {"params": {p: np.zeros(x.shape, np.float32) for p, x in stage.plan.shapes.items()}})
    (tmp_path / "ours" / "config.json").write_text(configs.to_json(stage.config))
    for release in cli.EXPORTS:
        assert cli.main([f"--export={release}", f"--src={tmp_path / 'ours'}", f"--out={tmp_path / release}"]) == 43
        said = capsys.readouterr().err
        assert ("no place for" in said if cli.EXPORTS[release].system == "clip" else "is a 'clip'" in said), said
        assert not (tmp_path / release).exists()


# ---- what comes along --------------------------------------------------------------------------

def test_a_source_without_a_tokenizer_imports_and_says_so(tmp_path):
    told = []
    cli.import_release("open_clip", str(STORED / "open_clip_odd"), tmp_path / "out", say=told.append)
    assert any("no tokenizer" in line for line in told)
    model = vlm_jax.load(tmp_path / "out")
    assert model.embed_image(Image.new("RGB", (40, 30), "red")).shape == (1, 24)
    with pytest.raises(ConfigError, match="without a tokenizer"):
        model.embed_text("a red square")
    record = json.loads((tmp_path / "out" / "import.json").read_text())
    assert record["release"] == "open_clip" and len(record["tensors"]) > len(record["ignored"])


def test_a_tiny_vocabulary_comes_along_and_goes_back(tmp_path):
    ids = 512 + 3 + 2
    table = np.random.default_rng(0).standard_normal((ids, 16)).astype(np.float32)
    folder = copy_with("open_clip_quickgelu", tmp_path / "src", **{"token_embedding.weight": table})
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"]["vocab_size"] = ids
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    spec = f"clip:{tiny_bpe(tmp_path / 'bpe.txt.gz')}"
    model = vlm_jax.load(cli.import_release("open_clip", str(folder), tmp_path / "out", tokenizer=spec, say=quiet))
    row = model.ids("ABC re")[0][0]
    assert list(row[:5]) == [ids - 2, 513, ord("r") - 33, 256 + ord("e") - 33, ids - 1]      # "re" ends in "e</w>", for which no merge is
    assert model.tokenizer.decode(row) == "abc re"
    # out to Hugging Face's layout, and in again with the directory's own tokenizer files
    back = cli.export_release("hf_clip", tmp_path / "out", tmp_path / "hf", say=quiet)
    assert {"config.json", "model.safetensors", "preprocessor_config.json", "vocab.json", "merges.txt", "tokenizer.json",
            "tokenizer_config.json"} <= {f.name for f in back.iterdir()}
    for drop in ((), ("tokenizer.json",)):
        for name in drop:
            (back / name).unlink()
        again = vlm_jax.load(cli.import_release("hf_clip", str(back), tmp_path / f"again{len(drop)}", say=quiet))
        assert list(again.ids("ABC re")[0][0][:4]) == list(row[:4]) and again.tokenizer.decode(row) == "abc re"
        np.testing.assert_allclose(again.embed_text("abc re"), model.embed_text("abc re"), atol=1e-6)


def test_a_tokenizer_that_does_not_fit_is_an_error_when_named(tmp_path):
    spec = f"clip:{tiny_bpe(tmp_path / 'bpe.txt.gz')}"
    with pytest.raises(ConfigError, match="517 ids, the model's table 60"):
        cli.import_release("open_clip", str(STORED / "open_clip_odd"), tmp_path / "out", tokenizer=spec, say=quiet)


def test_a_tokenizer_whose_end_is_not_the_models_is_refused(tmp_path):
    """This model pools at the first id 3: a tokenizer that ends texts otherwise would answer, and wrongly."""
    table = np.random.default_rng(0).standard_normal((517, 16)).astype(np.float32)
    folder = copy_with("open_clip_eos_bias", tmp_path / "src", **{"text.token_embedding.weight": table})
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"]["vocab_size"] = 517
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="ends texts with id 516, the model pools at id 3"):
        cli.import_release("open_clip", str(folder), tmp_path / "out", tokenizer=f"clip:{tiny_bpe(tmp_path / 'bpe.txt.gz')}", say=quiet)


def test_preprocessing_comes_along(tmp_path):
    shutil.copytree(STORED / "open_clip_quickgelu", tmp_path / "src")
    config = json.loads((tmp_path / "src" / "open_clip_config.json").read_text())
    config["preprocess_cfg"] = dict(mean=[0.5, 0.4, 0.3], std=[0.2, 0.2, 0.1], resize_mode="squash", interpolation="bicubic")
    (tmp_path / "src" / "open_clip_config.json").write_text(json.dumps(config))
    model = vlm_jax.load(cli.import_release("open_clip", str(tmp_path / "src"), tmp_path / "out", say=quiet))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 60, 3), np.uint8))
    squashed = np.asarray(image.resize((24, 24), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(model.images(image)[0], squashed)
    floats = (squashed / 255 - np.array([0.5, 0.4, 0.3])) / np.array([0.2, 0.2, 0.1])
    wanted = model.predict["embed"]({"image": floats[None].astype(np.float32)})["image_embed"]
    np.testing.assert_allclose(model.embed_image(image), wanted, atol=1e-5)
    out = cli.export_release("open_clip", tmp_path / "out", tmp_path / "back", say=quiet)
    assert json.loads((out / "open_clip_config.json").read_text())["preprocess_cfg"] == config["preprocess_cfg"]


@pytest.mark.parametrize("name, kernel", [("open_clip_quickgelu", "antialias"), ("hf_old_end", "border"), ("openai_resnet", "antialias")])
def test_another_resolution_resizes_with_the_releases_kernel(name, kernel, tmp_path):
    case = json.loads((STORED / name / "case.json").read_text())
    src = STORED / name if case["release"] != "openai_clip" else STORED / name / "model.pt"
    first = stages.read_weights(cli.import_release(case["release"], str(src), tmp_path / "own", say=quiet))
    size = 96 if name == "openai_resnet" else 42
    out = cli.import_release(case["release"], str(src), tmp_path / "other", Hints(size=size), say=quiet)
    path = "image/pool/position_embed" if name == "openai_resnet" else "image/position_embed"
    wanted = weight_rules.resize_grid(first[path], 10 if name == "openai_resnet" else 50, kernel)
    np.testing.assert_allclose(stages.read_weights(out)[path], wanted, atol=1e-6)
    assert vlm_jax.load(out).embed_image(Image.new("RGB", (50, 50))).shape == (1, 24)


# ---- training from an import -------------------------------------------------------------------

def trained_from(imported, size=24):
    """A run's config with the imported model's own sizes, on scenes."""
    whole = get_config("clip")
    stage, model = whole.stages.pretrain, configs.from_json((imported / "config.json").read_text()).model
    stage.model, stage.init = model, (str(imported),)
    stage.model.tokens.vocab = 60
    stage.data.update(size=size, length=12, train="scenes:train", eval="scenes:test", augment="squash", eval_augment="squash")
    stage.steps, stage.evals = 1, {}
    return whole


@pytest.mark.parametrize("size", [24, 36])
def test_init_takes_an_imported_directory(size, tmp_path):
    imported = cli.import_release("hf_clip", str(STORED / "hf_old_end"), tmp_path / "imported", say=quiet)
    config = trained_from(imported, size)
    config.stages.pretrain.data.tokenizer = ""
    stage = stages.resolve(config.stages.pretrain, "pretrain")
    rules = stages.init_rules(config, stage, tmp_path)
    given = init.take_over(rules, stage.plan, lambda origin: stages.open_origin(config, tmp_path, origin), "init")
    weights = stages.read_weights(imported)
    assert set(given) == set(weights) == set(stage.plan.shapes)
    for path, x in given.items():
        wanted = weights[path] if path != "image/position_embed" else weight_rules.resize_grid(weights[path], (size // 6) ** 2 + 1, "border")
        np.testing.assert_array_equal(x, wanted)
