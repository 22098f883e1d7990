"""BLIP against stored outputs of the official code (salesforce/BLIP 056a169 with transformers 4.15, and transformers 5.24's own
models, all on small random weights), and its invariants."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.tiny import config
from vlm_jax import partitioning, weight_rules
from vlm_jax import stage as stages
from vlm_jax.errors import ConfigError
from vlm_jax.importers import blip as layout
from vlm_jax.importers import cli, read
from vlm_jax.losses.matching import mine
from vlm_jax.nn.block import Stack
from vlm_jax.system import Context
from vlm_jax.train import init
from vlm_jax.train.state import merge
from vlm_jax.train.step import make_train_step

STORED = pathlib.Path(__file__).parent / "parity" / "official_outputs"


class Case:
    """An imported release: its stored arrays, its stage, its weights."""

    def __init__(self, name, folder, release="blip", **prompt):
        self.io = dict(np.load(STORED / name / "io.npz"))
        self.mask = self.io["in_attention_mask"].astype(bool)
        self.batch = {"image": self.io["in_images"].transpose(0, 2, 3, 1), "text": self.io["in_input_ids"], "text_mask": self.mask}
        self.folder = cli.import_release(release, str(STORED / name), folder / name, say=lambda line: None)
        self.section = stages.configs.from_json((self.folder / "config.json").read_text())
        self.section.model.update(prompt)
        self.section.data.batch = len(self.mask)
        self.weights = stages.read_weights(self.folder)
        self.stage = stages.resolve(self.section, name)

    def variables(self, weights=None):
        return merge(weights or {p: self.weights[p] for p in self.stage.plan.shapes}, {}, {})

    @functools.cached_property
    def compiled(self):
        """(variables, batch) -> what the model says of it, under the official names, compiled as one."""
        predict = self.stage.system.predict

        def answers(v, b):
            out = {}
            features = predict["features"](v, b)
            out["out_image_embeds"] = features["image"]
            if "embed" in predict:
                embeds = predict["embed"](v, b)
                out |= {"out_text_states": features["states"], "out_image_feat": embeds["image_embed"], "out_text_feat": embeds["text_embed"],
                        "out_cosine": embeds["image_embed"] @ embeds["text_embed"].T}
            if "match" in predict:
                rows = len(self.mask)
                text, image = np.repeat(np.arange(rows), rows), np.tile(np.arange(rows), rows)
                every = {"image_features": features["image"][image], "text": b["text"][text], "text_mask": b["text_mask"][text]}
                enc, cls = predict["match"](v, every), predict["match"](v, every, first="cls")
                out |= {"out_grounded_states": enc["grounded"][text == image], "out_itm_logits_all": enc["match"].reshape(rows, rows, 2),
                        "out_itm_logits_all_cls": cls["match"].reshape(rows, rows, 2), "out_itm_logits_cls": cls["match"][text == image]}
            if "caption_logits" in predict:
                out["out_lm_logits"] = predict["caption_logits"](v, b)["logits"]
            return out

        return jax.jit(answers)

    def answers(self, batch=None, variables=None):
        return jax.device_get(self.compiled(self.variables() if variables is None else variables, jax.tree.map(jnp.asarray, batch or self.batch)))

    def captions(self, **options):
        generate = self.stage.system.predict["generate"]
        return jax.device_get(jax.jit(lambda v, b: generate(v, b, **options)["text"])(self.variables(), {"image": self.batch["image"]}))

    def changed(self, part, change):
        """Features of images ("image") or texts ("states") of a model whose config was changed."""
        section = stages.ConfigDict(self.section.to_dict())
        with section.model.unlocked():
            change(section.model)
        stage = stages.resolve(section, "changed")
        batch = {"image": self.batch["image"]} if part == "image" else {"text": self.batch["text"], "text_mask": self.mask}
        weights = {p: self.weights[p].reshape(x.shape) for p, x in stage.plan.shapes.items()}
        return jax.device_get(jax.jit(stage.system.predict["features"])(self.variables(weights), batch)[part])

    def far(self, name, found):
        """The largest difference from the official output, in units of its tolerance."""
        wanted = self.io[name]
        real = name.endswith("states") or name == "out_lm_logits"
        difference = np.abs(found - wanted)[self.mask] if real else np.abs(found - wanted)
        return float(difference.max()) / (1e-3 if "logits" in name else 1e-4)


@pytest.fixture(scope="module")
def pretrain(tmp_path_factory):
    return Case("blip_pretrain", tmp_path_factory.mktemp("blip"))


@pytest.fixture(scope="module")
def captioner(tmp_path_factory):
    prompt = tuple(np.load(STORED / "blip_caption" / "io.npz")["out_gen_prompt"].tolist()[1:])
    return Case("blip_caption", tmp_path_factory.mktemp("blip"), prompt=prompt)


# ---- parity

def test_towers_and_heads_are_the_official_ones(pretrain):
    found = pretrain.answers()
    far = {name: pretrain.far(name, x) for name, x in found.items() if name in pretrain.io}
    assert len(far) == 8 and max(far.values()) <= 1, far
    # planted: the demo's [CLS] in the place of [ENC]; the decoder's self-attention in the encoder
    assert pretrain.far("out_itm_logits_all", found["out_itm_logits_all_cls"]) > 5
    swapped = {p: pretrain.weights[p.replace("/attn/", "/decoder_attn/").replace("/norm1/", "/decoder_norm1/") if p.startswith("text/") else p]
               for p in pretrain.stage.plan.shapes}
    wrong = merge(swapped, {}, {})
    found = pretrain.answers(variables=wrong)
    assert pretrain.far("out_text_states", found["out_text_states"]) > 5 and pretrain.far("out_lm_logits", found["out_lm_logits"]) <= 1


@pytest.mark.parametrize("mistake, change, output, part", [
    ("bert eps", lambda m: m.text.update(eps=1e-6), "out_text_states", "states"), ("one head", lambda m: m.text.update(heads=1), "out_text_states", "states"),
    ("vit eps", lambda m: m.image.update(eps=1e-5), "out_image_embeds", "image"),
    ("tanh gelu", lambda m: m.image.update(activation="gelu_tanh"), "out_image_embeds", "image")])
def test_a_planted_mistake_shows(pretrain, mistake, change, output, part):
    assert pretrain.far(output, pretrain.changed(part, change)) > 5, mistake


@pytest.fixture(scope="module")
def stepped(pretrain):
    """(carry, a function to the loss's metrics, the next carry and the gradients of its ``parts`` at the stored batch and negatives)."""
    kept, io = stages.read_carry(pretrain.folder), pretrain.io
    carry = {"teacher": {p.removeprefix("teacher/"): x for p, x in kept.items() if p.startswith("teacher/")}, "id_queue": np.full(8, -100, np.int32),
             **{k: kept[k] for k in ("image_queue", "text_queue", "pointer")}}
    batch = {**pretrain.batch, "image_id": np.arange(4), "negative_image": io["in_neg_image_idx"], "negative_text": io["in_neg_text_idx"]}
    section = stages.ConfigDict(pretrain.section.to_dict())
    with section.unlocked():
        section.loss.update(alpha=float(io["in_alpha"]), alpha_ramp=100)
    system = stages.resolve(section, "step").system

    @jax.jit
    def run(params, carry, batch, step, parts):
        def total(params):
            _, out = system.loss(merge(params, {}, {}), carry, batch, Context(jax.random.key(0), step, train=False))
            share = dict(zip(("itc", "itm", "lm"), parts, strict=True))
            return sum(share[name] * out.metrics[name] for name in share), (out.metrics, system.next_carry(carry, out.update))
        (_, out), grads = jax.value_and_grad(total, has_aux=True)(params)
        return *out, grads

    def step(params=None, step=100, parts=(0.0, 0.0, 1.0), **change):
        return jax.device_get(run(params or start, carry, {**batch, **change}, jnp.int32(step), parts))

    start = {p: pretrain.weights[p] for p in pretrain.stage.plan.shapes}
    step.params = start
    return carry, step


def test_a_step_has_the_official_losses_teacher_and_queues(pretrain, stepped):
    carry, step = stepped
    metrics, after, _ = step()
    for name in ("itc", "itm", "lm"):
        assert abs(metrics[name] - pretrain.io[f"out_loss_{name}"]) < 1e-4, name
    official = {n: t.read() for n, t in read.open_weights(STORED / "blip_pretrain" / "after_step.safetensors").items()}
    table = [(p.removeprefix("carry/"), source, how) for p, source, how in layout.carry_rules(())]
    held = {p: x for p, x in after["teacher"].items() if f"teacher/{p}" in stages.read_carry(pretrain.folder)}
    compared = 0
    for path, stack in held.items():
        _, source, how = next(rule for rule in table if rule[0] == f"teacher/{path}")
        for layer, x in enumerate(stack if "{layer" in source else [stack]):
            name = weight_rules.LAYER.sub(str(layer), source)
            if name.partition("[")[0] in official:
                theirs = weight_rules.apply([("x", name, how)], {"x": x.shape}, official)["x"]
                np.testing.assert_allclose(x, theirs, rtol=0, atol=1e-6, err_msg=path)
                compared += 1
    assert compared == 7      # five matrices, of which one holds three of ours
    for side in ("image", "text"):
        np.testing.assert_allclose(after[f"{side}_queue"], official[f"{side}_queue"].T, rtol=0, atol=1e-4)
        assert np.abs(after[f"{side}_queue"][:4] - carry[f"{side}_queue"][:4]).max() > 0.1
    assert after["pointer"] == official["queue_ptr"][0] == 4 and list(after["id_queue"]) == [0, 1, 2, 3] + [-100] * 4


def test_the_teachers_share_rises_over_the_ramp(stepped):
    _, step = stepped
    full = step()[0]["alpha"]
    assert step(step=0)[0]["alpha"] == 0 and abs(step(step=50)[0]["alpha"] - full / 2) < 1e-6 and step(step=500)[0]["alpha"] == full


def test_what_the_captions_teach(stepped):
    """The shared parts and the decoder, not the encoder's self-attention, nor a contrastive part."""
    _, step = stepped
    grads = step()[2]
    moved = {p for p, g in grads.items() if np.abs(g).max() > 0}
    quiet = {p for p in grads if p not in moved}
    others = ("text/blocks_cross/attn/", "text/blocks_cross/norm1/", "image_head/", "text_head/", "itm_head/", "temp")
    assert quiet == {p for p in grads if p.startswith(others)}
    for part in ("mlp/up/kernel", "cross/value/kernel", "decoder_attn/query/kernel"):
        assert f"text/blocks_cross/{part}" in moved
    assert {"text/token_embed/table", "lm_head/bias", "image/blocks/mlp/up/kernel"} <= moved


def test_the_caption_loss_is_the_smoothed_one_and_padding_does_not_count(pretrain, stepped):
    _, step = stepped
    logits = pretrain.answers()["out_lm_logits"].astype(np.float64)[:, :-1]
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    targets, counted = pretrain.batch["text"][:, 1:], pretrain.mask[:, 1:]
    token = 0.9 * -np.take_along_axis(logp, targets[..., None], -1)[..., 0] + 0.1 * -logp.mean(-1)
    assert abs(step()[0]["lm"] - token[counted].mean()) < 1e-5
    assert abs(-np.take_along_axis(logp, targets[..., None], -1)[..., 0][counted].mean() - pretrain.io["out_loss_lm"]) > 1e-2     # planted: no smoothing
    noise = np.where(pretrain.mask, pretrain.batch["text"], 150)
    assert abs(step(text=noise)[0]["lm"] - step()[0]["lm"]) < 1e-5


def test_the_decoder_is_causal_and_the_encoder_is_not(pretrain):
    later = {**pretrain.batch, "text": np.where(np.arange(pretrain.mask.shape[1]) == 3, 140, pretrain.batch["text"])}
    before, after = pretrain.answers(), pretrain.answers(later)
    np.testing.assert_allclose(before["out_lm_logits"][:, :3], after["out_lm_logits"][:, :3], atol=1e-5)
    for name in ("out_text_states", "out_grounded_states"):
        assert np.abs(before[name] - after[name])[:, :3].max() > 1e-2
    # a text alone does not look at an image; a grounded one does
    after = pretrain.answers({**pretrain.batch, "image": pretrain.batch["image"][::-1]})
    assert np.array_equal(before["out_text_feat"], after["out_text_feat"]) and np.abs(before["out_grounded_states"] - after["out_grounded_states"]).max() > 1e-2


def test_negatives_are_drawn_with_the_official_weights(pretrain):
    """Pre-training adds 1e-4 to the softmax."""
    weights = pretrain.io["out_itm_weights_t2i"].astype(np.float64)
    np.testing.assert_array_equal(np.diag(weights), 0)
    similarity = np.log(np.maximum(weights - 1e-4, 1e-9) + np.eye(4) * (1 - (weights - 1e-4).clip(0).sum(1)))
    drawn = np.asarray(jax.jit(jax.vmap(lambda k: mine(k, jnp.asarray(similarity, jnp.float32), jnp.eye(4, dtype=bool), 1e-4)))(
        jax.random.split(jax.random.key(0), 20000)))
    for row in range(4):
        np.testing.assert_allclose(np.bincount(drawn[:, row], minlength=4) / len(drawn), weights[row] / weights[row].sum(), atol=0.015)


# ---- captions

@pytest.mark.parametrize("name, options", [
    ("beam3_default", dict(method="beam", beams=3, max_length=30, min_length=10)),
    ("beam3_rep11", dict(method="beam", beams=3, max_length=20, min_length=5, repetition_penalty=1.1)), ("greedy", dict(max_length=20, min_length=5))])
def test_captions_are_the_official_ones_id_by_id(captioner, name, options):
    ids = captioner.captions(**options)
    official = captioner.io[f"out_gen_{name}"]
    start = len(captioner.stage.config.model.prompt) + 1
    assert (official[:, 0] == captioner.stage.config.model.tokens.dec).all() and (ids[:, 0] == 101).all()
    np.testing.assert_array_equal(ids[:, 1:], official[:, start:])
    ends = np.where((official == 102).any(1), (official == 102).argmax(1), official.shape[1])
    assert (ends >= options["min_length"]).all()


def test_another_ranking_of_beams_gives_other_captions(captioner):
    """Newer transformers divide by the continued ids alone."""
    found = captioner.captions(method="beam", beams=3, max_length=20, min_length=5, beam_rule="log_probability")
    np.testing.assert_array_equal(found[:, 1:], captioner.io["out_gen_beam3_hf5"][:, 4:])
    assert (captioner.io["out_gen_beam3_hf5"] != captioner.io["out_gen_beam3"]).any()


def test_a_captioner_learns_behind_its_prompt(captioner):
    """The official loss is of texts that hold the prompt; ours puts it there."""
    io, prompt = captioner.io, captioner.stage.config.model.prompt
    assert (captioner.batch["text"][:, 1:4] == prompt).all() and set(captioner.stage.plan.shapes) & {"temp", "itm_head/kernel"} == set()
    assert not any("/attn/" in p for p in captioner.stage.plan.shapes if p.startswith("text/"))
    bare = {**captioner.batch, **{k: np.delete(captioner.batch[k], [1, 2, 3], 1) for k in ("text", "text_mask")}}
    section = stages.ConfigDict(captioner.section.to_dict())
    with section.unlocked():
        section.loss.update(prompt="model")
    system = stages.resolve(section, "caption").system
    loss = jax.jit(lambda v, b: system.loss(v, {}, b, Context(jax.random.key(0), jnp.int32(0), train=False))[1].metrics["lm"])
    assert abs(loss(captioner.variables(), bare) - io["out_loss_lm"]) < 1e-4
    # the logits at the prompt's last word predict the first word of the caption: greedy search takes the likeliest that is no end
    logits = captioner.answers()["out_lm_logits"]
    first = np.where(np.arange(logits.shape[-1]) == 102, -np.inf, logits[:, 3]).argmax(-1)
    np.testing.assert_array_equal(first, io["out_gen_greedy"][:, 4])
    # planted: labels of the prompt and of padding counted, or no smoothing
    logp = np.asarray(jax.nn.log_softmax(logits[:, :-1].astype(np.float64)))
    nll = -np.take_along_axis(logp, captioner.batch["text"][:, 1:, None], -1)[..., 0]
    real, prompted = captioner.mask[:, 1:], np.arange(logits.shape[1] - 1) < 3
    smooth = 0.9 * nll - 0.1 * logp.mean(-1)
    assert abs(smooth[real & ~prompted].mean() - io["out_loss_lm"]) < 1e-5
    for wrong in (smooth[real], smooth[:, 3:], nll[real & ~prompted]):
        assert abs(wrong.mean() - io["out_loss_lm"]) > 1e-2


def test_huggingfaces_models_come_in(tmp_path):
    words = Case("hf_blip_caption", tmp_path, "hf_blip")
    assert words.far("out_lm_logits", words.answers()["out_lm_logits"]) <= 1
    np.testing.assert_array_equal(words.captions(max_length=10)[:, 1:], words.io["out_greedy"][:, 1:])
    pairs = Case("hf_blip_retrieval", tmp_path, "hf_blip")
    found = pairs.answers()
    assert all(pairs.far(name, found[name]) <= 1 for name in ("out_itm_logits_cls", "out_cosine"))
    assert pairs.weights["temp"] == np.float32(0.07)      # which their files leave out
    assert cli.guess_release(STORED / "hf_blip_caption") == "hf_blip"


def test_exporting_an_import_gives_the_source_back_bit_for_bit(pretrain, captioner, tmp_path):
    for case, name in ((pretrain, "blip_pretrain"), (captioner, "blip_caption")):
        out = cli.export_release("blip", case.folder, tmp_path / name, say=lambda line: None)
        source, back = read.open_weights(STORED / name / "weights.safetensors"), read.open_weights(out)
        ignored = json.loads((case.folder / "import.json").read_text())["ignored"]
        assert set(back) == set(source) - set(ignored) and all(n.endswith("position_ids") for n in ignored)
        for key, tensor in back.items():
            assert (tensor.dtype, tensor.shape, tensor.read().tobytes()) == (source[key].dtype, source[key].shape, source[key].read().tobytes()), key


@pytest.mark.parametrize("name", ["hf_blip_caption", "hf_blip_retrieval"])
def test_huggingfaces_models_go_out(name, tmp_path):
    """As they came, bit for bit, with the configs that their loaders read (``python -m tests.parity.hugging_face exports`` calls those)."""
    told, imported = [], cli.import_release("hf_blip", str(STORED / name), tmp_path / "in", say=lambda line: None)
    out = cli.export_release("hf_blip", imported, tmp_path / "out", say=told.append)
    source, back = read.open_weights(STORED / name / "model.safetensors"), read.open_weights(out)
    assert {n: (t.dtype, t.shape, t.read().tobytes()) for n, t in back.items()} == {n: (t.dtype, t.shape, t.read().tobytes()) for n, t in source.items()}
    assert any("place for it: temp" in line for line in told) == (name == "hf_blip_retrieval")
    stated, wanted = (json.loads((folder / "config.json").read_text()) for folder in (out, STORED / name))
    for key, value in wanted.items():
        assert stated[key] == value if not isinstance(value, dict) else value.items() <= stated[key].items(), key
    assert stated["text_config"]["bos_token_id"] == 110 and stated["text_config"]["intermediate_size"] == 24 and stated["vision_config"]["layer_norm_eps"] == 1e-6
    seen = json.loads((out / "preprocessor_config.json").read_text())
    assert seen["size"] == {"height": 16, "width": 16} and seen["image_mean"][0] == 0.48145466
    assert cli.import_release("", str(out), tmp_path / "again", say=lambda line: None) and cli.guess_release(out) == "hf_blip"


def test_a_stage_of_both_is_no_model_of_huggingface(pretrain, captioner, tmp_path):
    with pytest.raises(ConfigError, match=r"loss.weights has itc, itm, lm; nearest: a stage caption or retrieval, or --export=blip"):
        cli.export_release("hf_blip", pretrain.folder, tmp_path / "pretrain", say=lambda line: None)
    assert not (tmp_path / "pretrain").exists()
    out = cli.export_release("hf_blip", captioner.folder, tmp_path / "caption", say=lambda line: None)      # from the official code's layout to theirs
    again = cli.import_release("hf_blip", str(out), tmp_path / "again", say=lambda line: None)
    kept = stages.read_weights(again)
    assert set(kept) == set(captioner.weights) and all(np.array_equal(x, kept[p]) for p, x in captioner.weights.items())


def test_files_that_are_no_such_model_are_refused(pretrain):
    tensors = dict(read.open_weights(STORED / "blip_pretrain" / "weights.safetensors").items())
    headless = {n: t.shape for n, t in tensors.items() if not n.startswith(("vision_proj", "itm_head", "text_decoder"))}
    with pytest.raises(ConfigError, match="the file has no head of BLIP"):
        layout.sections_of(headless, cli.Hints(), 2, 4)
    tensors["text_decoder.bert.encoder.layer.1.output.dense.weight"] = tensors["text_encoder.encoder.layer.0.output.dense.weight"]
    with pytest.raises(ConfigError, match="layer.1.output.dense.weight are one tensor"):
        cli.check_ties(layout.ties(tensors), tensors)


# ---- configs and training

def test_the_papers_sizes_have_the_papers_counts():
    for size, name, count, image in (("base", "pretrain", 252_441_919, 85_798_656), ("large", "pretrain", 474_729_023, 303_301_632),
                                     ("base", "caption", 223_971_644, 86_090_496), ("base", "retrieval", 223_744_259, 86_090_496)):
        plan = stages.resolve(config("blip", size).stages[name], name).plan
        assert (plan.count(), plan.count("image/")) == (count, image), (size, name)


def test_the_published_recipe_decays_everything_and_steps_by_epochs():
    def rate_of(name, steps, epoch):
        section = config("blip", "base").stages[name].to_dict()
        assert section["optim"]["decay_exclude"] == () and section["optim"]["every"] == "1epoch"
        return stages.make_optimizer(stages.resolve(stages.ConfigDict({**section, "steps": steps, "optim": {**section["optim"], "every": epoch}}), name))[1]

    rate = rate_of("pretrain", 100_000, 5000)
    np.testing.assert_allclose([float(rate(t)) for t in (0, 1500, 3000, 4999, 5000, 10_000, 99_999)],
                               [1e-6, 1.505e-4, 3e-4, 3e-4, 2.7e-4, 2.43e-4, 3e-4 * 0.9 ** 19], rtol=1e-5)
    rate = rate_of("caption", 500, 100)
    np.testing.assert_allclose([float(rate(t)) for t in (0, 99, 100, 499)], [5e-6 * (1 + np.cos(e * np.pi / 5)) for e in (0, 0, 1, 4)], rtol=1e-5)


def test_a_batch_is_learned_by_heart(stepped):
    """Every term falls under AdamW, and matching is told apart."""
    carry, step = stepped
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(3e-3))
    state = tx.init(step.params)
    move = jax.jit(lambda grads, state, params: (lambda u, s: (optax.apply_updates(params, u), s))(*tx.update(grads, state, params)))
    params, seen = step.params, []
    for _ in range(40):
        metrics, _, grads = step(params, parts=(1.0, 1.0, 1.0))
        seen.append(metrics)
        params, state = move(grads, state, params)
    first, last = seen[0], seen[-1]
    assert last["itm_accuracy"] == 1.0 and last["itm"] < 0.1 and last["lm"] < 0.5 * first["lm"] and last["itc"] < first["itc"] - 0.1


@pytest.mark.parametrize("name", ["pretrain", "caption"])
def test_the_trainers_step_takes_every_stage(name):
    """Nothing is computed: shapes alone."""
    whole = config("blip")
    section = {**whole.stages[name].to_dict(), "model": whole.stages.pretrain.model.to_dict(), "init": ()}
    stage = stages.resolve(stages.ConfigDict(section), name)
    tx, _ = stages.make_optimizer(stage)
    mesh = partitioning.make_mesh("dp", devices=jax.devices()[:1])
    with partitioning.use(mesh):
        state = init.abstract(stage.system, stage.plan, tx, mesh)
        after, metrics = jax.eval_shape(make_train_step(stage.system, tx, jax.random.key(0)), state, stage.spec)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
    terms = {"pretrain": {"itc", "itm", "lm"}, "caption": {"lm"}}[name]
    assert set(metrics) & {"itc", "itm", "lm"} == terms and bool(state.carry) == ("itc" in terms)
    held = [p for p in state.carry.get("teacher", ()) if "decoder" in p or p.split("/")[0] in ("lm_head", "itm_head", "temp")]
    assert not held


def test_layers_are_skipped_only_in_training():
    stack = Stack(2, dict(width=8, heads=2, mlp_dim=16), drop_path=0.5)
    x = jax.random.normal(jax.random.key(0), (64, 3, 8))

    @jax.jit
    def run(key):
        params = stack.init(jax.random.key(1), x)
        below = stack.clone(layers=1).apply(jax.tree.map(lambda p: p[:1], params), x)[0]
        return stack.apply(params, x)[0], stack.clone(drop_path=0.0).apply(params, x)[0], stack.apply(params, x, rngs={"dropout": key})[0], below

    kept, plain, dropped, below = run(jax.random.key(2))
    np.testing.assert_array_equal(kept, plain)
    # the first layer is never skipped, of the last one each half in half of the examples: a quarter has neither
    neither = np.abs(dropped - below).max((1, 2)) < 1e-6
    assert 0.1 < neither.mean() < 0.4 and (np.abs(dropped - kept).max((1, 2)) > 1e-4).mean() > 0.9


def test_what_does_not_fit_is_named():
    def refused(words, edit, name="pretrain"):
        section = config("blip").stages[name]
        with section.unlocked():
            edit(section)
        with pytest.raises(ConfigError, match=words):
            stages.resolve(section, name)

    refused("loss.mined_by='studnet' is not known; nearest: 'student'", lambda s: s.loss.update(mined_by="studnet"))
    refused("loss.queue=32 is smaller than data.batch=56", lambda s: s.loss.update(queue=32))
    refused("loss.prompt='model', but model.prompt is empty", lambda s: s.loss.update(prompt="model"))
    refused("microbatch=8", lambda s: s.data.update(microbatch=8))
    refused("model.tokens.enc=5000 is no row", lambda s: (
        s.data.update(tokenizer=""), s.model.tokens.update(vocab=4000, bos=1, eos=2, pad=0, dec=10, enc=5000)))
    stage = stages.resolve(config("blip").stages.pretrain, "pretrain")
    assert stage.config.model.tokens.dec == stage.tokenizer.vocab_size and stage.config.model.tokens.enc == stage.tokenizer.vocab_size + 1
    assert stage.tokenizer.decode([stage.tokenizer.bos_id, 10, stage.tokenizer.vocab_size + 1, stage.tokenizer.eos_id]) == stage.tokenizer.decode([10])
