"""BERT, ViT and EVA alone, against transformers and timm on small random weights (tests/parity/hugging_face.py), and as the start of other systems."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vlm_jax
from tests.tiny import config
from vlm_jax import stage as stages
from vlm_jax.errors import ConfigError
from vlm_jax.importers import cli, read, write
from vlm_jax.models.bert import Bert
from vlm_jax.system import Context
from vlm_jax.train import init

STORED = pathlib.Path(__file__).parent / "parity" / "official_outputs"
WORDS, PIXELS = dict(np.load(STORED / "hf_bert" / "io.npz")), dict(np.load(STORED / "timm_vit" / "io.npz"))
BATCH = {"text": WORDS["in_ids"], "text_mask": WORDS["in_mask"]}


def bring(release, src, out):
    return cli.import_release(release, str(src), out, cli.Hints(image_heads=3) if release == "timm_vit" else None, say=lambda line: None)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return bring("hf_bert", STORED / "hf_bert", tmp_path_factory.mktemp("bert") / "in")


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    return bring("timm_vit", STORED / "timm_vit", tmp_path_factory.mktemp("vit") / "in")


def far(found, name):
    real = WORDS["in_mask"] if name in WORDS else ...
    return np.abs(found - {**WORDS, **PIXELS}[name])[real].max()


def test_states_and_logits_are_the_official_ones(bert):
    model = vlm_jax.load(bert)
    assert far(model.predict["features"](BATCH)["text"], "out_states") < 1e-4 and far(model.predict["mlm_logits"](BATCH)["logits"], "out_logits") < 1e-4


def test_tokens_of_images_are_the_official_ones(vit):
    images = {"image": PIXELS["in_images"]}
    assert far(vlm_jax.load(vit).predict["features"](images)["image"], "out_tokens") < 1e-4
    assert "head.weight" in json.loads((vit / "import.json").read_text())["ignored"]


def test_evas_tokens_are_the_official_ones_without_the_last_block(tmp_path):
    """The ViT of BLIP-2: transformers' tokens behind block 39 of 40, which nothing norms."""
    found = cli.import_release("eva", str(STORED / "eva" / "eva_tiny.pth"), tmp_path / "in", cli.Hints(image_heads=2), say=lambda line: None)
    io, model = np.load(STORED / "eva" / "io.npz"), vlm_jax.load(found)
    tokens = model.predict["features"]({"image": io["in_images"]})["image"]
    assert tokens.shape == (2, 5, 12) and np.abs(tokens - io["out_tokens"]).max() < 1e-4
    assert model.stage.plan.shapes["image/blocks/attn/query/bias"].shape == (39, 2, 6) and "image/blocks/attn/key/bias" not in model.stage.plan.shapes
    ignored = json.loads((found / "import.json").read_text())["ignored"]
    assert ignored and all(name.startswith(("blocks.39.", "norm.")) for name in ignored)
    wrong, variables = model.stage.system.model.image.clone(parent=None, eps=1e-2), {"params": model.variables["params"]["image"]}
    assert np.abs(jax.jit(wrong.apply)(variables, io["in_images"]) - io["out_tokens"]).max() > 1e-3


@pytest.mark.parametrize("change", [dict(eps=1e-12), dict(heads=2), dict(token_types=0)])
def test_a_planted_mistake_shows(bert, change):
    section = stages.configs.from_json((bert / "config.json").read_text())
    with section.model.unlocked():
        section.model.text.update(change)
    wrong, leaves = stages.resolve(section, "wrong"), stages.read_weights(bert)
    variables = stages.merge({p: jnp.asarray(leaves[p].reshape(x.shape)) for p, x in wrong.plan.shapes.items()}, {}, {})
    assert far(jax.jit(wrong.system.predict["features"])(variables, BATCH)["text"], "out_states") > 1e-3


@pytest.mark.parametrize("old, bare", [(True, False), (False, True)])
def test_other_files_of_the_same_model(bert, old, bare, tmp_path):
    """bert-base-uncased still names its norms as TensorFlow did; a BertModel has no head and no "bert."."""
    tensors = {n: t.read() for n, t in read.open_weights(STORED / "hf_bert").items()}
    if old:
        tensors = {n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): x for n, x in tensors.items()}
        tensors["cls.seq_relationship.weight"] = np.zeros((2, 24), np.float32)
        tensors["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"]
    if bare:
        tensors = {n.removeprefix("bert."): x for n, x in tensors.items() if not n.startswith("cls.")} | {"pooler.dense.bias": np.zeros(24, np.float32)}
    (tmp_path / "src").mkdir()
    shutil.copy(STORED / "hf_bert" / "config.json", tmp_path / "src")
    write.write_safetensors(tmp_path / "src" / "model.safetensors", tensors)
    found, wanted = stages.read_weights(bring("hf_bert", tmp_path / "src", tmp_path / "in")), stages.read_weights(bert)
    assert set(found) == {p for p in wanted if not (bare and p.startswith("lm_head/"))}
    assert all(np.array_equal(x, wanted[p]) for p, x in found.items())


@pytest.mark.parametrize("key, value, says", [("hidden_act", "gelu_new", "hidden_act='gelu_new' is not supported; nearest: 'gelu'"),
                                              ("model_type", "roberta", "nearest: 'bert'"), ("num_attention_heads", 5, "text_heads|heads")])
def test_what_is_no_such_bert_is_refused(key, value, says, tmp_path):
    shutil.copytree(STORED / "hf_bert", tmp_path / "src")
    stated = json.loads((tmp_path / "src" / "config.json").read_text())
    (tmp_path / "src" / "config.json").write_text(json.dumps({**stated, key: value}))
    with pytest.raises(ConfigError, match=says):
        bring("hf_bert", tmp_path / "src", tmp_path / "in")
    assert not (tmp_path / "in").exists()


def started(name, vit, bert):
    """(stage, what its ``init`` takes over): the published recipe of a family at the stored towers' sizes, 42 pixels."""
    whole = config(name, f"base,res=42,vit={vit},bert={bert}")
    section, words = whole.stages.pretrain, stages.configs.from_json((bert / "config.json").read_text()).model.text
    sizes = {k: words[k] for k in ("width", "layers", "heads", "mlp_dim", "positions")}
    section.model.image = stages.configs.from_json((vit / "config.json").read_text()).model.image
    section.model.text = dict(sizes, cross_layers=2) if name == "albef" else sizes
    section.model.tokens = dict(section.model.tokens, vocab=120 if name == "albef" else 122, **({} if name == "albef" else dict(dec=120, enc=121)))
    section.data.update(tokenizer="", batch=64, length=12)
    section.loss.group = 0
    stage = stages.resolve(section, "pretrain")
    rules = stages.init_rules(whole, stage, pathlib.Path())
    return stage, init.take_over(rules, stage.plan, lambda origin: stages.open_origin(whole, pathlib.Path(), origin), "init")


def test_albef_starts_from_them_and_reads_as_bert_does(vit, bert):
    stage, given = started("albef", vit, bert)
    fresh = set(stage.plan.shapes) - set(given)
    assert {p.split("/")[0] for p in fresh} == {"image_head", "text_head", "itm_head", "temp", "text"}
    assert all("/cross/" in p or "/norm_cross/" in p for p in fresh if p.startswith("text/"))
    text = Bert(120, **{**stage.config.model.text.to_dict(), "memory_width": 24, "dropout": 0.0, "eps": 1e-3})      # the stored one's eps
    missing = {p: jnp.zeros(stage.plan.shapes[p].shape) for p in fresh if p.startswith("text/")}
    variables = stages.merge({p.removeprefix("text/"): x for p, x in {**given, **missing}.items() if p.startswith("text/")}, {}, {})
    states = jax.jit(text.apply)(variables, BATCH["text"], BATCH["text_mask"])      # no image: the lower half, then the upper
    assert far(states, "out_states") < 1e-4
    assert given["image/position_embed"].shape == (50, 24)


def test_blips_encoder_and_decoder_start_from_the_same_layers(vit, bert):
    stage, given = started("blip", vit, bert)
    fresh = set(stage.plan.shapes) - set(given)
    assert {p.split("/")[0] for p in fresh} == {"image_head", "text_head", "itm_head", "temp", "text"}
    assert all("/cross/" in p or "/norm_cross/" in p for p in fresh if p.startswith("text/"))
    theirs, blocks = stages.read_weights(bert), "text/blocks_cross/"
    for path in ("attn/query/kernel", "norm1/bias", "attn/out/bias"):
        for role in ("", "decoder_"):
            np.testing.assert_array_equal(given[f"{blocks}{role}{path}"], theirs[f"text/blocks/{path}"])
    np.testing.assert_array_equal(given["text/token_embed/table"][:120], theirs["text/token_embed/table"])
    assert given["lm_head/bias"].shape == (122,)


def test_a_tower_alone_is_not_trained(bert):
    section = stages.configs.from_json((bert / "config.json").read_text())
    with pytest.raises(ConfigError, match="a tower alone has no loss"):
        stages.resolve(section, "in").system.loss({}, {}, BATCH, Context(jax.random.key(0), jnp.int32(0)))
    with section.model.unlocked():
        section.model.image = dict(variant="mini")
    with pytest.raises(ConfigError, match="either image or text"):
        stages.resolve(section, "in")
