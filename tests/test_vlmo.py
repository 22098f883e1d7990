"""VLMo against stored outputs of the official code (microsoft/unilm 768a3c8 on small random weights), and its invariants."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vlm_jax
from vlm_jax import stage as stages
from vlm_jax import weight_rules
from vlm_jax.importers import cli, read
from vlm_jax.importers import vlmo as layout
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
        stage, variables, batch = stage or self.stage, variables or self.variables(), batch or self.batch
        call = {name: jax.jit(fn) for name, fn in stage.system.predict.items()}
        states, embeds = call["states"](variables, batch), call["features"](variables, batch)
        model, length = stage.system.model, batch["text"].shape[1]
        rows, columns = np.divmod(np.arange(16), 4)
        pairs = call["match"](variables, {"image_features": embeds["image"][columns], "text_features": embeds["text"][rows], "text_mask": batch["text_mask"][rows]})
        out = {f"{side}_vl_cls_feats": run(model, variables, Vlmo.feature, states[f"{side}_vl"], f"{side}_vl") for side in ("image", "text")}
        uni = call["embed"](variables, batch)
        return jax.device_get(out | {
            "image_cls_feats": uni["image_embed"], "text_cls_feats": uni["text_embed"], "image_feats": states["image"], "image_vl_feats": states["image_vl"],
            "text_feats": states["text"], "text_vl_feats": states["text_vl"], "joint_text_feats": states["joint"][:, :length], "joint_image_feats": states["joint"][:, length:],
            "joint_cls_feats": states["pooled"], "itm_logits_all": pairs["match"].reshape(4, 4, 2),
            "mlm_logits": call["mlm_logits"](variables, {**batch, "text": self.masked["masked_text"]})["logits"]})

    def furthest(self, found):
        """name -> largest difference from the official output at real positions, in units of its tolerance (1e-4; logits 1e-3)."""
        def real(name, x):
            return x[self.mask] if "text_feats" in name or name in ("text_vl_feats", "mlm_logits") else x
        return {name: float(np.abs(real(name, x) - real(name, self.io[f"out_{name}"])).max()) / (1e-3 if "logits" in name else 1e-4) for name, x in found.items()}

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
            x, _ = block.apply({"params": own}, x, below if i < n else above, None if mask is None else jnp.asarray(mask)[:, None, None], None if bias is None else bias[i],
                               None, None, None)
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
