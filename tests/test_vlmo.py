"""VLMo against stored outputs of the official code (microsoft/unilm 768a3c8 on small random weights), and its invariants."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vlm_jax
from tests.tiny import config
from vlm_jax import partitioning, weight_rules
from vlm_jax import stage as stages
from vlm_jax.data import scenes, tokenizers
from vlm_jax.errors import ConfigError
from vlm_jax.importers import cli, read
from vlm_jax.importers import vlmo as layout
from vlm_jax.importers.release import Hints
from vlm_jax.losses.masked import mask_words
from vlm_jax.models.vlmo import relative_index
from vlm_jax.nn.multiway import Layout, MultiwayBlock, one
from vlm_jax.system import Context, run
from vlm_jax.systems.vlmo import Vlmo
from vlm_jax.train.state import merge

STORED = pathlib.Path(__file__).parent / "parity" / "official_outputs"
PLUS = STORED / "vlmo_pretrain_plus"


class Case:
    """A stored model: imported, with its inputs."""

    def __init__(self, name, folder):
        self.stored, self.io = STORED / name, dict(np.load(STORED / name / "io.npz"))
        self.folder = cli.import_release("vlmo", str(self.stored), folder, say=lambda line: None)
        self.section = stages.configs.from_json((self.folder / "config.json").read_text())
        self.leaves = stages.read_weights(self.folder)
        self.mask = self.io["in_text_masks"].astype(bool)
        self.batch = {"image": self.io["in_images"].transpose(0, 2, 3, 1), "text": self.io["in_text_ids"].astype(np.int32), "text_mask": self.mask}
        self.masked = {"masked_text": self.io["in_text_ids_mlm"].astype(np.int32), "masked_at": self.io["in_text_labels_mlm"] != -100}
        self.given = {"negative_image": self.io["in_neg_image_idx"].astype(np.int32), "negative_text": self.io["in_neg_text_idx"].astype(np.int32)}
        self.stage = self.resolved(lambda section: None)
        self.call, self.plain = {name: jax.jit(fn) for name, fn in self.stage.system.predict.items()}, None

    def resolved(self, change):
        section = stages.ConfigDict(self.section.to_dict())
        section.data.batch = len(self.mask)
        with section.unlocked():
            change(section)
        return stages.resolve(section, "test")

    def variables(self, change=lambda leaves: {}):
        return merge({**self.leaves, **change(self.leaves)}, {}, {})

    def answers(self, stage=None, variables=None, batch=None):
        """What the stored outputs are compared with."""
        if stage is variables is batch is None and self.plain:
            return self.plain
        plain, stage = stage is variables is batch is None, stage or self.stage
        variables, batch = variables or self.variables(), batch or self.batch
        call = self.call if stage is self.stage else {name: jax.jit(fn) for name, fn in stage.system.predict.items()}      # compiled once
        states, embeds = call["states"](variables, batch), call["features"](variables, batch)
        model, length = stage.system.model, batch["text"].shape[1]
        rows, columns = np.divmod(np.arange(16), 4)
        pairs = call["match"](variables, {"image_features": embeds["image"][columns], "text_features": embeds["text"][rows],
                                          "text_mask": batch["text_mask"][rows]})
        out = {f"{side}_vl_cls_feats": run(model, variables, Vlmo.feature, states[f"{side}_vl"], f"{side}_vl") for side in ("image", "text")}
        uni = call["embed"](variables, batch)
        found = jax.device_get(out | {
            "image_cls_feats": uni["image_embed"], "text_cls_feats": uni["text_embed"], "image_feats": states["image"], "image_vl_feats": states["image_vl"],
            "text_feats": states["text"], "text_vl_feats": states["text_vl"],
            "joint_text_feats": states["joint"][:, :length], "joint_image_feats": states["joint"][:, length:],
            "joint_cls_feats": states["pooled"], "itm_logits_all": pairs["match"].reshape(4, 4, 2),
            "mlm_logits": call["mlm_logits"](variables, {**batch, "text": self.masked["masked_text"]})["logits"]})
        self.plain = found if plain else self.plain
        return found

    def furthest(self, found):
        """name -> largest difference from the official output at real positions, in units of its tolerance (1e-4; logits 1e-3)."""
        def real(name, x):
            return x[self.mask] if "text_feats" in name or name in ("text_vl_feats", "mlm_logits") else x
        return {name: float(np.abs(real(name, x) - real(name, self.io[f"out_{name}"])).max()) / (1e-3 if "logits" in name else 1e-4)
                for name, x in found.items()}

    def step(self, stage=None, batch=(), variables=None):
        """(loss, metrics, gradients by path)."""
        system = (stage or self.stage).system

        @jax.jit
        def fn(params, batch):
            def loss(params):
                return system.loss(merge(params, {}, {}), {}, batch, Context(jax.random.key(0), jnp.int32(0), train=False))
            (value, out), grads = jax.value_and_grad(loss, has_aux=True)(params)
            return value, out.metrics, grads

        params = {p: self.leaves[p] for p in (stage or self.stage).plan.shapes}
        return jax.device_get(fn(params, {**self.batch, **self.masked, **self.given, **dict(batch)}))


@pytest.fixture(scope="module", params=["vlmo_pretrain_plus", "vlmo_pretrain_base"])
def case(request, tmp_path_factory):
    return Case(request.param, tmp_path_factory.mktemp(request.param) / "in")


def test_states_features_and_logits_are_the_official_ones(case):
    found = case.furthest(case.answers())
    assert max(found.values()) <= 1, found
    scales = run(case.stage.system.model, case.variables(), Vlmo.scales)
    for branch, scale, name in (("", scales[0], "sim_i2t"), ("vl_", scales[1], "vl_sim_i2t")):
        image, text = (case.io[f"out_{side}_{branch}cls_feats"] for side in ("image", "text"))
        np.testing.assert_allclose(scale * image @ text.T, case.io[f"out_{name}"], atol=1e-3)


def test_every_layer_is_the_official_one(case):
    model, variables = case.stage.system.model, case.variables()
    trunk, params, length = model.trunk, variables["params"], case.batch["text"].shape[1]
    embeds = case.stage.system.predict["features"](variables, case.batch)
    count, n = embeds["image"].shape[1], trunk.layers - trunk.fused
    for name, own in (("image", embeds["image"]), ("text", embeds["text"])):
        table = params["type_embed"][{"text": 0, "image": 1}[name]]
        np.testing.assert_allclose(own - table, case.io[f"out_{name}_embed"], atol=1e-5)
    routes = {"image": (embeds["image"], None, one("image", count), one("image", count), (0, True)),
              "text": (embeds["text"], case.mask, one("text", length), one("text", length), (length, False)),
              "joint": (jnp.concatenate([embeds["text"], embeds["image"]], 1), np.concatenate([case.mask, np.ones((4, count), bool)], 1),
                        Layout((("text", length), ("image", count))), one("vl", length + count), (length, True))}
    for route, (x, mask, below, above, at) in routes.items():
        bias = model.apply(variables, *at, method=lambda m, *at: (m.pooler, m.trunk.bias(*at))[1])
        real = np.ones(x.shape[:2], bool) if mask is None else mask
        for i in range(trunk.layers):
            stack, j = ("blocks", i) if i < n else ("blocks_vl", i - n)
            block = MultiwayBlock(width=trunk.width, heads=trunk.heads, mlp_dim=trunk.mlp_dim, eps=trunk.eps, layer_scale=trunk.layer_scale, key_bias=False,
                                  experts=("text", "image", "vl")[:2 + (stack == "blocks_vl")])
            own = jax.tree.map(lambda p, j=j: p[j], params[stack])
            x, _ = block.apply({"params": own}, x, below if i < n else above, None if mask is None else jnp.asarray(mask)[:, None, None],
                               None if bias is None else bias[i], None, None, None)
            np.testing.assert_allclose(x[real], case.io[f"out_{route}_hidden_layers"][i][real], atol=2e-4, err_msg=f"{route} {i}")


def swapped(leaves, a, b):
    return {p.replace(a, b): x for p, x in leaves.items() if a in p} | {p.replace(b, a): x for p, x in leaves.items() if b in p}


MISTAKES = {
    "trunk eps": (lambda s: s.model.trunk.update(eps=1e-5 if s.model.trunk.positions == "absolute" else 1e-3), {}),
    "experts swapped": (None, lambda v: swapped(v, "mlp/text/", "mlp/image/") | swapped(v, "norm2/text/", "norm2/image/")),
    "no third expert": (lambda s: s.model.trunk.update(experts=("text", "image")), {}),
    "third expert behind the text's norm": (None, lambda v: {p.replace("/text/", "/vl/"): x for p, x in v.items() if "blocks_vl/norm2/text/" in p}),
    "no token types": (None, lambda v: {"type_embed": 0 * v["type_embed"]}), "token types swapped": (None, lambda v: {"type_embed": v["type_embed"][::-1]}),
    "query and key swapped": (None, lambda v: swapped({p: x for p, x in v.items() if "kernel" in p}, "attn/all/query", "attn/all/key")),
    "padding seen": (None, None)}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_planted_mistake_shows(case, mistake):
    change, leaves = MISTAKES[mistake]
    if mistake == "no third expert":
        stage = case.resolved(lambda s: s.model.trunk.update(experts=("text", "image")) or s.model.update(heads=("pooler", "mlm", "itm", "itc")))
        states = jax.jit(stage.system.predict["states"])(case.variables(), case.batch)
        assert case.furthest({"joint_cls_feats": states["pooled"]})["joint_cls_feats"] > 100
        return
    stage = case.resolved(change) if change else case.stage
    shaped = {p: x.shape for p, x in stage.plan.shapes.items()}
    variables = case.variables(lambda v: {p: x.reshape(shaped[p]) for p, x in {**v, **(leaves(v) if callable(leaves) else {})}.items()})
    batch = {**case.batch, "text_mask": np.ones_like(case.mask)} if mistake == "padding seen" else case.batch
    found = case.furthest(case.answers(stage, variables, batch))
    assert max(found.values()) > 5, found


def test_a_step_has_the_official_losses_and_gradients(case):
    value, metrics, grads = case.step()
    assert abs(value - case.io["out_loss_total"]) < 1e-4
    for name, wanted in (("itc", "itc"), ("itm", "itm"), ("mlm", "mlm_ce")):
        assert abs(metrics[name] - case.io[f"out_loss_{wanted}"]) < 1e-4, name
    official = {n: t.read() for n, t in read.open_weights(case.stored / "grads.safetensors").items()}
    shapes = {n: x.shape for n, x in official.items()}
    table = layout.rules(case.section.to_dict(), shapes)
    held = {p: g.shape for p, g in grads.items() if p != "text/position_embed" or "text_embeddings.position_embeddings.weight" in official}
    wanted, _ = weight_rules.import_leaves(table, layout.IGNORED, held, official, "gradients")
    for path, g in wanted.items():
        np.testing.assert_allclose(grads[path], g, rtol=0, atol=1e-3 * np.abs(g).max() + 1e-6, err_msg=path)
    assert not np.abs([np.abs(grads[p]).max() for p in grads if p not in held]).sum()
    assert abs(metrics["itc"] + metrics["itm"] + 0.25 * metrics["mlm"] - value) < 1e-5


def test_negatives_are_drawn_by_the_uni_branch(case):
    """The official weights of the draw are the softmax of the uni branch's similarities, off the diagonal."""
    found, scale = case.answers(), run(case.stage.system.model, case.variables(), Vlmo.scales)[0]
    similar = np.asarray(scale * found["image_cls_feats"] @ found["text_cls_feats"].T)
    for name, x in (("i2t", similar), ("t2i", similar.T)):
        np.testing.assert_allclose(jax.nn.softmax(x, axis=1) * (1 - np.eye(4)), case.io[f"out_itm_weights_{name}"], atol=1e-4)


def test_exporting_an_import_gives_the_source_back_bit_for_bit(case, tmp_path):
    out = cli.export_release("vlmo", case.folder, tmp_path / "out", say=lambda line: None)
    source, back = read.open_weights(case.stored / "weights.safetensors"), read.open_weights(out)
    ignored = set(json.loads((case.folder / "import.json").read_text())["ignored"])
    assert set(back) == set(source) - ignored and all("position_ids" in n or n.endswith("position_index") for n in ignored)
    for name, tensor in back.items():
        assert (tensor.dtype, tensor.shape, tensor.read().tobytes()) == (source[name].dtype, source[name].shape, source[name].read().tobytes()), name
    again = cli.import_release("vlmo", str(out), tmp_path / "again", say=lambda line: None)
    assert vlm_jax.load(again).config.model.trunk.to_dict() == case.section.model.trunk.to_dict()


# ---- fine-tuned files

def imported(name, folder, **hints):
    out = cli.import_release("vlmo", str(STORED / name), folder, cli.Hints(**hints), say=lambda line: None)
    section = stages.configs.from_json((out / "config.json").read_text())
    section.data.batch = 4
    return out, stages.resolve(section, "test"), stages.read_weights(out), dict(np.load(STORED / name / "io.npz"))


def loss_of(stage, leaves, batch):
    context = Context(jax.random.key(0), jnp.int32(0), train=False)
    return float(jax.jit(lambda v, b: stage.system.loss(v, {}, b, context)[0])(merge({p: leaves[p] for p in stage.plan.shapes}, {}, {}), batch))


def inputs(io):
    return {"text": io["in_text_ids"].astype(np.int32), "text_mask": io["in_text_masks"].astype(bool)}


def test_questions_are_answered_as_officially(tmp_path):
    out, stage, leaves, io = imported("vlmo_vqa", tmp_path / "in")
    batch = {**inputs(io), "image": io["in_images"].transpose(0, 2, 3, 1)}
    model = vlm_jax.load(out)
    found = model.predict["answer"](batch, k=3)
    np.testing.assert_allclose(found["logits"], io["out_logits"], atol=1e-3)
    np.testing.assert_array_equal(found["answer"], io["out_logits"].argmax(1))
    np.testing.assert_allclose(loss_of(stage, leaves, batch | {"answer_target": io["in_target"]}), io["out_loss"], rtol=1e-5)
    assert round_trip(out, "vlmo_vqa", tmp_path)


def test_statements_about_two_images_are_judged_as_officially(tmp_path):
    out, stage, leaves, io = imported("vlmo_nlvr2", tmp_path / "in")
    images = io["in_images"].transpose(0, 1, 3, 4, 2)
    batch = {**inputs(io), "images": images, "label": io["in_label"].astype(np.int32)}
    predict = vlm_jax.load(out).predict["classify"]
    np.testing.assert_allclose(predict(batch)["logits"], io["out_logits"], atol=1e-3)
    assert np.abs(predict({**batch, "images": images[:, ::-1]})["logits"] - io["out_logits"]).max() > 0.05
    np.testing.assert_allclose(loss_of(stage, leaves, batch), io["out_loss"], rtol=1e-5)
    assert round_trip(out, "vlmo_nlvr2", tmp_path)


def test_retrieval_trains_the_uni_branch_alone_as_officially(tmp_path):
    out, stage, leaves, io = imported("vlmo_irtr", tmp_path / "in")
    assert stage.system.model.heads == ("pooler", "itc")
    batch = {**inputs(io), "image": io["in_images"].transpose(0, 2, 3, 1)}
    found = vlm_jax.load(out).predict["embed"](batch)
    np.testing.assert_allclose(found["logit_scale"] * found["image_embed"] @ found["text_embed"].T, io["out_sim_i2t"], atol=1e-3)
    np.testing.assert_allclose(loss_of(stage, leaves, batch), io["out_loss"], rtol=1e-5)
    assert round_trip(out, "vlmo_irtr", tmp_path)


def test_texts_alone_are_read_as_officially(tmp_path):
    out, stage, leaves, io = imported("vlmo_stage2", tmp_path / "in")
    assert dict(stage.config.loss.weights) == {"textmlm": 1.0} and stage.system.model.trunk.experts == ("text", "image")
    batch = {**inputs(io), "masked_text": io["in_text_ids_mlm"].astype(np.int32), "masked_at": io["in_text_labels_mlm"] != -100}
    found = vlm_jax.load(out).predict["mlm_logits"]({"text": batch["masked_text"], "text_mask": batch["text_mask"]})["logits"]
    np.testing.assert_allclose(found[batch["text_mask"]], io["out_logits"][batch["text_mask"]], atol=1e-3)
    np.testing.assert_allclose(loss_of(stage, leaves, batch), io["out_loss"], rtol=1e-5)
    assert round_trip(out, "vlmo_stage2", tmp_path)


def round_trip(folder, name, tmp_path):
    out = cli.export_release("vlmo", folder, tmp_path / "out", say=lambda line: None)
    source, back = read.open_weights(STORED / name / "weights.safetensors"), read.open_weights(out)
    assert set(source) - set(back) <= {"text_embeddings.position_ids"} and set(back) <= set(source)
    return all(np.array_equal(back[n].read(), source[n].read()) for n in back)


def test_another_resolution_has_the_official_bias_table(tmp_path):
    """The pre-trained file, brought to the pixels of the tasks that the official code loaded it for; larger and smaller."""
    for task, size in (("vlmo_vqa", 36), ("vlmo_nlvr2", 18)):
        _, stage, leaves, _ = imported("vlmo_pretrain_base", tmp_path / task, size=size)
        _, _, wanted, _ = imported(task, tmp_path / f"{task}_wanted")
        assert stage.system.model.trunk.side == size // 6
        for part in ("image", "class", "text"):
            np.testing.assert_allclose(leaves[f"position_bias/{part}"], wanted[f"position_bias/{part}"], atol=1e-6, err_msg=f"{task} {part}")


# ---- BEiT

def test_beit_is_the_route_of_images(tmp_path):
    io = dict(np.load(STORED / "beit" / "io.npz"))
    image = io["images"].transpose(0, 2, 3, 1)
    tuned = cli.import_release("beit", str(STORED / "beit" / "finetuned.pth"), tmp_path / "tuned", say=lambda line: None)
    states = vlm_jax.load(tuned).predict["states"]({"image": image})["image"]
    x = io["hidden"]      # a fine-tuned BEiT has no norm here: it starts fresh
    np.testing.assert_allclose(states, (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6), atol=1e-4)
    first = cli.import_release("beit", str(STORED / "beit" / "pretrained.pth"), tmp_path / "first", say=lambda line: None)
    model = vlm_jax.load(first)
    embeds = run(model.stage.system.model, model.variables, Vlmo.embed_image, image, io["masked"])
    states, = run(model.stage.system.model, model.variables, Vlmo.encode_image, embeds)
    np.testing.assert_allclose(run(model.stage.system.model, model.variables, Vlmo.predict_codes, states), io["logits"], atol=1e-3)


# ---- who computes what

@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return Case("vlmo_pretrain_base", tmp_path_factory.mktemp("base") / "in")


def idle(case, name, batch):
    """The parameters that a state of predict "states" does not depend on."""
    fn = case.stage.system.predict["states"]
    grads = jax.jit(jax.grad(lambda params: jnp.square(fn(merge(params, {}, {}), batch)[name]).sum()))({p: case.leaves[p] for p in case.stage.plan.shapes})
    return {p for p, g in grads.items() if not np.abs(g).max()}


def test_each_route_has_its_experts(base):
    image, text = {"image": base.batch["image"]}, {k: base.batch[k] for k in ("text", "text_mask")}
    experts = {e: {p for p in base.leaves if f"/{e}/" in p and ("mlp/" in p or "norm2/" in p)} for e in ("image", "text", "vl")}
    top = {e: {p for p in paths if p.startswith("blocks_vl/")} for e, paths in experts.items()}
    embedded = {side: {p for p in base.leaves if p.startswith(f"{side}/")} - {"text/position_embed"} for side in ("image", "text")}
    relative = {name: {f"position_bias/{name}"} for name in ("image", "class", "text")}
    trunk = ("image/", "text/", "blocks", "norm/", "type_embed", "position_bias/")
    never = {p for p in base.leaves if not p.startswith(trunk)} | {"text/position_embed"}
    assert idle(base, "text", text) == never | experts["image"] | experts["vl"] | embedded["image"] | relative["image"] | relative["class"]
    assert idle(base, "image", image) == never | experts["text"] | experts["vl"] | embedded["text"] | relative["text"]
    assert idle(base, "image_vl", image) == never | experts["text"] | top["image"] | embedded["text"] | relative["text"]
    assert idle(base, "joint", base.batch) == never | top["text"] | top["image"]


def test_what_is_in_the_padding_says_nothing(base):
    changed = {**base.batch, "text": np.where(base.mask, base.batch["text"], 17)}
    found, other = base.answers(), base.answers(batch=changed)
    real = base.mask
    for name in ("text_feats", "text_vl_feats", "joint_text_feats"):
        np.testing.assert_allclose(found[name][real], other[name][real], atol=1e-6)
    for name in ("joint_image_feats", "joint_cls_feats", "itm_logits_all", "text_cls_feats"):
        np.testing.assert_allclose(found[name], other[name], atol=1e-5)
    assert np.abs(found["text_feats"] - other["text_feats"])[~real].max() > 1e-2


def test_relative_positions_are_numbered_as_officially(base):
    index = relative_index(14, 40, 196)
    assert index.shape == (237, 237) and set(np.unique(index)) == set(range(734)) | set(range(890, 967)) | {1123, 1124, 1125}
    words = np.arange(1, 40)
    np.testing.assert_array_equal(index[1:40, 1:40], 928 + words[None, :] - words[:, None])
    assert (index[:40, 40:] == 732).all() and (index[40:, :40] == 733).all()
    assert index[0, 1] == 1123 and index[1, 0] == 1124 and index[0, 0] == 1125 and index[40, 41] == 729 and index[41, 40] == 730 and index[40, 40] == 731
    assert index[41, 42] == 13 * 27 + 12 and index[42, 41] == 13 * 27 + 14      # query - key: the opposite sign
    np.testing.assert_array_equal(relative_index(4, 11, 15), base.io["out_index"])
    with pytest.raises(ValueError, match="text of 30 ids exceeds reach=15 of the relative positions; nearest: 15"):
        relative_index(4, 30, 15)


# ---- masking, targets

def test_words_are_masked_whole():
    ids = jnp.asarray(np.random.default_rng(0).integers(10, 40, (600, 20)))
    continues = (ids % 3 == 0) & (jnp.arange(20) > 1)
    mask = jnp.broadcast_to(jnp.arange(20) < 16, ids.shape)
    fixed = jnp.broadcast_to((jnp.arange(20) == 0) | (jnp.arange(20) == 15), ids.shape)
    continues = continues & mask & ~fixed
    hidden, chosen = map(np.asarray, jax.jit(lambda key: mask_words(key, ids, mask, fixed, continues, vocab=40, mask_id=4, share=0.25))(jax.random.key(0)))
    assert not chosen[:, 0].any() and not chosen[:, 15:].any() and (hidden != np.asarray(ids))[~chosen].sum() == 0
    goes_on = np.asarray(continues)[:, 1:]
    assert (chosen[:, 1:] == chosen[:, :-1])[goes_on].all()      # pieces share their word's fate
    counts = chosen.sum(1)
    assert counts.max() <= 5 and abs(counts.mean() / 14 - 5 / 18) < 0.03      # 5 of 20 positions, of which 4 are padding and 2 are no words
    assert abs((hidden == 4)[chosen].mean() - 0.8) < 0.04


def test_tokenizers_tell_which_pieces_go_on_with_a_word(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "play", "##ing", "##s", "##", "ed"]))
    assert tokenizers.load(f"bert:{tmp_path / 'vocab.txt'}").continuing == [6, 7]
    scenes = tokenizers.load("scenes")
    assert {scenes.bos_id, scenes.eos_id, scenes.pad_id}.isdisjoint(scenes.continuing)
    section = tiny("joint").stages.joint
    section.loss.masking = "words"
    with pytest.raises(ConfigError, match="loss.masking='words', but tokenizer 'clip' has no pieces"):
        section.data.tokenizer = "clip"
        ids = {k: getattr(scenes, k) for k in ("bos_id", "eos_id", "pad_id", "vocab_size")}
        stages.resolve(section, "joint", type("NoPieces", (), {**ids, "continuing": []})())


# ---- stages

def tiny(*names):
    """The embedded preset with a trunk of width 16 and steps of a second."""
    whole = config("vlmo")
    for name in names or whole.stages:
        stage = whole.stages[name]
        with stage.unlocked():
            stage.model.trunk.update(width=16, heads=2, layers=2, mlp_dim=32)
            stage.evals, stage.steps, stage.optim = {}, 1, dict(name="adamw", lr=1e-2, weight_decay=0.1, clamps=(), ema=0.0, max_bad_steps=10)
            stage.data.update(batch=8, prefetch=1)
    return whole


TEXT_STAGE = ("text_embeddings", "token_type_embeddings", "mlp_text", "norm2_text", "mlm_score", "relative_position_bias_table", "transformer.norm")


def test_texts_alone_train_what_the_official_code_lets_learn(base):
    for size in ("", "base", "base_plus"):
        section = config("vlmo", size).stages.language
        section.data.tokenizer = section.data.tokenizer if not size else ""
        stage = stages.resolve(section, "language")
        table = layout.rules(stage.config.to_dict(), {})
        learns = {p for p in stage.plan.shapes if any(part in weight_rules.first_match(table, p)[1] for part in TEXT_STAGE)}
        unused = {"text/position_embed"} if size != "base_plus" else set()
        assert stage.plan.trainable == learns - unused and len(learns) < len(stage.plan.shapes)


def test_three_stages_in_one_command(tmp_path):
    whole = tiny()
    vlm_jax.train(whole, tmp_path)
    vision, language, joint = (stages.read_weights(tmp_path / f"{i}_{name}") for i, name in enumerate(("vision", "language", "joint"), 1))
    frozen = [p for p in vision if p in language and not p.startswith(("norm/", "position_bias/"))]
    assert "blocks/attn/all/query/kernel" in frozen and "blocks_vl/mlp/image/up/kernel" in frozen
    for path in frozen:
        np.testing.assert_array_equal(language[path], vision[path], err_msg=path)
    assert np.abs(language["norm/scale"] - vision["norm/scale"]).max() > 0
    changed = {p for p in joint if p in language and not np.array_equal(joint[p], language[p])}
    assert {p for p in language if p in joint} - changed == {"text/position_embed"}
    assert {"blocks_vl/mlp/vl/up/kernel", "pooler/kernel", "image_vl_head/kernel"} <= set(joint) - set(language)


    for name, fresh in (("retrieval", ""), ("vqa", "vqa_head/"), ("nlvr", "nlvr_head/")):      # what follows starts from it, at another resolution
        whole.stages[name].data.size = 56
        stage = stages.open_stage(whole, tmp_path, name)
        given = stages.init.take_over(stages.init_rules(whole, stage, tmp_path), stage.plan, lambda origin: stages.open_origin(whole, tmp_path, origin), "init")
        assert {p for p in stage.plan.shapes if p not in given} == {p for p in stage.plan.shapes if fresh and p.startswith(fresh)}
        assert given["position_bias/image"].shape[1] == 13 * 13 and np.isfinite(given["position_bias/image"]).all()
        stages.make_optimizer(stage)
    np.testing.assert_array_equal(given["type_embed"], joint["type_embed"][[0, 1, 1]])


def test_masked_patches_are_told_as_the_codes_of_an_imported_tokenizer(tmp_path):
    source, hints = str(STORED / "vqkd" / "weights.safetensors"), Hints(image_heads=3, decoder_heads=4)
    folder = cli.import_release("vqkd", source, tmp_path / "vqkd", hints, say=lambda line: None)
    tokenizer = vlm_jax.load(folder)
    whole, told = tiny("vision"), tokenizer.config.model
    section = whole.stages.vision
    with section.unlocked(), section.ignore_type():
        section.model.trunk.update(patch=8)
        section.model.targets = dict(kind="vqkd", encoder=told.encoder.to_dict(), codes=told.codes, code_width=told.code_width)
        section.init, section.data.size = str(folder), tokenizer.stage.data.size
    stage = stages.open_stage(whole, tmp_path, "vision")
    leaves = stages.init.take_over(stages.init_rules(whole, stage, tmp_path), stage.plan, lambda origin: stages.open_origin(whole, tmp_path, origin), "init")
    own = {p for p in stage.plan.shapes if p.startswith("tokenizer/")}
    assert own == set(leaves) and own and not own & set(stage.plan.trainable)
    fresh, _, _ = stages.init.unbox(jax.jit(lambda key: stage.system.init(key, stage.spec))(jax.random.key(0)))
    image = np.random.default_rng(0).integers(0, 256, (2, section.data.size, section.data.size, 3)).astype(np.uint8)
    codes = run(stage.system.model, merge({**fresh, **leaves}, {}, {}), Vlmo.codes, image)
    np.testing.assert_array_equal(codes, tokenizer.predict["tokens"]({"image": image})["ids"])
    assert fresh["mim_head/kernel"].shape[1] == told.codes


def test_the_papers_first_stage_takes_a_tokenizer():
    section = config("vlmo", "base,tokenizer=DIR").stages.vision
    section.data.tokenizer = ""
    plan = stages.resolve(section, "vision").plan
    assert section.init == "DIR" and plan.shapes["mim_head/kernel"].shape == (768, 8192) and plan.shapes["tokenizer/table"].shape == (8192, 32)
    assert {p for p in plan.shapes if p not in plan.trainable} == {p for p in plan.shapes if p.startswith("tokenizer/")}


def test_texts_alone_come_without_images(tmp_path, monkeypatch):
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(dict(text=f"a {word} star")) + "\n" for word in ("red", "blue", "green", "white")))
    monkeypatch.setattr(scenes, "render", None)      # calling it would end the run
    for source in (f"jsonl:{tmp_path}/texts.jsonl", "scenes:train"):
        section = tiny("language").stages.language
        section.data.update(train=source, eval=source, batch=4)
        stage = stages.resolve(section, "language")
        with stage.train_batches(stage.open(source), 0, 1, tmp_path / "bad.jsonl") as batches:
            (_, batch), = batches
        assert set(batch) == set(stage.spec) == {"text", "text_mask", "caption_id", "image_id"} and batch["text_mask"].any(1).all()
        evaluated, = stage.eval_batches(stage.open(source), 4, 4)
        assert "image" not in evaluated and evaluated["mask"].all()


def test_the_loss_is_the_same_on_any_number_of_devices():
    section = tiny("joint").stages.joint
    section.loss.weights.mlm = 0.0
    stage = stages.resolve(section, "joint")
    params, _, _ = stages.init.unbox(jax.jit(lambda key: stage.system.init(key, stage.spec))(jax.random.key(0)))
    rng = np.random.default_rng(0)
    batch = {"image": rng.integers(0, 256, (8, 48, 48, 3)).astype(np.uint8),
             "text": rng.integers(5, 100, (8, 12)).astype(np.int32), "text_mask": np.ones((8, 12), bool)}

    def found(devices):
        mesh = partitioning.make_mesh("dp", devices=jax.devices()[:devices])
        with partitioning.use(mesh):
            fn = jax.jit(lambda p, b: stage.system.loss(merge(p, {}, {}), {}, b, Context(jax.random.key(1), jnp.int32(0), train=False)))
            return jax.device_get(fn(params, partitioning.place(batch, mesh)))
    (one_loss, one_out), (loss, out) = found(1), found(2)
    np.testing.assert_allclose(loss, one_loss, rtol=1e-5)
    assert one_out.metrics.keys() == out.metrics.keys()


def test_ranks_weaken_the_features_and_not_the_scales(base):
    grads = {}
    for ranks in (1, 4):
        stage = base.resolved(lambda s, n=ranks: s.loss.update(weights=dict(itm=0.0, mlm=0.0), ranks=n))
        context = Context(jax.random.key(0), jnp.int32(0), train=False)
        fn = jax.jit(jax.value_and_grad(lambda p, stage=stage, context=context: stage.system.loss(merge(p, {}, {}), {}, base.batch, context)[0]))
        grads[ranks] = fn({p: base.leaves[p] for p in stage.plan.shapes})
    np.testing.assert_allclose(grads[4][0], grads[1][0], rtol=1e-6)
    for path in ("image_head/kernel", "blocks/attn/all/query/kernel", "text_vl_head/kernel"):
        np.testing.assert_allclose(grads[4][1][path] * 4, grads[1][1][path], rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(grads[4][1]["logit_scale"], grads[1][1]["logit_scale"], rtol=1e-4)


@pytest.mark.parametrize("size, counts", [("base", (175_430_496, 202_445_470)), ("base_plus", (166_567_360, 184_980_734)),
                                          ("large", (561_544_448, 599_127_102))])
def test_the_papers_sizes_have_the_papers_counts(size, counts):
    section = config("vlmo", size).stages.joint
    section.data.tokenizer = ""
    plan = stages.resolve(section, "joint").plan
    heads = ("pooler", "lm_", "itm_head", "image_head", "text_head", "image_vl_head", "text_vl_head", "logit")
    assert (plan.count() - sum(plan.count(head) for head in heads), plan.count()) == counts


def test_attention_and_feed_forward_are_shared_or_split():
    def paths(**fields):
        section = tiny("joint").stages.joint
        with section.unlocked():
            section.model.trunk.update(fields)
        return {p for p in stages.resolve(section, "joint").plan.shapes if p.startswith("blocks")}

    vlmo, apart, together = paths(), paths(attention="split"), paths(feed_forward="shared")
    assert {"blocks/attn/all/query/kernel", "blocks/norm1/scale", "blocks/mlp/text/up/kernel", "blocks_vl/norm2/vl/scale"} <= vlmo
    assert {"blocks/attn/text/query/kernel", "blocks/norm1/image/scale", "blocks_vl/attn/vl/out/kernel"} <= apart and not [p for p in apart if "/all/" in p]
    assert {"blocks/mlp/all/up/kernel", "blocks_vl/norm2/all/scale"} <= together and not [p for p in together if "/text/" in p or "/vl/" in p]


@pytest.mark.parametrize("name, change, message", [
    ("joint", lambda s: s.loss.update(negatives="hrad"), "loss.negatives='hrad' is not known; nearest: 'hard'"),
    ("joint", lambda s: s.loss.update(masking="word"), "loss.masking='word' is not known; nearest: 'words'"),
    ("joint", lambda s: s.model.update(heads=("pooler", "itc", "itc_vl", "mlm")), "loss.weights.itm needs the head 'itm'"),
    ("joint", lambda s: s.data.update(microbatch=4), "data.microbatch=4: negatives are mined from the whole batch; nearest: 0"),
    ("joint", lambda s: s.model.trunk.update(positions="relativ"), "positions='relativ' is not known; nearest: 'relative'"),
    ("vision", lambda s: s.model.targets.update(kind="colors"), "targets.kind='colors' is not known; nearest: 'colours'"),
    ("vision", lambda s: s.data.update(images=0), "data.images=0, but of loss.weights only textmlm learns from texts alone; nearest: data.images=1"),
    ("vqa", lambda s: s.model.update(answers=("yes", "the blue star")) or s.data.update(answer_length=3), "data.answer_length=3 cuts answers of model.answers"),
    ("vqa", lambda s: s.model.update(answers=()), "model.classes=0 and model.answers says none"),
    ("nlvr", lambda s: s.data.update(images=1), "data.images=1, but statements are about two images; nearest: data.images=2")])
def test_wrong_sections_are_refused_by_name(name, change, message):
    section = tiny(name).stages[name]
    with section.unlocked(), section.ignore_type():
        change(section)
    with pytest.raises(ConfigError, match=message):
        stages.resolve(section, name).plan.count()
